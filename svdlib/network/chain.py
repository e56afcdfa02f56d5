"""The fast way for a chain of layers: only what is behind a layer runs again for another rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from svdlib import checks
from svdlib.bars import bar
from svdlib.network import calls
from svdlib.network.calls import Batch, Batches, Objective
from svdlib.network.kinds import KINDS, Layer
from svdlib.network.low_rank import LowRank
from svdlib.network.modes import hooked
from svdlib.network.opened import Network
from svdlib.network.task import MEMORY, Moments, Sweep, Task, check_data

# Numbers that fit a processor's cache, about: stacks of this size are fastest.
CACHED = 2**20
# Modules that work on each number alone, or do nothing in evaluation mode.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Tanhshrink, nn.Identity, nn.Dropout, nn.AlphaDropout,
)  # fmt: skip
# Modules that work on each input of a call alone.
INPUTWISE = (
    *ELEMENTWISE, *(type_ for kind in KINDS for type_ in kind.types), nn.LayerNorm, nn.GroupNorm,
    nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
)  # fmt: skip


def is_inputwise(step: nn.Module) -> bool:
    """Whether a module's result for an input does not depend on the others of its call."""
    if type(step) is nn.Flatten:
        return step.start_dim > 0
    if type(step) is nn.Unflatten:
        return isinstance(step.dim, int) and step.dim > 0
    if type(step) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return step.running_mean is not None
    return type(step) in INPUTWISE


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def chain_of(model: nn.Module) -> dict[str, nn.Module] | None:
    """The steps of a chain by name, those of nested ``nn.Sequential`` too; None if it is no chain.

    In a chain every step is called once, and works on each input by itself.
    """
    plain = isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward
    if not plain or has_hooks(model) or model._compiled_call_impl is not None:
        return None
    steps: dict[str, nn.Module] = {}
    for name, child in model._modules.items():
        assert child is not None
        inner = chain_of(child)
        if inner is not None:
            steps |= {f"{name}.{place}": step for place, step in inner.items()}
        elif is_inputwise(child) and not has_hooks(child):
            steps[name] = child
        else:
            return None
    return steps if len(set(map(id, steps.values()))) == len(steps) else None


