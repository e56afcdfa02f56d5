"""The training loop: all networks of an ensemble at once, by hand-derived gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from svdlib import checks
from svdlib.data import Data
from svdlib.factored import truncate_
from svdlib.networks import MLPEnsemble, stack_padded
from svdlib.projection import Projection, project_stacks_

Projections = Projection | None | Sequence[Projection | None]


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
    (Schotthöfer et al. 2022, Algorithm 1), here after an epoch instead of every step.

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
    >>> history = train(nets, data, epochs=2, projection=[None, Projection("truncsvd", 5)],
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
    groups = _groups(nets, projection)
    _check_factors(nets, groups, tail)
    check_fit(nets, data)
    if validation is not None:
        _check_validation(nets, *validation)
    nets.to(data.device)
    step_of = _Step(nets, optimizer, dropout)
    _check_weights(step_of.weights, step_of.biases, "before the first step")

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
                start = _clock(data.device)
                if shuffle or epoch == 1:
                    order = generator if shuffle else None
                    batches = _batches(data.train_x, labels, batch_size, order)
                for step, (x, y) in enumerate(batches):
                    done = (epoch - 1) * steps + step
                    rate = lr
                    if schedule == "cosine":
                        rate = lr * (1 + math.cos(math.pi * done / (epochs * steps))) / 2
                    step_of.take(x, y, rate, losses[step], generator)
                    # On a GPU a look at the loss would stall the queue: there once an epoch.
                    if not losses.is_cuda or step == steps - 1:
                        _check_losses(losses[: step + 1], step_of, epoch)
                    for group in groups:
                        if group.is_due(done + 1, steps):
                            group.project_(step_of.weights, generator)
                    bar.update()
                if tail is not None:
                    # Tensors made in inference mode could never be trained elsewhere.
                    with torch.inference_mode(False):
                        truncate_(nets, tail)
                    step_of = _Step(nets, optimizer, dropout)
                seconds = _clock(data.device) - start
                train_loss = losses.double().sum(0) / len(labels)
                measured = {"test": nets.losses(data.test_x, data.test_y)}
                if validation and best:
                    measured["validation"] = nets.losses(*validation)
                    best.note(nets, (~measured["validation"][1]).sum(1))
                rows += _rows(nets, groups, tail, epoch, train_loss, measured, seconds)
        if best:
            best.restore_(nets)
    except BaseException as stop:
        stop.history = pd.DataFrame(rows)  # type: ignore[attr-defined]
        raise
    return pd.DataFrame(rows)


class _Step:
    """A step of training on the tensors of an ensemble, as they are now."""

    def __init__(self, nets: MLPEnsemble, optimizer: str, dropout: float) -> None:
        links = nets.links()
        self.dropout = dropout
        self.weights = [w.detach() for w, _ in links]
        self.biases = [None if b is None else b.detach().unsqueeze(-1) for _, b in links]
        self.adam: torch.optim.Adam | None = None
        if optimizer == "adam":
            given = [*self.weights, *(b for b in self.biases if b is not None)]
            for tensor in given:
                tensor.grad = torch.zeros_like(tensor)
            self.gradients = (
                [w.grad for w in self.weights],
                [None if b is None else b.grad for b in self.biases],
            )
            self.adam = torch.optim.Adam(given, fused=True)

    def take(
        self, x: Tensor, y: Tensor, rate: float, loss: Tensor, generator: torch.Generator
    ) -> None:
        """One step on a batch, in place; ``loss`` receives the losses before it."""
        given = (self.weights, self.biases, x, y)
        if self.adam is None:
            descend_(*given, -rate, loss, dropout=self.dropout, generator=generator)
            return
        self.adam.zero_grad(set_to_none=False)
        descend_(*given, 1.0, loss, self.gradients, self.dropout, generator)  # type: ignore[arg-type]
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()


def descend_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    x: Tensor,
    y: Tensor,
    scale: float,
    loss: Tensor,
    onto: tuple[Sequence[Tensor], Sequence[Tensor | None]] | None = None,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> None:
    """Add ``scale`` times the gradient of S perceptrons' loss on one batch to tensors, in place.

    Forward, with activations h_l of shape (S, out, B) and h_0 = xᵀ:

        z_l = W_l h_{l−1} + b_l,   h_l = max(z_l, 0),   p = softmax(z_L).

    Backward, for the mean cross-entropy L = −(1/B) Σ log p_y:

        δ_L = p − y,   δ_{l−1} = (W_lᵀ δ_l) ⊙ [h_{l−1} > 0],
        ∂L/∂W_l = δ_l h_{l−1}ᵀ / B,   ∂L/∂b_l = Σ_batch δ_l / B.

    No gradient need be stored: onto the weights themselves, with a negative scale, this is a
    step of gradient descent. All networks share x, so the first layer's products are single ones
    of an (S·out) × in matrix. A factorized layer is two, the inner one without bias and
    max(·, 0). Dropout with probability d multiplies an h by 1/(1−d) or by 0, the same for all
    networks.

    Args:
        weights, biases: a layer each, of shapes (S, out, in) and (S, out, 1); the bias of an
            inner factor is None.
        x, y: inputs (B, in) and one-hot labels, feature-first (classes, B).
        loss: receives each network's loss on the batch before the step, summed, (S,).
        onto: tensors like weights and biases that the products are added to; by default they
            themselves.
        dropout, generator: d, and the source of its randomness on the weights' device.

    >>> W, b = [torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 1)]
    >>> loss = torch.empty(1)
    >>> descend_(W, b, torch.ones(1, 3), torch.tensor([[1.0], [0.0]]), scale=-1.0, loss=loss)
    >>> loss, W[0]
    (tensor([0.6931]), tensor([[[ 0.5000,  0.5000,  0.5000],
             [-0.5000, -0.5000, -0.5000]]]))
    """
    to_weights, to_biases = onto or (weights, biases)
    if dropout:
        x = _drop_(x.clone(), dropout, generator)
    flat = weights[0].flatten(0, 1)
    z = _affine(biases[0], flat, x).view(*weights[0].shape[:2], -1)
    hidden = []
    for weight, bias, below in zip(weights[1:], biases[1:], biases[:-1], strict=True):
        if below is not None:
            z = z.relu_()
            if dropout:
                _drop_(z, dropout, generator)
        hidden.append(z)
        z = torch.bmm(weight, z) if bias is None else torch.baddbmm(bias, weight, z)
    log_p = z.log_softmax(1)
    torch.mv(log_p.flatten(1), y.flatten(), out=loss).neg_()
    delta = log_p.exp_().sub_(y)
    scale /= len(x)
    for layer in range(len(weights) - 1, 0, -1):
        below, bias = hidden[layer - 1], to_biases[layer]
        back = torch.bmm(weights[layer].mT, delta)
        to_weights[layer].baddbmm_(delta, below.mT, alpha=scale)
        if bias is not None:
            bias.add_(delta.sum(-1, keepdim=True), alpha=scale)
        if biases[layer - 1] is None:
            delta = back
        else:
            delta = torch.ops.aten.threshold_backward(back, below, 0)
            if dropout:
                delta.div_(1 - dropout)
    to_weights[0].flatten(0, 1).addmm_(delta.view(-1, len(x)), x, alpha=scale)
    bias = to_biases[0]
    if bias is not None:
        bias.add_(delta.sum(-1, keepdim=True), alpha=scale)


def _affine(bias: Tensor | None, flat: Tensor, x: Tensor) -> Tensor:
    """The first layer of all networks at once: (S·out, in) × (in, B)."""
    return flat @ x.t() if bias is None else torch.addmm(bias.view(-1, 1), flat, x.t())


def _drop_(x: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor:
    """Dropout of x (…, features, B) in place, the same for all networks: they stay comparable."""
    chance = torch.rand(x.shape[-2:], dtype=x.dtype, device=x.device, generator=generator)
    return x.mul_((chance >= dropout).to(x.dtype).div_(1 - dropout))


class _Best:
    """Each network's tensors after the epoch with the fewest errors so far."""

    def __init__(self, nets: MLPEnsemble) -> None:
        self.errors = [math.inf] * len(nets)
        self.tensors: list[list[Tensor]] = [[]] * len(nets)

    def note(self, nets: MLPEnsemble, errors: Tensor) -> None:
        for network, error in enumerate(errors.tolist()):
            if error <= self.errors[network]:
                self.errors[network] = error
                self.tensors[network] = [p[network].clone() for p in nets.parameters()]

    def restore_(self, nets: MLPEnsemble) -> None:
        for parameter, best in zip(nets.parameters(), zip(*self.tensors, strict=True), strict=True):
            parameter.data = stack_padded(best)


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


