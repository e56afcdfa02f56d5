"""The training loop: all networks of an ensemble at once, by hand-derived gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from svdlib import checks
from svdlib.data import Data
from svdlib.networks import MLPEnsemble
from svdlib.projection import Projection, project_stacks_

Projections = Projection | None | Sequence[Projection | None]


def train(
    nets: MLPEnsemble,
    data: Data,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-2,
    projection: Projections = None,
    shuffle: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Train every network of an ensemble, in place, by stochastic gradient descent.

    All networks see the same batches, in the data's order unless ``shuffle``. A projection
    replaces the weights by low-rank ones after every epoch, step or number of steps; the
    networks need not share it, so that a sweep of ranks or a comparison of methods from the
    same seeds is one call. The defaults are the paper's.

    Args:
        nets: the ensemble, moved to the data's device.
        data: what `load` gives.
        epochs, batch_size, lr: as usual; the last batch of an epoch may be smaller.
        projection: None (stock), one for all networks, or one (or None) a network.
        shuffle: draw a new order before each epoch.
        seed: of the order and of the randomized projections.
        progress: show a progress bar.

    Returns:
        one row a network and epoch: network, seed, method, rank, every, epoch (from 1),
        train_loss (mean over the epoch's batches as they were trained on), test_loss,
        test_error (per cent), accuracy (per cent), and seconds, the wall time of that epoch for
        the whole ensemble: steps and projections, without testing.

    Raises:
        ValueError: sizes or labels that don't fit the data, projections that don't fit the
            networks, a number out of range.
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
    if not lr > 0:
        raise ValueError(f"lr must be positive, not {lr}")
    groups = _groups(nets, projection)
    check_fit(nets, data)
    nets.to(data.device)
    weights = [w.detach() for w in nets.weights]
    biases = [b.detach().unsqueeze(-1) for b in nets.biases]
    _check_weights(weights, biases, "before the first step")

    generator = torch.Generator(data.device).manual_seed(seed)
    labels = F.one_hot(data.train_y, nets.sizes[-1]).float()
    steps = -(-len(labels) // batch_size)
    losses = torch.zeros(steps, len(nets), device=data.device)
    rows: list[dict[str, object]] = []
    bar = tqdm(total=epochs * steps, disable=not progress, unit="step", desc="training")
    try:
        with torch.inference_mode(), _threads(nets), bar:
            for epoch in range(1, epochs + 1):
                start = _clock(data.device)
                for step, (x, y) in enumerate(
                    _batches(data.train_x, labels, batch_size, generator if shuffle else None)
                ):
                    descend_(weights, biases, x, y, lr, losses[step])
                    # On a GPU a look at the loss would stall the queue: there once an epoch.
                    if not losses.is_cuda or step == steps - 1:
                        _check_losses(losses[: step + 1], weights, biases, epoch)
                    done = (epoch - 1) * steps + step + 1
                    for group in groups:
                        if group.is_due(done, steps):
                            group.project_(weights, generator)
                    bar.update()
                seconds = _clock(data.device) - start
                train_loss = losses.double().sum(0) / len(labels)
                test = nets.losses(data.test_x, data.test_y)
                rows += _rows(nets, groups, epoch, train_loss, *test, seconds)
    except BaseException as stop:
        stop.history = pd.DataFrame(rows)  # type: ignore[attr-defined]
        raise
    return pd.DataFrame(rows)


def descend_(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    lr: float,
    loss: Tensor,
) -> None:
    """One step of gradient descent for S perceptrons on one batch, in place.

    Forward, with activations h_l of shape (S, out, B) and h_0 = xᵀ:

        z_l = W_l h_{l−1} + b_l,   h_l = max(z_l, 0),   p = softmax(z_L).

    Backward, for the mean cross-entropy L = −(1/B) Σ log p_y:

        δ_L = p − y,   δ_{l−1} = (W_lᵀ δ_l) ⊙ [h_{l−1} > 0],
        ∂L/∂W_l = δ_l h_{l−1}ᵀ / B,   ∂L/∂b_l = Σ_batch δ_l / B.

    No gradient is stored: each product is added to the weights at once. All networks share x,
    so the first layer's products are single ones of an (S·out) × in matrix.

    Args:
        weights, biases: a layer each, of shapes (S, out, in) and (S, out, 1).
        x, y: inputs (B, in) and one-hot labels, feature-first (classes, B).
        loss: receives each network's loss on the batch before the step, summed, (S,).

    >>> W, b = [torch.zeros(1, 2, 3)], [torch.zeros(1, 2, 1)]
    >>> loss = torch.empty(1)
    >>> descend_(W, b, torch.ones(1, 3), torch.tensor([[1.0], [0.0]]), lr=1.0, loss=loss)
    >>> loss, W[0]
    (tensor([0.6931]), tensor([[[ 0.5000,  0.5000,  0.5000],
             [-0.5000, -0.5000, -0.5000]]]))
    """
    first = weights[0].flatten(0, 1)
    z = torch.addmm(biases[0].view(-1, 1), first, x.t()).view(*weights[0].shape[:2], -1)
    hidden = [z]
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        z = torch.baddbmm(bias, weight, z.relu_())
        hidden.append(z)
    log_p = z.log_softmax(1)
    torch.mv(log_p.flatten(1), y.flatten(), out=loss).neg_()
    delta = log_p.exp_().sub_(y)
    scale = -lr / len(x)
    for layer in range(len(weights) - 1, 0, -1):
        below = hidden[layer - 1]
        back = torch.bmm(weights[layer].mT, delta)
        weights[layer].baddbmm_(delta, below.mT, alpha=scale)
        biases[layer].add_(delta.sum(-1, keepdim=True), alpha=scale)
        delta = torch.ops.aten.threshold_backward(back, below, 0)
    first.addmm_(delta.view(-1, len(x)), x, alpha=scale)
    biases[0].add_(delta.sum(-1, keepdim=True), alpha=scale)


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of x (n, features), and of y (n, classes) feature-first, in order or shuffled."""
    if generator is None:
        parts: Iterable[tuple[Tensor, Tensor]] = zip(x.split(size), y.split(size), strict=True)
    else:
        order = torch.randperm(len(x), generator=generator, device=x.device)
        parts = ((x[part], y[part]) for part in order.split(size))
    return ((images, labels.t().contiguous()) for images, labels in parts)


