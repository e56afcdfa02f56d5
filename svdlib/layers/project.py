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

    Every Linear, convolution (as its out × (in·kh·kw) matrix, one a group), transposed one,
    Embedding and Conv1D of the transformers library takes part, or those named. Of an
    ``nn.MultiheadAttention`` these are q_proj, k_proj and v_proj, the three blocks of its
    ``in_proj_weight``, and out_proj. Of a `LowRank` layer, the second factor is projected so that
    its product with the first is the best of that rank. A weight that layers share, such as an
    embedding's and an output layer's, is cut for all of them. Biases, ``requires_grad`` and
    optimizer state are left alone, and nothing leaves the device. A rank at or above a matrix's
    smaller side leaves it untouched.

    What a module reads itself, without a layer, takes part only by the name of its parameter, as
    "lstm.weight_hh_l0" of an LSTM or "bag.weight" of an EmbeddingBag: its rows by all the rest.

    Args:
        model: the module, changed in place and returned.
        rank: one for all layers, or {layer or parameter name: rank} for those named, as
            `reveal_ranks` gives it.
        method: "truncsvd" or "rsvd", the latter with ``oversample``, ``power_iters`` and
            ``generator`` as in `randomized_svd`.

    Raises:
        ValueError: an unknown method or layer name, a rank below 1 or not whole, a model
            without such layers, non-finite weights, a named layer whose weight is computed from
            other parameters (``weight_norm``, pruning), or is shared with a layer of which the
            same rank is not asked. The model is then untouched. A layer with a computed weight
            that is not named is left as it was, with a warning.

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
        layer = layers[name]
        A = layer.matrix()
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
