"""Losses of variants of one network on the same images, paired with its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import cast

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.bars import bar
from svdlib.layers.kinds import Matrix, as_weight, choose, evaluating, hooked, ties, warn_of
from svdlib.objective import (
    Batch,
    Batches,
    Objective,
    asked,
    cut,
    inputs_in,
    is_whole,
    judged,
    refuse_once,
    tensors,
)


@dataclass
class Moments:
    """Per variant, summed over images: loss, correct answers, paired difference and its square."""

    loss: Tensor
    correct: Tensor
    difference: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, variants: int, device: torch.device) -> Moments:
        """Nothing seen yet."""
        return cls(*torch.zeros(4, variants, dtype=torch.float64, device=device))

    def add(self, at: slice, z: Tensor, y: Tensor, full: Tensor) -> None:
        """Take in logits (R, b, classes) of the variants ``at``, for b images of labels y (b,).

        ``full`` (b,) are the losses of the network itself.
        """
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
        right = (own >= top) & (own > (z + barred).amax(-1))
        difference = (losses - full).double()
        self.loss[at] += losses.double().sum(1)
        self.correct[at] += right.sum(1)
        self.difference[at] += difference.sum(1)
        self.square[at] += difference.square().sum(1)

    def take(self, at: int, losses: Tensor, right: Tensor, full: Tensor) -> None:
        """Take in losses (b,) of one variant, and whether (b,) its answers are right."""
        difference = losses.double() - full.double()
        self.loss[at] += losses.double().sum()
        self.correct[at] += right.double().sum()
        self.difference[at] += difference.sum()
        self.square[at] += difference.square().sum()

    def __add__(self, other: Moments) -> Moments:
        """Of these images and those."""
        return Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def means(self, n: int) -> dict[str, list[float]]:
        """Over n images: loss, accuracy (per cent), increase of the loss, and its standard error.

        >>> moments = Moments.zeros(1, torch.device("cpu"))
        >>> z, y = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]), torch.tensor([0, 1])
        >>> moments.add(slice(0, 1), z, y, full=torch.tensor([0.5, 0.5]))
        >>> {name: round(value, 3) for name, [value] in moments.means(2).items()}
        {'loss': 0.693, 'accuracy': 50.0, 'increase': 0.193, 'se': 0.0}
        """
        mean = self.difference / n
        variance = (self.square - n * mean.square()).clamp(min=0) / max(n - 1, 1)
        return {
            "loss": (self.loss / n).tolist(),
            "accuracy": (100 * self.correct / n).tolist(),
            "increase": mean.tolist(),
            "se": (variance / n).sqrt().tolist(),
        }


# Sums over so few classes are faster with images side by side in memory.
FEW = 64

# Numbers that fit a processor's cache, about: stacks of this size are fastest.
CACHED = 2**20

# Networks of fewer numbers repeat small operations, which more threads only hold up.
SMALL = 100_000


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """The model as it is measured: evaluation mode, no gradients, none of the caller's autocast.

    Random numbers that it, an objective or a DataLoader draws are none of the caller's.

    >>> model = nn.Dropout()
    >>> with measuring(model):
    ...     model.training, torch.is_grad_enabled()
    (False, False)
    """
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    inner = threads.inside(1 if small else torch.get_num_threads())
    cuda = {parameter.get_device() for parameter in model.parameters() if parameter.is_cuda}
    random = torch.random.fork_rng(devices=sorted(cuda))
    with torch.no_grad(), threads.plain(), random, inner, evaluating(model):
        yield


@dataclass(frozen=True)
class Task:
    """What a network is measured by, where it is not images and labels.

    Args:
        data: batches, or one that is given whole, to be cut into ``size`` inputs each.
        objective, accuracy: see `objective.judged`.
    """

    data: Batches
    objective: Objective | None
    accuracy: Objective | None
    size: int | None

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses (n,) of a batch and right answers (n,)."""
        return judged(model, batch, self.objective, self.accuracy)

    def means(
        self,
        model: nn.Module,
        variants: Callable[[], Iterable[AbstractContextManager[nn.Module | None]]],
        number: int,
        progress: bool = False,
    ) -> dict[str, list[float]]:
        """`Moments.means` of the model itself, and of so many variants, in one pass over the data.

        Each batch is seen by all, so that losses are paired also where the next pass shows other
        batches.

        Args:
            variants: gives for each a context in which the model is another, or which gives
                another model, see `replaced`.

        Raises:
            ValueError: empty data, NaN or infinite losses of the model itself, a variant with
                another number of losses.
        """
        moments, seen = None, 0
        number_of = len(self.data) if hasattr(self.data, "__len__") and self.size is None else None
        batches = cut(self.data, self.size)
        for batch in bar(batches, progress=progress, total=number_of, desc="batches"):
            full, right = self.judge(model, batch)
            if not bool(full.isfinite().all()):
                raise ValueError("the model gives NaN or infinite losses on these data")
            moments = moments or Moments.zeros(1 + number, full.device)
            moments.take(0, full, right, full)
            for row, variant in enumerate(variants(), 1):
                with variant as other:
                    losses, right = self.judge(model if other is None else other, batch)
                if losses.shape != full.shape:
                    raise ValueError(
                        f"the objective gives {len(full)} losses for a batch, and {len(losses)} "
                        "for the same batch with a layer cut; it must give one an input"
                    )
                moments.take(row, losses, right, full)
            seen += len(full)
        if moments is None or seen == 0:
            raise ValueError("the data are empty: not one loss is given for them")
        return moments.means(seen)


