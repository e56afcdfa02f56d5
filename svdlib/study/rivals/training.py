"""Other ways to train the same networks, to measure `train` against.

Each function trains S perceptrons on the same batches in the same order as `train`, and returns
the seconds of one epoch, the median over ``repeats`` after one that is not counted (which
compiles, where there is something to compile).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm.auto import tqdm

from svdlib import clock
from svdlib.data import Data
from svdlib.ensemble.networks import MLPEnsemble, perceptron
from svdlib.ensemble.projection import Projection
from svdlib.ensemble.training import train
from svdlib.study.rivals.timing import product_rate


def svdlib_epoch(
    sizes: Sequence[int], networks: int, data: Data, projection: Projection | None, repeats: int
) -> float:
    """`train` itself: the history's own seconds of an epoch, testing not included."""
    nets = MLPEnsemble(sizes, seeds=range(networks), device=data.device)
    few = data.head(len(data.train_x), 100)
    history = train(nets, few, epochs=1 + repeats, projection=projection, progress=False)
    return float(history[history.epoch > 1].groupby("epoch").seconds.first().median())


class _Images(Dataset):
    """Images that become tensors one at a time, as torchvision's MNIST with ToTensor does."""

    def __init__(self, data: Data):
        from torchvision.transforms.functional import to_pil_image, to_tensor

        self.picture, self.tensor = to_pil_image, to_tensor
        side = int(data.train_x.shape[1] ** 0.5)
        self.images = (data.train_x * 255).round().byte().view(-1, side, side).cpu()
        self.labels = data.train_y.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.tensor(self.picture(self.images[index])), self.labels[index]


def paper_epoch(
    sizes: Sequence[int], data: Data, projection: Projection | None = None, repeats: int = 1
) -> float:
    """The paper's way, one network: DataLoader, ToTensor, autograd, and a state dict that is
    taken, projected by `torch.linalg.svd` or `torch.svd_lowrank` and loaded again.
    """
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
            if projection and projection.every == "step":
                _project_by_state_dict(model, projection)
        if projection and projection.every == "epoch":
            _project_by_state_dict(model, projection)

    return clock.median(epoch, repeats, device=data.device)


def _project_by_state_dict(model: nn.Module, projection: Projection) -> None:
    rank = projection.ranks(1)[0]
    state = model.state_dict()
    for name, weight in state.items():
        if weight.ndim < 2:
            continue
        if projection.method == "rsvd":
            U, S, V = torch.svd_lowrank(weight, min(rank, *weight.shape))
            Vh = V.mT
        else:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            S[rank:] = 0
        state[name] = U @ torch.diag(S) @ Vh
    model.load_state_dict(state)


def torch_func_epoch(
    sizes: Sequence[int],
    networks: int,
    data: Data,
    projection: Projection | None = None,
    repeats: int = 1,
) -> float:
    """`torch.func`: stacked modules, vmap of grad, an update out of place; batched SVD."""
    models = list(MLPEnsemble(sizes, seeds=range(networks), device=data.device))
    params, _ = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    base = models[0]

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        z = torch.func.functional_call(base, p, (x,))
        return nn.functional.cross_entropy(z, y)

    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))
    batches = TensorDataset(data.train_x, data.train_y)
    rank = projection.ranks(1)[0] if projection else 0

    def epoch() -> None:
        nonlocal params
        for x, y in zip(*(part.split(64) for part in batches.tensors), strict=True):
            g = gradient(params, x, y)
            params = {k: (p - 1e-2 * g[k]).detach() for k, p in params.items()}
            if projection and projection.every == "step":
                params = _projected(params, projection.method, rank)
        if projection and projection.every == "epoch":
            params = _projected(params, projection.method, rank)

    return clock.median(epoch, repeats, device=data.device)


def _projected(params: dict[str, Tensor], method: str, rank: int) -> dict[str, Tensor]:
    new = dict(params)
    for name, W in params.items():
        if W.ndim == 3 and rank < min(W.shape[1:]):
            if method == "rsvd":
                U, S, V = torch.svd_lowrank(W, rank)
                new[name] = (U * S.unsqueeze(1)) @ V.mT
            else:
                U, S, Vh = torch.linalg.svd(W, full_matrices=False)
                new[name] = (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]
    return new


