"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from svdlib import checks, clock, threads
from svdlib.bars import bar
from svdlib.data import Data, with_ones
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.parts import Batches, Part, shares
from svdlib.ensemble.projection import Choices, Projections, per_network

Row = dict[str, object]
Watch = Callable[[list[Row]], object] | None
Parts = dict[str, tuple[Tensor, Tensor]]  # images and labels by part of the data
Columns = dict[str, list[Any]]  # of the history, a number per network


@threads.making()
def train(
    nets: MLPEnsemble,
    data: Data,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-2,
    optimizer: str = "sgd",
    schedule: str = "constant",
    dropout: float = 0.0,
    projection: Projections = None,
    tail: float | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    watch: Watch = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Train every network of an ensemble, in place. The defaults are the paper's.

    All networks see the same batches. Factorized networks (`MLPEnsemble.from_modules`) stay
    factorized. With ``tail``, each layer's W = U V is truncated after every epoch to the smallest
    rank r with (Σ_{i>r} σ_i²)^½ ≤ tail · (Σ σ_i²)^½, as in dynamical low-rank training (Schotthöfer
    et al. 2022, Algorithm 1) after every step; Adam's moments then start anew. Whatever stops the
    training, the networks keep their last weights, and the exception has the rows as ``history``.

    Args:
        nets: the ensemble in float32 or float64, moved to the data's device.
        data: what `load` returns.
        epochs, batch_size, lr: as usual; the last batch of an epoch may be smaller.
        optimizer: "sgd", or "adam" (Kingma and Ba 2015, with torch's constants).
        schedule: of the learning rate: "constant", or "cosine", from lr down to 0.
        dropout: probability that a step ignores a pixel or a layer's input (Srivastava et al. 2014).
        projection: None (stock), one for all networks, or one (or None) per network.
        tail: the relative tail of a truncation, between 0 and 1.
        validation: images and labels (`Data.hold_out`). Each network then ends with its weights of
            the epoch with the fewest errors on them (the last such).
        shuffle: draw a new order before each epoch.
        seed: of the order, the dropout and the randomized projections.
        watch: called with the rows so far, some ten times a second and after each epoch.

    Returns:
        one row per network and epoch: network, seed, method, rank, every, epoch (from 1),
        train_loss (as it was trained), test_loss, test_error and accuracy (percent), seconds (for
        all networks, without testing), and with ``validation`` its loss and error.

    Raises:
        ValueError: networks, data, and settings that do not fit each other, a number out of range.
        TypeError: not an `MLPEnsemble`, not `Data`.
        FloatingPointError: NaN or infinite weights before the first step, or losses after an epoch.

    >>> from svdlib import Projection, load
    >>> data = load("MNIST", device="cpu").head(640, 100)
    >>> nets = MLPEnsemble((784, 15, 10), seeds=(0, 1), device="cpu")
    >>> history = train(nets, data, epochs=1, projection=[None, Projection("truncsvd", 5)])
    """
    _check_networks(nets, data, tail)
    epochs = checks.positive_int(epochs, "epochs")
    batch_size = checks.positive_int(batch_size, "batch_size")
    checks.one_of(optimizer, ("sgd", "adam"), "optimizer")
    checks.one_of(schedule, ("constant", "cosine"), "schedule")
    if not 0 < (lr := checks.number(lr, "lr")) < math.inf:
        raise ValueError(f"lr must be positive and finite, not {lr}")
    if not 0 <= (dropout := checks.number(dropout, "dropout")) < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    shuffle, progress = checks.truth(shuffle, "shuffle"), checks.truth(progress, "progress")
    seed = checks.positive_int(seed, "seed", least=0)
    choices = per_network(projection, nets)
    held_out = _parts(nets, data, validation)
    images, classes = held_out.pop("train")
    labels = -F.one_hot(classes, nets.sizes[-1]).to(images.dtype)
    nets.to(data.device)
    generator = torch.Generator(data.device).manual_seed(seed) if shuffle else None
    steps = -(-len(images) // batch_size)
    networks, large = shares(nets, min(batch_size, len(images)))
    parts = [Part(nets, share, choices, optimizer, dropout, seed) for share in networks]
    rates = [lr] * (epochs * steps)
    if schedule == "cosine":
        rates = [lr * (1 + math.cos(math.pi * i / len(rates))) / 2 for i in range(len(rates))]
    crew = _Crew(nets, parts, large, _bar(nets, choices, epochs, steps, progress), watch)
    try:
        with crew.progress_bar, threads.inside(crew.inner_threads), crew.pool:
            for epoch in range(1, epochs + 1):
                start = clock.now(data.device)
                if shuffle or epoch == 1:
                    batches = Batches(images, labels, batch_size, generator)
                train_loss = crew.train(epoch, batches, rates[steps * (epoch - 1) :][:steps], tail)
                seconds = clock.now(data.device) - start
                columns: Columns = {"epoch": [epoch] * len(nets), "train_loss": train_loss}
                columns |= crew.test(held_out) | {"seconds": [seconds] * len(nets)}
                crew.rows += _rows(nets, choices, tail, columns)
                crew.tick()
        if validation:
            nets.restack_([net for _, net in crew.best])
    except BaseException as stopped:
        stopped.history = pd.DataFrame(crew.rows)  # type: ignore[attr-defined]
        raise
    return pd.DataFrame(crew.rows)


class _Crew:
    """Parts of an ensemble in training; ``best`` is each network at its best on validation data."""

    def __init__(
        self, nets: MLPEnsemble, parts: list[Part], large: bool, progress_bar: tqdm, watch: Watch
    ) -> None:
        self.nets, self.parts, self.progress_bar, self.watch = nets, parts, progress_bar, watch
        self.rows: list[Row] = []
        self.best = [(-math.inf, nn.Sequential())] * len(nets)
        self.stop, usual = Event(), torch.get_num_threads()
        self.inner_threads = max(1, usual // len(parts)) if large else 1
        # A new thread learns of torch's setting only when it asks.
        self.pool = ThreadPoolExecutor(min(usual, len(parts)), initializer=torch.get_num_threads)

    def tick(self) -> None:
        done = sum(part.done for part in self.parts) // len(self.parts)
        self.progress_bar.update(done - self.progress_bar.n)
        if self.watch:
            self.watch(self.rows)

    def all_do(self, work: Callable[[Part], Any]) -> list[Any]:
        return threads.side_by_side(self.pool, work, self.parts, self.tick, self.stop)

    def train(
        self, epoch: int, batches: Batches, rates: Sequence[float], tail: float | None
    ) -> list[float]:
        """Each network's mean loss in an epoch of training, then truncated."""
        losses = batches.images.new_zeros(len(rates), len(self.nets))
        try:
            self.all_do(lambda part: part.train(batches, rates, losses, self.stop))
            _check_losses(losses, epoch)
            if tail is not None:
                self.nets.truncate_(tail)
                for part in self.parts:
                    part.begin(self.nets)
        except torch.linalg.LinAlgError:
            _check_losses(losses, epoch)
            what = f"an SVD does not converge in epoch {epoch}, as weights are so large"
            raise FloatingPointError(f"{what}; a smaller learning rate may help") from None
        return (losses.double().sum(0) / len(batches.images)).tolist()

    def test(self, held_out: Parts) -> Columns:
        """Losses and errors on each held-out part of the data, and the accuracy on the test one."""
        columns, accuracies = {}, {}
        for name, (x, y) in held_out.items():
            results = self.all_do(partial(Part.test, x=x, y=y))
            loss, right = map(torch.cat, zip(*results, strict=True))
            accuracies[name] = (accuracy := 100 * right / len(y)).tolist()
            columns[f"{name}_loss"] = (loss / len(y)).tolist()
            columns[f"{name}_error"] = (100 - accuracy).tolist()
        for network, percent in enumerate(accuracies.get("validation", [])):
            if percent >= self.best[network][0]:
                self.best[network] = percent, self.nets[network]
        return columns | {"accuracy": accuracies["test"]}


def _bar(nets: MLPEnsemble, choices: Choices, epochs: int, steps: int, progress: bool) -> tqdm:
    """A bar titled like ``8 networks, rsvd of rank 10 every step, 10 epochs``."""
    title = f"{len(nets)} {'factorized ' * nets.factorized}network{'s' * (len(nets) > 1)}, "
    if (different := len(set(choices))) > 1:
        title += f"{different} ways, "
    elif shared := choices[0]:
        title += f"{shared.method} of rank {shared.rank} every {shared.every}, "
    title += f"{epochs} epoch{'s' * (epochs > 1)}"
    # In a notebook a refresh is several messages, and nbval loses those after a thousand.
    return bar(total=epochs * steps, progress=progress, unit="step", desc=title, mininterval=1.0)


def _rows(nets: MLPEnsemble, choices: Choices, tail: float | None, more: Columns) -> Iterator[Row]:
    """The rows of an epoch: which network, what was done to it, and more columns."""
    ranks = nets.ranks
    for network, choice in enumerate(choices):
        method: tuple[object, ...] = "stock", None, None
        if nets.factorized:
            method = "factorized", ranks[network], tail and "epoch"
        elif choice:
            method = choice.method, choice.rank, choice.every
        row: Row = {"network": network, "seed": nets.seeds[network] if nets.seeds else None}
        row |= zip(("method", "rank", "every"), method, strict=True)
        yield row | {name: values[network] for name, values in more.items()}


def _check_networks(nets: object, data: object, tail: float | None) -> None:
    if not isinstance(nets, MLPEnsemble):
        given = type(nets).__name__
        raise TypeError(f"train takes an MLPEnsemble, not {given}; see MLPEnsemble.from_modules")
    if not isinstance(data, Data):
        raise TypeError(f"train takes svdlib.Data, as load gives it, not {type(data).__name__}")
    if not all(parameter.requires_grad for parameter in nets.parameters()):
        raise ValueError("the networks are frozen; nets.requires_grad_() lets them be trained")
    if (dtype := nets.weights[0].dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"train networks in float32 or float64, not {dtype}; see nets.float()")
    if tail is not None and not 0 < tail < 1:
        raise ValueError(f"tail must be between 0 and 1, not {tail}")
    if tail is not None and not nets.factorized:
        raise ValueError("a tail cuts factorized networks; factorize them, or use a Projection")
    for number, layer in enumerate(nets.layers):
        for factor in layer.factors:
            if len(bad := (~factor.detach().isfinite()).flatten(1).any(1).nonzero()):
                where = f"network {int(bad[0])}, layer {number}"
                raise FloatingPointError(f"{where} has NaN or infinite weights before training")


def _parts(nets: MLPEnsemble, data: Data, validation: object) -> Parts:
    """The parts of the data, the images with a column of ones, if they fit the networks."""
    parts = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
    if validation is not None:
        if not isinstance(validation, tuple | list) or len(validation) != 2:
            raise ValueError("validation must be images and labels, (x, y); see Data.hold_out")
        checks.labeled_images("validation", *validation)
        parts["validation"] = validation[0], validation[1]
    inputs, *_, outputs = nets.sizes
    for part, (x, y) in parts.items():
        if x.shape[1] != inputs:
            taken = f"the networks take {inputs} features"
            raise ValueError(f"{taken} but the {part} images have {x.shape[1]}")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= outputs:
            needed = f"networks with {outputs} outputs need labels 0 to {outputs - 1}"
            raise ValueError(f"the {part} labels run from {low} to {high}; {needed}")
        if part != "train":
            checks.finite(x, f"{part}_x")
    dtype = nets.weights[0].dtype
    return {part: (with_ones(x.to(dtype)), y) for part, (x, y) in parts.items()}


def _check_losses(losses: Tensor, epoch: int) -> None:
    if len(bad := (~losses.isfinite()).nonzero()):
        step, network = bad[0].tolist()
        what = f"network {network} has an infinite or NaN loss at step {step + 1} of epoch {epoch}"
        raise FloatingPointError(f"{what}; a smaller learning rate may help")
