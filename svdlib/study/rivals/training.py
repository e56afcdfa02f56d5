"""Other ways to train the same networks, to measure `train` against.

Each ``…_epoch`` sets up S perceptrons and returns a function that trains them for one more epoch,
on the same batches in the same order as `train`, and returns its seconds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from threading import Event
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from svdlib import clock, threads
from svdlib.bars import bar
from svdlib.data import Data, with_ones
from svdlib.ensemble.networks import MLPEnsemble, perceptron
from svdlib.ensemble.parts import Batches, Part
from svdlib.ensemble.projection import Projection
from svdlib.ensemble.training import train
from svdlib.study.rivals.timing import operations, product_rate
from svdlib.study.running import inputs

Epoch = Callable[[], float]
Sizes = Sequence[int]
Choice = Projection | None
Entrants = dict[tuple[str, str, int], Epoch]  # by projection, way and number of networks
TURN = 0.2  # the shortest turn of the race, in seconds


def svdlib_epoch(sizes: Sizes, networks: int, data: Data, projection: Choice = None) -> Epoch:
    """`train` itself: the history's own seconds of a second epoch, without testing.

    The first one has what a training does once, as its first projection.
    """
    nets = MLPEnsemble(sizes, seeds=range(networks), device=data.device)
    few = data.head(len(data.train_x), 100)
    run = partial(train, nets, few, epochs=2, projection=projection, progress=False)
    return lambda: float(run().seconds.iloc[-1])


class _Images(Dataset):
    """Images that become tensors one at a time, as torchvision's MNIST with ToTensor does."""

    def __init__(self, data: Data):
        from torchvision.transforms.functional import to_pil_image, to_tensor

        side = int(data.train_x.shape[1] ** 0.5)
        self.images = (data.train_x * 255).round().byte().view(-1, side, side).cpu()
        self.labels = data.train_y.tolist()
        self.tensor = lambda image: to_tensor(to_pil_image(image))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tensor(self.images[index]), self.labels[index]


def paper_epoch(sizes: Sizes, data: Data, projection: Choice = None) -> Epoch:
    """The paper's way, one network: DataLoader, ToTensor, autograd, and a projected state dict."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *perceptron(sizes)).to(data.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loader = DataLoader(_Images(data), batch_size=64)

    def epoch() -> None:
        for x, y in loader:
            loss = nn.functional.cross_entropy(model(x.to(data.device)), y.to(data.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if projection:
                state = model.state_dict()
                low = {name: _low_rank(W, projection) for name, W in state.items() if W.ndim == 2}
                model.load_state_dict(state | low)

    return partial(clock.median, epoch, 1, warmup=0, device=data.device)


def _low_rank(W: Tensor, projection: Projection) -> Tensor:
    """By torch's own SVDs, of k + p columns and q power iterations where it is randomized."""
    rank = min(projection.ranks(1)[0], *W.shape[-2:])
    if projection.method == "rsvd":
        columns = min(rank + projection.oversample, *W.shape[-2:])
        U, S, V = torch.svd_lowrank(W, columns, niter=projection.power_iters)
        Vh = V.mT
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def torch_func_epoch(sizes: Sizes, networks: int, data: Data, projection: Choice = None) -> Epoch:
    """`torch.func`: stacked modules, vmap of grad, an update out of place; batched SVD."""
    models = list(MLPEnsemble(sizes, seeds=range(networks), device=data.device))
    params, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    rank = projection.ranks(1)[0] if projection else 0

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = torch.func.functional_call(models[0], p, (x,))
        return nn.functional.cross_entropy(z, y)

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))

    def epoch() -> None:
        nonlocal params
        for x, y in zip(data.train_x.split(64), data.train_y.split(64), strict=True):
            g = gradient(params, x, y)
            params = {k: (p - 1e-2 * g[k]).detach() for k, p in params.items()}
            if projection:
                for name, W in params.items():
                    if W.ndim == 3 and rank < min(W.shape[1:]):
                        params[name] = _low_rank(W, projection)

    return partial(clock.median, epoch, 1, warmup=0, device=data.device)