def jax_epoch(
    sizes: Sequence[int],
    networks: int,
    data: Data,
    projection: Projection | None = None,
    repeats: int = 1,
) -> float:
    """JAX: value_and_grad under vmap, the epoch one compiled `scan`; batched `jnp.linalg.svd`.

    The randomized method draws its sketch in JAX: Q from QR of W Ω, with k columns and two
    power iterations, as `torch.svd_lowrank` has it.
    """
    import jax
    import jax.numpy as jnp

    nets = MLPEnsemble(sizes, seeds=range(networks), device="cpu")
    weights = [jnp.asarray(w.detach().numpy()) for w in nets.weights]
    biases = [jnp.asarray(b.detach().numpy()) for b in nets.biases]
    whole = len(data.train_x) // 64 * 64
    x = jnp.asarray(data.train_x[:whole].reshape(-1, 64, sizes[0]).cpu().numpy())
    y = jnp.asarray(data.train_y[:whole].reshape(-1, 64).cpu().numpy())
    rank = projection.ranks(1)[0] if projection else 0

    def loss(params: Any, x: Any, y: Any) -> Any:
        *hidden, last = zip(*params, strict=True)
        for W, b in hidden:
            x = jax.nn.relu(x @ W.T + b)
        log_p = jax.nn.log_softmax(x @ last[0].T + last[1])
        return -jnp.take_along_axis(log_p, y[:, None], 1).mean()

    def low_rank(W: Any, key: Any) -> Any:
        if rank >= min(W.shape[1:]):
            return W
        if projection and projection.method == "truncsvd":
            U, S, Vh = jnp.linalg.svd(W, full_matrices=False)
            return (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]
        Q = jnp.linalg.qr(W @ jax.random.normal(key, (len(W), W.shape[2], rank)))[0]
        for _ in range(2):
            Q = jnp.linalg.qr(W @ jnp.linalg.qr(W.swapaxes(1, 2) @ Q)[0])[0]
        return Q @ (Q.swapaxes(1, 2) @ W)

    def step(params: Any, batch: Any) -> Any:
        x, y, key = batch
        losses, g = jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, None))(params, x, y)
        W, b = jax.tree.map(lambda p, d: p - 1e-2 * d, params, g)
        if projection and projection.every == "step":
            W = [low_rank(w, key) for w in W]
        return (W, b), losses

    @jax.jit
    def epoch(params: Any, key: Any) -> Any:
        params, losses = jax.lax.scan(step, params, (x, y, jax.random.split(key, len(x))))
        if projection and projection.every == "epoch":
            params = ([low_rank(w, key) for w in params[0]], params[1])
        return params, losses

    params = (weights, biases)

    def run() -> None:
        nonlocal params
        params, losses = epoch(params, jax.random.key(0))
        losses.block_until_ready()

    return clock.median(run, repeats)


def product_bound(sizes: Sequence[int], data: Data, repeats: int = 5) -> float:
    """Seconds that the matrix products of one network's epoch would take at this machine's
    best rate: forward and both products backward, but for the one to the inputs.
    """
    rate = product_rate(data.device, repeats)
    products_per_image = sum(3 * m * k for k, m in pairwise(sizes))
    products_per_image -= sizes[0] * sizes[1]
    return 2 * products_per_image * len(data.train_x) / rate


def race(
    sizes: Sequence[int],
    counts: Sequence[int],
    data: Data,
    projections: Sequence[Projection | None],
    repeats: int = 3,
    progress: bool = True,
) -> pd.DataFrame:
    """Every way of training, for every number of networks and projection, in one run.

    Returns:
        columns way, networks, method, every, seconds (per network and epoch of
        these data). The paper's way trains one network at a time, so it has one row a projection.
    """
    ways = {"svdlib": svdlib_epoch, "torch.func": torch_func_epoch, "JAX": jax_epoch}
    rows: list[tuple[str, int, Projection | None, float]] = []
    bar = tqdm(total=len(projections) * (1 + 3 * len(counts)), disable=not progress, unit="way")
    with bar:
        for projection in projections:
            taken = paper_epoch(sizes, data, projection, repeats)
            rows.append(("the paper's way", 1, projection, taken))
            bar.update()
            for count in counts:
                for way, epoch in ways.items():
                    taken = epoch(sizes, count, data, projection, repeats) / count
                    rows.append((way, count, projection, taken))
                    bar.update()
    return pd.DataFrame(
        {
            "way": way,
            "networks": networks,
            "method": projection.method if projection else "stock",
            "every": projection.every if projection else "never",
            "seconds": taken,
        }
        for way, networks, projection, taken in rows
    )
