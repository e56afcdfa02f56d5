"""Best low-rank fits of a layer to its calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svdlib import checks
from svdlib.bars import bar
from svdlib.network.calls import Batch, Batches, Call, batches, copied, count_batches, run
from svdlib.network.kinds import Layer
from svdlib.network.opened import Network

# mask(batch) -> bool (n, T): the places of a batch that count, the others are padding.
Mask = Callable[[Batch], Tensor]
# Share of its trace that is added to the diagonal of a covariance before it is inverted: the
# smallest eigenvalues are noise.
RIDGE = 1e-5
# Inputs of a call, where calibration is a single batch.
BATCH = 128


@dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs that layers are fitted to, and how they are read.

    `factorize` and `compress` take one as their ``calibration``, or the data alone.

    Attributes:
        data: a few hundred inputs of the model: a tensor (n, …), a tuple or mapping (of keyword
            arguments) of tensors, or an iterable of batches. Targets are ignored. In `compress`
            None stands for the inputs in ``x``.
        call: ``call(model, batch)`` runs the model on a batch. By default a tensor, or the parts
            of a tuple or mapping, are the model's arguments.
        mask: ``mask(batch)`` returns a tensor (n, T), nonzero at the places that count; the others
            are padding. By default a mapping's "attention_mask".
        sequential: fit layers in the order of their calls, each on the inputs that the cut layers
            before it leave, which reads the data twice per layer.

    Raises:
        ValueError: call or mask is not a function. `factorize` and `compress` refuse data that are
            empty, not finite, or do not fit the model, and a mask that fits no layer's inputs.

    >>> import svdlib
    >>> x = torch.nn.functional.pad(torch.ones(50, 6, 20), (0, 0, 0, 3))  # 6 places, 3 of padding
    >>> calibration = svdlib.Calibration(x, mask=lambda batch: batch[..., 0] != 0)
    >>> svdlib.factorize(torch.nn.Linear(20, 30), 5, calibration=calibration).rank
    5
    """

    data: Batches = None
    call: Call | None = None
    mask: Mask | None = None
    sequential: bool = False

    def __post_init__(self) -> None:
        for name, function in (("call", self.call), ("mask", self.mask)):
            if function is not None and not callable(function):
                given = type(function).__name__
                raise ValueError(f"{name} must be a function, got {given}; see svdlib.Calibration")


def calibration_of(given: Batches | Calibration) -> Calibration:
    return given if isinstance(given, Calibration) else Calibration(given)


def _kept(batch: Batch, mask: Mask | None) -> Tensor | None:
    """The places of a batch that count, by ``mask`` or by a mapping's "attention_mask"."""
    if mask is not None:
        keep = mask(copied(batch))
        if not torch.is_tensor(keep) or keep.ndim == 0:
            raise ValueError(f"mask must give a tensor of places (n, …), not {keep!r}")
        return keep != 0
    inputs = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    found = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return found != 0 if isinstance(found, Tensor) and found.ndim == 2 else None


@dataclass
class Sums:
    """Sums over a layer's input vectors x (n,): their number, Σ x, and Σ x xᵀ.

    If earlier layers are cut, they are over the inputs x̃ of the cut network, with ``dense`` = Σ x
    and ``cross`` = Σ x x̃ᵀ. With g groups all are (g, …). An Embedding's Σ x xᵀ is diagonal, (n,).
    """

    count: int = 0
    total: Any = 0.0
    square: Any = 0.0
    dense: Any = 0.0
    cross: Any = 0.0

    def add(self, count: int, *sums: Tensor) -> None:
        self.count += count
        for name, value in zip(("total", "square", "dense", "cross"), sums, strict=False):
            setattr(self, name, getattr(self, name) + value)

    def check(self, name: str) -> None:
        for value in (self.square, self.cross):
            if isinstance(value, Tensor):
                checks.finite(value, f"what calibration gives to layer {name!r}")


