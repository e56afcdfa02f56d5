"""When to cut a network's weights: once, after training, or again and again while it trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise

import pandas as pd
import torch
from torch import Tensor

from svdlib.bars import bar
from svdlib.data import Data
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.projection import Projection
from svdlib.ensemble.training import train
from svdlib.layers.factorize import factorized
from svdlib.linalg.bases import dominant_basis
from svdlib.network.opened import Network
from svdlib.ranks.joint import joint_profile
from svdlib.ranks.reduced import verify_ranks
from svdlib.study.evidence.grading import best_ranks
from svdlib.study.evidence.statistics import crossed, interval, summarize, with_interval
from svdlib.study.running import inputs

Cell = tuple[str, int, int]  # way, rank, epochs trained
Answers = dict[Cell, Tensor]  # (S, N), whether a network is right about a test image
Reached = tuple[str, int, int, MLPEnsemble]  # a cell's networks, which go on after it is noted
FREE = "an epoch after a projection"  # shows what grows beyond the rank until the next one
SAMPLE = 10_000  # training images whose activations a data-aware cut takes


@torch.no_grad()
def cut(nets: MLPEnsemble, rank: int, moments: Sequence[Tensor] | None = None) -> MLPEnsemble:
    """A copy of an ensemble whose weight matrices have this rank at most.

    W becomes U Uᵀ W with the k leading eigenvectors U of W C Wᵀ. That minimizes E ‖(W − W_k) x‖²
    for inputs x with the second moment C = E x xᵀ; without ``moments``, C = 1, it is the truncated
    SVD of W.

    >>> nets = cut(MLPEnsemble((784, 15, 15, 10), device="cpu"), rank=4)
    >>> [torch.linalg.matrix_rank(weight).item() for weight in nets.weights]
    [4, 4, 4]
    """
    nets = copy.deepcopy(nets)
    for number, W in enumerate(nets.weights):
        if rank < min(W.shape[-2:]):
            wide = W.double()
            metric = wide if moments is None else wide @ moments[number]
            U = dominant_basis(metric @ wide.mT, rank)
            W.copy_(U @ (U.mT @ wide))
    return nets


@torch.no_grad()
def input_moments(nets: MLPEnsemble, x: Tensor) -> list[Tensor]:
    """The second moments E h hᵀ (S or 1, in, in) of every layer's inputs, in float64."""
    hidden, moments = x.mT.unsqueeze(0), []
    for W, b in zip(nets.weights, nets.biases, strict=True):
        moments.append((hidden @ hidden.mT).double() / len(x))
        hidden = (W @ hidden + b.unsqueeze(-1)).relu()
    return moments


def factors(nets: MLPEnsemble, rank: int) -> MLPEnsemble:
    """The ensemble with all layers as two factors U √S and √S Vᵀ of this rank at most."""
    thin = []
    for net in map(Network, nets):  # each is a copy
        ranks = {name: min(rank, layer.full_rank) for name, layer in net.layers.items()}
        thin.append(factorized(net, ranks, dict.fromkeys(ranks).items()))
    return MLPEnsemble.from_modules(thin, nets.seeds)  # type: ignore[arg-type]


@torch.no_grad()
def shrink_(nets: MLPEnsemble, how: str, strength: float) -> None:
    """One step of a penalty on all weight matrices, in place.

    "weight decay": W becomes (1 − s) W. "nuclear norm": each singular value σ becomes
    max(σ − s, 0), the proximal step of s ‖W‖_* (Cai, Candès, and Shen 2010, Theorem 2.1).

    >>> nets = MLPEnsemble((784, 15, 15, 10), device="cpu")
    >>> shrink_(nets, "nuclear norm", 1.5)
    >>> [torch.linalg.matrix_rank(weight).item() for weight in nets.weights]
    [0, 0, 0]
    """
    for W in nets.weights:
        if how == "weight decay":
            W.mul_(1 - strength)
        else:
            U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
            W.copy_((U * (S - strength).clamp(min=0).unsqueeze(-2)) @ Vh)


