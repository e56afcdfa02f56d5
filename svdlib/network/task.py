"""What a network is measured by: batches in, losses of it and of its variants out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from svdlib.bars import bar
from svdlib.network import calls
from svdlib.network.calls import Batch, Batches, Objective
from svdlib.network.kinds import Layer
from svdlib.network.modes import hooked
from svdlib.network.opened import Network

# Sums over so few classes are faster with images side by side in memory.
FEW = 64
# Bytes that intermediate results may take, about, unless the caller says otherwise.
MEMORY = 2**28
# Contexts in which the model is another, or which give another model.
Variants = Callable[[], Iterable[AbstractContextManager[nn.Module | None]]]


@dataclass
class Moments:
    """Sums over images (4, variants): loss, right answers, paired difference and its square."""

    sums: Tensor

    @classmethod
    def zeros(cls, variants: int, device: torch.device) -> Moments:
        return cls(torch.zeros(4, variants, dtype=torch.float64, device=device))

    def add_logits(self, at: slice, z: Tensor, y: Tensor, full: Tensor) -> None:
        """Take in logits (R, b, classes) of variants; of b images labels y and losses ``full``."""
        z = z if z.element_size() >= 4 else z.float()
        classes = z.shape[-1]
        if classes < FEW:
            z = z.mT.contiguous().mT
        top = z.amax(-1)
        own = z.gather(-1, y.expand(len(z), -1)[..., None]).squeeze(-1)
        losses = (z - top[..., None]).exp_().sum(-1).log_() + (top - own)
        # Of equal largest logits the first is the answer, as by argmax, which takes longer.
        later = torch.arange(classes, device=y.device)[:, None] >= y
        barred = z.new_zeros(later.shape).masked_fill_(later, -torch.inf).mT
        self.add(at, losses, (own >= top) & (own > (z + barred).amax(-1)), full)

    def add(self, at: slice, losses: Tensor, right: Tensor, full: Tensor) -> None:
        """Take in losses (R, b) of variants, and whether answers are right, (R, b)."""
        difference = (losses - full).double()
        parts = (losses.double(), right.double(), difference, difference.square())
        self.sums[:, at].add_(torch.stack([part.sum(1) for part in parts]))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.sums + other.sums)

    def means(self, n: int) -> dict[str, list[float]]:
        """Over n images: loss, accuracy (percent), increase of the loss, and its standard error."""
        loss, right, difference, square = self.sums
        increase = difference / n
        variance = (square - n * increase.square()).clamp(min=0) / max(n - 1, 1)
        means = torch.stack([loss / n, 100 * right / n, increase, (variance / n).sqrt()])
        return dict(zip(("loss", "accuracy", "increase", "se"), means.tolist(), strict=True))


class Task:
    """A network's data, and the losses by which it and its variants are judged.

    A single batch is cut into pieces that fit memory, unless losses depend on the others of a
    call, as in a BatchNorm without running statistics. In `Network.measuring`.

    Attributes:
        size: inputs of a call, None where the data are batches already.
        width: numbers in the largest intermediate result for an input, of a single batch.
        mixes: whether an input's loss depends on the others of its call.
        loss: the network's own mean loss, once all batches were seen.
    """

    def __init__(
        self,
        net: Network,
        data: Batches,
        objective: Objective | None = None,
        accuracy: Objective | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.net, self.data, self.memory = net, data, memory
        self.objective, self.accuracy = objective, accuracy
        self.width, self.mixes, self.loss = 1, False, math.nan
        self.size = self._fitting_size() if calls.is_single(data) else None
        self._own: list[tuple[Tensor, Tensor]] = []

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        losses, right = calls.judged(model, batch, self.objective, self.accuracy)
        return losses.detach(), right.detach()

    def _fitting_size(self) -> int:
        """How many inputs fit memory; all, where what is found depends on those of a call."""
        n, model, sizes = calls.count_inputs(self.data), self.net.model, [1]
        few = next(calls.batches(self.data, min(n, 4)))

        def note(name: str, inputs: object, output: object) -> None:
            sizes.extend(t.numel() * t.element_size() for t in calls.tensors(output))

        with hooked(dict(model.named_modules()), after=note):
            together, _ = self.judge(model, few)
        self.width = -(-max(sizes) // (4 * min(n, 4)))
        if n < 4:
            return n
        halves = torch.cat([self.judge(model, half)[0] for half in calls.batches(few, 2)])
        self.mixes = not equal_up_to_rounding(halves, together)
        return n if self.mixes else max(1, self.memory // (2 * max(sizes)))

    def batches(
        self, progress: bool = False, stage: str = "losses"
    ) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Each batch, and the network's own losses on it and right answers (n,).

        Those of a single batch's pieces are kept; the next pass over others may show other ones.
        """
        known, losses, seen = list(self._own), 0.0, 0
        pieces = calls.batches(self.data, self.size)
        total = calls.count_batches(self.data, self.size)
        shown = bar(pieces, progress=progress, total=total, desc=stage, delay=3, leave=False)
        for number, batch in enumerate(shown):
            full, right = known[number] if known else self.judge(self.net.model, batch)
            if not known and not bool(full.isfinite().all()):
                raise ValueError("the model gives NaN or infinite losses on these data")
            if not known and self.size is not None:
                self._own.append((full, right))
            losses, seen = losses + full.double().sum().item(), seen + len(full)
            yield batch, full, right
        if seen == 0:
            raise ValueError("the data are empty: they give no loss")
        self.loss = losses / seen

    def measure(self, progress: bool = False) -> float:
        """See all batches once; the network's own mean loss."""
        for _ in self.batches(progress):
            pass
        return self.loss

    def means(
        self, variants: Variants, number: int, progress: bool = False, stage: str = "losses"
    ) -> dict[str, list[float]]:
        """`Moments.means` of the model itself, and of so many variants, in one pass over the data.

        All see each batch, so that losses are paired also where the next pass shows other batches.
        """
        moments, seen = Moments.zeros(0, torch.device("cpu")), 0
        for batch, full, right in self.batches(progress, stage):
            moments = moments if seen else Moments.zeros(1 + number, full.device)
            moments.add(slice(0, 1), full[None], right[None], full)
            for row, variant in enumerate(variants(), 1):
                with variant as other:
                    changed = self.net.model if other is None else other
                    losses, right = self.judge(changed, batch)
                if losses.shape != full.shape:
                    raise ValueError(
                        f"the objective gives {len(full)} losses for a batch, and {len(losses)} "
                        "once a layer is cut; it must give one per input"
                    )
                moments.add(slice(row, row + 1), losses[None], right[None], full)
            seen += len(full)
        return moments.means(seen)

    def sweeps(self, layers: Mapping[str, Layer]) -> Iterator[Sweep]:
        """These layers, each to be cut to any ranks, in as few passes over the data as possible."""
        yield Sweep(self, layers)


