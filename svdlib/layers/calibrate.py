"""Best low-rank fits of a layer to its calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from svdlib import checks
from svdlib.bars import bar
from svdlib.network.batches import Batch, copied
from svdlib.network.calls import Call, run
from svdlib.network.kinds import Layer
from svdlib.network.opened import Network

# mask(batch) -> bool (n, T): the places of a batch that count, the others are padding.
Mask = Callable[[Batch], Tensor]

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

    def check(self, name: str) -> None:
        """Refuse NaN or infinite inputs of the layer of that name."""
        for value in (self.square, self.cross):
            if isinstance(value, Tensor):
                checks.finite(value, f"what calibration gives to layer {name!r}")


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


def fit(layer: Layer, sums: Sums) -> Fit:
    """All best approximations of a layer on inputs of these sums, see `Fit`.

    The eigenvectors are found on the smaller side. Where W = Q R is higher than wide, those of
    W C Wᵀ are Q times those of R C Rᵀ, without a root of C, which a rank-deficient C may not have
    to rounding. Where layers before are cut, and C is inverted, they are those of GGᵀ or GᵀG,
    G = M L and C = L Lᵀ.

    >>> from svdlib.network.kinds import Linear
    >>> layer, x = Linear(torch.nn.Linear(4, 3, bias=False)), torch.eye(4)
    >>> found = fit(layer, Sums(4, x.sum(0).double(), (x.mT @ x).double()))
    >>> S = torch.linalg.svdvals(layer.weight)
    >>> torch.allclose(4 * found.energies.float(), S.square(), rtol=1e-4)
    True
    """
    W = layer.matrix().double()
    mean, C = cast(Tensor, sums.total) / sums.count, cast(Tensor, sums.square) / sums.count
    other = None if isinstance(sums.cross, float) else sums.cross / sums.count
    before = mean if isinstance(sums.dense, float) else sums.dense / sums.count
    centered = layer.is_centered()
    if centered:
        C = C - _outer(mean, mean)
        other = None if other is None else other - _outer(before, mean)
    shift = (W @ before.unsqueeze(-1)).squeeze(-1) if centered else None
    m, n = W.shape[-2:]
    if other is None:
        M = W
        Q, R = torch.linalg.qr(W) if m > n else (None, W)
        RC = R * C if C.ndim < R.ndim else R @ C
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


def fits_of(
    net: Network,
    names: Iterable[str],
    batches: Iterable[Batch],
    call: Call | None,
    mask: Mask | None,
    progress: bool,
) -> Iterator[tuple[str, Fit]]:
    """The fits of those layers that calibration reaches, one at a time. See `input_sums`."""
    names = list(names)
    shown = bar(batches, progress=progress, desc="calibration", delay=3, leave=False)
    sums = input_sums(net, names, shown, call, mask)
    unseen = [name for name in names if name not in sums]
    net.left |= dict.fromkeys(unseen, "calibration does not reach it")
    for name in list(sums):
        yield name, fit(net.layers[name], sums.pop(name))


def lost_by(layer: Layer, found: Fit | None) -> np.ndarray:
    """The share of its output's variance, or of its own squares, that a layer loses at each rank."""
    if found is not None:
        return found.errors().cpu().numpy()
    squares = torch.linalg.svdvals(layer.matrix().double()).square()
    kept = np.append(0.0, squares.reshape(-1, squares.shape[-1]).sum(0).cumsum(0).cpu().numpy())
    return 1 - kept / kept[-1] if kept[-1] > 0 else np.zeros_like(kept)


def _kept(batch: Batch, mask: Mask | None) -> Tensor | None:
    """Which places of a batch count: what ``mask`` says, or a mapping's "attention_mask"."""
    if mask is not None:
        keep = mask(copied(batch))
        if not torch.is_tensor(keep) or keep.ndim == 0:
            raise ValueError(f"mask must give a tensor of places (n, …), not {keep!r}")
        return keep != 0
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return found != 0 if isinstance(found, Tensor) and found.ndim == 2 else None