def widest(sizes: Sequence[int], parameters: int) -> list[int]:
    """Widths of the widest dense network with equal hidden layers and at most so many parameters.

    Its hidden layers are no wider than the widest of ``sizes``.

    >>> widest([784, 15, 15, 10], 8_000)
    [784, 9, 9, 10]
    """
    for width in range(max(sizes[1:-1]), 0, -1):
        widths = [sizes[0], *[width] * (len(sizes) - 2), sizes[-1]]
        if (count := sum(m * n + n for m, n in pairwise(widths))) <= parameters:
            return widths
    raise ValueError(
        f"parameters must be at least {count:,}, what {widths} has, got {parameters:,}"
    )


def narrow(sizes: Sequence[int], rank: int) -> list[int]:
    """The `widest` network with no more parameters than one whose layers have this rank.

    A layer is stored as two factors, or as a matrix where that is smaller.

    >>> narrow([784, 15, 15, 10], 10)
    [784, 10, 10, 10]
    """
    return widest(sizes, sum(min(rank * (m + n), m * n) + n for m, n in pairwise(sizes)))


def trained(
    nets: MLPEnsemble,
    data: Data,
    checkpoints: Sequence[int],
    lr: float,
    projection: Projection | None = None,
) -> Iterator[int]:
    """Train in place from the first checkpoint to the last; yield at each."""
    for before, epoch in pairwise(checkpoints):
        train(nets, data, epochs=epoch - before, lr=lr, projection=projection, progress=False)
        yield epoch


def ways(
    data: Data,
    sizes: Sequence[int],
    seeds: int,
    checkpoints: Sequence[int],
    ranks: Sequence[int],
    compared: Sequence[int],
    late: Sequence[int],
    lr: float,
    penalties: Sequence[tuple[str, float]] = (),
    *,
    progress: bool = True,
) -> tuple[Answers, pd.DataFrame]:
    """Errors of networks cut in different ways, from the same seeds and equally long trained.

    - "stock": not cut.
    - "cut once", "cut once, data-aware": the stock networks at each checkpoint, by `cut`.
    - "every epoch": projected while they train.

    And for the ranks that are ``compared``, which are among ``ranks``:

    - "every epoch, data-aware": projected while they train, by `cut` with input moments.
    - "every step": projected while they train, after every step.
    - "last K epochs": every epoch, from a checkpoint in ``late`` to the next one.
    - "factors": trained as two factors of this rank from the start.
    - "narrow": not cut, all hidden layers of the same `narrow` width, no more parameters.

    Each of the ``penalties``, such as ("weight decay", 0.02), is a way of its own: weights are
    shrunk by `shrink_` after every epoch, and at checkpoints cut once, or at full rank not cut.

    Returns:
        the answers, and the `geometry` of the first layer, of "stock" and "every epoch".
    """
    start = MLPEnsemble(sizes, range(seeds), data.device)
    times, sample = [0, *checkpoints], data.train_x[:SAMPLE]

    def cut_once() -> Iterator[Reached]:
        nets, full = copy.deepcopy(start), max(map(min, pairwise(sizes)))
        for epoch in trained(nets, data, times, lr):
            yield "stock", full, epoch, nets
            moments = input_moments(nets, sample)
            for rank in ranks:
                yield "cut once", rank, epoch, cut(nets, rank)
                yield "cut once, data-aware", rank, epoch, cut(nets, rank, moments)

    def projected(rank: int) -> Iterator[Reached]:
        nets, projection = copy.deepcopy(start), Projection("truncsvd", rank, "epoch")
        for epoch in trained(nets, data, times, lr, projection):
            yield "every epoch", rank, epoch, nets
            further = copy.deepcopy(nets)
            train(further, data, epochs=1, lr=lr, progress=False)
            yield FREE, rank, epoch, further
        for first in late if rank in compared else ():
            last, nets = times[times.index(first) + 1], copy.deepcopy(stock[first])
            for epoch in trained(nets, data, [first, last], lr, projection):
                yield f"last {last - first} epochs", rank, epoch, nets

    def others(rank: int) -> Iterator[Reached]:
        step, small = Projection("truncsvd", rank, "step"), narrow(sizes, rank)
        plans = {
            "every step": (copy.deepcopy(start), step),
            "factors": (factors(start, rank), None),
            "narrow": (MLPEnsemble(small, range(seeds), data.device), None),
        }
        for way, (nets, how) in plans.items():
            for epoch in trained(nets, data, times, lr, how):
                yield way, rank, epoch, nets
        nets = copy.deepcopy(start)
        for epoch in range(1, times[-1] + 1):
            train(nets, data, epochs=1, lr=lr, progress=False)
            nets = cut(nets, rank, input_moments(nets, sample))
            if epoch in checkpoints:
                yield "every epoch, data-aware", rank, epoch, nets

    def penalized(how: str, strength: float) -> Iterator[Reached]:
        nets, full = copy.deepcopy(start), max(map(min, pairwise(sizes)))
        for epoch in range(1, times[-1] + 1):
            train(nets, data, epochs=1, lr=lr, progress=False)
            shrink_(nets, how, strength)
            for rank in (full, *ranks) if epoch in checkpoints else ():
                yield f"{how} {strength}", rank, epoch, cut(nets, rank)

    answers: Answers = {}
    stock: dict[int, MLPEnsemble] = {}
    free: dict[int, dict[int, Tensor]] = {rank: {} for rank in ranks}
    reached = chain(
        cut_once(),
        *map(projected, ranks),
        *map(others, compared),
        *(penalized(*penalty) for penalty in penalties),
    )
    total = len(checkpoints) * (1 + 4 * (len(ranks) + len(compared))) + len(late) * len(compared)
    total += len(checkpoints) * len(penalties) * (1 + len(ranks))
    for way, rank, epoch, nets in bar(reached, progress=progress, desc="ways", total=total):
        if way == FREE:
            free[rank][epoch] = nets.weights[0]
            continue
        answers[way, rank, epoch] = nets.losses(data.test_x, data.test_y)[1].cpu()
        if way == "stock":
            stock[epoch] = copy.deepcopy(nets)
    shapes = [geometry({epoch: nets.weights[0] for epoch, nets in stock.items()}, ranks, "stock")]
    shapes += [geometry(weights, [rank], "every epoch") for rank, weights in free.items()]
    return answers, pd.concat(shapes, ignore_index=True)


