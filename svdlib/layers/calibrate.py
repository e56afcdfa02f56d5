"""What calibration inputs tell of a layer: its best approximations on them, of every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdlib import checks
from svdlib.layers.kinds import (
    CONVOLUTIONS,
    TRANSPOSED,
    Matrix,
    bias,
    evaluating,
    hooked,
    matrix,
    rows,
)
from svdlib.objective import Batch, Call, at_home, prepared

# mask(batch) -> bool (n, T): the places of a batch that count, the others are padding.
Mask = Callable[[Batch], Tensor]

# Vectors that are multiplied at a time: enough for a fast product, few enough for any memory.
BLOCK = 4096

# What is added to the diagonal of a covariance that is inverted, in shares of its trace, so that its
# least eigenvalues, which are noise, are not.
RIDGE = 1e-5


@dataclass
class Sums:
    """Of the vectors x (n,) that a layer's matrix is applied to: their number, Σ x and Σ x xᵀ.

    In a network of which layers before this one are cut, x̃ takes the place of x, and Σ x of the
    dense network and Σ x x̃ᵀ are kept besides. Of g groups all are (g, …); an Embedding's vectors
    have a single one each, so that Σ x xᵀ is diagonal, (n,).
    """

    count: int = 0
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0
    dense: Tensor | float = 0.0
    cross: Tensor | float = 0.0

    def add(self, count: int, *sums: Tensor) -> None:
        """Take in the sums of so many vectors more, in the order of the fields."""
        self.count += count
        for name, value in zip(("total", "square", "dense", "cross"), sums, strict=False):
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Fit:
    """The best approximations of a layer's matrix W (m × n), by what it puts out on its inputs.

    W_r = U_r U_rᵀ M is the matrix of rank r, and b_r = b + W μ − W_r μ̃ the bias, that minimize

        E ‖W x + b − (W_r x̃ + b_r)‖²

    over inputs x of the dense network, of mean μ, and x̃, of mean μ̃ and covariance C, where the
    layer is put. Where they are the same, M = W, and U_r are leading eigenvectors of W C Wᵀ
    (Zhang, Zou, He and Sun 2016, section 3.1). Where layers before are cut, M = W E[x x̃ᵀ] C⁻¹
    is the least-squares map from x̃ to W x, and U_r are those of M C Mᵀ: reduced-rank regression
    (Izenman 1975). A layer without a bias takes second moments for covariances.

    Args:
        target: M, (…, m, n), in float64, as all of this.
        left: all columns of U, (…, m, k), leading ones first.
        energies: what each column carries of the output's variance, (…, k), falling.
        shift, mean: W μ, (…, m), and μ̃, (…, n); None for a layer without a bias.
    """

    target: Tensor
    left: Tensor
    energies: Tensor
    shift: Tensor | None
    mean: Tensor

    def at(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """U_r (…, m, r), U_rᵀ M (…, r, n), and what the bias changes by (…, m), if there is one."""
        left = self.left[..., :rank]
        right = left.mT @ self.target
        if self.shift is None:
            return left, right, None
        return left, right, self.shift - (left @ (right @ self.mean.unsqueeze(-1))).squeeze(-1)

    def errors(self) -> Tensor:
        """The share of the output's variance that is lost at ranks 0, 1, … k: (k + 1,).

        Over all groups together.
        """
        kept = self.energies.reshape(-1, self.energies.shape[-1]).sum(0).clamp(min=0)
        kept = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
        return 1 - kept / kept[-1] if kept[-1] > 0 else torch.zeros_like(kept)


def is_centred(layer: Matrix) -> bool:
    """Whether a change of the bias makes up for a change of the matrix at the mean input.

    Not in a transposed convolution, whose windows overlap.

    >>> is_centred(nn.Linear(3, 2)), is_centred(nn.Linear(3, 2, bias=False))
    (True, False)
    """
    return bias(layer) is not None and not isinstance(layer, TRANSPOSED)


def fit(layer: Matrix, sums: Sums) -> Fit:
    """All best approximations of a layer on inputs of these sums, see `Fit`.

    The eigenvectors are found on the smaller side. Where W = Q R is higher than wide, those of
    W C Wᵀ are Q times those of R C Rᵀ, without a root of C, which a rank-deficient C may not have
    to rounding. Where layers before are cut, and C is inverted, they are those of GGᵀ or GᵀG,
    G = M L and C = L Lᵀ.

    >>> layer, x = nn.Linear(4, 3, bias=False), torch.eye(4)
    >>> found = fit(layer, Sums(4, x.sum(0).double(), (x.mT @ x).double()))
    >>> S = torch.linalg.svdvals(layer.weight)
    >>> torch.allclose(4 * found.energies.float(), S.square(), rtol=1e-4)
    True
    """
    W = matrix(layer).double()
    mean, C = cast(Tensor, sums.total) / sums.count, cast(Tensor, sums.square) / sums.count
    other = None if isinstance(sums.cross, float) else sums.cross / sums.count
    before = mean if isinstance(sums.dense, float) else sums.dense / sums.count
    centred = is_centred(layer)
    if centred:
        C = C - _outer(mean, mean)
        other = None if other is None else other - _outer(before, mean)
    shift = (W @ before.unsqueeze(-1)).squeeze(-1) if centred else None
    m, n = W.shape[-2:]
    if other is None:
        M = W
        Q, R = torch.linalg.qr(W) if m > n else (None, W)
        RC = R * C if isinstance(layer, nn.Embedding) else R @ C
        energies, left = torch.linalg.eigh(RC @ R.mT)
        left = left if Q is None else Q @ left
    else:
        L = _root(C)
        G = torch.linalg.solve_triangular(L, (W @ other).mT, upper=False).mT
        M = torch.linalg.solve_triangular(L.mT, G.mT, upper=True).mT
        energies, left = torch.linalg.eigh(G @ G.mT if m <= n else G.mT @ G)
        if m > n:
            left = torch.linalg.qr(G @ left.flip(-1)).Q.flip(-1)
    k = min(m, n)
    return Fit(M, left.flip(-1)[..., :k], energies.flip(-1)[..., :k].clamp(min=0), shift, mean)


def _outer(a: Tensor, b: Tensor) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def _root(C: Tensor) -> Tensor:
    """L with L Lᵀ = C and `RIDGE` more on the diagonal."""
    trace = C.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    more = torch.where(trace > 0, RIDGE * trace, torch.ones_like(trace))
    return torch.linalg.cholesky(C + more * torch.eye(C.shape[-1], dtype=C.dtype, device=C.device))


@torch.no_grad()
def input_sums(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    batches: Iterable[Batch],
    call: Call | None,
    mask: Mask | None,
) -> dict[str, Sums]:
    """`Sums` of what each layer is called with, in one pass; of those that get any vector.

    No input is kept. Layers that are called with the same tensor, one after the other, such as
    q, k and v, have it multiplied once.

    Raises:
        ValueError: NaN or infinite inputs, a mask that does not fit, batches that the model does
            not take.
    """
    sums: dict[str, Sums] = {}
    keep: Tensor | None = None
    masked: list[bool] = []
    latest: list[tuple[Any, ...]] = []

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        layer, x = layers[name], inputs[0]
        what = (_version(x), _kind(layer))
        if not (latest and latest[0][0] is x and latest[0][1] == what):
            latest[:] = [(x, what, _summed(layer, x, keep))]
        sums.setdefault(name, Sums()).add(*latest[0][2])
        masked.append(_is_masked(layer, x, keep))

    with evaluating(model), hooked(layers, before=note):
        for batch in batches:
            _check(batch)
            batch = at_home(model, batch)
            keep = _kept(batch, mask)
            prepared(model, batch, call)()
            latest.clear()
    _check_mask(mask, keep, masked)
    for name, each in sums.items():
        _check_sums(each, name)
    return {name: each for name, each in sums.items() if each.count}


def _check(batch: Batch) -> None:
    if torch.is_tensor(batch):
        checks.finite(batch, "calibration")


def _check_sums(sums: Sums, name: str) -> None:
    for value in (sums.square, sums.cross):
        if isinstance(value, Tensor):
            checks.finite(value, f"what calibration gives to layer {name!r}")


def _check_mask(mask: Mask | None, keep: Tensor | None, masked: Sequence[bool]) -> None:
    """Refuse a caller's mask that is of no use for any call of a layer."""
    if mask is not None and keep is not None and masked and not any(masked):
        raise ValueError(
            f"mask gives places {tuple(keep.shape)}, and no layer has such inputs, "
            f"{(*keep.shape, 'features')}"
        )


