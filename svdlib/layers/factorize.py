"""Networks that really shrink: layers stored, and computed, as two thin factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.layers.kinds import (
    LowRank,
    Matrix,
    choose,
    dense_twin,
    duplicate,
    evaluating,
    hooked,
    low_rank_layers,
    matrix,
    matrix_layers,
    replace_module,
    rows,
    stored,
    take_no_fused_way,
    thin_twin,
    warn_of,
)
from svdlib.linalg.svd import truncated_svd
from svdlib.objective import Batch, Batches, Call, at_home, cut, prepared


@threads.making()
def factorize(
    model: nn.Module,
    ranks: float | Mapping[str, int],
    *,
    calibration: Batches | None = None,
    call: Call | None = None,
) -> nn.Module:
    """A copy of a model in which weight matrices W (m × n) are products of thin factors.

    Without ``calibration``, W_r = U_r Σ_r V_rᵀ, the best approximation of W in itself, and the
    output is that of `project_` with the same ranks. With it, the best approximation in what
    the layer puts out on such inputs x, of mean μ and covariance C: the minimum of
    E ‖(W − W_r) x + b − b_r‖² over all W_r of rank r and all b_r is at

        W_r = U_r U_rᵀ W,    b_r = b + (W − W_r) μ,

    with U_r the leading eigenvectors of W C Wᵀ (Zhang, Zou, He and Sun 2016, section 3.1). That is
    the truncated SVD of the whitened W C^½, whitening undone, without the inverse of C^½ that a
    rank-deficient C does not have. A layer without a bias takes the second moment for C.

    Either way the singular values are shared evenly, √σ to each factor. Factors keep the
    weight's type, device, mode and ``requires_grad``; the model is not changed.

    A layer is left as it was, with a warning that names it, where two factors would not store
    less, r (m + n) ≥ m n.

    Args:
        ranks: {layer: rank}, as `reveal_ranks` gives it; or one rank for all layers, or a
            fraction in (0, 1) of each layer's min(m, n).
        calibration: inputs of the model (some hundreds; no labels needed): a tensor (n, …), a
            tuple or mapping of such, or an iterable of batches, such as a DataLoader, looked at
            once. By default the last of a tuple is left out where the model takes one less, and
            "labels" of a mapping, whose values are keyword arguments.
        call: ``call(model, batch)`` calls the model on a batch in another way.

    Raises:
        ValueError: a model without matrices, an unknown layer, a rank that is not whole and
            positive (or a fraction), NaN or infinite weights, empty or non-finite calibration
            inputs. Also a layer that can't be factorized, if it is named: a grouped convolution,
            a subclass of Linear or Conv2d (such as in ``nn.MultiheadAttention``) or a
            parametrized layer, one with hooks, one whose weight others share. If it is not
            named, it is left as it was, with a warning. So is a layer, where calibration inputs
            show it, whose weight the model reads without calling the layer: its factors would be
            multiplied at every call.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    >>> small = factorize(model, {"0": 10, "2": 5})
    >>> sum(p.numel() for p in model.parameters()), sum(p.numel() for p in small.parameters())
    (12940, 2640)
    >>> small[0]
    LowRank(
      (0): Linear(in_features=100, out_features=10, bias=False)
      (1): Linear(in_features=10, out_features=80, bias=True)
    )
    """
    named = ranks if isinstance(ranks, Mapping) else None
    layers, left = choose(model, named, "factorize", twin=True)
    chosen: dict[str, int] = {}
    for name, rank in _ranks(layers, ranks).items():
        m, n = matrix(layers[name]).shape
        if stored(rank, m, n) == m * n:
            factors = rank * (m + n)
            left[name] = f"rank {rank} stores {factors:,} numbers as factors, {m * n:,} as a matrix"
            continue
        checks.finite(layers[name].weight, f"the weight of layer {name!r}")
        chosen[name] = rank
    small = duplicate(model)
    layers = {name: layer for name, layer in matrix_layers(small).items() if name in chosen}
    inputs, few = {}, None
    if calibration is not None:
        if torch.is_tensor(calibration) and len(calibration) == 0:
            raise ValueError("calibration is empty; some hundreds of inputs would do")
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws random numbers
            batches = cut(calibration, 16)
            few = next(batches)
            inputs = _input_moments(small, layers, chain([few], batches), call)
    with torch.no_grad():
        for name, rank in chosen.items():
            small = replace_module(
                small, layers[name], _factors(layers[name], rank, inputs.get(name))
            )
    take_no_fused_way(small)
    for name in [] if calibration is None else _read(small, few, call):
        if named is not None:
            raise ValueError(f"can't factorize layer {name!r}: {READ}; leave it out of the ranks")
        left[name] = READ
        small = replace_module(small, low_rank_layers(small)[name], layers[name])
    warn_of(left, depth=3)  # a context wraps this call
    return small


READ = "the model reads its weight without calling it, which would multiply the factors each time"


class _Watched(LowRank):
    """A factorized layer that notes when its weight is read."""

    @property
    def weight(self) -> Tensor:
        """As `LowRank`."""
        self.__dict__["read"] = True
        return super().weight


def _read(model: nn.Module, batch: Batch, call: Call | None) -> list[str]:
    """The factorized layers whose weight a call of the model reads."""
    layers = low_rank_layers(model)
    try:
        for layer in layers.values():
            layer.__class__ = _Watched
        with torch.no_grad(), evaluating(model):
            prepared(model, at_home(model, batch), call)()
    finally:
        for layer in layers.values():
            layer.__class__ = LowRank
    return [name for name, layer in layers.items() if layer.__dict__.pop("read", False)]


@threads.making()
@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A copy of a model in which each `LowRank` layer is one dense layer again.

    >>> small = factorize(nn.Sequential(nn.Linear(100, 80)), 10)
    >>> merge(small)
    Sequential(
      (0): Linear(in_features=100, out_features=80, bias=True)
    )
    """
    dense = duplicate(model)
    for layer in low_rank_layers(dense).values():
        whole = dense_twin(layer)
        whole.weight.copy_(layer.weight).requires_grad_(layer.factors[0].weight.requires_grad)
        if layer.bias is not None:
            whole.bias = layer.bias
        dense = replace_module(dense, layer, whole)
    return dense