@torch.no_grad()
def geometry(weights: Mapping[int, Tensor], ranks: Sequence[int], way: str) -> pd.DataFrame:
    """How a layer's singular values and leading subspaces change from epoch to epoch.

    Per epoch, rank k, and network: ``tail`` is Σ_{i>k} σ_i² / Σ σ_i², ``gap`` is σ_{k+1} / σ_k, and
    ``overlap`` is ‖V_kᵀ V_k′‖² / k, from 0 to 1, of the leading right singular vectors now and at
    the last epoch.

    >>> W = torch.eye(3).unsqueeze(0)
    >>> geometry({1: W, 2: 2 * W}, [2], "stock")[["tail", "gap", "overlap"]].round(2).values[0]
    array([0.33, 1.  , 1.  ])
    """
    found = {
        epoch: torch.linalg.svd(W.double(), full_matrices=False) for epoch, W in weights.items()
    }
    final, rows = found[max(found)].Vh, []
    for epoch, (_, S, Vh) in found.items():
        for k in (k for k in ranks if k < S.shape[-1]):
            columns = {
                "tail": S[:, k:].square().sum(-1) / S.square().sum(-1),
                "gap": S[:, k] / S[:, k - 1],
                "overlap": (Vh[:, :k] @ final[:, :k].mT).square().sum((-2, -1)) / k,
            }
            table = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
            rows.append(table.assign(way=way, rank=k, epoch=epoch, seed=range(len(S))))
    return pd.concat(rows, ignore_index=True)


def cells(answers: Answers) -> pd.DataFrame:
    """A row per way, rank, and epoch: errors, and differences to other ways, in points.

    ``error`` is the mean test error. ``added`` is what is added to the stock networks' error, and
    ``ahead`` how much more "cut once" adds than this way. All have the ends of a 95% interval,
    by `crossed`, which covers both the seeds and the test images.
    """
    rows = []
    stock = {epoch: _wrong(a) for (way, _, epoch), a in answers.items() if way == "stock"}
    for (way, rank, epoch), right in answers.items():
        wrong = _wrong(right)
        row = {"way": way, "rank": rank, "epoch": epoch, "n": len(wrong)}
        row |= _named("error", wrong) | _named("added", wrong - stock[epoch])
        if (once := answers.get(("cut once", rank, epoch))) is not None:
            row |= _named("ahead", _wrong(once) - wrong)
        rows.append(row)
    return pd.DataFrame(rows)


def _wrong(right: Tensor) -> Tensor:
    return 100 * (~right).double()