@dataclass
class Gradients:
    """The second moment G = Σ g gᵀ (…, m, m) of a loss's gradients at a layer's output.

    The sum is over an input's places, the mean over inputs; ``count`` are all places. ``power`` is
    the mean of Σ (gᵀz)², z being the output.
    """

    square: Any = 0.0  # in the type of the gradients, float32 at least
    count: int = 0
    power: float = 0.0


@dataclass(frozen=True)
class Fit:
    """Best approximations of a layer's matrix W (m × n) at all ranks, judged by its outputs.

    The matrix W_r = S⁻¹ U_r U_rᵀ S M of rank r and the bias b_r = b + W μ − W_r μ̃ minimize

        E ‖S (W x + b − (W_r x̃ + b_r))‖²

    over inputs x of the dense network, with mean μ, and x̃ of the cut one, with mean μ̃ and
    covariance C. S is the identity, or SᵀS = G is the second moment of the loss's gradients at the
    output: an output that is off by e adds ½ E (gᵀe)² to the loss, to second order, and that is
    half of the minimum if g and e are independent. If x̃ = x, M = W and U_r are leading eigenvectors
    of S W C Wᵀ Sᵀ (Zhang, Zou, He and Sun 2016, section 3.1). Otherwise M = W E[x x̃ᵀ] C⁻¹ is the
    least-squares map from x̃ to W x, and M takes the place of W: reduced-rank regression (Izenman
    1975). A layer without a bias takes second moments for covariances.
    """

    left: Tensor  # S⁻¹ U (…, m, k), leading columns first, in the type of W; others in float64
    right: Tensor  # Uᵀ S M (…, k, n), in the type of W
    energies: Tensor  # variance of S times the output along each column of U, (…, k), falling
    shift: Tensor | None  # W μ (…, m); None without a bias
    mean: Tensor  # μ̃ (…, n)

    def at(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """S⁻¹ U_r (…, m, r), U_rᵀ S M (…, r, n), and the change of the bias (…, m), if any."""
        left, right, shift = self.left[..., :rank], self.right[..., :rank, :], self.shift
        if shift is not None:
            moved = left.double() @ (right.double() @ self.mean[..., None])
            shift = shift - moved[..., 0]
        return left, right, shift


def fit(layer: Layer, sums: Sums, gradients: Gradients | None = None) -> Fit:
    """The `Fit` of a layer to inputs with these sums and, if given, gradients at its output.

    Eigenvectors are computed on the smaller side. If W = Q R has more rows than columns, those of
    W C Wᵀ are Q times those of R C Rᵀ; no root of C is needed, which a rank-deficient C may lack
    after rounding. If C is inverted, they are those of F Fᵀ or Fᵀ F, with F = M L and C = L Lᵀ.

    With gradients C and G are `shrunk`: what few inputs did not show still counts.
    """
    own, S, weight = layer.matrix(), None, 1.0
    W = own.double()
    m, n = W.shape[-2:]
    k = min(m, n)
    mean, C = sums.total / sums.count, sums.square / sums.count
    is_paired = torch.is_tensor(sums.cross)
    before = sums.dense / sums.count if is_paired else mean
    shift = None
    if layer.is_centered():
        C = C - mean[..., None] * mean[..., None, :]
        shift = (W @ before[..., None])[..., 0]
    if gradients is not None:
        C, G = shrunk(C, sums.count), gradients.square.to(W)
        weight = float(G.diagonal(dim1=-2, dim2=-1).mean())
        if weight > 0:  # else any error is as good
            S = torch.linalg.cholesky(shrunk(G / weight, gradients.count)).mT
            W = S @ W
    if is_paired:
        cross = sums.cross / sums.count
        if shift is not None:
            cross = cross - before[..., None] * mean[..., None, :]
        trace = C.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        ridge = torch.where(trace > 0, RIDGE * trace, torch.ones_like(trace))
        L = torch.linalg.cholesky(C + ridge * torch.eye(n, dtype=C.dtype, device=C.device))
        F = torch.linalg.solve_triangular(L, (W @ cross).mT, upper=False).mT
        M = torch.linalg.solve_triangular(L.mT, F.mT, upper=True).mT
        energies, left = torch.linalg.eigh(F @ F.mT if m <= n else F.mT @ F)
        left = left.flip(-1) if m <= n else torch.linalg.qr(F @ left.flip(-1)).Q
    else:
        M = W
        Q, R = torch.linalg.qr(W) if m > n else (None, W)
        RC = R * C if C.ndim < R.ndim else R @ C
        energies, left = torch.linalg.eigh(RC @ R.mT)
        left = (left if Q is None else Q @ left).flip(-1)
    left = left[..., :k]
    right = left.mT @ M
    left = left if S is None else torch.linalg.solve_triangular(S, left, upper=True)
    energies = weight * energies.flip(-1)[..., :k].clamp(min=0)
    return Fit(left.to(own), right.to(own), energies, shift, mean)


def shrunk(C: Tensor, count: int) -> Tensor:
    """(1 − ρ) C + ρ t I of a second moment C (…, n, n), or a diagonal (n,), of so many vectors.

    t is the mean of the diagonal, and ρ the oracle approximating shrinkage for normal vectors
    (Chen, Wiesel, Eldar and Hero 2010, equation 23, without its terms 2/n, as scikit-learn has it):
    near 1 of few vectors, near 0 of many.

    >>> shrunk(torch.diag(torch.tensor([2.0, 0.0])), 4).diagonal()
    tensor([1.2000, 0.8000])
    """
    diagonal = C if C.ndim == 1 else C.diagonal(dim1=-2, dim2=-1)
    n, mean = diagonal.shape[-1], diagonal.mean(-1)
    squares = C.square().sum(-1 if C.ndim == 1 else (-2, -1))
    spread = (count + 1) * (squares - n * mean.square())
    share = (squares + (n * mean).square()) / spread
    share = torch.where(spread > 0, share, 1.0).clamp(0, 1)[..., None]
    # A group of a layer's may change nothing.
    added = (share * mean[..., None]).clamp(min=1e-12 * float(mean.mean()))
    if C.ndim == 1:
        return (1 - share) * C + added
    eye = torch.eye(n, dtype=C.dtype, device=C.device)
    return (1 - share[..., None]) * C + added[..., None] * eye


def fits_of(
    net: Network,
    names: Iterable[str],
    calibration: Calibration,
    gradients: Mapping[str, Gradients] = MappingProxyType({}),
    progress: bool = False,
) -> Iterator[tuple[str, Fit]]:
    """The fits of the layers that calibration reaches, one by one, so that sums can be freed."""
    names, shown = list(names), partial(bar, progress=progress, delay=3, leave=False)
    total = count_batches(calibration.data, BATCH)
    data = shown(batches(calibration.data, BATCH), desc="calibration", total=total)
    sums = input_sums(net, names, replace(calibration, data=data))
    net.left |= {name: "calibration does not reach it" for name in names if name not in sums}
    for name in shown(list(sums), desc="factors"):
        yield name, fit(net.layers[name], sums.pop(name), gradients.get(name))


def _observe(
    net: Network,
    names: Iterable[str],
    calibration: Calibration,
    note: Callable[[str, Tensor, Tensor | None, bool], None],
    ended: Callable[[], bool] = lambda: False,
) -> None:
    """Run the batches with ``note(name, x, keep, repeated)`` at each input x of a layer.

    ``keep`` are the places that count; ``repeated``: the previous call in this batch was with the
    same vectors, as those of q, k and v are. Each batch is preceded by ``ended()``.
    """
    keep: Tensor | None = None
    latest: tuple[Tensor, tuple[object, ...]] | None = None
    fits: set[bool] = set()

    def called(name: str, inputs: tuple[Tensor, ...]) -> None:
        nonlocal latest
        x, layer = inputs[0], net.layers[name]
        vectors = (-1 if x.is_inference() else x._version, *layer.vector_kind())
        note(name, x, keep, latest is not None and latest[0] is x and latest[1] == vectors)
        latest = x, vectors
        fits.add(layer.is_masked(x, keep))

    with torch.no_grad(), net.hooked(names, before=called):
        for batch in batches(calibration.data, BATCH):
            if ended():
                break
            if torch.is_tensor(batch):
                checks.finite(batch, "calibration")
            keep, latest = _kept(batch, calibration.mask), None
            run(net.model, batch, calibration.call)
    if calibration.mask is not None and keep is not None and fits == {False}:
        inputs = f"no layer has such inputs, {(*keep.shape, 'features')}"
        raise ValueError(f"mask gives places {tuple(keep.shape)}, and {inputs}")


def input_sums(net: Network, names: Iterable[str], calibration: Calibration) -> dict[str, Sums]:
    """`Sums` of the inputs of each layer that gets any, in one pass; no input is kept."""
    sums: dict[str, Sums] = {}
    blocks: list[tuple[int, *tuple[Tensor, ...]]] = []

    def note(name: str, x: Tensor, keep: Tensor | None, repeated: bool) -> None:
        layer = net.layers[name]
        if not repeated:
            blocks[:] = [(len(block), *layer.sums(block)) for block in layer.blocks(x, keep)]
        for block in blocks:
            sums.setdefault(name, Sums()).add(*block)

    _observe(net, names, calibration, note)
    for name, found in sums.items():
        found.check(name)
    return {name: found for name, found in sums.items() if found.count}


def call_order(
    net: Network, names: Collection[str], calibration: Calibration
) -> tuple[list[list[str]], set[str]]:
    """The layers in groups by their first call, and those that each batch calls at most once.

    A group has one input for all its layers, each called once.
    """
    first: list[str] = []
    called: list[str] = []  # in this batch
    earlier: set[str] = set()  # called in batches before
    several: set[str] = set()
    joined: set[str] = set()  # with the input of the one before in ``first``

    def ended() -> bool:
        called.clear()
        earlier.update(first)
        return len(first) == len(names)

    def note(name: str, x: Tensor, keep: Tensor | None, repeated: bool) -> None:
        if name in called:
            several.add(name)
        elif name not in first:
            if repeated and called[-1] == first[-1] and called[-1] not in earlier:
                joined.add(name)
            first.append(name)
        called.append(name)

    _observe(net, names, calibration, note, ended)
    groups: list[list[str]] = []
    for before, name in pairwise(["", *first]):
        if name not in joined or several & {before, name}:
            groups.append([])
        groups[-1].append(name)
    return groups, set(first) - several


class _Reached(Exception): ...


@torch.no_grad()
def paired_sums(
    dense: Network, small: Network, names: Sequence[str], calibration: Calibration, once: bool
) -> dict[str, Sums]:
    """`Sums` of layers' common input in a network cut before them, paired with the dense one's."""
    first, sums = names[0], Sums()
    layer = small.layers[first]
    for batch in batches(calibration.data, BATCH):
        keep = _kept(batch, calibration.mask)
        originals = _inputs(dense, first, batch, calibration.call, once)
        inputs = _inputs(small, first, batch, calibration.call, once)
        if [x.shape for x in originals] != [x.shape for x in inputs]:
            raise ValueError(
                f"layer {first!r} has other numbers of inputs once layers before it are cut; "
                "calibrate without sequential=True"
            )
        for pair in zip(inputs, originals, strict=True):
            for block, original in zip(*(layer.blocks(x, keep) for x in pair), strict=True):
                sums.add(len(block), *layer.sums(block, original))
    sums.check(first)
    return dict.fromkeys(names, sums) if sums.count else {}


def _inputs(net: Network, name: str, batch: Batch, call: Call | None, once: bool) -> list[Tensor]:
    seen: list[Tensor] = []

    def note(name: str, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].clone())
        if once:  # all that is needed
            raise _Reached

    with net.hooked([name], before=note), suppress(_Reached):
        run(net.model, batch, call)
    return seen
