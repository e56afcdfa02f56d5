"""Which low-rank approximation replaces an ensemble's weights, when and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal
from weakref import ref

import torch
from torch import Tensor, nn

from svdlib import checks
from svdlib.ensemble import thin
from svdlib.ensemble.affine import Affine
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.stacks import Generators, layer_stacks
from svdlib.layers.project import project_
from svdlib.layers.steps import Attached, after_steps
from svdlib.linalg.svd import METHODS, OVERSAMPLE, POWER_ITERS
from svdlib.network.opened import Network


@dataclass(frozen=True)
class Projection:
    """Which low-rank approximation replaces the weights while a network trains, and when.

    Args:
        method: "truncsvd" (the best approximation) or "rsvd" (the randomized one).
        rank: one for all layers, or one per layer; a layer of no higher rank stays as it is.
        every: "epoch", "step", or a number of steps.
        oversample, power_iters: see `randomized_svd`.
    """

    method: Literal["rsvd", "truncsvd"]
    rank: int | tuple[int, ...]
    every: Literal["epoch", "step"] | int = "epoch"
    oversample: int = OVERSAMPLE
    power_iters: int = POWER_ITERS

    def __post_init__(self) -> None:
        checks.one_of(self.method, METHODS, "method")
        if isinstance(self.rank, Iterable) and getattr(self.rank, "ndim", True):
            ranks = tuple(checks.positive_int(rank, "rank") for rank in self.rank)
            object.__setattr__(self, "rank", ranks)
        else:
            object.__setattr__(self, "rank", checks.positive_int(self.rank, "rank"))
        if isinstance(self.every, str):
            checks.one_of(self.every, ("epoch", "step"), "every")
        else:
            object.__setattr__(self, "every", checks.positive_int(self.every, "every"))
        checks.positive_int(self.oversample, "oversample", least=0)
        checks.positive_int(self.power_iters, "power_iters", least=0)

    @classmethod
    def published(cls, method: Literal["rsvd", "truncsvd"], rank: int = 10) -> Projection:
        """The projection in the paper's code, unlike its text: after every step.

        The truncated SVD keeps rank + 1 terms, the randomized SVD draws ``rank`` vectors in all.
        """
        rank = checks.positive_int(rank, "rank")
        if method == "truncsvd":
            return cls(method, rank + 1, every="step")
        return cls(method, rank, every="step", oversample=0, power_iters=2)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        layers: Iterable[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> Attached:
        """Project a model's weights after steps of its optimizer, in a training loop of your own.

        The optimizer may be wrapped or copied, before or after. Steps that a gradient scaler skips
        are not counted. Layers whose weights the optimizer does not step stay, such as a frozen
        backbone's.

        Args:
            model: changed in place; layers that can't be projected stay, with one warning.
            optimizer: the one that steps the model's parameters.
            layers: names of layers or parameters, as `project_` takes them; all layers by default.
            generator: the source of sketches, on the model's device.

        Returns:
            a handle; ``handle.remove()`` ends the projections, and ``handle.project()`` projects
            once more, where the last step was not one that a projection follows.

        Raises:
            ValueError: ``every="epoch"``, which an optimizer does not know, an optimizer of none of
                the layers or without one that is named, or as `project_`.

        >>> model = nn.Linear(20, 15)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = Projection("truncsvd", rank=3, every="step").attach(model, optimizer)
        """
        if self.every == "epoch":
            raise ValueError("an optimizer knows no epochs; give every='step' or a number of steps")
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(model, nn.Module) or groups is None:
            given = f"{type(model).__name__} and {type(optimizer).__name__}"
            raise ValueError(f"attach takes a model and its optimizer, not {given}")
        net = Network(model)
        chosen = net.choose(layers, "project")
        # By memory, as the projections of attention are views of its parameters.
        stepped = {p.untyped_storage().data_ptr() for group in groups for p in group["params"]}
        place = lambda layer: layer.weights[-1].untyped_storage().data_ptr()
        foreign = [name for name, layer in chosen.items() if place(layer) not in stepped]
        if foreign and (layers is not None or len(foreign) == len(chosen)):
            raise ValueError(
                f"the optimizer does not step layer {foreign[0]!r}; give the one that trains it"
            )
        net.left |= dict.fromkeys(foreign, "the optimizer does not step it")
        chosen = {name: layer for name, layer in chosen.items() if name not in foreign}
        net.warn()
        ranks = dict(zip(chosen, self.ranks(len(chosen)), strict=True))
        net.check_ties(ranks, "project")
        if not ranks:
            raise ValueError("no layer of the model can be projected")
        sketch = {"oversample": self.oversample, "power_iters": self.power_iters}
        steps, known = count(1), ref(model)

        def project() -> None:
            if (alive := known()) is not None:
                project_(alive, ranks, self.method, **sketch, generator=generator)

        def follow() -> None:
            if self.is_due(next(steps)):
                project()

        places = set(map(place, chosen.values()))
        own = [p for p in model.parameters() if p.untyped_storage().data_ptr() in places]
        return Attached(project, after_steps(own, follow))

    def is_due(self, done: int, epoch: int = 0) -> bool:
        """Whether a projection follows step ``done`` (from 1); ``epoch`` is an epoch's steps."""
        every = {"epoch": epoch, "step": 1}.get(str(self.every), self.every)
        return done % int(every) == 0

    def ranks(self, layers: int) -> tuple[int, ...]:
        if isinstance(self.rank, int):
            return (self.rank,) * layers
        if len(self.rank) != layers:
            raise ValueError(f"{layers} layers need {layers} ranks, not {self.rank}")
        return self.rank