def _version(x: Tensor) -> int:
    """What tells whether a tensor was written to since."""
    return -1 if x.is_inference() else x._version


def _kind(layer: Matrix) -> tuple[object, ...]:
    """Layers of one kind have the same vectors of the same input."""
    window = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    if isinstance(layer, CONVOLUTIONS):
        return (type(layer), *(getattr(layer, name) for name in window))
    if isinstance(layer, nn.Embedding):
        return (type(layer), layer.num_embeddings)
    return (type(layer), layer.groups if isinstance(layer, TRANSPOSED) else 1)


def _kept(batch: Batch, mask: Mask | None) -> Tensor | None:
    """Which places of a batch count: what ``mask`` says, or a mapping's "attention_mask"."""
    if mask is not None:
        keep = mask(batch)
        if not torch.is_tensor(keep) or keep.ndim == 0:
            raise ValueError(f"mask must give a tensor of places (n, …), not {keep!r}")
        return keep != 0
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return found != 0 if isinstance(found, Tensor) and found.ndim == 2 else None


def _is_masked(layer: Matrix, x: Tensor, keep: Tensor | None) -> bool:
    """Whether the places that are kept are those of the layer's inputs."""
    if keep is None or isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return False
    places = x.shape if isinstance(layer, nn.Embedding) else x.shape[:-1]
    return places[: keep.ndim] == keep.shape


