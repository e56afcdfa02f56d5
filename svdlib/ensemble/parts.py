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
from svdlib.ensemble.projection import Choices, grouped, sketch_generators

# Multiply-adds of a step, forward, that are worth a thread: sixteen of the paper's networks.
THREAD = 12_400_000


def shares(nets: MLPEnsemble, batch_size: int) -> tuple[list[slice], bool]:
    """Which networks each part has, and whether operations are large enough for inner threads.

    By sizes alone, so results do not depend on the number of threads. Networks like the paper's
    come in parts of eight to twenty-four, which fit into a processor's cache. A large one is a part
    of its own, and remaining threads work inside its products (which may change the last bits).
    """
    work = sum(factor.numel() for factor in nets.parameters()) * batch_size / THREAD
    count = 1
    if nets.device.type == "cpu" and work >= 1:
        count = min(len(nets), 2 * max(1, round(work / 2)))
    ends = [len(nets) * part // count for part in range(count + 1)]
    return [slice(*pair) for pair in pairwise(ends)], work >= len(nets)


class Batches:
    """The batches of an epoch, as `descent` takes them, in an order that a generator may draw.

    Images (n, features + 1) end in ones; labels (n, classes) are minus one-hot.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, size: int, generator: torch.Generator | None
    ) -> None:
        self.images, self.size = images, size
        self.order: Sequence[Tensor] = ()
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


class Part:
    """Some networks of an ensemble while it is trained, after ``done`` steps.

    ``seed`` is that of the dropout, the same in all parts, and with the networks' own of sketches.
    """

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
        """Train the tensors that the ensemble holds now."""
        self.step = Step(nets, *self.settings)
        self.groups = grouped(self.choices, self.step.weights, self.generators)

    @torch.inference_mode()
    def train(self, batches: Batches, rates: Sequence[float], losses: Tensor, stop: Event) -> None:
        """An epoch, until ``stop`` is set; losses (steps, all networks) get the batches' sums."""
        rows = losses[:, self.networks].unbind()
        with torch.cuda.stream(self.stream):
            try:
                for (x, y), rate, loss in zip(batches, rates, rows, strict=True):
                    if stop.is_set():
                        break
                    self.step.take(x, y, rate, loss)
                    self.done += 1
                    for group in self.groups:
                        if group.projection.is_due(self.done, len(rates)):
                            group.project_()
            finally:
                self.step.store()

    @torch.inference_mode()
    def test(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.stream(self.stream):
            return self.step.losses(x, y)
