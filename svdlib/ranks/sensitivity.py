"""What a layer's rank costs the loss, to second order, from one pass forward and backward."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import pad

from svdlib.bars import bar
from svdlib.layers.calibrate import Fit, Gradients
from svdlib.network import calls
from svdlib.network.calls import Batch
from svdlib.network.kinds import Layer
from svdlib.network.modes import hooked
from svdlib.network.task import Task

# Gradients of each layer that are enough to tell one direction of its output from another.
PLACES = 4096
# A mean loss below it is a distance that has no gradient.
MINIMUM = 1e-6


def gradients(
    task: Task, layers: Mapping[str, Layer], whole: Collection[str], progress: bool
) -> dict[str, Gradients]:
    """The `Gradients` of layers over as many of a task's inputs as give `PLACES` to each.

    Where the loss has no gradient, or is at its minimum, as a distance to the network's own outputs
    is, they are those of the outputs' products with normal random numbers: their second moment is
    the second derivative of half the outputs' squared distance.

    ``power`` is found for the layers in ``whole`` only. A layer without influence on the loss has
    G = 0. In `Network.measuring`.

    Raises:
        RuntimeError: a part of the model or of the objective has no derivative.
    """
    found = {} if task.loss < MINIMUM else _moments(task, layers, whole, progress)
    if not any(each.square.any() for each in found.values()):
        found = _moments(task, layers, whole, progress, torch.Generator().manual_seed(0))
    return found


def _moments(
    task: Task,
    layers: Mapping[str, Layer],
    whole: Collection[str],
    progress: bool,
    generator: torch.Generator | None = None,
) -> dict[str, Gradients]:
    """As `gradients`, of the loss or, with a generator, of products of the model's outputs."""
    found = {name: Gradients() for name in layers}
    seen = 0
    with bar(progress=progress, desc="gradients", delay=3, leave=False) as shown:
        for batch in _pieces(task):
            n, noted = _at_outputs(task, layers, whole, batch, generator)
            for name, g, power in noted:
                square, count = layers[name].output_square(g)
                found[name].square = found[name].square + square
                found[name].count += count
                found[name].power += power
            seen += n
            shown.update()
            if all(each.count >= PLACES for each in found.values()):
                break
    for name, each in found.items():
        if not each.count:
            m, groups = layers[name].shape[0], layers[name].groups
            each.square = torch.zeros(groups, m, m).squeeze(0)
            each.count = 1
        each.square, each.power = each.square / seen, each.power / seen
    return found


def _at_outputs(
    task: Task,
    layers: Mapping[str, Layer],
    whole: Collection[str],
    batch: Batch,
    generator: torch.Generator | None,
) -> tuple[int, Iterator[tuple[str, Tensor, float]]]:
    """The number of inputs, and of each call of a layer its name, gradient, and Σ (gᵀz)²."""
    outputs: list[tuple[str, Any, Tensor | None]] = []
    results: list[Any] = []

    def note(name: str, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output.detach().clone() if name in whole else None
        # An edge stays what it is if the output is changed in place later.
        outputs.append((name, get_gradient_edge(output), kept))

    model = task.net.model
    keep = lambda name, inputs, output: results.append(output)
    with torch.enable_grad(), _differentiable(layers.values()):
        with task.net.hooked(layers, after=note), hooked({"": model}, after=keep):
            losses, _ = calls.judged(model, batch, task.objective, None)
        total = losses.double().sum()
        if generator is not None:
            parts = [z for z in calls.tensors(results) if z.requires_grad]
            total = sum(((z * _normal_like(z, generator)).sum() for z in parts), 0 * total)
        edges = [edge for _, edge, _ in outputs]
        grads: Sequence[Tensor | None] = [None] * len(edges)
        if edges and total.requires_grad:
            grads = torch.autograd.grad(total, edges, allow_unused=True)
    return len(losses), (
        (name, g, 0.0 if z is None else _power(g * z, layers[name]))
        for (name, _, z), g in zip(outputs, grads, strict=True)
        if g is not None
    )


def _normal_like(z: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(z.shape, generator=generator).double().to(z.device)


def _power(products: Tensor, layer: Layer) -> float:
    return products.double().sum(layer.feature_dim).square().sum().item()


def _pieces(task: Task) -> Iterator[Batch]:
    """The batches of a task, in pieces whose results fit memory where that is possible."""
    size = task.size
    for batch in calls.batches(task.data, size):
        if size is None and calls.is_single(batch):
            size = Task(task.net, batch, task.objective, task.accuracy, task.memory).size
        yield from calls.batches(batch, size) if calls.is_single(batch) else [batch]


@contextmanager
def _differentiable(layers: Collection[Layer]) -> Iterator[None]:
    """Weights that ask for gradients, so that outputs have some, also in a frozen model."""
    asked = [(layer.weight, layer.weight.requires_grad) for layer in layers]
    try:
        for weight, _ in asked:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, before in asked:
            weight.requires_grad_(before)


def expected_losses(layer: Layer, found: Fit | None, gradients: Gradients | None) -> np.ndarray:
    """The rise of the loss at ranks 0, 1, … k, half of the energies that a `Fit` leaves out.

    Of a layer without a fit, the share of its matrix's squares that is lost, times ½ E (gᵀz)²,
    the rise without its output z. Without gradients, the share of the output's variance.
    """
    energies = found.energies if found else torch.linalg.svdvals(layer.matrix().double()).square()
    energies = energies.reshape(-1, energies.shape[-1]).sum(0)
    lost = pad(energies.flip(0).cumsum(0).flip(0), (0, 1))
    if gradients is None or found is None:
        lost = lost / lost[0] if lost[0] > 0 else lost
    if gradients is not None:
        lost = lost / 2 * (1.0 if found else gradients.power)
    return lost.cpu().numpy()
