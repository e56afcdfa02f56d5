"""Networks that really shrink: layers stored, and computed, as two thin factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import cast

import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.layers.attention import pack_, unpack_
from svdlib.layers.kinds import (
    TRANSPOSED,
    LowRank,
    Matrix,
    apart,
    as_weight,
    bias,
    check_ties,
    choose,
    dense_twin,
    duplicate,
    evaluating,
    groups,
    hooked,
    low_rank_layers,
    matrix,
    matrix_layers,
    replace_module,
    rows,
    stored,
    take_no_fused_way,
    thin_twins,
    ties,
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
    rank-deficient C does not have. A layer without a bias takes the second moment for C, and so
    does a transposed convolution, whose windows overlap. Layers that share a weight, such as an
    embedding and an output layer, share its factors, and take the best approximation in itself.

    Either way the singular values are shared evenly, √σ to each factor. Factors keep the
    weight's type, device, mode and ``requires_grad``; the model is not changed.

    An ``nn.MultiheadAttention`` has the layers q_proj, k_proj, v_proj and out_proj. In the copy
    these are layers of their own where one of them is factorized, in a subclass of the same
    arguments and outputs, without torch's fused ways.

    A layer is left as it was, with a warning that names it, where two factors would not store
    less, r (m + n) ≥ m n. One that is factorized already is factorized anew from the product of
    its factors, where the rank is lower.

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
            inputs. Also a layer that can't be factorized, if it is named: a subclass of a plain
            layer or a parametrized one, one with hooks, a parameter that a module reads itself (an
            LSTM's; `project_` takes these), an Embedding with ``max_norm``, one whose weight is
            shared with a layer of which the same rank is not asked, or which is no Linear or
            Embedding. If it is not named, it is left as it was, with a warning. So is a layer,
            where calibration inputs show it, whose weight the model reads without calling the
            layer: its factors would be multiplied at every call.

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
    earlier = low_rank_layers(duplicate(model))
    model = merge(model) if earlier else model
    found, left = choose(opened(model), named, "factorize", twin=True)
    layers = cast(dict[str, Matrix], found)  # no factorized ones, since it is merged
    chosen: dict[str, int] = {}
    wanted = _ranks(layers, ranks)
    check_ties(model, wanted, "factorize")
    for name, rank in wanted.items():
        if name in earlier and rank >= earlier[name].rank:
            left[name] = f"it has rank {earlier[name].rank} already"
            continue
        m, n = matrix(layers[name]).shape[-2:]
        if stored(rank, m, n) == m * n:
            factors, whole = (groups(layers[name]) * size for size in (rank * (m + n), m * n))
            left[name] = f"rank {rank} stores {factors:,} numbers as factors, {whole:,} as a matrix"
            continue
        checks.finite(layers[name].weight, f"the weight of layer {name!r}")
        chosen[name] = rank
    small = unpack_(duplicate(model), [*chosen, *earlier])
    for name, layer in earlier.items():
        if name not in chosen:
            small = replace_module(small, matrix_layers(small)[name], layer)
    layers = {name: layer for name, layer in matrix_layers(small).items() if name in chosen}
    tied = {name: names for names in ties(layers) for name in names}
    alone = {name: layer for name, layer in layers.items() if name not in tied}
    inputs, few = {}, None
    if calibration is not None:
        if torch.is_tensor(calibration) and len(calibration) == 0:
            raise ValueError("calibration is empty; some hundreds of inputs would do")
        with torch.random.fork_rng(devices=[]):  # a DataLoader draws random numbers
            batches = cut(calibration, 16)
            few = next(batches)
            inputs = _input_moments(small, alone, chain([few], batches), call)
    with torch.no_grad():
        for name, thin in thin_twins(layers, chosen).items():
            _fill(thin, layers[name], inputs.get(name))
            small = replace_module(small, layers[name], thin)
    take_no_fused_way(small)
    for name in [] if calibration is None else _read(small, few, call):
        if named is not None:
            raise ValueError(f"can't factorize layer {name!r}: {READ}; leave it out of the ranks")
        for each in tied.get(name, [name]):
            left[each] = READ
            small = replace_module(small, low_rank_layers(small).get(each, small), layers[each])
    pack_(small)
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
    layers = low_rank_layers(dense)
    whole = {name: dense_twin(layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        weight = whole[name].weight
        weight.copy_(layer.weight).requires_grad_(layer.factors[0].weight.requires_grad)
        if layer.bias is not None:
            whole[name].bias = layer.bias
    for first, *others in ties(layers):
        for name in others:
            whole[name].weight = whole[first].weight
    for name, layer in layers.items():
        dense = replace_module(dense, layer, whole[name])
    return pack_(dense)


def opened(model: nn.Module) -> nn.Module:
    """A model as `loss_profile` and the searches look into it: merged, and taken `apart`.

    The model itself where it needs neither.

    >>> list(matrix_layers(opened(nn.MultiheadAttention(8, 2))))
    ['q_proj', 'k_proj', 'v_proj', 'out_proj']
    """
    return apart(merge(model) if low_rank_layers(model) else model)


def _ranks(layers: Mapping[str, Matrix], ranks: float | Mapping[str, int]) -> dict[str, int]:
    if isinstance(ranks, Mapping):
        wanted = {name: (rank, f"the rank of layer {name!r}") for name, rank in ranks.items()}
        return {name: checks.positive_int(*rank) for name, rank in wanted.items()}
    if isinstance(ranks, float):
        if not 0 < ranks < 1:
            raise ValueError(f"a fraction of the ranks must be between 0 and 1, not {ranks}")
        full = {name: min(matrix(layer).shape[-2:]) for name, layer in layers.items()}
        return {name: max(1, round(ranks * rank)) for name, rank in full.items()}
    return dict.fromkeys(layers, checks.positive_int(ranks, "rank"))


def _fill(thin: LowRank, layer: Matrix, inputs: tuple[Tensor, Tensor] | None) -> None:
    """Give two thin layers the factors of a layer's matrix, on inputs of these moments."""
    A, rank = matrix(layer), thin.rank
    first, second = thin.factors
    old, new = bias(layer), bias(second)
    shift: Tensor | int = 0
    if inputs is None:
        U, S, Vh = truncated_svd(A, rank)
    else:
        mean, moment = inputs
        weighed = A.double() * moment if moment.ndim == 1 else A.double() @ moment
        left = torch.linalg.eigh(weighed @ A.double().mT).eigenvectors[..., -rank:]
        inner, S, Vh = truncated_svd(left.mT.to(A.dtype) @ A, rank)
        U = left.to(A.dtype) @ inner
        if old is not None and _is_centred(layer):
            lost = A.double() - (U * S.unsqueeze(-2)).double() @ Vh.double()
            shift = (lost @ mean.unsqueeze(-1)).flatten().to(old.dtype)
    root = S.sqrt()
    first.weight.copy_(as_weight(first, root.unsqueeze(-1) * Vh))
    second.weight.copy_(as_weight(second, U * root.unsqueeze(-2)))
    for factor in (first, second):
        factor.weight.requires_grad_(layer.weight.requires_grad)
    if old is not None and new is not None:
        new.copy_(old + shift).requires_grad_(old.requires_grad)


