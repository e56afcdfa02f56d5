"""An ensemble in parts: networks share nothing, so each part has a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from threading import Event

import torch
from torch import Tensor

from svdlib.data import with_ones
from svdlib.ensemble.descent import Step
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.projection import Choices, grouped
from svdlib.ensemble.stacks import sketch_generators

THREAD = 12_400_000  # multiply-adds, forward, worth a thread: sixteen of the paper's networks


def shares(nets: MLPEnsemble, batch_size: int) -> tuple[list[slice], bool]:
    """Which networks each part has, and whether operations are large enough for inner threads.

    By sizes alone, so results do not depend on the number of threads, but for the last bits of
    large networks. Eight to twenty-four of the paper's networks fit into a processor's cache.
    """
    work = sum(factor.numel() for factor in nets.parameters()) * batch_size / THREAD
    alone = nets.device.type != "cpu" or work < 1
    count = 1 if alone else min(len(nets), 2 * max(1, round(work / 2)))
    ends = [len(nets) * part // count for part in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)], work >= len(nets)


class Batches:
    """The batches of an epoch, as `descent` takes them, in an order that a generator may draw."""

    def __init__(
        self, images: Tensor, labels: Tensor, size: int, generator: torch.Generator | None
    ) -> None:
        self.images, self.size = images, size
        self.order: Sequence[Tensor] = ()
        self.grams: dict[int, Tensor] = {}
        if generator is not None:
            order = torch.randperm(len(images), generator=generator, device=images.device)
            labels, self.order = labels[order], order.split(size)
        self.labels = [part.t().flatten() for part in labels.split(size)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y of each batch; if there is an order, each x overwrites the one before."""
        if not self.order:
            yield from zip(self.images.split(self.size), self.labels, strict=True)
            return
        x = with_ones(self.images[: self.size, :-1].clone())
        for chosen, y in zip(self.order, self.labels, strict=True):
            torch.index_select(self.images, 0, chosen, out=x[: len(chosen)])
            yield x[: len(chosen)], y

    def with_grams(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """x and y of each batch, and x xᵀ without the ones, kept if there is no order."""
        for number, (x, y) in enumerate(self):
            if self.order or number not in self.grams:
                self.grams[number] = x[:, :-1] @ x[:, :-1].mT
            yield x, y, self.grams[number]


class Part:
    """Some networks of an ensemble while it is trained, after ``done`` steps."""

    def __init__(
        self,
        nets: MLPEnsemble,
        networks: slice,
        choices: Choices,
        optimizer: str,
        dropout: float,
        seed: int,
    ) -> None:
        self.networks, self.choices, self.done = networks, choices[networks], 0
        device, seeds = nets.device, (nets.seeds or range(len(nets)))[networks]
        self.settings = networks, optimizer, dropout, torch.Generator(device).manual_seed(seed)
        self.generators = sketch_generators(seeds, seed, device)
        # A new thread would work in the default stream instead of the caller's.
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self.begin(nets)

    def begin(self, nets: MLPEnsemble) -> None:
        self.step = Step(nets, *self.settings)
        self.groups = grouped(self.choices, self.step.weights, self.generators)

    @torch.inference_mode()
    def train(self, batches: Batches, rates: Sequence[float], losses: Tensor, stop: Event) -> None:
        """An epoch, until ``stop`` is set; losses (steps, all networks) get the batches' sums."""
        rows = losses[:, self.networks].unbind()
        thin = self.step.thin is not None or self._may_be_thin(batches.size)
        # Torch would look for better plans for a function that has been called a few times.
        with torch.cuda.stream(self.stream), torch.jit.optimized_execution(False):
            try:
                each = batches.with_grams() if thin else batches
                for batch, rate, loss in zip(each, rates, rows, strict=True):
                    if stop.is_set():
                        break
                    x, y, *grams = batch
                    self.step.take(x, y, rate, loss, *grams)
                    self.done += 1
                    for group in self.groups:
                        if group.projection.is_due(self.done, len(rates)):
                            group.project_()
                    if thin and self.step.thin is None:
                        self.step.hold(self.groups[0].hold_first(self.step.maps[0]))
            finally:
                self.step.store()

    def _may_be_thin(self, batch: int) -> bool:
        """Whether the first layer can be held as two factors from one projection to the next."""
        _, optimizer, dropout, _ = self.settings
        alike = len(set(self.choices)) == 1 and bool(self.groups)
        return alike and optimizer == "sgd" and not dropout and self.groups[0].holds_first(batch)

    @torch.inference_mode()
    def test(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(self.stream):
            return self.step.losses(x, y)
