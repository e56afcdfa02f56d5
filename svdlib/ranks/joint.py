"""The loss of a perceptron at every combination of its layers' ranks, and what the table says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.bars import bar
from svdlib.network.calls import Batch, Batches, batches, copied_to, described
from svdlib.network.chain import CACHED, Link, perceptron_of, task_of
from svdlib.network.opened import Network
from svdlib.network.task import MEMORY, Moments, check_data

# The largest number of combinations by default, and of those that may be asked for.
ALL = 20_000
MOST = 1_000_000
# The images are measured in this many shares, side by side.
SHARES = 4
Ranks = Iterable[int] | Mapping[str, Iterable[int]] | None


def joint_profile(
    model: nn.Sequential,
    x: Batches,
    y: Tensor | None = None,
    *,
    ranks: Ranks = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> pd.DataFrame:
    """The loss of a perceptron with all its layers cut at once, at every combination of ranks.

    With W_l = Σ_j σ_j u_j v_jᵀ, layer l at rank r gives z = b + Σ_{j≤r} σ_j u_j (v_jᵀ h), a nested
    sum over r, so that each rank is reached from the one before. With |R_l| ranks of layer l, an
    m_l × n_l matrix, that takes for each image, in multiply-adds,

        Σ_l |R_1| ⋯ |R_{l−1}| k_l (m_l + n_l),    k_l the highest rank in R_l,

    and the softmax of |R_1| ⋯ |R_L| outputs. Losses are those of the weights replaced, to rounding.

    Args:
        model: Linear layers in an ``nn.Sequential`` with activations between.
        x, y: inputs (n, …) and labels (n,), on the model's device. Or, without y, ``x`` is a tuple
            of both, or an iterable of such batches, read once.
        ranks: those to combine, for all layers or {layer: ranks}, capped at each layer's
            min(m, n); a layer that is not named stays whole. By default all, from 0, where these
            are at most 20,000 combinations; else a geometric grid that is.
        memory: bytes that intermediate results may take, about.

    Returns:
        One row per combination: a column per layer with its rank, loss, accuracy, increase, and se
        as in `loss_profile`, parameters (of the model, each layer stored as two factors where that
        is smaller), multiply_adds (for one input). ``attrs`` has the full network's ``loss``, and
        ``layers``, the names of the columns of ranks.

    Raises:
        ValueError: a model that is no perceptron, shared or computed weights, data that don't fit,
            impossible ranks, more than a million combinations, NaN or infinite losses.

    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> joint = joint_profile(net, torch.rand(20, 8), torch.arange(20) % 3, progress=False)
    >>> joint[(joint["0"] == 2) & (joint["2"] == 3)].parameters.item()
    55
    """
    checks.positive_int(memory, "memory")
    data = x if y is None else (x, y)
    if isinstance(data, tuple):
        check_data(*_labelled(data))
    net = Network(model)
    links = perceptron_of(net)
    grids = _grids(links, ranks)
    trees = math.prod(map(len, grids[:-1]))
    total = len(data[0]) * trees if isinstance(data, tuple) else None
    done: list[int] = []
    stop = Event()
    parts: list[Moments] = []
    losses: list[Tensor] = []
    usual = torch.get_num_threads()
    shown = partial(bar, desc="joint profile", unit="image", unit_scale=True)
    with net.measuring(), threads.inside(1), shown(total=total, progress=progress) as seen:
        for link, grid in zip(links, grids, strict=True):
            link.decompose(grid)
        with ThreadPoolExecutor(min(usual, SHARES)) as pool:
            for batch in batches(data):
                x, y = _labelled(batch if isinstance(data, tuple) else copied_to(model, batch))
                task = task_of(net, (x, y), memory=memory)
                losses.append(torch.cat([full for _, full, _ in task.batches()]))
                # So many shares whatever the number of threads, which so changes no result.
                shares = SHARES if x.device.type == "cpu" and len(x) > SHARES else 1
                images = _images(links, x, memory // shares)
                parts += threads.side_by_side(
                    pool,
                    partial(_moments, links, images, done, stop),
                    list(zip(*(t.tensor_split(shares) for t in (x, y, losses[-1])), strict=True)),
                    lambda: seen.update(sum(done) - seen.n),
                    stop,
                )
    full = torch.cat(losses)
    means = sum(parts[1:], parts[0]).means(len(full))
    if not all(map(math.isfinite, means["loss"])):
        raise ValueError("some combination of ranks gives NaN or infinite losses on these data")
    names = [link.name for link in links]
    table = pd.MultiIndex.from_product(grids, names=names).to_frame(index=False)
    stored = sum(table[link.name].map(link.layer.stored) for link in links)
    others = sum(parameter.numel() for parameter in net.model.parameters())
    others -= sum(link.layer.weight.numel() for link in links)
    table = table.assign(**means, parameters=stored + others, multiply_adds=stored)
    table.attrs = {"loss": full.double().mean().item(), "layers": names}
    return table


def _labelled(batch: Batch) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(f"joint_profile takes batches (inputs, labels), not {described(batch)}")
    x, y = batch
    return x, y


@torch.no_grad()
def _moments(
    links: Sequence[Link],
    images: int,
    done: list[int],
    stop: Event,
    share: tuple[Tensor, Tensor, Tensor],
) -> Moments:
    """Of every combination, over a share of the inputs, labels, and losses of the whole network."""
    combinations = math.prod(len(link.ranks) for link in links)
    moments = Moments.zeros(combinations, share[0].device)
    for h, y, full in zip(*(t.split(images) for t in share), strict=True):
        for at, logits in _visit(links, h.flatten(1).mT, 0):
            if stop.is_set():
                return moments
            moments.add_logits(at, logits, y, full)
            done.append(len(h))
    return moments


def _images(links: Sequence[Link], x: Tensor, memory: int) -> int:
    """How many to take at once: what is worked on again and again stays in the cache."""
    # For an image: the sums of each layer, or all logits, and what is made of them.
    numbers = max(*(link.rows for link in links), 2 * links[-1].rows * len(links[-1].ranks))
    fitting = memory // (8 * max(numbers, x[0].numel()) * x.element_size())
    return max(1, min(fitting, max(256, CACHED // numbers)))


def _visit(links: Sequence[Link], h: Tensor, start: int) -> Iterator[tuple[slice, Tensor]]:
    """The logits (R, b, classes) at all combinations from number ``start`` on, R at a time."""
    link, *behind = links
    for step in link.before:
        # In place it would change the sum that the next rank grows from.
        h = step(h.clone() if getattr(step, "inplace", False) else h)
    if not behind:
        z = h.new_empty(len(link.ranks), link.rows, h.shape[1])
        for row, found in zip(z, link.sums(h), strict=True):
            row.copy_(found)
        yield slice(start, start + len(z)), z.mT
        return
    combinations = math.prod(len(later.ranks) for later in behind)
    for number, z in enumerate(link.sums(h)):
        yield from _visit(behind, z, start + number * combinations)


def _grids(links: Sequence[Link], ranks: Ranks) -> list[list[int]]:
    """The ranks of each layer, in rising order."""
    if ranks is None:
        return _fitting(links)
    names = [link.name for link in links]
    wanted = ranks if isinstance(ranks, Mapping) else dict.fromkeys(names, tuple(ranks))
    if unknown := wanted.keys() - set(names):
        raise ValueError(f"no layer {unknown.pop()!r}; the model has {', '.join(names)}")
    grids = []
    for link in links:
        given = {
            min(checks.positive_int(rank, f"a rank of layer {link.name!r}", least=0), link.limit)
            for rank in wanted.get(link.name, [link.limit])
        }
        if not given:
            raise ValueError(f"layer {link.name!r} has no ranks; give one at least")
        grids.append(sorted(given))
    if (number := math.prod(map(len, grids))) > MOST:
        raise ValueError(
            f"{' × '.join(str(len(grid)) for grid in grids)} = {number:,} combinations are more "
            f"than {MOST:,}; {int(MOST ** (1 / len(links)) + 1e-9)} ranks a layer would fit"
        )
    return grids


def _fitting(links: Sequence[Link]) -> list[list[int]]:
    """All ranks, or a geometric grid: the largest with not more than `ALL` combinations, about."""
    size = max(link.limit for link in links) + 1
    while True:
        grids = [geometric(link.limit, size) for link in links]
        if (number := math.prod(map(len, grids))) <= ALL or size == 3:
            return grids
        size = max(3, min(size - 1, int(size * (ALL / number) ** (1 / len(links)))))


def geometric(limit: int, number: int) -> list[int]:
    """At most so many ranks from 0 to a limit, each about as many times the one before.

    >>> geometric(3, 10), geometric(100, 6)
    ([0, 1, 2, 3], [0, 1, 3, 10, 32, 100])
    """
    if number > limit:
        return list(range(limit + 1))
    return sorted({0, *np.geomspace(1, limit, number - 1).round().astype(int).tolist()})


def front(joint: pd.DataFrame, cost: str = "parameters") -> pd.DataFrame:
    """The combinations of ranks that no other beats in both loss and cost, and those close by.

    Args:
        joint: what `joint_profile` returns.
        cost: "parameters" or "multiply_adds".

    Returns:
        The rows of ``joint`` in the order of their cost, with ``excess``: by how much a row's
        loss is above the smallest at its cost or less, 0 on the front, else at most the row's se.

    Raises:
        ValueError: a table that `joint_profile` didn't make, NaN losses, an unknown cost.

    >>> joint = pd.DataFrame({"loss": [3.0, 1.0, 1.1, 2.0], "se": 0.2, "parameters": [1, 2, 2, 3]})
    >>> front(joint)[["loss", "parameters", "excess"]].round(2).values.tolist()
    [[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [1.1, 2.0, 0.1]]
    """
    checks.one_of(cost, ("parameters", "multiply_adds"), "cost")
    _check(joint, ["loss", "se", cost])
    ordered = joint.sort_values([cost, "loss"], kind="stable")
    lowest = ordered.loss.cummin()
    first = ordered.loss < lowest.shift(fill_value=math.inf)
    excess = ordered.loss - lowest
    return ordered.assign(excess=excess)[first | (excess > 0) & (excess <= ordered.se)]


def layers_of(joint: pd.DataFrame) -> list[str]:
    """The columns of ranks: those that stand before the loss."""
    _check(joint, ["loss", "increase", "se", "parameters"])
    layers = [str(name) for name in joint.columns[: joint.columns.get_loc("loss")]]
    if joint.duplicated(layers).any():
        raise ValueError(
            "the table has a combination of ranks more than once; give one network's at a time"
        )
    return layers


def _check(joint: pd.DataFrame, needed: list[str]) -> None:
    if lacking := [name for name in needed if name not in joint]:
        raise ValueError(f"the table lacks {', '.join(lacking)}; see joint_profile")
    if not np.isfinite(joint[[*needed]].to_numpy(float)).all():
        raise ValueError("the table has NaN or infinite losses")


def optimal(joint: pd.DataFrame, **budget: float) -> dict[str, int]:
    """The combination with the smallest loss, or the fewest parameters, under a budget."""
    layers = layers_of(joint)
    ((limited, limit),) = budget.items()
    eligible = _within(joint, limited, limit)
    order = ["loss", "parameters"] if limited == "parameters" else ["parameters", "loss"]
    best = eligible.sort_values(order, kind="stable").iloc[0]
    return {name: int(best[name]) for name in layers}


def walk(joint: pd.DataFrame, parameters: int, rising: bool) -> dict[str, int]:
    """The ranks at the end of greedy steps in one layer each, by change of loss per parameter."""
    layers = layers_of(joint)
    grids = [sorted(joint[name].unique()) for name in layers]
    shape = tuple(map(len, grids))
    if len(joint) != math.prod(shape):
        raise ValueError("a search in steps needs every combination of the table's ranks, once")
    ordered = joint.sort_values(layers)
    loss = ordered.loss.to_numpy().reshape(shape)
    weights = ordered.parameters.to_numpy().reshape(shape)
    _within(joint, "parameters", parameters)
    moves = np.eye(len(shape), dtype=int) * (1 if rising else -1)
    at = tuple(0 if rising else size - 1 for size in shape)
    visited = [at]
    while rising or weights[at] > parameters:
        steps = [
            ((loss[to] - loss[at]) / max(abs(int(weights[to]) - int(weights[at])), 1), to)
            for to in map(tuple, moves + at)
            if all(0 <= place < size for place, size in zip(to, shape, strict=True))
            and (not rising or weights[to] <= parameters)
        ]
        if not steps:
            break
        at = min(steps)[1]
        visited.append(at)
    best = min(visited, key=loss.__getitem__) if rising else at
    return {name: int(grid[place]) for name, grid, place in zip(layers, grids, best, strict=True)}


def _within(joint: pd.DataFrame, limited: str, limit: float) -> pd.DataFrame:
    eligible = joint[joint[limited] <= limit]
    if eligible.empty:
        raise ValueError(
            f"no combination of ranks meets the budget; {joint[limited].min():.12g} is the "
            f"smallest {limited} in the table"
        )
    return eligible
