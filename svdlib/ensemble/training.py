"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from svdlib import checks, clock
from svdlib.data import Data
from svdlib.ensemble.descent import Step
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.projection import Group, Projections, grouped


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
    progress: bool = True,
) -> pd.DataFrame:
    """Train every network of an ensemble, in place. The defaults are the paper's.

    All networks see the same batches, in the data's order unless ``shuffle``. A projection
    replaces the weights by low-rank ones after every epoch, step or number of steps; the
    networks need not share it, so that a sweep of ranks or a comparison of methods from the
    same seeds is one call.

    An ensemble of factorized networks (`MLPEnsemble.from_modules`) stays factorized: its thin
    factors are what is trained, so that a step costs no more than they do. With ``tail``, each
    layer's W = U V is decomposed after every epoch and cut to the smallest rank r with
    (Σ_{i>r} σ_i²)^½ ≤ tail · (Σ σ_i²)^½, the truncation of dynamical low-rank training
    (Schotthöfer et al. 2022, Algorithm 1), here after an epoch instead of every step. A cut gives
    the factors new coordinates, in which Adam's old moments mean nothing: they start anew.

    Args:
        nets: the ensemble, moved to the data's device.
        data: what `load` gives.
        epochs, batch_size, lr: as usual; the last batch of an epoch may be smaller.
        optimizer: "sgd", or "adam" (Kingma and Ba 2015, with torch's constants).
        schedule: of the learning rate: "constant", or "cosine", from lr down to 0.
        dropout: the chance that an input of a layer is left out of a step, the images' pixels
            included (Srivastava et al. 2014).
        projection: None (stock), one for all networks, or one (or None) a network.
        tail: the relative tail to cut factorized layers by, between 0 and 1; None: no cut.
        validation: images and labels held out of the data (`Data.hold_out`). Each network then
            ends with its weights of the epoch with the fewest errors on them (the last such).
        shuffle: draw a new order before each epoch.
        seed: of the order, the dropout and the randomized projections.
        progress: show a progress bar.

    Returns:
        one row a network and epoch: network, seed, method, rank, every, epoch (from 1),
        train_loss (mean over the epoch's batches as they were trained on), test_loss,
        test_error (per cent), accuracy (per cent), and seconds, the wall time of that epoch for
        the whole ensemble: steps and projections, without testing. With ``validation`` also
        validation_loss and validation_error.

    Raises:
        ValueError: sizes or labels that don't fit the data, projections that don't fit the
            networks, a projection of factorized layers or a tail without them, a validation
            split that doesn't fit, an unknown optimizer or schedule, a number out of range.
        FloatingPointError: NaN or infinite weights or losses; says which network, layer, step.

    Whatever stops the training, Ctrl-C included, the networks keep their last weights and the
    exception carries the rows so far as ``history``.

    >>> import svdlib
    >>> data = svdlib.load("MNIST", device="cpu").head(640, 100)
    >>> nets = MLPEnsemble((784, 15, 10), seeds=(0, 1), device="cpu")
    >>> history = train(nets, data, epochs=2, projection=[None, svdlib.Projection("truncsvd", 5)],
    ...                 progress=False)
    >>> history[["network", "method", "epoch"]].values.tolist()
    [[0, 'stock', 1], [1, 'truncsvd', 1], [0, 'stock', 2], [1, 'truncsvd', 2]]
    """
    epochs = checks.positive_int(epochs, "epochs")
    batch_size = checks.positive_int(batch_size, "batch_size")
    checks.one_of(optimizer, ("sgd", "adam"), "optimizer")
    checks.one_of(schedule, ("constant", "cosine"), "schedule")
    if not lr > 0:
        raise ValueError(f"lr must be positive, not {lr}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    groups = grouped(nets, projection)
    _check_factors(nets, groups, tail)
    check_fit(nets, data)
    if validation is not None:
        _check_validation(nets, *validation)
    nets.to(data.device)
    step = Step(nets, optimizer, dropout)
    _check_weights(step, "before the first step")

    generator = torch.Generator(data.device).manual_seed(seed)
    labels = F.one_hot(data.train_y, nets.sizes[-1]).float()
    steps = -(-len(labels) // batch_size)
    losses = torch.zeros(steps, len(nets), device=data.device)
    rows: list[dict[str, object]] = []
    best = _Best(nets) if validation else None
    bar = tqdm(total=epochs * steps, disable=not progress, unit="step", desc="training")
    try:
        with torch.inference_mode(), bar:
            for epoch in range(1, epochs + 1):
                start = clock.now(data.device)
                if shuffle or epoch == 1:
                    order = generator if shuffle else None
                    batches = _batches(data.train_x, labels, batch_size, order)
                done = range((epoch - 1) * steps, epoch * steps)
                rates = [_rate(schedule, lr, number, epochs * steps) for number in done]
                _epoch(step, groups, batches, rates, losses, epoch, generator, bar)
                if tail is not None:
                    # Tensors made in inference mode could never be trained elsewhere.
                    with torch.inference_mode(False):
                        nets.truncate_(tail)
                    step = Step(nets, optimizer, dropout)
                seconds = clock.now(data.device) - start
                train_loss = losses.double().sum(0) / len(labels)
                measured = {"test": nets.losses(data.test_x, data.test_y)}
                if validation and best:
                    measured["validation"] = nets.losses(*validation)
                    best.note(nets, (~measured["validation"][1]).sum(1))
                rows += _rows(nets, groups, tail, epoch, train_loss, measured, seconds)
        if best:
            nets.restack_(best.networks)
    except BaseException as stop:
        stop.history = pd.DataFrame(rows)  # type: ignore[attr-defined]
        raise
    return pd.DataFrame(rows)


def _rate(schedule: str, lr: float, step: int, steps: int) -> float:
    """The learning rate of a step (from 0) out of so many."""
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * step / steps)) / 2
    return lr


