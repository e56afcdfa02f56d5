"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlib import checks, clock, threads
from svdlib.bars import bar
from svdlib.data import Data, with_ones
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.parts import Batches, Part, shares
from svdlib.ensemble.projection import Projection, Projections, per_network


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
    watch: Callable[[list[dict[str, object]]], object] | None = None,
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
        nets: the ensemble, moved to the data's device; in float32 or float64, which the images
            are turned into.
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
        watch: called some ten times a second, and after each epoch, with the rows so far. What
            it raises stops the training.
        progress: show a progress bar, which says what is trained.

    Returns:
        one row a network and epoch: network, seed, method, rank, every, epoch (from 1),
        train_loss (mean over the epoch's batches as they were trained on), test_loss,
        test_error (per cent), accuracy (per cent), and seconds, the wall time of that epoch for
        the whole ensemble: steps and projections, without testing. With ``validation`` also
        validation_loss and validation_error.

    Raises:
        ValueError: frozen networks, sizes or labels that don't fit the data, NaN in the test images, projections that don't fit the
            networks, a projection of factorized layers or a tail without them, a validation
            split that doesn't fit, an unknown optimizer or schedule, a number out of range,
            networks in less than float32.
        TypeError: no `MLPEnsemble`, no `Data`.
        FloatingPointError: NaN or infinite weights before the first step, and losses at the end
            of an epoch; says which network, and which layer or step.

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
    _check_kinds(nets, data)
    epochs = checks.positive_int(epochs, "epochs")
    batch_size = checks.positive_int(batch_size, "batch_size")
    checks.one_of(optimizer, ("sgd", "adam"), "optimizer")
    checks.one_of(schedule, ("constant", "cosine"), "schedule")
    lr, dropout = checks.number(lr, "lr"), checks.number(dropout, "dropout")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, not {lr}")
    shuffle, progress = checks.truth(shuffle, "shuffle"), checks.truth(progress, "progress")
    seed = checks.positive_int(seed, "seed", least=0)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    choices = per_network(projection, nets)
    _check_factors(nets, choices, tail)
    check_fit(nets, data)
    checks.finite(data.test_x, "test_x")
    if validation is not None:
        _check_validation(nets, validation)
    dtype = nets.weights[0].dtype
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"train networks in float32 or float64, not {dtype}; see nets.float()")
    nets.to(data.device)
    _check_weights(nets)

    images = with_ones(data.train_x.to(dtype))
    labels = -F.one_hot(data.train_y, nets.sizes[-1]).to(dtype)
    held_out = {"test": (data.test_x, data.test_y)}
    if validation:
        held_out["validation"] = validation
    held_out = {name: (with_ones(x.to(dtype)), y) for name, (x, y) in held_out.items()}
    steps = -(-len(images) // batch_size)
    losses = torch.zeros(steps, len(nets), dtype=dtype, device=data.device)
    generator = torch.Generator(data.device).manual_seed(seed)
    networks, large = shares(nets, min(batch_size, len(images)))
    parts = [Part(nets, share, choices, optimizer, dropout, seed) for share in networks]
    best = _Best(nets) if validation else None
    rows: list[dict[str, object]] = []
    stop, usual = Event(), torch.get_num_threads()
    # A second between refreshes: in a notebook each is some messages, and a reader that looks at
    # them only when the cell has ended, as nbval does, loses those beyond a thousand.
    shown = bar(
        total=epochs * steps,
        progress=progress,
        unit="step",
        desc=_in_words(nets, choices, epochs),
        mininterval=1.0,
    )

    def tick() -> None:
        shown.update(sum(part.done for part in parts) // len(parts) - shown.n)
        if watch:
            watch(rows)

    try:
        with (
            shown,
            threads.inside(max(1, usual // len(parts)) if large else 1),
            # A new thread learns of torch's setting only when it asks.
            ThreadPoolExecutor(min(usual, len(parts)), initializer=torch.get_num_threads) as pool,
        ):
            everywhere = partial(threads.side_by_side, pool, pieces=parts, tick=tick, stop=stop)
            for epoch in range(1, epochs + 1):
                start = clock.now(data.device)
                if shuffle or epoch == 1:
                    order = _order(len(images), generator) if shuffle else None
                    batches = Batches.of(images, labels, batch_size, order)
                done = range((epoch - 1) * steps, epoch * steps)
                rates = [_rate(schedule, lr, step, epochs * steps) for step in done]
                try:
                    everywhere(lambda part: part.train(batches, rates, losses, stop))  # noqa: B023
                    _check_losses(losses, epoch)
                    if tail is not None:
                        nets.truncate_(tail)
                        for part in parts:
                            part.begin(nets)
                except torch.linalg.LinAlgError:
                    _check_losses(losses, epoch)
                    raise FloatingPointError(
                        f"the weights of some network are beyond all bounds in epoch {epoch}: "
                        "no SVD of them converges; a smaller learning rate may help"
                    ) from None
                seconds = clock.now(data.device) - start
                train_loss = losses.double().sum(0) / len(images)
                measured = {
                    name: _means(everywhere(partial(Part.test, x=x, y=y)), len(y))
                    for name, (x, y) in held_out.items()
                }
                if best:
                    best.note(nets, measured["validation"][1])
                rows += list(_rows(nets, choices, tail, epoch, train_loss, measured, seconds))
                tick()
        if best:
            nets.restack_(best.networks)
    except BaseException as stopped:
        stopped.history = pd.DataFrame(rows)  # type: ignore[attr-defined]
        raise
    return pd.DataFrame(rows)


def _in_words(nets: MLPEnsemble, choices: Sequence[Projection | None], epochs: int) -> str:
    """What a bar says of a training: ``8 networks, rsvd of rank 10 every step, 10 epochs``."""
    kind = "factorized network" if nets.factorized else "network"
    words = [f"{len(nets)} {kind}{'s' if len(nets) > 1 else ''}"]
    kinds = set(choices)
    if len(kinds) > 1:
        words.append(f"{len(kinds)} ways")
    elif only := choices[0]:
        words.append(f"{only.method} of rank {only.rank} every {only.every}")
    return ", ".join([*words, f"{epochs} epoch{'s' if epochs > 1 else ''}"])


def _order(images: int, generator: torch.Generator) -> Tensor:
    """A permutation of so many images, on the generator's device."""
    return torch.randperm(images, generator=generator, device=generator.device)


def _rate(schedule: str, lr: float, step: int, steps: int) -> float:
    """The learning rate of a step (from 0) out of so many."""
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * step / steps)) / 2
    return lr


class _Best:
    """Each network as it was after the epoch with the fewest errors so far."""

    def __init__(self, nets: MLPEnsemble) -> None:
        self.accuracies = [-math.inf] * len(nets)
        self.networks = [nn.Sequential()] * len(nets)

    def note(self, nets: MLPEnsemble, accuracies: Sequence[float]) -> None:
        for network, accuracy in enumerate(accuracies):
            if accuracy >= self.accuracies[network]:
                self.accuracies[network] = accuracy
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


def _check_factors(
    nets: MLPEnsemble, choices: Sequence[Projection | None], tail: float | None
) -> None:
    """Refuse what does not fit factorized networks, or fits only these."""
    if tail is not None and not 0 < tail < 1:
        raise ValueError(f"tail must be between 0 and 1, not {tail}")
    if tail is not None and not nets.factorized:
        raise ValueError("a tail cuts factorized networks; factorize them, or use a Projection")
    if nets.factorized and any(choices):
        raise ValueError("factorized networks have low rank already; give a tail, no projection")


def _check_validation(nets: MLPEnsemble, pair: object) -> None:
    features, classes = nets.sizes[0], nets.sizes[-1]
    if (
        not isinstance(pair, tuple | list)
        or len(pair) != 2
        or not all(isinstance(part, Tensor) for part in pair)
    ):
        raise ValueError("validation must be images and labels, (x, y); see Data.hold_out")
    x, y = pair
    fits = len(x) > 0 and x.shape[1:] == (features,) and y.shape == (len(x),)
    whole = fits and not y.is_floating_point()
    if not whole or int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(
            f"validation must be images (n, {features}), n ≥ 1, and labels (n,) from 0 to "
            f"{classes - 1}, not shapes {tuple(x.shape)} and {tuple(y.shape)} or other labels"
        )
    checks.finite(x, "validation's images")


def _check_kinds(nets: object, data: object) -> None:
    """Refuse what is no ensemble, one that is not to be trained, and what is no data."""
    if not isinstance(nets, MLPEnsemble):
        raise TypeError(
            f"train takes an MLPEnsemble, not {type(nets).__name__}; see MLPEnsemble.from_modules"
        )
    if not isinstance(data, Data):
        raise TypeError(f"train takes svdlib.Data, as load gives it, not {type(data).__name__}")
    if not all(parameter.requires_grad for parameter in nets.parameters()):
        raise ValueError("the networks are frozen; nets.requires_grad_() lets them be trained")


def _check_losses(losses: Tensor, epoch: int) -> None:
    """Name the first step and network without a finite loss."""
    bad = (~losses.isfinite()).nonzero()
    if not len(bad):
        return
    step, network = bad[0].tolist()
    raise FloatingPointError(
        f"network {network} has an infinite or NaN loss at step {step + 1} of epoch {epoch}; "
        "a smaller learning rate may help"
    )


def _check_weights(nets: MLPEnsemble) -> None:
    for number, layer in enumerate(nets.layers):
        for factor in layer.factors:
            bad = ~factor.detach().isfinite().flatten(1).all(1)
            if bool(bad.any()):
                raise FloatingPointError(
                    f"network {int(bad.nonzero()[0])}, layer {number} has NaN or infinite weights "
                    "before the first step; train from finite ones"
                )


def _means(found: Sequence[tuple[Tensor, Tensor]], images: int) -> tuple[list[float], list[float]]:
    """Each network's mean loss and accuracy (per cent), from what `Part.test` found."""
    loss, correct = map(torch.cat, zip(*found, strict=True))
    return (loss / images).tolist(), (100 * correct / images).tolist()


def _rows(
    nets: MLPEnsemble,
    choices: Sequence[Projection | None],
    tail: float | None,
    epoch: int,
    train_loss: Tensor,
    measured: dict[str, tuple[list[float], list[float]]],
    seconds: float,
) -> Iterator[dict[str, object]]:
    ranks = nets.ranks
    for network, (choice, loss) in enumerate(zip(choices, train_loss.tolist(), strict=True)):
        row = {
            "network": network,
            "seed": nets.seeds[network] if nets.seeds else None,
            "method": choice.method if choice else "stock",
            "rank": choice.rank if choice else None,
            "every": choice.every if choice else None,
            "epoch": epoch,
            "train_loss": loss,
        }
        if nets.factorized:
            row |= {"method": "factorized", "rank": ranks[network]}
            row["every"] = "epoch" if tail is not None else None
        for part, (losses, accuracies) in measured.items():
            row |= {f"{part}_loss": losses[network], f"{part}_error": 100 - accuracies[network]}
        yield row | {"accuracy": measured["test"][1][network], "seconds": seconds}