def task(
    model: nn.Module,
    data: Batches,
    y: Tensor | None,
    objective: Objective | None,
    accuracy: Objective | None,
    memory: int,
    why: str | None = None,
) -> Task | tuple[Tensor, Tensor]:
    """What the network is measured by; of images and labels with class scores, just these.

    For images (n, …) with labels (n,) of which the model gives scores (n, classes), there are fast
    ways. In `measuring`.

    Args:
        y: labels of the inputs ``data``, where these are not in it.
        why: who looks at the data several times, if anybody does.

    Raises:
        ValueError: as `check_data`; data that can't be looked at so often.
    """
    checks.positive_int(memory, "memory")
    for function, what in ((objective, "objective"), (accuracy, "accuracy")):
        if function is not None and not callable(function):
            raise ValueError(f"{what} must be a function of (model, batch), not {function!r}")
    if why is not None:
        refuse_once(data, why)
    if y is not None:
        data = (data, y)
    if isinstance(data, tuple) and len(data) == 2 and not objective and not accuracy:
        x, y = data
        if not _are_many(x, y):
            check_data(x, y, memory)
            few = asked(model, x[:2].clone())
            if isinstance(few, Tensor) and few.ndim == 2:
                return x, y
    if not is_whole(data):
        return Task(data, objective, accuracy, None)
    return Task(data, objective, accuracy, _fitting(model, data, objective, accuracy, memory))


def whole_task(
    model: nn.Module, data: Batches, objective: Objective | None, accuracy: Objective | None
) -> Task:
    """As `task`, without fast ways. In `measuring`."""
    memory = 2**28
    found = task(model, data, None, objective, accuracy, memory)
    if isinstance(found, Task):
        return found
    return Task(found, None, None, _fitting(model, found, None, None, memory))


def _are_many(x: Batch, y: object) -> bool:
    """Whether inputs are several tensors, or have several labels each."""
    return isinstance(y, Tensor) and (
        y.ndim > 1 or (not isinstance(x, Tensor) and bool(tensors(x)))
    )