def _epoch(
    step: Step,
    groups: Sequence[Group],
    batches: Sequence[tuple[Tensor, Tensor]],
    rates: Sequence[float],
    losses: Tensor,
    epoch: int,
    generator: torch.Generator,
    bar: tqdm,
) -> None:
    """A step on every batch, each with its rate, and the projections that are due after it."""
    for number, ((x, y), rate) in enumerate(zip(batches, rates, strict=True)):
        step.take(x, y, rate, losses[number], generator)
        # On a GPU a look at the loss would stall the queue: there once an epoch.
        if not losses.is_cuda or number == len(batches) - 1:
            _check_losses(losses[: number + 1], step, epoch)
        for group in groups:
            if group.is_due((epoch - 1) * len(batches) + number + 1, len(batches)):
                group.project_(step.weights, generator)
        bar.update()


class _Best:
    """Each network as it was after the epoch with the fewest errors so far."""

    def __init__(self, nets: MLPEnsemble) -> None:
        self.errors = [math.inf] * len(nets)
        self.networks = [nn.Sequential()] * len(nets)

    @torch.inference_mode(False)
    def note(self, nets: MLPEnsemble, errors: Tensor) -> None:
        for network, error in enumerate(errors.tolist()):
            if error <= self.errors[network]:
                self.errors[network] = error
                self.networks[network] = nets[network]


def check_fit(nets: MLPEnsemble, data: Data) -> None:
    """Refuse data whose features or labels are not those of the networks."""
    features, classes = nets.sizes[0], nets.sizes[-1]
    if data.train_x.shape[1] != features:
        raise ValueError(
            f"the networks take {features} features but {data.name} has {data.train_x.shape[1]}"
        )
    for part, y in (("train", data.train_y), ("test", data.test_y)):
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"the {part} labels run from {low} to {high}; networks with {classes} outputs "
                f"need labels 0 to {classes - 1}"
            )


def _batches(
    x: Tensor, y: Tensor, size: int, generator: torch.Generator | None
) -> Sequence[tuple[Tensor, Tensor]]:
    """Batches of x (n, features), and of y (n, classes) feature-first, in order or shuffled."""
    if generator is not None:
        order = torch.randperm(len(x), generator=generator, device=x.device)
        x, y = x[order], y[order]
    labels = (part.t().contiguous() for part in y.split(size))
    return list(zip(x.split(size), labels, strict=True))


def _check_factors(nets: MLPEnsemble, groups: Sequence[Group], tail: float | None) -> None:
    """Refuse what does not fit factorized networks, or fits only these."""
    if tail is not None and not 0 < tail < 1:
        raise ValueError(f"tail must be between 0 and 1, not {tail}")
    if tail is not None and not nets.factorized:
        raise ValueError("a tail cuts factorized networks; factorize them, or use a Projection")
    if nets.factorized and any(group.projection for group in groups):
        raise ValueError("factorized networks have low rank already; give a tail, no projection")


def _check_validation(nets: MLPEnsemble, x: Tensor, y: Tensor) -> None:
    features, classes = nets.sizes[0], nets.sizes[-1]
    fits = len(x) > 0 and x.shape[1:] == (features,) and y.shape == (len(x),)
    if not fits or int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(
            f"validation must be images (n, {features}), n ≥ 1, and labels (n,) from 0 to "
            f"{classes - 1}, not shapes {tuple(x.shape)} and {tuple(y.shape)} or other labels"
        )


def _check_losses(losses: Tensor, step: Step, epoch: int) -> None:
    recent = losses if losses.is_cuda else losses[-1]
    if math.isfinite(recent.sum().item()):
        return
    number, network = (~losses.isfinite()).nonzero()[0].tolist()
    when = f"at step {number + 1} of epoch {epoch}"
    _check_weights(step, when)
    raise FloatingPointError(
        f"network {network} has an infinite or NaN loss {when}, its weights being finite; "
        "a smaller learning rate may help"
    )


def _check_weights(step: Step, when: str) -> None:
    layer = 0
    for weight, bias in zip(step.weights, step.biases, strict=True):
        bad = ~weight.isfinite().flatten(1).all(1)
        if bias is not None:
            bad |= ~bias.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            raise FloatingPointError(
                f"network {int(bad.nonzero()[0])}, layer {layer} has NaN or infinite weights "
                f"{when}; a smaller learning rate or finite starting weights may help"
            )
        layer += bias is not None  # the inner factor has none


def _rows(
    nets: MLPEnsemble,
    groups: Sequence[Group],
    tail: float | None,
    epoch: int,
    train_loss: Tensor,
    measured: dict[str, tuple[Tensor, Tensor]],
    seconds: float,
) -> Iterator[dict[str, object]]:
    by_network = {network: group.projection for group in groups for network in group.networks}
    ranks = nets.ranks
    means = {
        part: (losses.double().mean(1).tolist(), (100 * correct.double().mean(1)).tolist())
        for part, (losses, correct) in measured.items()
    }
    for network, train in enumerate(train_loss.tolist()):
        projection = by_network[network]
        row = {
            "network": network,
            "seed": nets.seeds[network] if nets.seeds else None,
            "method": projection.method if projection else "stock",
            "rank": projection.rank if projection else None,
            "every": projection.every if projection else None,
            "epoch": epoch,
            "train_loss": train,
        }
        if nets.factorized:
            row |= {"method": "factorized", "rank": ranks[network]}
            row["every"] = "epoch" if tail is not None else None
        for part, (losses, right) in means.items():
            row |= {f"{part}_loss": losses[network], f"{part}_error": 100 - right[network]}
        yield row | {"accuracy": means["test"][1][network], "seconds": seconds}