class Chain(Task):
    """A chain of layers with class scores for images x (n, …) and labels y (n,)."""

    def __init__(
        self, net: Network, steps: dict[str, nn.Module], data: tuple[Tensor, Tensor], memory: int
    ) -> None:
        self.steps = steps
        self.in_place = any(getattr(step, "inplace", False) for step in steps.values())
        super().__init__(net, data, memory=memory)

    def _fitting_size(self) -> int:
        self.widths: list[int] = []

        def note(name: str, inputs: object, z: Tensor) -> None:
            self.widths.append(-(-z.numel() // len(z)))

        with hooked(self.steps, after=note):
            z = calls.called(self.net.model, self.given(self.data[0][:2]))
        self.width = max(self.widths)
        return max(1, self.memory // (8 * self.width * z.element_size()))

    def given(self, x: Tensor) -> Tensor:
        """What to give the steps for x, which stays as it is."""
        return x.clone() if self.in_place else x

    def judge(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = batch
        z = model(self.given(x))
        if (shape := tuple(z.shape))[:-1] != (len(x),):
            raise ValueError(f"the model must give class scores ({len(x)}, classes), not {shape}")
        return calls.cross_entropy(z, y)

    def sweeps(self, layers: Mapping[str, Layer]) -> Iterator[Sweep]:
        """As `Task`, with a `ChainSweep` where the layer has one matrix of its own."""
        for name, layer in layers.items():
            plain = layer.has_code() and layer.weight.element_size() >= 4 and name in self.steps
            alone = not self.net.is_shared(layer) and self.net.obstacle(name, True) is None
            yield (ChainSweep if plain and alone else Sweep)(self, {name: layer})


class ChainSweep(Sweep):
    """A layer of a chain at any of its ranks, by nested sums of its code Vᵀ X."""

    def __init__(self, task: Chain, layers: Mapping[str, Layer]) -> None:
        super().__init__(task, layers)
        ((self.name, self.layer),) = layers.items()
        self.US, S, self.Vh = self.factors[self.name]
        steps, place = list(task.steps.values()), list(task.steps).index(self.name)
        self.before, self.behind = nn.Sequential(*steps[:place]), nn.Sequential(*steps[place + 1 :])
        x = task.data[0]
        numbers = max(task.widths[place:])
        # Four arrays of that width live at once: the sum, the stack, and two behind it.
        cells = max(1, task.memory // (4 * numbers * x.element_size()))
        self.images = min(len(x), cells, max(256, CACHED // numbers))
        self.block = max(1, min(cells, CACHED // numbers) // self.images)
        self.keep = len(x) * len(S) * x.element_size() <= task.memory
        self.codes: dict[int, Tensor] = {}

    def means(self, ranks: Mapping[str, Sequence[int]], progress: bool) -> dict[str, list[float]]:
        wanted, task = ranks[self.name], cast(Chain, self.task)
        x, y = task.data
        full = torch.cat([losses for _, losses, _ in task.batches()])
        moments = Moments.zeros(len(wanted), x.device)
        starts = range(0, len(x), self.images)
        for start in bar(starts, progress=progress, desc=f"layer {self.name}", leave=False):
            part = slice(start, start + self.images)
            for at, logits in self.logits(task.given(x[part]), start, wanted):
                moments.add_logits(at, logits, y[part], full[part])
        return moments.means(len(x))

    def logits(self, x: Tensor, start: int, ranks: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """The logits (R, b, classes) of images x at blocks of ranks: nested sums, run on together."""
        if start not in self.codes:
            code = self.layer.apply(self.before(x), self.Vh)
            self.codes = {**(self.codes if self.keep else {}), start: code}
        code = self.codes[start]
        sums = self._sums(code, ranks)
        for first in range(0, len(ranks), self.block):
            at = slice(first, min(first + self.block, len(ranks)))
            z = next(sums)
            stack = z.expand(at.stop - at.start, *z.shape).clone()
            for row in stack[1:]:
                row.copy_(next(sums))
            logits = self.behind(stack.flatten(0, 1))
            yield at, logits.view(len(stack), len(code), -1)

    def _sums(self, code: Tensor, ranks: Sequence[int]) -> Iterator[Tensor]:
        sizes, dim = list(code.shape), self.layer.feature_dim
        sizes[dim] = len(self.US)
        z = code.new_zeros(sizes)
        if self.layer.bias is not None:
            z.movedim(dim, -1).add_(self.layer.bias.detach())
        for low, rank in pairwise((0, *ranks)):
            self._add_terms(z, code, slice(low, rank))
            yield z

    def _add_terms(self, z: Tensor, code: Tensor, terms: slice) -> None:
        """Z += Σ σ_j u_j (v_jᵀ X) over these terms, in place."""
        if self.layer.feature_dim == -1:
            z.flatten(0, -2).addmm_(code.flatten(0, -2)[:, terms], self.US[:, terms].mT)
        elif terms.start < terms.stop:
            z.flatten(2).add_(self.US[:, terms] @ code[:, terms].flatten(2))


def task_of(
    net: Network,
    data: Batches,
    y: Tensor | None = None,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    memory: int = MEMORY,
    why: str | None = None,
) -> Task:
    """What the network is measured by. In `Network.measuring`.

    Args:
        y: labels of the inputs ``data``, where these are not in it.
        why: the name of a function that reads the data several times, if any does.
    """
    checks.positive_int(memory, "memory")
    for function, what in ((objective, "objective"), (accuracy, "accuracy")):
        if function is not None and not callable(function):
            raise ValueError(f"{what} must be a function of (model, batch), not {function!r}")
    if why is not None:
        calls.refuse_generator(data, why)
    data = data if y is None else (data, y)
    if isinstance(data, tuple) and len(data) == 2 and not objective and not accuracy:
        x, y = data
        nested = not isinstance(x, Tensor) and bool(calls.tensors(x))
        if not isinstance(y, Tensor) or (y.ndim <= 1 and not nested):
            check_data(x, cast(Tensor, y))
            if (steps := chain_of(net.model)) is not None:
                return Chain(net, steps, data, memory)
    return Task(net, data, objective, accuracy, memory)


class Link:
    """A Linear layer of a perceptron and the activations before it."""

    def __init__(self, name: str, layer: Layer, before: Sequence[nn.Module]) -> None:
        self.name, self.layer, self.before = name, layer, before
        self.rows, self.columns = layer.shape
        self.limit = layer.full_rank
        self.ranks: Sequence[int] = ()

    def decompose(self, ranks: Sequence[int]) -> None:
        """Take the SVD, as far as these ranks, in rising order, need it."""
        U, S, Vh = torch.linalg.svd(self.layer.weight.detach(), full_matrices=False)
        self.ranks, self.Vh = ranks, Vh[: ranks[-1]]
        self.steps = [rank - low for low, rank in pairwise((0, *ranks))]
        self.US = (U * S)[:, : ranks[-1]].split(self.steps, dim=1)

    def sums(self, h: Tensor) -> Iterator[Tensor]:
        """The layer's output (rows, b) at each rank, from h (columns, b): one growing tensor."""
        code = self.Vh @ h
        z = code.new_zeros(self.rows, code.shape[1])
        if self.layer.bias is not None:
            z += self.layer.bias.detach()[:, None]
        for US, part in zip(self.US, code.split(self.steps), strict=True):
            yield z.addmm_(US, part)


def is_relu_perceptron(model: nn.Sequential) -> bool:
    """Whether a model is Linear, ReLU, …, Linear, each Linear dense or factorized."""
    linear = all(type(layer) in (nn.Linear, LowRank) for layer in model[::2])
    return linear and len(model) % 2 == 1 and all(type(step) is nn.ReLU for step in model[1::2])


def perceptron_of(net: Network) -> list[Link]:
    """The layers of a perceptron in their order: Linear ones, with activations between."""
    model, kind = net.model, type(net.model).__name__
    links: list[Link] = []
    before: list[nn.Module] = []

    def refused(reason: str) -> ValueError:
        return ValueError(
            "joint_profile takes a perceptron, an nn.Sequential of Linear layers with activations "
            f"between; loss_profile takes any module; {reason}"
        )

    if type(model).forward is not nn.Sequential.forward:
        raise refused(f"this {kind} has a forward of its own")
    if has_hooks(model):
        raise refused(f"this {kind} has hooks")
    for name, step in model.named_children():
        if isinstance(step, nn.Linear):
            layer = net.layers[name]
            if reason := net.obstacle(name, replace=True):
                raise refused(f"layer {name!r}: {reason}")
            if net.is_shared(layer):
                raise refused(f"layer {name!r}: its weight is shared with another layer")
            checks.finite(layer.weight, f"the weight of layer {name!r}")
            links.append(Link(name, layer, before))
            before = []
        elif type(step) in ELEMENTWISE:
            before.append(step)
        # Inputs are flattened anyway.
        elif links or type(step) is not nn.Flatten or (step.start_dim, step.end_dim) != (1, -1):
            raise refused(f"step {name!r} is a {type(step).__name__}")
    if not links or before:
        raise refused("the last step must be a Linear layer")
    if len(list(model.children())) < len(model._modules):
        raise refused("a step is used twice")
    return links