def jax_epoch(sizes: Sizes, networks: int, data: Data, projection: Choice = None) -> Epoch:
    """JAX: value_and_grad under vmap, the epoch one compiled `scan`, SVDs as in `_low_rank`."""
    import jax
    import jax.numpy as jnp

    nets = MLPEnsemble(sizes, seeds=range(networks), device="cpu")
    start = nets.weights, nets.biases
    params = tuple([jnp.asarray(p.detach().numpy()) for p in part] for part in start)
    images = len(data.train_x) // 64 * 64
    x = jnp.asarray(data.train_x[:images].reshape(-1, 64, sizes[0]).cpu().numpy())
    y = jnp.asarray(data.train_y[:images].reshape(-1, 64).cpu().numpy())

    def loss(params: Any, x: Any, y: Any) -> Any:
        *hidden, last = zip(*params, strict=True)
        for W, b in hidden:
            x = jax.nn.relu(x @ W.T + b)
        log_p = jax.nn.log_softmax(x @ last[0].T + last[1])
        return -jnp.take_along_axis(log_p, y[:, None], 1).mean()

    def truncated(W: Any, rank: int) -> Any:
        U, S, Vh = jnp.linalg.svd(W, full_matrices=False)
        return (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]

    def low_rank(W: Any, key: Any) -> Any:
        if projection is None or (rank := projection.ranks(1)[0]) >= min(W.shape[1:]):
            return W
        if projection.method == "truncsvd":
            return truncated(W, rank)
        columns = min(rank + projection.oversample, *W.shape[1:])
        Q = jnp.linalg.qr(W @ jax.random.normal(key, (len(W), W.shape[2], columns)))[0]
        for _ in range(projection.power_iters):
            Q = jnp.linalg.qr(W @ jnp.linalg.qr(W.swapaxes(1, 2) @ Q)[0])[0]
        return Q @ truncated(Q.swapaxes(1, 2) @ W, rank)

    def step(params: Any, batch: Any) -> Any:
        x, y, key = batch
        losses, g = jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, None))(params, x, y)
        W, b = jax.tree.map(lambda p, d: p - 1e-2 * d, params, g)
        return ([low_rank(w, key) for w in W], b), losses

    @jax.jit
    def epoch(params: Any, key: Any) -> Any:
        return jax.lax.scan(step, params, (x, y, jax.random.split(key, len(x))))

    def run() -> None:
        nonlocal params
        params, losses = epoch(params, jax.random.key(0))
        losses.block_until_ready()

    return partial(clock.median, run, 1, warmup=0)


def product_bound(sizes: Sizes, data: Data) -> float:
    """Seconds of one network's epoch if it were its matrix products at this machine's best rate."""
    # The forward product and both backward ones of each layer, without that to the inputs.
    products = sum(3 * m * k for k, m in itertools.pairwise(sizes)) - sizes[0] * sizes[1]
    return 2 * products * len(data.train_x) / product_rate(data.device, repeats=1)


def entrants(
    sizes: Sizes, counts: Sequence[int], data: Data, projection: Choice = None, name: str = "stock"
) -> Entrants:
    """An epoch of every way, by projection ``name``; the paper's trains one network at a time."""
    if projection and projection.every != "step":
        raise ValueError(f"the race is of projections every step, not every {projection.every!r}")
    epochs: Entrants = {
        (name, "the paper's way", 1): paper_epoch(sizes, data, projection),
        (name, "the products alone", 1): partial(product_bound, sizes, data),
    }
    ways = {"svdlib": svdlib_epoch, "torch.func": torch_func_epoch, "JAX": jax_epoch}
    for count, (way, epoch) in itertools.product(counts, ways.items()):
        epochs[name, way, count] = epoch(sizes, count, data, projection)
    return epochs


def race(entrants: Entrants, repeats: int = 5, progress: bool = True) -> pd.DataFrame:
    """Seconds per network and epoch of each entrant in turn, after a round that compiles.

    Whatever disturbs the machine then disturbs all, and a ratio can be taken within a round. A
    turn lasts `TURN` or an epoch: threads of the one before may wait actively for milliseconds.
    """
    rows = []
    for number in bar(range(1 + repeats), progress=progress, unit="round", desc="race"):
        for (*names, networks), epoch in entrants.items():
            start, taken = clock.now(), [epoch()]
            while number and clock.now() - start < TURN:
                taken.append(epoch())
            if number:
                rows.append((*names, networks, number, statistics.median(taken) / networks))
    return pd.DataFrame(rows, columns=["projection", "way", "networks", "round", "seconds"])


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """How many times as long as svdlib the others take; faster is "none" where rounds disagree."""
    ours = table[table.way == "svdlib"].drop(columns="way")
    others = table[table.way != "svdlib"]
    pairs = others.merge(ours, on=["projection", "round"], suffixes=("_theirs", ""))
    single = pairs.way.isin(["the paper's way", "the products alone"])
    same = ~single & (pairs.networks_theirs == pairs.networks)
    pairs = pd.concat([pairs[same], pairs[single]])
    pairs["ratio"] = pairs.seconds_theirs / pairs.seconds
    groups = pairs.groupby(["projection", "networks", "way"], sort=False).ratio
    summary = groups.agg(median="median", least="min", most="max").reset_index()
    slower = np.where(summary.most < 1, summary.way, "none")
    summary["faster"] = np.where(summary.least > 1, "svdlib", slower)
    return summary


def step_operations(
    sizes: Sizes, networks: int, data: Data, projection: Choice = None
) -> pd.DataFrame:
    """`operations` of a step of so many networks, as one part, a projection after each step."""
    nets = MLPEnsemble(sizes, seeds=range(networks), device=data.device)
    part = Part(nets, slice(0, networks), [projection] * networks, "sgd", 0.0, seed=0)
    labels = -nn.functional.one_hot(data.train_y, sizes[-1]).float()
    batches = Batches(with_ones(data.train_x), labels, 64, None)
    losses = torch.zeros(len(batches.labels), networks, device=data.device)
    rates = [0.01] * len(losses)
    with threads.inside(1):
        return operations(lambda: part.train(batches, rates, losses, Event()), len(losses))


@inputs.refusing(
    whole="projected rank repeats",
    from_zero="oversample power_iters",
    wholes="counts",
    widths="sizes",
)
def check(rank: int, sizes: Sizes) -> None:
    """Refuse what 05_speed could not use."""
    inputs.below_full(rank, sizes)