def _ranks(layers: Mapping[str, Matrix], ranks: float | Mapping[str, int]) -> dict[str, int]:
    if isinstance(ranks, Mapping):
        wanted = {name: (rank, f"the rank of layer {name!r}") for name, rank in ranks.items()}
        return {name: checks.positive_int(*rank) for name, rank in wanted.items()}
    if isinstance(ranks, float):
        if not 0 < ranks < 1:
            raise ValueError(f"a fraction of the ranks must be between 0 and 1, not {ranks}")
        full = {name: min(matrix(layer).shape) for name, layer in layers.items()}
        return {name: max(1, round(ranks * rank)) for name, rank in full.items()}
    return dict.fromkeys(layers, checks.positive_int(ranks, "rank"))


def _factors(layer: Matrix, rank: int, inputs: tuple[Tensor, Tensor] | None) -> LowRank:
    A = matrix(layer)
    thin = thin_twin(layer, rank)
    first, second = thin.factors
    if inputs is None:
        U, S, Vh = truncated_svd(A, rank)
    else:
        mean, moment = inputs
        left = torch.linalg.eigh(A.double() @ moment @ A.double().mT).eigenvectors[:, -rank:]
        inner, S, Vh = truncated_svd(left.mT.to(A.dtype) @ A, rank)
        U = left.to(A.dtype) @ inner
        if layer.bias is not None:
            lost = A.double() @ mean - (U * S).double() @ (Vh.double() @ mean)
    root = S.sqrt()
    first.weight.copy_((root[:, None] * Vh).view_as(first.weight))
    second.weight.copy_((U * root).view_as(second.weight))
    for factor in (first, second):
        factor.weight.requires_grad_(layer.weight.requires_grad)
    if layer.bias is not None and second.bias is not None:
        shift = 0 if inputs is None else lost.to(layer.bias.dtype)
        second.bias.copy_(layer.bias + shift).requires_grad_(layer.bias.requires_grad)
    return thin


@torch.no_grad()
def _input_moments(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    calibration: Iterable[Batch],
    call: Call | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (n,) and covariance (n, n) of what each layer's matrix is applied to, in float64.

    For a layer without bias the second moment takes the covariance's place.
    """
    counts = dict.fromkeys(layers, 0)
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    waiting: dict[str, list[Tensor]] = {name: [] for name in layers}

    def add(name: str) -> None:
        x = torch.cat(waiting[name])
        waiting[name].clear()
        counts[name] += len(x)
        sums[name] = sums.get(name, 0) + x.sum(0)
        squares[name] = squares.get(name, 0) + x.mT @ x

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        # a copy: the model may go on to work on its input in place
        waiting[name].append(rows(layers[name], inputs[0]).to(torch.float64, copy=True))
        if sum(map(len, waiting[name])) >= 1024:  # products of few rows at a time are slow
            add(name)

    with evaluating(model), hooked(layers, before=note):
        for batch in calibration:
            if torch.is_tensor(batch):
                checks.finite(batch, "calibration")
            prepared(model, at_home(model, batch), call)()  # a copy, as above
    for name in layers:
        if waiting[name]:
            add(name)
    unused = [name for name in layers if not counts[name]]
    if unused:
        raise ValueError(f"calibration does not reach layer {unused[0]!r}")
    moments = {}
    for name, layer in layers.items():
        mean, moment = sums[name] / counts[name], squares[name] / counts[name]
        checks.finite(moment, f"what calibration gives to layer {name!r}")
        if layer.bias is not None:
            moment = moment - torch.outer(mean, mean)
        moments[name] = (mean, moment)
    return moments