@contextmanager
def _threads(nets: MLPEnsemble) -> Iterator[None]:
    """One thread for networks so small that sharing a product costs more than it saves."""
    threads = torch.get_num_threads()
    if len(nets) * nets.sizes[0] * nets.sizes[1] < 30_000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clock(device: torch.device) -> float:
    """Wall time in seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _check_losses(
    losses: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], epoch: int
) -> None:
    recent = losses if losses.is_cuda else losses[-1]
    if math.isfinite(recent.sum().item()):
        return
    step, network = (~losses.isfinite()).nonzero()[0].tolist()
    when = f"at step {step + 1} of epoch {epoch}"
    _check_weights(weights, biases, when)
    raise FloatingPointError(
        f"network {network} has an infinite or NaN loss {when}, its weights being finite; "
        "a smaller learning rate may help"
    )


def _check_weights(weights: Sequence[Tensor], biases: Sequence[Tensor], when: str) -> None:
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        bad = ~(weight.isfinite().all(-1) & bias.isfinite().squeeze(-1)).all(-1)
        if bool(bad.any()):
            raise FloatingPointError(
                f"network {int(bad.nonzero()[0])}, layer {layer} has NaN or infinite weights "
                f"{when}; a smaller learning rate or finite starting weights may help"
            )


def _rows(
    nets: MLPEnsemble,
    groups: Sequence[_Group],
    epoch: int,
    train_loss: Tensor,
    losses: Tensor,
    correct: Tensor,
    seconds: float,
) -> Iterator[dict[str, object]]:
    by_network = {network: group.projection for group in groups for network in group.networks}
    accuracy = 100 * correct.double().mean(1)
    columns = (train_loss.tolist(), losses.double().mean(1).tolist(), accuracy.tolist())
    for network, (train, test, right) in enumerate(zip(*columns, strict=True)):
        projection = by_network[network]
        yield {
            "network": network,
            "seed": nets.seeds[network] if nets.seeds else None,
            "method": projection.method if projection else "stock",
            "rank": projection.rank if projection else None,
            "every": projection.every if projection else None,
            "epoch": epoch,
            "train_loss": train,
            "test_loss": test,
            "test_error": 100 - right,
            "accuracy": right,
            "seconds": seconds,
        }
