"""Replacing weights of any module by low-rank ones, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.linalg.svd import METHODS, OVERSAMPLE, POWER_ITERS, randomized_svd, truncated_svd
from svdlib.network.opened import Network


@threads.plain()
@torch.no_grad()
def project_(
    model: nn.Module,
    rank: int | Mapping[str, int],
    method: str = "truncsvd",
    *,
    oversample: int = OVERSAMPLE,
    power_iters: int = POWER_ITERS,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace weight matrices of any module by low-rank approximations, in place.

    Every Linear, Embedding, convolution (as its out × (in·kh·kw) matrix, one per group), transposed
    convolution, and Conv1D of the transformers library, or those named. An
    ``nn.MultiheadAttention`` has the layers q_proj, k_proj, v_proj and out_proj. Of a `LowRank`
    layer the second factor is projected, so that the product is the best of that rank. A shared
    weight is cut for all its layers. A parameter that a module reads without a layer is cut only by
    name, as "lstm.weight_hh_l0" of an LSTM: its rows by all the rest.

    Args:
        model: the module, changed in place and returned.
        rank: one for all layers, or {layer or parameter name: rank}, as from `reveal_ranks`.
        method: "truncsvd", or "rsvd" with ``oversample``, ``power_iters`` and ``generator`` as in
            `randomized_svd`.

    Raises:
        ValueError: an unknown method or layer, an impossible rank, a model without matrices,
            non-finite weights, a named layer whose weight is computed, as by ``weight_norm``.

    >>> model = nn.Sequential(nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 10))
    >>> _ = project_(model, rank=4)
    >>> torch.linalg.matrix_rank(model[0].weight).item()
    4
    """
    checks.one_of(method, METHODS, "method")
    net = Network(model)
    layers = net.choose(rank if isinstance(rank, Mapping) else None, "project")
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)
    net.check_ties(ranks, "project")
    projected: dict[Tensor, Tensor] = {}
    for name, k in ranks.items():
        k = checks.positive_int(k, f"the rank of layer {name!r}")
        layer, A = layers[name], layers[name].matrix()
        checks.finite(A, f"the weight of layer {name!r}")
        if k >= layer.max_rank or layer.weights[-1] in projected:
            continue
        if method == "truncsvd":
            svd = truncated_svd(A, k)
        else:
            svd = randomized_svd(
                A, k, oversample=oversample, power_iters=power_iters, generator=generator
            )
        projected |= layer.projected(svd)
    for weight, value in projected.items():
        weight.copy_(value)
    net.warn()
    return model