@dataclass
class _Group:
    """Networks that share a projection, and the bases that its last use found."""

    projection: Projection | None
    networks: list[int]
    ranks: tuple[int, ...]
    bases: list[Tensor | None]

    def is_due(self, done: int, steps: int) -> bool:
        if self.projection is None:
            return False
        every = {"epoch": steps, "step": 1}.get(str(self.projection.every), self.projection.every)
        return done % int(every) == 0

    def project_(self, weights: Sequence[Tensor], generator: torch.Generator) -> None:
        assert self.projection is not None
        low, high = self.networks[0], self.networks[-1] + 1
        contiguous = high - low == len(self.networks)
        parts = [w[low:high] if contiguous else w[self.networks] for w in weights]
        bases = project_stacks_(parts, self.ranks, self.projection, generator, self.bases)
        if not contiguous:
            for weight, part in zip(weights, parts, strict=True):
                weight[self.networks] = part
        if self.projection.every == "step":
            self.bases = bases


def _groups(nets: MLPEnsemble, projection: Projections) -> list[_Group]:
    """Networks by projection, so that each projection is one batched call a layer."""
    single = projection is None or isinstance(projection, Projection)
    each = [projection] * len(nets) if single else list(projection)  # type: ignore[arg-type]
    if len(each) != len(nets):
        raise ValueError(f"{len(nets)} networks need as many projections, not {len(each)}")
    members: dict[Projection | None, list[int]] = {}
    for network, choice in enumerate(each):
        if choice is not None and not isinstance(choice, Projection):
            raise ValueError(f"a projection is a svdlib.Projection or None, not {choice!r}")
        members.setdefault(choice, []).append(network)
    layers = len(nets.weights)
    return [
        _Group(choice, networks, choice.ranks(layers) if choice else (), [None] * layers)
        for choice, networks in members.items()
    ]


