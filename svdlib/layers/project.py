"""Replacing weights of any module by low-rank ones, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from svdlib import checks, threads
from svdlib.layers.kinds import as_weight, check_ties, choose, matrix, warn_of
from svdlib.linalg.svd import METHODS, OVERSAMPLE, POWER_ITERS, randomized_svd, truncated_svd


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
    Embedding and Conv1D of the transformers library takes part, or those named. A weight that
    layers share, such as an embedding's and an output layer's, is cut for all of them. Biases,
    ``requires_grad`` and optimizer state are left alone, and nothing leaves the device. A rank
    at or above a matrix's smaller side leaves it untouched.

    Args:
        model: the module, changed in place and returned.
        rank: one for all layers, or {layer name: rank} for the layers named, as
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
    layers, left = choose(model, rank if isinstance(rank, Mapping) else None, "project")
    ranks = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)
    check_ties(model, ranks, "project")
    projected = {}
    known = set()
    for name, k in ranks.items():
        k = checks.positive_int(k, f"the rank of layer {name!r}")
        A = matrix(layers[name])
        checks.finite(A, f"the weight of layer {name!r}")
        if k >= min(A.shape[-2:]) or layers[name].weight in known:
            continue
        known.add(layers[name].weight)
        if method == "truncsvd":
            svd = truncated_svd(A, k)
        else:
            svd = randomized_svd(
                A, k, oversample=oversample, power_iters=power_iters, generator=generator
            )
        projected[name] = svd.matrix()
    for name, A in projected.items():
        layers[name].weight.copy_(as_weight(layers[name], A))
    warn_of(left, depth=4)  # two contexts wrap this call
    return model
