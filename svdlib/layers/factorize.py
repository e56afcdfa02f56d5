"""Networks that really shrink: layers stored, and computed, as two thin factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.bars import bar
from svdlib.layers.attention import pack_, unpack_
from svdlib.layers.calibrate import Fit, Mask, call_order, fit, input_sums, paired_sums
from svdlib.layers.kinds import (
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
    low_rank_layers,
    matrix,
    matrix_layers,
    replace_module,
    stored,
    take_no_fused_way,
    thin_twins,
    ties,
    warn_of,
)
from svdlib.linalg.svd import truncated_svd
from svdlib.objective import Batch, Batches, Call, at_home, cut, prepared, refuse_once

Step = TypeVar("Step")


@threads.making()
def factorize(
    model: nn.Module,
    ranks: float | Mapping[str, int],
    *,
    calibration: Batches | None = None,
    call: Call | None = None,
    mask: Mask | None = None,
    sequential: bool = False,
    progress: bool = True,
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

    With ``sequential``, layers are cut in the order in which they are called, each fitted on the
    inputs x̃ that the layers cut before it leave, to what the dense network's layer puts out on
    its own inputs x, see `calibrate.Fit`: later layers make up for the errors of earlier ones. It
    takes two passes a layer, and is worth it where much is cut.

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
        mask: ``mask(batch)`` gives the places (n, T) that count where the others are padding. By
            default a mapping's "attention_mask", if it has one.
        sequential: calibrate one layer after the other; the data are looked at many times.
        progress: show a progress bar where calibration takes longer than some seconds.

    Raises:
        ValueError: a model without matrices, an unknown layer, a rank that is not whole and
            positive (or a fraction), NaN or infinite weights, empty or non-finite calibration
            inputs. Also a layer that can't be factorized, if it is named: a subclass of a plain
            layer or a parametrized one, one with hooks, a parameter that a module reads itself (an
            LSTM's; `project_` takes these), an Embedding with ``max_norm``, one whose weight is
            shared with a layer of which the same rank is not asked, or which is no Linear or
            Embedding. If it is not named, it is left as it was, with a warning. So is a layer that
            calibration does not reach, and one, where calibration inputs show it, whose weight
            the model reads without calling the layer: its factors would be multiplied at every
            call. Calibration that reaches no layer.

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
    if calibration is None:
        if sequential or mask is not None:
            raise ValueError("sequential=True and mask are about calibration, which is not given")
        return shrunk(model, ranks, as_they_are)
    if torch.is_tensor(calibration) and len(calibration) == 0:
        raise ValueError("calibration is empty; some hundreds of inputs would do")
    if sequential:
        refuse_once(calibration, "calibration of one layer after the other")
    batches = cut(calibration, BATCH)
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws random numbers
        few = next(batches)
        if sequential:
            fits = partial(
                one_after_another, calibration, call, mask, opened(duplicate(model)), progress
            )
        else:
            fits = partial(together, chain([few], batches), call, mask, progress)
        return shrunk(model, ranks, fits, few, call)


class Approximations(Protocol):
    """Factors of any rank of a layer's matrix, and what its bias changes by, see `Fit.at`."""

    def at(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]: ...


# Given a model and some of its layers, their fits, None where it is the truncated SVD; the layer
# is replaced before the next one is asked for. What is left out has no inputs.
Fits = Callable[[nn.Module, Mapping[str, Matrix]], Iterable[tuple[str, Approximations | None]]]

# Inputs of a call, where calibration is given whole.
BATCH = 128