Choices = Sequence[Projection | None]  # one per network
Projections = Projection | None | Choices


class Group:
    """Networks, numbers among ``weights`` (S, out, in) per layer, that share a projection."""

    def __init__(
        self, projection: Projection, networks: list[int], weights: list[Tensor], own: Generators
    ) -> None:
        self.projection, self.projected = projection, False
        low, high = networks[0], networks[-1] + 1
        scattered = high - low > len(networks)
        self.index = torch.tensor(networks, device=weights[0].device)
        self.weights = [W[self.index] if scattered else W[low:high] for W in weights]
        self.copies = list(zip(weights, self.weights, strict=True)) if scattered else []
        ranks = projection.ranks(len(weights))
        self.stacks = layer_stacks(self.weights, ranks, projection, own)

    def project_(self) -> None:
        """Project the weights in place."""
        for W, own in self.copies:
            torch.index_select(W, 0, self.index, out=own)
        warm = self.projected and self.projection.every == "step"
        for stack in self.stacks:
            stack.project_(warm)
        self.projected = True
        for W, own in self.copies:
            W.index_copy_(0, self.index, own)

    def holds_first(self, batch: int) -> bool:
        """Whether the first layer is better held as two factors: its products with x then rule."""
        rows, columns = self.weights[0].shape[1:]
        stack = next(iter(self.stacks), None)
        followed = stack is not None and stack.by_gram and stack.sides[0] is self.weights[0]
        return followed and self.projection.every == "step" and 2 * max(rows, batch) <= columns

    def hold_first(self, dense: Affine) -> thin.Layer:
        """The first layer, just projected, as two factors, which projects others in its steps."""
        followed = [stack for stack in self.stacks if stack.by_gram]
        self.stacks = [stack for stack in self.stacks if not stack.by_gram]
        return thin.Layer(dense, followed)


def per_network(projection: Projections, nets: MLPEnsemble) -> Choices:
    """A projection or None for each network, if they fit the networks."""
    if projection is None or isinstance(projection, Projection):
        projection = [projection] * len(nets)
    choices = list(projection)
    if len(choices) != len(nets):
        raise ValueError(f"{len(nets)} networks need as many projections, not {len(choices)}")
    if nets.factorized and any(choices):
        raise ValueError("factorized networks have low rank already; give a tail, no projection")
    for choice in choices:
        if isinstance(choice, Projection):
            choice.ranks(len(nets.layers))
        elif choice is not None:
            raise ValueError(f"a projection is a svdlib.Projection or None, not {choice!r}")
    return choices


def grouped(choices: Choices, weights: list[Tensor], generators: Generators = ()) -> list[Group]:
    """Networks by projection, each then one batched call per layer."""
    groups = []
    for choice in dict.fromkeys(filter(None, choices)):
        networks = [network for network, other in enumerate(choices) if other == choice]
        own = [generators[network] for network in networks if generators]
        groups.append(Group(choice, networks, weights, own))
    return groups