def _named(name: str, values: Tensor) -> dict[str, float]:
    found = crossed(values.numpy())
    return {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def seeds_of(answers: Answers, shapes: pd.DataFrame) -> pd.DataFrame:
    """A row per rank, epoch, and seed: errors of three ways beside the first layer's geometry."""
    ways = ("stock", "cut once", "every epoch")
    tables = []
    for (way, rank, epoch), right in answers.items():
        if way in ways:
            error = _wrong(right).mean(1).numpy()
            tables.append(pd.DataFrame({"way": way, "rank": rank, "epoch": epoch, "error": error}))
            tables[-1]["seed"] = range(len(error))
    errors = pd.concat(tables, ignore_index=True)
    at = ["rank", "epoch", "seed"]
    stock = errors[errors.way == "stock"].drop(columns=["way", "rank"])
    wide = errors[errors.way != "stock"].pivot(index=at, columns="way", values="error")
    table = wide.reset_index().merge(stock.rename(columns={"error": "stock"}), on=at[1:])
    kept = shapes[shapes.way == "stock"].drop(columns="way")
    grown = shapes[shapes.way == "every epoch"].drop(columns=["way", "gap"])
    return table.merge(kept, on=at).merge(grown, on=at, suffixes=("", " projected"))


def orders(
    data: Data, sizes: Sequence[int], seeds: int, epochs: int, rank: int, lr: float, count: int
) -> pd.DataFrame:
    """Points that projecting every epoch adds to each network's error, for orders of the images.

    Networks see the training images in the same order in every epoch: order 0 is the data's own,
    and the others are drawn with the seed of their number.
    """
    rows = []
    for order in range(count):
        mixed = data
        if order:
            generator = torch.Generator().manual_seed(order)
            index = torch.randperm(len(data.train_x), generator=generator).to(data.device)
            mixed = replace(data, train_x=data.train_x[index], train_y=data.train_y[index])
        errors = []
        for projection in (None, Projection("truncsvd", rank, "epoch")):
            nets = MLPEnsemble(sizes, range(seeds), data.device)
            [_] = trained(nets, mixed, [0, epochs], lr, projection)
            errors.append(_wrong(nets.losses(data.test_x, data.test_y)[1].cpu()).mean(1))
        added = (errors[1] - errors[0]).tolist()
        rows += [{"order": order, "seed": seed, "added": a} for seed, a in enumerate(added)]
    return pd.DataFrame(rows)


def kept(
    data: Data,
    sizes: Sequence[int],
    seeds: int,
    checkpoints: Sequence[int],
    lr: float,
    tolerance: float,
    validation: int,
) -> pd.DataFrame:
    """The share of parameters that the best ranks keep, per network and epoch.

    The best ranks are the smallest in all whose loss on held-out training images, of all
    combinations of the layers' ranks, is within the tolerance of the full network's. ``increase``
    is what they add to the loss on the test images.
    """
    data, x, y = data.hold_out(validation)
    nets, rows = MLPEnsemble(sizes, range(seeds), data.device), []
    for epoch in trained(nets, data, [0, *checkpoints], lr):
        for seed, net in enumerate(nets):
            joint = joint_profile(net, x, y, progress=False)
            ranks = best_ranks(joint, tolerance)
            at = joint[(joint[list(ranks)] == list(ranks.values())).all(axis=1)].iloc[0]
            tested = verify_ranks(net, ranks, data.test_x, data.test_y)
            row = {"epoch": epoch, "seed": seed, **ranks}
            row["share"] = 100 * at.parameters / joint.parameters.max()
            rows.append(row | {"increase": float(tested["increase"])})
    return pd.DataFrame(rows)


def kept_table(found: pd.DataFrame, tolerance: float) -> pd.DataFrame:
    """Per data set, learning rate, and epoch, what `kept` found, and who exceeds the tolerance."""
    keys = ["dataset", "lr", "epoch"]
    table = summarize(found, "share", keys)
    table["parameters kept (%)"] = [with_interval(row, 0) for _, row in table.iterrows()]
    over = found.assign(over=found.increase > tolerance).groupby(keys).over.sum()
    table = table.set_index(keys).join(over.rename("over the tolerance on test"))
    return table.drop(columns=["mean", "low", "high"]).astype({"n": int})


def added_table(cells: pd.DataFrame, ranks: Sequence[int], epochs: Sequence[int]) -> pd.DataFrame:
    """Points added to the stock networks' error, with intervals: a row per way."""
    part = cells[cells["rank"].isin(ranks) & cells.epoch.isin(epochs) & (cells.way != "stock")]
    names = {"added": "mean", "added_low": "low", "added_high": "high"}
    rows = part[list(names)].rename(columns=names).iterrows()
    part = part.assign(points=[with_interval(row, 1) for _, row in rows])
    wide = part.pivot(index="way", columns=["rank", "epoch"], values="points")
    return wide.reindex(part.way.unique()).sort_index(axis=1, ascending=[False, True]).fillna("")


def flips(cells: pd.DataFrame) -> pd.DataFrame:
    """Per rank, the epochs up to which one cut is better, and from which on projecting is.

    "Better" means that the 95% interval of the difference leaves out zero; None if it never is.
    """
    rows = {}
    for rank, part in cells[cells.way == "every epoch"].groupby("rank"):
        once = part.epoch[part.ahead_high < 0]
        later = part.epoch > part.epoch[part.ahead_low <= 0].max()
        better = part.epoch[later | (part.ahead_low > 0).all()]
        rows[rank] = {
            "one cut is better up to": once.max() if len(once) else None,
            "projecting is better from": better.min() if len(better) else None,
        }
    return pd.DataFrame(rows).T.rename_axis("rank").astype("Int64")


def rules(seeds: pd.DataFrame) -> pd.DataFrame:
    """How well one sign of a stock network tells whether it should have been projected.

    Halfway through training, a rule "project if the sign is above (or below) a threshold" predicts
    whether, at the end, one cut has more errors than projecting every epoch. Networks with even
    seeds choose each threshold, and those with odd seeds grade it: ``correct`` is the percentage of
    right answers, with a 95% interval over networks. "always" projects. Ties are left out.
    """
    end = seeds.assign(better=seeds["cut once"] - seeds["every epoch"])
    end = end.loc[end.better != 0, ["rank", "epoch", "seed", "better"]]
    halfway = seeds.drop(columns=["cut once", "every epoch"]).assign(epoch=2 * seeds.epoch)
    table = halfway.merge(end, on=["rank", "epoch", "seed"])
    label, even = table.better > 0, table.seed % 2 == 0
    if even.all() or not even.any():
        return pd.DataFrame(columns=["sign", "project if", "networks", "correct (%)"])
    rows = [{"sign": "always", "project if": "", **_graded(label[~even], table.seed[~even])}]
    for sign in ("tail", "gap", "rank", "epoch"):
        found = {}
        for limit in (-math.inf, *table[sign].unique()):
            found["above", limit] = ((table[sign] > limit) == label)[even].mean()
            found["below", limit] = ((table[sign] < limit) == label)[even].mean()
        side, limit = max(found, key=lambda rule: found[rule])
        says = table[sign] > limit if side == "above" else table[sign] < limit
        right = (says == label)[~even]
        rows.append(
            {"sign": sign, "project if": f"{side} {limit:.3g}"} | _graded(right, table.seed[~even])
        )
    return pd.DataFrame(rows)


def _graded(right: pd.Series, seed: pd.Series) -> dict[str, object]:
    share = 100 * right.groupby(seed).mean()
    return {"networks": len(share), "correct (%)": with_interval(interval(share), 0)}


@inputs.refusing(
    whole="seeds validation order_epochs",
    from_zero="orders",
    positive="lr tolerance",
    wholes="checkpoints ranks",
    wholes_or_none="compared late kept_at",
    shares_or_none="decays norms",
    widths="sizes",
)
def check(
    sizes: Sequence[int],
    checkpoints: Sequence[int],
    ranks: Sequence[int],
    compared: Sequence[int],
    late: Sequence[int],
) -> None:
    """Refuse what notebook 11 could not use."""
    inputs.below_full(max(ranks), sizes)
    if list(checkpoints) != sorted(checkpoints):
        raise ValueError(f"checkpoints must increase, got {checkpoints}")
    if other := sorted({*compared} - {*ranks}):
        raise ValueError(f"compared must be among ranks = {ranks}, got {other} besides")
    if other := sorted({*late} - {*checkpoints[:-1]}):
        raise ValueError(f"late must be among checkpoints but the last, got {other} besides")
