"""Any ``nn.Module``, a layer at a time: project it, factorize it, count what it costs, store it."""