def shrunk(
    model: nn.Module,
    ranks: float | Mapping[str, int],
    fits: Fits,
    few: Batch = None,
    call: Call | None = None,
    depth: int = 4,  # a context wraps factorize, which calls this
) -> nn.Module:
    """`factorize` by these fits; with a batch, layers whose weight is read are looked for.

    Warnings are those of a caller ``depth`` calls above this one's.
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
    twins = thin_twins(layers, chosen)
    unseen = set(alone)
    with torch.no_grad():
        for name, best in chain(dict.fromkeys(tied).items(), fits(small, alone)):
            _fill(twins[name], layers[name], best)
            small = replace_module(small, layers[name], twins[name])
            unseen.discard(name)
    if unseen and len(unseen) == len(chosen):
        raise ValueError(f"calibration does not reach layer {next(iter(alone))!r}, nor any other")
    left.update({name: "calibration does not reach it" for name in alone if name in unseen})
    take_no_fused_way(small)
    for name in [] if few is None else weights_read(small, few, call):
        if named is not None:
            raise ValueError(f"can't factorize layer {name!r}: {READ}; leave it out of the ranks")
        for each in tied.get(name, [name]):
            left[each] = READ
            small = replace_module(small, low_rank_layers(small).get(each, small), layers[each])
    pack_(small)
    warn_of(left, depth)
    return small


def as_they_are(model: nn.Module, layers: Mapping[str, Matrix]) -> Iterator[tuple[str, None]]:
    """No fit: the truncated SVD of each."""
    yield from dict.fromkeys(layers).items()


def together(
    batches: Iterable[Batch],
    call: Call | None,
    mask: Mask | None,
    progress: bool,
    model: nn.Module,
    layers: Mapping[str, Matrix],
) -> Iterator[tuple[str, Fit]]:
    """Fits on the inputs in the dense network, from one pass over the batches."""
    sums = input_sums(model, layers, shown(batches, progress, "calibration"), call, mask)
    for name in [name for name in layers if name in sums]:
        yield name, fit(layers[name], sums.pop(name))


def one_after_another(
    calibration: Batches,
    call: Call | None,
    mask: Mask | None,
    dense: nn.Module,
    progress: bool,
    model: nn.Module,
    layers: Mapping[str, Matrix],
) -> Iterator[tuple[str, Fit]]:
    """Fits in the order of the calls, each on the inputs that those cut before it leave."""
    order, once = call_order(model, layers, cut(calibration, BATCH), call, mask)
    for names in shown(order, progress, "layers"):
        alone = once.issuperset(names)
        sums = paired_sums(dense, model, names, cut(calibration, BATCH), call, mask, alone)
        for name in sums:
            yield name, fit(layers[name], sums[name])


def shown(steps: Iterable[Step], progress: bool, what: str) -> Iterable[Step]:
    """With a progress bar, once it takes longer than some seconds.

    >>> list(shown([1, 2], False, "numbers"))
    [1, 2]
    """
    return bar(steps, progress=progress, desc=what, delay=3, leave=False)


READ = "the model reads its weight without calling it, which would multiply the factors each time"


class _Watched(LowRank):
    """A factorized layer that notes when its weight is read."""

    @property
    def weight(self) -> Tensor:
        """As `LowRank`."""
        self.__dict__["read"] = True
        return super().weight


def weights_read(model: nn.Module, batch: Batch, call: Call | None) -> list[str]:
    """The factorized layers whose weight a call of the model reads.

    >>> weights_read(factorize(nn.Linear(30, 20), 2), torch.rand(1, 30), None)
    []
    """
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


def _fill(thin: LowRank, layer: Matrix, found: Approximations | None) -> None:
    """Give two thin layers the factors of a layer's matrix, the best in itself or by a fit."""
    A, rank = matrix(layer), thin.rank
    old, new = bias(layer), bias(thin.factors[1])
    shift = None
    if found is None:
        U, S, Vh = truncated_svd(A, rank)
    else:
        left, right, shift = found.at(rank)
        inner, S, Vh = truncated_svd(right.to(A.dtype), rank)
        U = left.to(A.dtype) @ inner
    root = S.sqrt()
    first, second = thin.factors
    first.weight.copy_(as_weight(first, root.unsqueeze(-1) * Vh))
    second.weight.copy_(as_weight(second, U * root.unsqueeze(-2)))
    for factor in (first, second):
        factor.weight.requires_grad_(layer.weight.requires_grad)
    if old is not None and new is not None:
        moved = old if shift is None else old + shift.flatten().to(old.dtype)
        new.copy_(moved).requires_grad_(old.requires_grad)