def _batches(
    x: Tensor, y: Tensor, size: int, generator: torch.Generator | None
) -> Sequence[tuple[Tensor, Tensor]]:
    """Batches of x (n, features), and of y (n, classes) feature-first, in order or shuffled."""
    if generator is not None:
        order = torch.randperm(len(x), generator=generator, device=x.device)
        x, y = x[order], y[order]
    labels = (part.t().contiguous() for part in y.split(size))
    return list(zip(x.split(size), labels, strict=True))


def _clock(device: torch.device) -> float:
    """Wall time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_factors(nets: MLPEnsemble, groups: Sequence[_Group], tail: float | None) -> None:
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


def _check_losses(losses: Tensor, step_of: _Step, epoch: int) -> None:
    recent = losses if losses.is_cuda else losses[-1]
    if math.isfinite(recent.sum().item()):
        return
    step, network = (~losses.isfinite()).nonzero()[0].tolist()
    when = f"at step {step + 1} of epoch {epoch}"
    _check_weights(step_of.weights, step_of.biases, when)
    raise FloatingPointError(
        f"network {network} has an infinite or NaN loss {when}, its weights being finite; "
        "a smaller learning rate may help"
    )


def _check_weights(weights: Sequence[Tensor], biases: Sequence[Tensor | None], when: str) -> None:
    layer = 0
    for weight, bias in zip(weights, biases, strict=True):
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
    groups: Sequence[_Group],
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
