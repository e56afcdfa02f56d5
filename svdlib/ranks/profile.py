"""How the loss of a network depends on the rank of each layer, measured cheaply and exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import pandas as pd
from torch import Tensor, nn

from svdlib import checks
from svdlib.network.calls import Batches, Objective
from svdlib.network.chain import task_of
from svdlib.network.kinds import Layer
from svdlib.network.opened import Network
from svdlib.network.task import MEMORY, Sweep, Task


def loss_profile(
    model: nn.Module,
    x: Batches,
    y: Tensor | None = None,
    *,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    layers: Iterable[str] | None = None,
    ranks: Iterable[int] | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> pd.DataFrame:
    """The network's loss with one layer at a time cut to each rank, and the others as they are.

    The paper's Algorithm 3 takes an SVD and a whole forward pass for each layer and rank. Here, in
    an ``nn.Sequential``, each layer takes one SVD W = Σ σ_j u_j v_jᵀ, its output at rank j is a
    nested sum of its input X,

        Z_0 = b,    Z_j = Z_{j−1} + σ_j u_j (v_jᵀ X),

    and only the layers behind it run again. Elsewhere, and for layers that share their weight or
    hold several matrices, the whole model runs with the weight replaced. Both agree to rounding.

    Args:
        model: a module with layers as in `factorize`; a factorized one counts as the dense one.
        x, y: inputs (n, …) and labels (n,), on the model's device. Or, without y, ``x`` is all
            data: a tensor (n, …), a tuple (inputs …, targets) or a mapping of such, or an iterable
            of batches of any kind, such as a DataLoader, read once.
        objective: ``objective(model, batch)`` gives the losses (n,) of a batch, as does
            `next_token_losses`. By default the cross-entropy of class scores (n, classes, …), or
            (n, …, classes), in the model's output or its ``logits``, for targets (n, …), which are
            a tuple's last part or a mapping's "labels": an input's mean where these are not −100.
        accuracy: ``accuracy(model, batch)`` gives right answers (n,), 0 to 1; by default those of
            the default objective, NaN with another.
        layers: names of the layers to profile, all by default, or of parameters as in `project_`.
        ranks: the ranks to evaluate, capped at each layer's min(m, n); 0 … min(m, n) by default.
        memory: bytes that the stacked intermediate results may take, about.

    Returns:
        one row per layer and rank: layer, rank, loss (mean of the objective), accuracy (percent),
        increase (of the loss over the full network, paired by image), se (its standard error),
        rows and columns (the matrix's shape m × n), sigma (σ_rank, NaN at rank 0). Of layers with
        groups, matrices is their number, and sigma the root mean square over them. Of layers that
        share a weight, shared is the first. ``attrs["loss"]`` is the full network's loss.

    Raises:
        ValueError: data or an objective that do not fit the model, a model without matrices, an
            unknown layer, an impossible rank, NaN or infinite weights or losses.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> profile = loss_profile(net, torch.rand(20, 8), torch.arange(20) % 3, progress=False)
    >>> profile.groupby("layer")["rank"].max().to_dict()
    {'0': 6, '2': 3}
    """
    net = Network.to_measure(model)
    chosen = profiled_layers(net, layers)
    net.warn()
    wanted = None if ranks is None else {checks.positive_int(r, "a rank", least=0) for r in ranks}
    if wanted is not None and not wanted:
        raise ValueError("there are no ranks to evaluate; give one at least, or ranks=None for all")
    with net.measuring():
        task = task_of(net, x, y, objective, accuracy, memory)
        return profile_of(task, chosen, wanted, progress)


def profile_of(
    task: Task, layers: Mapping[str, Layer], ranks: Iterable[int] | None, progress: bool
) -> pd.DataFrame:
    """`loss_profile` of these layers of an opened network."""
    first = task.net.first_of_ties(layers)
    measured = {name: layer for name, layer in layers.items() if first.get(name, name) == name}
    tables = [sweep.table(ranks, progress) for sweep in task.sweeps(measured)]
    profile = pd.concat(tables, ignore_index=True)
    if "matrices" in profile:
        profile["matrices"] = profile.matrices.fillna(1).astype(int)
    if first:  # the same numbers for all that share a weight, and so the same rank by any rule
        parts = []
        for name in layers:
            rows, columns = layers[name].shape
            same = profile[profile.layer == first.get(name, name)]
            parts.append(same.assign(layer=name, rows=rows, columns=columns))
        profile = pd.concat(parts, ignore_index=True)
        profile["shared"] = profile.layer.replace(first)
    profile.attrs["loss"] = task.loss
    return profile


def profiled_layers(net: Network, names: Iterable[str] | None) -> dict[str, Layer]:
    """The layers of these names, or all whose weight can be cut; their weights are finite."""
    layers = net.choose(names, "profile")
    for name, reason in net.left.items() if not layers else ():
        raise ValueError(f"no layer can be profiled, such as {name!r}: {reason}")
    for name, layer in layers.items():
        checks.finite(layer.weight, f"the weight of layer {name!r}")
    return layers


def search_ranks(
    model: nn.Module,
    x: Batches,
    y: Tensor | None = None,
    accept: Callable[[pd.DataFrame], pd.Series] | None = None,
    *,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    window: int = 8,
    memory: int = MEMORY,
) -> dict[str, int]:
    """The smallest acceptable rank of each layer, without the whole profile.

    A geometric grid of ranks, bisection between its last refused and first accepted rank, and then
    windows of ranks below that, since loss is not quite monotone, until a whole window is refused.

    Args:
        x, y, objective, accuracy: as in `loss_profile`, but read several times.
        accept: says of each row of a profile whether its rank is acceptable; full rank always is.
        window: ranks that must be refused in a row before the search ends, or an eighth of the
            rank found, if that is more.

    Raises:
        ValueError: as `loss_profile`; no ``accept``, a generator for data.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> x, y = torch.rand(20, 8), torch.arange(20) % 3
    >>> search_ranks(net, x, y, lambda rows: rows.increase <= rows.se).keys()
    dict_keys(['0', '2'])
    """
    if accept is None or not callable(accept):
        example = "lambda rows: rows.increase <= rows.se"
        raise ValueError(f"accept must say which rows would do, such as {example}, not {accept!r}")
    window = checks.positive_int(window, "window")
    net = Network.to_measure(model)
    with net.measuring():
        task = task_of(net, x, y, objective, accuracy, memory, why="search_ranks")
        layers = profiled_layers(net, None)
        net.warn()
        first = net.first_of_ties(layers)
        found: dict[str, int] = {}
        for name, layer in layers.items():
            if first.get(name, name) in found:
                found[name] = found[first[name]]
            else:
                (sweep,) = task.sweeps({name: layer})
                found[name] = _smallest(sweep, layer.full_rank, accept, window)
        return found


def _smallest(
    sweep: Sweep, limit: int, accept: Callable[[pd.DataFrame], pd.Series], window: int
) -> int:
    def accepted(ranks: Iterable[int]) -> list[int]:
        table = sweep.table(sorted(ranks))
        return table["rank"][accept(table)].tolist()

    grid = {min(2**power, limit) for power in range(limit.bit_length() + 1)}
    best = min(accepted(grid), default=limit)
    low = max((rank for rank in grid if rank < best), default=0)
    while best - low > 1:
        middle = (low + best) // 2
        low, best = (low, middle) if accepted([middle]) else (middle, best)
    while best > 1 and (better := accepted(range(max(1, best - max(window, best // 8)), best))):
        best = min(better)
    return best
