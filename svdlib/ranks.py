"""How the loss of a network depends on the rank of each layer, measured cheaply and exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from svdlib import checks
from svdlib.modules import evaluating, matrices


def loss_profile(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    layers: Iterable[str] | None = None,
    ranks: Iterable[int] | None = None,
    memory: int = 2**28,
    progress: bool = True,
) -> pd.DataFrame:
    """The network's loss with one layer at a time cut to each rank, and the others as they are.

    The paper's Algorithm 3 asks for this and takes an SVD and a whole forward pass for each
    layer and rank. Here, in an ``nn.Sequential``, each layer takes one SVD W = Σ σ_j u_j v_jᵀ
    and its input X once, the layer's output at rank j is a nested sum

        Z_0 = b,    Z_j = Z_{j−1} + σ_j u_j (v_jᵀ X),

    and only the layers behind it are run again. The losses are those of the paper's procedure
    to rounding. In any other module the whole model runs for each rank, with a hook that puts
    the nested sum in the place of the layer's output; and where a layer is used twice, or its
    weight is read without it, with the weight replaced.

    Args:
        model: a module of Linear and Conv2d layers; called in evaluation mode, left as it was.
        x, y: inputs (n, …) and labels (n,), on the model's device.
        layers: names of the layers to profile; all by default.
        ranks: the ranks to evaluate, capped at each layer's min(m, n); 0 … min(m, n) by default.
        memory: bytes that the stacked intermediate results may take, about.
        progress: show a progress bar.

    Returns:
        one row a layer and rank: layer, rank, loss (mean cross-entropy), accuracy (per cent),
        increase (of the loss over the full network, paired by image), se (its standard error),
        rows and columns (the matrix's shape m × n), sigma (its singular value σ_rank, NaN at
        rank 0). The full network's loss is in ``attrs["loss"]``.

    Raises:
        ValueError: empty data, labels of another length, a model without matrices, an unknown
            layer, a rank below 0 or not whole, NaN or infinite weights or losses.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> profile = loss_profile(net, torch.rand(20, 8), torch.arange(20) % 3, progress=False)
    >>> profile.groupby("layer")["rank"].max().to_dict()
    {'0': 6, '2': 3}
    """
    chosen = _layers(model, layers)
    _check_data(model, x, y)
    wanted = None if ranks is None else {checks.positive_int(r, "a rank", least=0) for r in ranks}
    with torch.no_grad(), evaluating(model):
        full, _ = _full_losses(model, x, y, memory)
        tables = []
        for name in tqdm(chosen, disable=not progress, desc="profile", unit="layer"):
            sweep = _Sweep(model, name, x, y, full, memory)
            at = {min(rank, sweep.limit) for rank in wanted} if wanted is not None else None
            tables.append(sweep.table(sorted(at) if at else range(sweep.limit + 1), progress))
    profile = pd.concat(tables, ignore_index=True)
    profile.attrs["loss"] = full.double().mean().item()
    return profile


@torch.no_grad()
def verify_ranks(
    model: nn.Module, ranks: Mapping[str, int], x: Tensor, y: Tensor, memory: int = 2**28
) -> dict[str, float]:
    """What the network loses with all these layers reduced at once. Layer effects do not add.

    Returns:
        loss, accuracy (per cent), increase (of the loss, paired by image), se, error_increase
        (per cent), and parameters: of the whole model with each reduced layer stored as two
        factors, where that is smaller.

    Raises:
        ValueError: as `loss_profile`, or a rank above the matrix's smaller side.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> verify_ranks(net, {"0": 2}, torch.rand(20, 8), torch.arange(20) % 3)["parameters"]
    55.0
    """
    _check_data(model, x, y)
    with evaluating(model):
        return _Reduced(model, list(ranks), x, y, memory).measure(ranks)


def refine_ranks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ranks: Mapping[str, int],
    *,
    tolerance: float,
    memory: int = 2**28,
) -> dict[str, int]:
    """Raise or lower ranks until the verified loss increase meets a tolerance, cheaply stored.

    A pattern search on the network with all layers reduced at once. While the increase is above
    the tolerance, the layer whose rank buys the most loss per parameter is raised; then each
    layer, the one that saves most first, is lowered as long as the tolerance holds, by steps
    that start at a quarter of its rank and halve down to one.

    Args:
        x, y: data to choose by: a validation split, never the test set.
        ranks: where to start, as `reveal_ranks` gives it.
        tolerance: the largest admissible increase of the mean loss, at least 0.

    Raises:
        ValueError: a negative tolerance, or as `verify_ranks`.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> x, y = torch.rand(20, 8), net(torch.rand(20, 8)).argmax(1)
    >>> refine_ranks(net, x, y, {"0": 6, "2": 3}, tolerance=1.0)
    {'0': 1, '2': 1}
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, not {tolerance}")
    _check_data(model, x, y)
    with torch.no_grad(), evaluating(model):
        reduced = _Reduced(model, list(ranks), x, y, memory)
        current = {name: min(rank, reduced.limit[name]) for name, rank in ranks.items()}
        # Full rank in every layer is the network itself, up to rounding.
        slack = tolerance + 1e-6 * abs(reduced.full.mean().item())
        while reduced.increase(current) > slack:
            raised = [
                {**current, name: min(rank + max(1, rank // 4), reduced.limit[name])}
                for name, rank in current.items()
                if rank < reduced.limit[name]
            ]
            if not raised:
                break
            current = min(raised, key=partial(reduced.price, current))
        for fraction in (4, 8, 16, 32, 64, None):
            lowered = True
            while lowered:
                lowered = False
                for name in sorted(current, key=lambda layer: -sum(reduced.shape[layer])):
                    step = 1 if fraction is None else current[name] // fraction
                    trial = {**current, name: current[name] - step}
                    if 0 < step < current[name] and reduced.increase(trial) <= slack:
                        current, lowered = trial, True
        return current


def search_ranks(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    accept: Callable[[pd.DataFrame], pd.Series],
    *,
    window: int = 8,
    memory: int = 2**28,
) -> dict[str, int]:
    """The smallest acceptable rank of each layer, without the whole profile.

    Loss is nearly but not quite monotone in rank. So: a geometric grid of ranks, bisection
    between its last refused and first accepted rank, and then, since a smaller rank may be
    acceptable again, a window of ranks at a time below it until a whole window is refused.

    Args:
        accept: takes a profile and says of each row whether its rank would do, such as
            ``lambda rows: rows.increase <= rows.se``. Full rank always will.
        window: ranks that must be refused in a row before the search ends, or an eighth of the
            rank found, if that is more.

    Raises:
        ValueError: as `loss_profile`.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> x, y = torch.rand(20, 8), torch.arange(20) % 3
    >>> search_ranks(net, x, y, lambda rows: rows.increase <= rows.se).keys()
    dict_keys(['0', '2'])
    """
    _check_data(model, x, y)
    found = {}
    with torch.no_grad(), evaluating(model):
        full, _ = _full_losses(model, x, y, memory)
        for name in _layers(model, None):
            sweep = _Sweep(model, name, x, y, full, memory)
            found[name] = _smallest(sweep, accept, window)
    return found


def _smallest(sweep: _Sweep, accept: Callable[[pd.DataFrame], pd.Series], window: int) -> int:
    def accepted(ranks: Iterable[int]) -> list[int]:
        table = sweep.table(sorted(ranks), progress=False)
        return table["rank"][accept(table)].tolist()

    grid = {min(2**power, sweep.limit) for power in range(sweep.limit.bit_length() + 1)}
    best = min(accepted(grid), default=sweep.limit)
    low = max((rank for rank in grid if rank < best), default=0)
    while best - low > 1:
        middle = (low + best) // 2
        if accepted([middle]):
            best = middle
        else:
            low = middle
    while best > 1:
        better = accepted(range(max(1, best - max(window, best // 8)), best))
        if not better:
            break
        best = min(better)
    return best


@dataclass
class _Moments:
    """Per rank, summed over images: loss, correct answers, paired difference and its square."""

    loss: Tensor
    correct: Tensor
    difference: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, ranks: int, device: torch.device) -> _Moments:
        return cls(*torch.zeros(4, ranks, dtype=torch.float64, device=device))

    def add(self, at: slice, z: Tensor, y: Tensor, full: Tensor) -> None:
        """Take in logits (R, b, classes) of the ranks ``at``, for b images."""
        losses = z.logsumexp(-1) - z.gather(-1, y.expand(len(z), -1)[..., None]).squeeze(-1)
        difference = (losses - full).double()
        self.loss[at] += losses.double().sum(1)
        self.correct[at] += (z.argmax(-1) == y).sum(1)
        self.difference[at] += difference.sum(1)
        self.square[at] += difference.square().sum(1)


class _Sweep:
    """One layer at any of its ranks, the others as they are."""

    def __init__(
        self, model: nn.Module, name: str, x: Tensor, y: Tensor, full: Tensor, memory: int
    ) -> None:
        self.model, self.name, self.x, self.y, self.full = model, name, x, y, full
        self.layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(name))
        weight = self.layer.weight.detach()
        checks.finite(weight, f"the weight of layer {name!r}")
        U, self.S, self.Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        self.US = U * self.S
        self.limit = len(self.S)
        self.nested = _is_chain(model, name)
        self.hooked = not self.nested and _is_called_once(model, name, x[:1])
        width = _width(model, x[:1], name if self.nested else None)
        # Four arrays of that width live at once: the sum, the stack, and two behind it.
        cells = max(1, memory // (4 * width * x.element_size()))
        self.images = min(len(x), cells, max(256, CACHED // width))
        self.block = max(1, min(cells, CACHED // width) // self.images)
        self.codes: dict[int, Tensor] = {}
        self.keep = len(x) * self.limit * x.element_size() <= memory

    def table(self, ranks: Sequence[int], progress: bool) -> pd.DataFrame:
        """The rows of `loss_profile` for these ranks, in rising order."""
        moments = _Moments.zeros(len(ranks), self.x.device)
        starts = range(0, len(self.x), self.images)
        for start in tqdm(starts, disable=not progress, desc=f"layer {self.name}", leave=False):
            part = slice(start, start + self.images)
            for at, logits in self._logits(part, ranks):
                moments.add(at, logits, self.y[part], self.full[part])
        n = len(self.x)
        mean = moments.difference / n
        variance = (moments.square - n * mean.square()).clamp(min=0) / max(n - 1, 1)
        loss = (moments.loss / n).tolist()
        if not all(map(math.isfinite, loss)):
            raise ValueError(f"layer {self.name!r} gives NaN or infinite losses on these data")
        return pd.DataFrame(
            {
                "layer": self.name,
                "rank": list(ranks),
                "loss": loss,
                "accuracy": (100 * moments.correct / n).tolist(),
                "increase": mean.tolist(),
                "se": (variance / n).sqrt().tolist(),
                "rows": self.US.shape[0],
                "columns": self.Vh.shape[1],
                "sigma": [self.S[rank - 1].item() if rank else math.nan for rank in ranks],
            }
        )

    def _logits(self, part: slice, ranks: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of ranks, and the network's logits (R, b, classes) at each of them."""
        if self.hooked:
            code = self._code(part)
            z, done = self._bias(code), 0
            for row, rank in enumerate(ranks):
                self._add_terms(z, code, slice(done, rank))
                done = rank
                with _hooked(self.layer, lambda *_, z=z: z.clone()):
                    logits = self.model(self.x[part])
                yield slice(row, row + 1), logits[None]
            return
        if not self.nested:
            for row, rank in enumerate(ranks):
                weight = (self.US[:, :rank] @ self.Vh[:rank]).view_as(self.layer.weight)
                with _replaced({self.layer.weight: weight}):
                    logits = self.model(self.x[part])
                yield slice(row, row + 1), logits[None]
            return
        assert isinstance(self.model, nn.Sequential)
        behind = self.model[self._position() + 1 :]
        code = self._code(part)
        z, done = self._bias(code), 0
        for start in range(0, len(ranks), self.block):
            at = ranks[start : start + self.block]
            stack = z.new_empty(len(at), *z.shape)
            for row, rank in enumerate(at):
                self._add_terms(z, code, slice(done, rank))
                stack[row], done = z, rank
            logits = behind(stack.flatten(0, 1))
            yield slice(start, start + len(at)), logits.view(len(at), len(code), -1)

    def _position(self) -> int:
        return [name for name, _ in self.model.named_children()].index(self.name)

    def _code(self, part: slice) -> Tensor:
        """The layer's input in the basis of right singular vectors, k in the features' place."""
        if part.start not in self.codes:
            x = self._input(part)
            if isinstance(self.layer, nn.Conv2d):
                kernels = self.Vh.view(-1, *self.layer.weight.shape[1:])
                layer = self.layer
                code = F.conv2d(x, kernels, None, layer.stride, layer.padding, layer.dilation)
            else:
                code = x @ self.Vh.mT
            if not self.keep:
                return code
            self.codes[part.start] = code
        return self.codes[part.start]

    def _input(self, part: slice) -> Tensor:
        if self.nested:
            assert isinstance(self.model, nn.Sequential)
            x: Tensor = self.model[: self._position()](self.x[part])
            return x
        seen: list[Tensor] = []
        with _hooked(self.layer, lambda layer, inputs, output: seen.append(inputs[0].clone())):
            self.model(self.x[part])
        return seen[0]

    def _bias(self, code: Tensor) -> Tensor:
        """The layer's output at rank 0."""
        bias, rows = self.layer.bias, len(self.US)
        if isinstance(self.layer, nn.Linear):
            z = code.new_zeros(*code.shape[:-1], rows)
            return z if bias is None else z.add_(bias.detach())
        z = code.new_zeros(len(code), rows, *code.shape[2:])
        return z if bias is None else z.add_(bias.detach().view(-1, 1, 1))

    def _add_terms(self, z: Tensor, code: Tensor, terms: slice) -> None:
        """Z += Σ σ_j u_j (v_jᵀ X) over these terms, in place."""
        if isinstance(self.layer, nn.Linear):
            z.flatten(0, -2).addmm_(code.flatten(0, -2)[:, terms], self.US[:, terms].mT)
        elif terms.start < terms.stop:
            z.add_(F.conv2d(code[:, terms], self.US[:, terms, None, None]))


class _Reduced:
    """The network with several layers reduced at once."""

    def __init__(
        self, model: nn.Module, layers: Sequence[str], x: Tensor, y: Tensor, memory: int
    ) -> None:
        known = _layers(model, layers)
        self.model, self.x, self.y, self.memory = model, x, y, memory
        self.full, correct = _full_losses(model, x, y, memory)
        self.full_accuracy = 100 * correct.double().mean().item()
        self.factors, self.shape = {}, {}
        for name, weight in known.items():
            checks.finite(weight, f"the weight of layer {name!r}")
            U, S, Vh = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
            self.factors[name] = (U * S, Vh)
            self.shape[name] = (len(U), Vh.shape[1])
        self.limit = {name: min(shape) for name, shape in self.shape.items()}
        self.others = sum(p.numel() for p in model.parameters())
        self.others -= sum(weight.numel() for weight in known.values())
        self.known: dict[tuple[int, ...], dict[str, float]] = {}

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Of the whole model, each layer as two factors where that is smaller."""
        sizes = ((rank, *self.shape[name]) for name, rank in ranks.items())
        return self.others + sum(min(rank * (m + n), m * n) for rank, m, n in sizes)

    def measure(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """See `verify_ranks`; each choice of ranks is measured once."""
        key = tuple(ranks[name] for name in self.factors)
        if key not in self.known:
            replaced: dict[Tensor, Tensor] = {}
            for name, (US, Vh) in self.factors.items():
                rank = checks.positive_int(ranks[name], f"the rank of layer {name!r}", least=0)
                if rank > self.limit[name]:
                    raise ValueError(
                        f"layer {name!r} has rank {self.limit[name]} at most, not {rank}"
                    )
                weight = self.model.get_parameter(f"{name}.weight")
                if rank < self.limit[name]:
                    replaced[weight] = (US[:, :rank] @ Vh[:rank]).view_as(weight)
            moments = _Moments.zeros(1, self.x.device)
            size = max(1, self.memory // (8 * _width(self.model, self.x[:1]) * 4))
            for x, y, full in zip(
                *(t.split(size) for t in (self.x, self.y, self.full)), strict=True
            ):
                with _replaced(replaced):
                    z = self.model(x)
                moments.add(slice(0, 1), z[None], y, full)
            n = len(self.x)
            mean = moments.difference.item() / n
            variance = max(moments.square.item() - n * mean**2, 0) / max(n - 1, 1)
            accuracy = 100 * moments.correct.item() / n
            self.known[key] = {
                "loss": moments.loss.item() / n,
                "accuracy": accuracy,
                "increase": mean,
                "se": (variance / n) ** 0.5,
                "error_increase": self.full_accuracy - accuracy,
                "parameters": float(self.parameters(ranks)),
            }
        return self.known[key]

    def increase(self, ranks: Mapping[str, int]) -> float:
        return self.measure(ranks)["increase"]

    def price(self, now: Mapping[str, int], then: Mapping[str, int]) -> float:
        """Change of loss per parameter; a free change costs nothing but its loss."""
        spent = max(self.parameters(then) - self.parameters(now), 1)
        return (self.increase(then) - self.increase(now)) / spent


# Numbers that fit a processor's cache, about: stacks of this size are fastest.
CACHED = 2**20


def _layers(model: nn.Module, names: Iterable[str] | None) -> dict[str, Tensor]:
    known = matrices(model)
    if not known:
        raise ValueError("the model has no nn.Linear or nn.Conv2d to profile")
    chosen = list(known if names is None else names)
    for name in chosen:
        checks.one_of(name, tuple(known), "layer")
    return {name: known[name] for name in chosen}


def _check_data(model: nn.Module, x: Tensor, y: Tensor) -> None:
    if len(x) == 0:
        raise ValueError("the data are empty; the loss needs at least one image")
    if y.shape != (len(x),):
        raise ValueError(f"{len(x)} inputs need labels of shape ({len(x)},), not {tuple(y.shape)}")
    if int(y.min()) < 0:
        raise ValueError(f"labels must be at least 0, not {int(y.min())}")


@contextmanager
def _replaced(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Other values for some parameters, wherever these are used; the old ones afterwards."""
    kept = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, value in weights.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value


def _full_losses(model: nn.Module, x: Tensor, y: Tensor, memory: int) -> tuple[Tensor, Tensor]:
    """Loss and correctness of the full network on every image."""
    size = max(1, memory // (8 * _width(model, x[:1]) * x.element_size()))
    losses, correct = [], []
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        z = model(images)
        if int(labels.max()) >= z.shape[-1]:
            raise ValueError(
                f"labels run to {int(labels.max())} but the model has {z.shape[-1]} outputs"
            )
        losses.append(F.cross_entropy(z, labels, reduction="none"))
        correct.append(z.argmax(-1) == labels)
    full = torch.cat(losses)
    if not bool(full.isfinite().all()):
        raise ValueError("the model gives NaN or infinite losses on these data")
    return full, torch.cat(correct)


def _is_chain(model: nn.Module, name: str) -> bool:
    """Whether the layer is a step of an ``nn.Sequential`` that takes each step once."""
    if not isinstance(model, nn.Sequential) or "." in name:
        return False
    once = len(set(map(id, model))) == len(model)
    return once and _is_plain(model, name)


def _is_called_once(model: nn.Module, name: str, x: Tensor) -> bool:
    """Whether a call of the model calls the layer once, and what it puts out is all it does."""
    calls: list[int] = []
    with _hooked(model.get_submodule(name), lambda *_: calls.append(1)):
        model(x)
    return calls == [1] and _is_plain(model, name)


def _is_plain(model: nn.Module, name: str) -> bool:
    """Whether the layer is its matrix and bias alone, without hooks or a shared weight."""
    layer = cast(nn.Linear | nn.Conv2d, model.get_submodule(name))
    owners = [m for m in model.modules() if any(p is layer.weight for p in m._parameters.values())]
    plain = type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    )
    return plain and len(owners) == 1 and not (layer._forward_hooks or layer._forward_pre_hooks)


@contextmanager
def _hooked(layer: nn.Module, hook: Callable[..., object]) -> Iterator[None]:
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _width(model: nn.Module, x: Tensor, behind: str | None = None) -> int:
    """Numbers in the largest result for one image, of any module or of those from ``behind`` on."""
    largest = [1]
    hooks = []
    steps = list(model.named_children())
    if behind is not None:
        steps = steps[[name for name, _ in steps].index(behind) :]

    def note(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            largest.append(output.numel())

    for _, step in steps:
        hooks += [module.register_forward_hook(note) for module in step.modules()]
    try:
        with torch.no_grad():
            largest.append(model(x).numel())
    finally:
        for hook in hooks:
            hook.remove()
    return max(largest)
