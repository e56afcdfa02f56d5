"""How much rank does each layer need: losses by rank, and rules from losses to ranks."""