def _vectors(layer: Matrix, x: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
    """What the layer's matrix is applied to, in float64, some thousand vectors at a time."""
    if keep is not None and _is_masked(layer, x, keep):
        x = x[keep.to(x.device)]
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        x = x if x.ndim == layer.weight.ndim else x[None]
        one = len(rows(layer, x[:1]))
        for some in x.split(max(1, BLOCK // max(one, 1))):
            yield rows(layer, some).double()
    elif isinstance(layer, nn.Embedding):
        yield rows(layer, x)
    else:
        for some in x.reshape(-1, x.shape[-1]).split(BLOCK):
            yield some.double()


def _summed(layer: Matrix, x: Tensor, keep: Tensor | None) -> tuple[int, Tensor, Tensor]:
    """The number of vectors, their sum, and that of their squares, see `Sums`."""
    found: list[tuple[int, Tensor, Tensor]] = []
    for some in _vectors(layer, x, keep):
        if isinstance(layer, nn.Embedding):
            times = some.long().bincount(minlength=layer.num_embeddings).double()
            found.append((len(some), times, times))
        else:
            each = some.movedim(0, -2)
            found.append((len(some), some.sum(0), each.mT @ each))
    count, total, square = found[0]
    for n, sum_, squares in found[1:]:
        count, total, square = count + n, total + sum_, square + squares
    return count, total, square


@torch.no_grad()
def call_order(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    batches: Iterable[Batch],
    call: Call | None,
    mask: Mask | None = None,
) -> tuple[list[list[str]], set[str]]:
    """The layers in the order of their first call, and those that are called once in a call.

    Of the latter, those with one input, one after the other, stand together. Batches are looked
    at until each layer was called.

    >>> model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> call_order(model, {"0": model[0], "2": model[2]}, [torch.rand(2, 3)], None)[0]
    [['0'], ['2']]
    """
    first: list[str] = []
    earlier: set[str] = set()  # in batches before
    called: list[str] = []  # in this batch
    latest: list[tuple[Tensor, tuple[Any, ...]]] = []
    several: set[str] = set()
    together: dict[str, str] = {}  # with the layer before it
    masked: list[bool] = []
    keep: Tensor | None = None

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        x, what = inputs[0], (_version(inputs[0]), _kind(layers[name]))
        if name in called:
            several.add(name)
        elif name not in first:
            first.append(name)
            same = bool(latest) and latest[0][0] is x and latest[0][1] == what
            if same and called[-1] not in earlier:
                together[name] = called[-1]
        called.append(name)
        latest[:] = [(x, what)]
        masked.append(_is_masked(layers[name], x, keep))

    with evaluating(model), hooked(layers, before=note):
        for batch in batches:
            batch = at_home(model, batch)
            keep = _kept(batch, mask)
            prepared(model, batch, call)()
            called.clear()
            latest.clear()
            if len(first) == len(layers):
                break
            earlier = set(first)
    _check_mask(mask, keep, masked)
    groups: list[list[str]] = []
    for name in first:
        mate = together.get(name)
        if mate is not None and groups[-1][-1] == mate and not several & {name, mate}:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups, set(first) - several


class _Reached(Exception):
    """All is seen that is wanted of a call."""


@torch.no_grad()
def paired_sums(
    dense: nn.Module,
    small: nn.Module,
    names: Sequence[str],
    batches: Iterable[Batch],
    call: Call | None,
    mask: Mask | None,
    once: bool,
) -> dict[str, Sums]:
    """`Sums` of layers' inputs in a network that is cut before them, with those in the dense one.

    Args:
        names: layers that are called with one input, the first of which stands for all.
        once: they are called once, so that the call need not go on behind them.

    Raises:
        ValueError: as `input_sums`; other numbers of inputs in the two networks.
    """
    first = names[0]
    layers = [dict(network.named_modules())[first] for network in (dense, small)]
    sums = Sums()
    for batch in batches:
        batch_here = at_home(small, batch)
        keep = _kept(batch_here, mask)
        seen: list[list[Tensor]] = []
        for network, layer in zip((dense, small), layers, strict=True):
            inputs = _inputs(network, layer, batch, call, once)
            seen.append(inputs)
        if [x.shape for x in seen[0]] != [x.shape for x in seen[1]]:
            raise ValueError(
                f"layer {first!r} has other numbers of inputs once layers before it are cut; "
                "calibrate without sequential=True"
            )
        layer = layers[1]
        for x, other in zip(seen[1], seen[0], strict=True):
            pairs = zip(_vectors(layer, x, keep), _vectors(layer, other, keep), strict=True)
            for cut, whole in pairs:
                if isinstance(layer, nn.Embedding):
                    times = cut.long().bincount(minlength=layer.num_embeddings).double()
                    sums.add(len(cut), times, times)
                    continue
                a, b = cut.movedim(0, -2), whole.movedim(0, -2)
                sums.add(len(cut), cut.sum(0), a.mT @ a, whole.sum(0), b.mT @ a)
    _check_sums(sums, first)
    return dict.fromkeys(names, sums) if sums.count else {}


def _inputs(
    network: nn.Module, layer: nn.Module, batch: Batch, call: Call | None, once: bool
) -> list[Tensor]:
    """Copies of what a layer is called with."""
    seen: list[Tensor] = []

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].clone())
        if once:
            raise _Reached

    with evaluating(network), hooked({"": layer}, before=note), suppress(_Reached):
        prepared(network, at_home(network, batch), call)()
    return seen