def _fitting(
    model: nn.Module,
    data: Batches,
    objective: Objective | None,
    accuracy: Objective | None,
    memory: int,
) -> int:
    """How many inputs fit memory; all, where what is found depends on those of a call."""
    n = inputs_in(data)
    if n < 4:
        return n
    few = next(cut(data, 4))
    largest = [1]

    def note(name: str, inputs: object, output: object) -> None:
        largest.extend(t.numel() * t.element_size() for t in tensors(output))

    with hooked(dict(model.named_modules()), after=note):
        whole, _ = judged(model, few, objective, accuracy)
    halves = [judged(model, half, objective, accuracy)[0] for half in cut(few, 2)]
    if not alike(whole, torch.cat(halves)):
        return n
    return max(1, memory // (2 * max(largest)))


def full_losses(
    model: nn.Module, x: Tensor, y: Tensor, memory: int, habit: Habits
) -> tuple[Tensor, Tensor]:
    """Loss and correctness of the network itself on every image.

    Raises:
        ValueError: labels beyond the outputs, NaN or infinite losses.
    """
    losses, correct = [], []
    size = habit.images(model, x, memory)
    for images, labels in zip(x.split(size), y.split(size), strict=True):
        z = model(habit.given(images))
        if not isinstance(z, Tensor) or z.shape[:-1] != (len(images),):
            told = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(
                f"the model must give class scores (n, classes), here ({len(images)}, classes), "
                f"not {told}"
            )
        z = z if z.element_size() >= 4 else z.float()
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


@dataclass(frozen=True)
class Habits:
    """What a model does with the images of a call.

    Args:
        mixes: an image's result depends on the others of its call, as in a BatchNorm without
            running statistics: all images must be given at once.
        writes: the model works in place on what it is given.
    """

    mixes: bool
    writes: bool

    def images(self, model: nn.Module, x: Tensor, memory: int) -> int:
        """How many images a call takes: as memory allows, or all that there are."""
        return len(x) if self.mixes else max(1, memory // (8 * width(model, x) * x.element_size()))

    def given(self, x: Tensor) -> Tensor:
        """What to give the model for x, which stays as it is."""
        return x.clone() if self.writes else x


def habits(model: nn.Module, x: Tensor) -> Habits:
    """Seen from a call with four images, and two with the halves of them.

    >>> norm = nn.BatchNorm1d(3, track_running_stats=False)
    >>> habits(norm, torch.arange(12.0).view(4, 3))
    Habits(mixes=True, writes=False)
    """
    few = x[:4].clone()
    whole = model(few)
    writes = not torch.equal(few, x[:4])
    if len(few) < 4:
        return Habits(True, writes)
    halves = [model(half.clone()) for half in x[:4].split(2)]
    mixes = isinstance(whole, Tensor) and not alike(whole, torch.cat(halves))
    return Habits(mixes, writes)


def alike(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by rounding alone, at most √ε of the largest entry.

    >>> alike(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]))
    False
    """
    if found.shape != expected.shape or not expected.is_floating_point():
        return False
    within = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().amax()
    return bool(((found - expected).abs() <= within).all())


def profiled_layers(model: nn.Module, names: Iterable[str] | None) -> dict[str, Matrix]:
    """The layers of these names, or all that hold a matrix of their own, of a caller's model.

    Raises:
        ValueError: as `choose`, no layer that can be profiled, NaN or infinite weights.
    """
    layers, left = choose(model, names, "profile")
    for name, reason in left.items() if not layers else ():
        raise ValueError(f"no layer can be profiled, such as {name!r}: {reason}")
    for name, layer in layers.items():
        checks.finite(layer.weight, f"the weight of layer {name!r}")
    warn_of(left, depth=3)
    return cast(dict[str, Matrix], layers)  # an opened model has no factorized ones


def with_ties(profile: pd.DataFrame, layers: Mapping[str, Matrix]) -> pd.DataFrame:
    """A table of layers with a column "shared", where weights are shared: the first of those alike.

    >>> with_ties(pd.DataFrame({"layer": ["0"]}), {"0": nn.Linear(3, 3)}).columns.tolist()
    ['layer']
    """
    first = {name: names[0] for names in ties(layers) for name in names}
    return profile.assign(shared=profile.layer.replace(first)) if first else profile


def check_data(x: Tensor, y: Tensor, memory: int = 1) -> None:
    """Refuse data that are empty or do not fit one another, and memory below a byte."""
    checks.positive_int(memory, "memory")
    for data, what in ((x, "inputs"), (y, "labels")):
        if not isinstance(data, Tensor) or data.is_meta or data.ndim == 0:
            kind = type(data).__name__
            raise ValueError(f"{what} must be a tensor with numbers, (n, …), not this {kind}")
    if y.dtype != torch.int64:
        raise ValueError(f"labels must be class numbers of type torch.int64, not {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"the inputs are on {x.device} but the labels on {y.device}")
    if len(x) == 0:
        raise ValueError("the data are empty; the loss needs at least one image")
    if y.shape != (len(x),):
        raise ValueError(f"{len(x)} inputs need labels of shape ({len(x)},), not {tuple(y.shape)}")
    if int(y.min()) < 0:
        raise ValueError(f"labels must be at least 0, not {int(y.min())}")


@contextmanager
def replaced(weights: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Other values for some parameters, wherever these are used; the old ones afterwards."""
    kept = {parameter: parameter.data for parameter in weights}
    try:
        for parameter, value in weights.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in kept.items():
            parameter.data = value


def cut_weight(layer: Matrix, US: Tensor, Vh: Tensor, rank: int) -> Tensor:
    """The layer's weight at a rank, from the factors U Σ and Vᵀ of its matrix.

    >>> cut_weight(nn.Linear(3, 2), torch.rand(2, 2), torch.rand(2, 3), 0)
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    return as_weight(layer, US[..., :rank] @ Vh[..., :rank, :]).to(layer.weight.dtype)


def width(model: nn.Module, x: Tensor, behind: str | None = None) -> int:
    """Numbers in the largest result for one image, of any module or of those from ``behind`` on.

    Seen with two of the images x, where there are, since a BatchNorm may refuse a single one.

    >>> width(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2)), torch.rand(2, 3))
    9
    """
    largest = [1]
    x = x[:2].clone()
    steps = dict(model.named_children())
    if behind is not None:
        names = list(steps)
        steps = {name: steps[name] for name in names[names.index(behind) :]}
    modules = {
        f"{step}.{name}": module
        for step, part in steps.items()
        for name, module in part.named_modules()
    }

    def note(name: str, inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            largest.append(output.numel())

    with torch.no_grad(), hooked(modules, after=note):
        note("", x, model(x))
    return -(-max(largest) // len(x))