def _is_centred(layer: Matrix) -> bool:
    """Whether a change of the bias makes up for a change of the matrix at the mean input."""
    return bias(layer) is not None and not isinstance(layer, TRANSPOSED)


def _sums(layer: Matrix, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of vectors x, as `rows` gives them, their sum and the sum of their squares (…, n, n).

    Of an Embedding's, which have a single one each, that is diagonal, (n,).
    """
    if isinstance(layer, nn.Embedding):
        times = x.long().bincount(minlength=layer.num_embeddings).double()
        return times, times
    each = x.movedim(0, -2)
    return x.sum(0), each.mT @ each


@torch.no_grad()
def _input_moments(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    calibration: Iterable[Batch],
    call: Call | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (n,) and covariance (n, n) of what each layer's matrix is applied to, in float64.

    For a layer without bias the second moment takes the covariance's place. Of g groups both are
    (g, …); of an Embedding the second moment is diagonal, (n,).
    """
    counts = dict.fromkeys(layers, 0)
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    waiting: dict[str, list[Tensor]] = {name: [] for name in layers}

    def add(name: str) -> None:
        x = torch.cat(waiting[name])
        waiting[name].clear()
        counts[name] += len(x)
        total, square = _sums(layers[name], x)
        sums[name] = sums.get(name, 0) + total
        squares[name] = squares.get(name, 0) + square

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
        if _is_centred(layer):
            moment = moment - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        moments[name] = (mean, moment)
    return moments