class Sweep:
    """Layers one at a time at any of their ranks, with weights replaced, in one pass."""

    def __init__(self, task: Task, layers: Mapping[str, Layer]) -> None:
        self.task, self.layers = task, layers
        self.factors = {name: layer.decomposed() for name, layer in layers.items()}

    def table(self, ranks: Iterable[int] | None = None, progress: bool = False) -> pd.DataFrame:
        """The rows of `loss_profile` for these ranks, capped at each layer's full rank, or all."""
        full = {name: layer.full_rank for name, layer in self.layers.items()}
        asked = range(max(full.values()) + 1) if ranks is None else list(ranks)
        at = {name: sorted({min(rank, full[name]) for rank in asked}) for name in full}
        rows = [(name, rank) for name in at for rank in at[name]]
        losses = pd.DataFrame(rows, columns=["layer", "rank"]).assign(**self.means(at, progress))
        for row in losses[~losses.loss.map(math.isfinite)].itertuples():
            raise ValueError(f"layer {row.layer!r} at rank {row.rank} gives NaN or infinite losses")
        tables = []
        for name, layer in self.layers.items():
            table, S = losses[losses.layer == name].copy(), self.factors[name][1].double()
            # Over groups the root mean square.
            sigma = [math.nan, *S.view(-1, S.shape[-1]).square().mean(0).sqrt().tolist()]
            table["rows"], table["columns"] = layer.shape
            table["sigma"] = [sigma[rank] for rank in at[name]]
            tables.append(table if layer.groups == 1 else table.assign(matrices=layer.groups))
        return pd.concat(tables, ignore_index=True)

    def means(self, ranks: Mapping[str, Sequence[int]], progress: bool) -> dict[str, list[float]]:

        def variants() -> Iterator[AbstractContextManager[None]]:
            for name, layer in self.layers.items():
                US, _, Vh = self.factors[name]
                for rank in ranks[name]:
                    yield replaced({layer.weight: layer.at_rank(US, Vh, rank)})

        means = self.task.means(variants, sum(map(len, ranks.values())), progress)
        return {name: values[1:] for name, values in means.items()}


@contextmanager
def replaced(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Other values of some parameters, wherever these are used; the old ones afterwards."""
    kept = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, value in weights.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value


def equal_up_to_rounding(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by at most √ε of the largest entry."""
    if found.shape != expected.shape or not expected.is_floating_point():
        return False
    within = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().amax()
    return bool(((found - expected).abs() <= within).all())


def check_data(x: Tensor, y: Tensor) -> None:
    """Refuse images and labels that are empty or do not fit one another."""
    for data, what in ((x, "inputs"), (y, "labels")):
        if not isinstance(data, Tensor) or data.is_meta or data.ndim == 0:
            kind = type(data).__name__
            raise ValueError(f"{what} must be a tensor with numbers, (n, …), not this {kind}")
    if x.device != y.device:
        raise ValueError(f"the inputs are on {x.device} but the labels on {y.device}")
    if len(x) == 0:
        raise ValueError("the data are empty; the loss needs at least one image")
    if y.shape != (len(x),):
        raise ValueError(f"{len(x)} inputs need labels of shape ({len(x)},), not {tuple(y.shape)}")
    calls.check_labels(y)