def _check_mask(mask: Mask | None, keep: Tensor | None, masked: Sequence[bool]) -> None:
    """Refuse a caller's mask that fits no input of any layer."""
    if mask is not None and keep is not None and masked and not any(masked):
        raise ValueError(
            f"mask gives places {tuple(keep.shape)}, and no layer has such inputs, "
            f"{(*keep.shape, 'features')}"
        )


def _vectors_of(layer: Layer, x: Tensor) -> tuple[object, ...]:
    """What tells that two layers called with the same tensor are applied to the same vectors."""
    return (-1 if x.is_inference() else x._version, *layer.vector_kind())


def input_sums(
    net: Network,
    names: Iterable[str],
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
    latest: list[Any] = [None, None, []]

    def start(batch: Batch) -> None:
        nonlocal keep
        if torch.is_tensor(batch):
            checks.finite(batch, "calibration")
        keep, latest[:] = _kept(batch, mask), [None, None, []]

    def note(name: str, x: Tensor) -> None:
        layer = net.layers[name]
        what = _vectors_of(layer, x)
        if latest[0] is not x or latest[1] != what:
            latest[:] = [x, what, [(len(b), *layer.sums(b)) for b in layer.blocks(x, keep)]]
        for found in latest[2]:
            sums.setdefault(name, Sums()).add(*found)
        masked.append(layer.is_masked(x, keep))

    net.watch(names, batches, call, note, start)
    _check_mask(mask, keep, masked)
    for name, each in sums.items():
        each.check(name)
    return {name: each for name, each in sums.items() if each.count}


def call_order(
    net: Network,
    names: Iterable[str],
    batches: Iterable[Batch],
    call: Call | None,
    mask: Mask | None = None,
) -> tuple[list[list[str]], set[str]]:
    """The layers in the order of their first call, and those that are called once in a call.

    Of the latter, those with one input, one after the other, stand together. Batches are looked
    at until each layer was called.

    >>> net = Network(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)))
    >>> call_order(net, ["0", "1"], [torch.rand(2, 3)], None)[0]
    [['0'], ['1']]
    """
    names = list(names)
    first: list[str] = []
    earlier: set[str] = set()  # in batches before
    called: list[str] = []  # in this batch
    latest: list[Any] = [None, None]
    several: set[str] = set()
    together: dict[str, str] = {}  # with the layer before it

    keep: Tensor | None = None
    masked: list[bool] = []

    def start(batch: Batch) -> bool:
        nonlocal keep
        called.clear()
        keep, latest[:] = _kept(batch, mask), [None, None]
        earlier.update(first)
        return len(first) == len(names)

    def note(name: str, x: Tensor) -> None:
        what = _vectors_of(net.layers[name], x)
        if name in called:
            several.add(name)
        elif name not in first:
            first.append(name)
            if latest[0] is x and latest[1] == what and called[-1] not in earlier:
                together[name] = called[-1]
        called.append(name)
        latest[:] = [x, what]
        masked.append(net.layers[name].is_masked(x, keep))

    net.watch(names, batches, call, note, start)
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
    dense: Network,
    small: Network,
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
    first, sums = names[0], Sums()
    layer = small.layers[first]
    for batch in batches:
        keep = _kept(batch, mask)
        whole, cut = (_inputs(net, first, batch, call, once) for net in (dense, small))
        if [x.shape for x in whole] != [x.shape for x in cut]:
            raise ValueError(
                f"layer {first!r} has other numbers of inputs once layers before it are cut; "
                "calibrate without sequential=True"
            )
        for x, other in zip(cut, whole, strict=True):
            for block, original in zip(
                layer.blocks(x, keep), layer.blocks(other, keep), strict=True
            ):
                sums.add(len(block), *layer.sums(block, original))
    sums.check(first)
    return dict.fromkeys(names, sums) if sums.count else {}


def _inputs(net: Network, name: str, batch: Batch, call: Call | None, once: bool) -> list[Tensor]:
    """Copies of what a layer is called with."""
    seen: list[Tensor] = []

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].clone())
        if once:
            raise _Reached

    with net.hooked([name], before=note), suppress(_Reached):
        run(net.model, batch, call)
    return seen
