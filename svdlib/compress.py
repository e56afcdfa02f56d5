"""A network of one's own, made smaller in one call that says what it did."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks, threads
from svdlib.layers.calibrate import BATCH, Calibration, Fit, Gradients, calibration_of, fits_of
from svdlib.layers.cost import WHOLE_MODEL, cost, counted
from svdlib.layers.factorize import Fits, factorized, one_after_another
from svdlib.network.calls import (
    Batches,
    Objective,
    count_inputs,
    first_batch,
    is_single,
    rebuilt,
    refuse_generator,
)
from svdlib.network.chain import task_of
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.opened import Network
from svdlib.network.task import Task
from svdlib.ranks.allocate import Plan, plan_of
from svdlib.ranks.sensitivity import expected_losses, gradients

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Timed runs, to tell which layers are faster.
REPEATS = 3
# Inputs of which a fifth can be spared.
FEWEST = 50


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`: the smaller network, the ranks of its factorized layers, a report.

    The ``report`` has one row per layer and one for the whole model: rows, columns and the columns
    of `cost` on the first batch, with seconds if ``faster`` was asked for. ``losses`` has a row for
    each plan that was tried: its share of the budget's unit, the increase loss_added of the loss
    where plans were chosen, paired with the network's own, its standard error se, and whether it
    was kept. Its last row is the kept plan on data that did not choose it.
    """

    model: nn.Module
    ranks: dict[str, int]
    report: pd.DataFrame
    losses: pd.DataFrame

    def __str__(self) -> str:
        whole = self.report.set_index("layer").loc[WHOLE_MODEL]
        judged = self.losses.iloc[-1]
        return (
            f"{whole.parameters / whole.dense_parameters:.1%} of {whole.dense_parameters:,.0f} "
            f"parameters, {whole.multiply_adds / max(whole.dense_multiply_adds, 1):.1%} of the "
            f"multiply-adds; loss {judged.loss_added:+.3g} ± {1.96 * judged.se:.2g} on {judged.data}"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each layer's parameters before and now, with its rank."""
        import matplotlib.pyplot as plt

        table = self.report[self.report.layer != WHOLE_MODEL].iloc[::-1]
        ax = plt.subplots(figsize=(7, 1 + 0.25 * len(table)))[1] if ax is None else ax
        ax.barh(table.layer, table.dense_parameters, color="0.85", label="before")
        ax.barh(table.layer, table.parameters, color="C0", label="now")
        ends = table[["parameters", "dense_parameters"]].max(axis=1)
        for name, rank, end in zip(table.layer, table["rank"], ends, strict=True):
            label = "dense" if np.isnan(rank) else f"rank {rank:.0f}"
            ax.annotate(label, (end, name), (4, 0), textcoords="offset points", va="center")
        ax.set(xlabel="parameters", title=str(self).replace("; ", ";\n"))
        ax.margins(x=0.15)
        ax.legend(loc="lower right")
        return ax


@threads.making()
@threads.same_random()  # a DataLoader draws random numbers
def compress(
    model: nn.Module,
    x: Batches,
    y: Tensor | None = None,
    *,
    parameters: float | None = None,
    multiply_adds: float | None = None,
    increase: float | None = None,
    objective: Objective | None = None,
    accuracy: Objective | None = None,
    validation: Batches | None = None,
    calibration: Batches | Calibration | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    multiple_of: int = 1,
    faster: bool = False,
    progress: bool = True,
) -> Compressed:
    """A smaller copy of a network, its layers factorized at ranks that share a budget.

    1. The covariance C of each layer's inputs, and the second moment G of the loss's gradients at
       its output.
    2. Factors that are best for both, see `layers.calibrate.Fit`, and what rank r adds to the loss,
       to second order: half of the eigenvalues after the r-th of G W C Wᵀ.
    3. Ranks with the least total under the budget (Everett 1963). Even ranks, the same share in
       all layers, are tried too, and the better plan is kept.

    Args:
        model: any module; it is not changed.
        x, y, objective, accuracy: data and losses, as in `loss_profile`, read several times.
        parameters, multiply_adds: the largest share of the whole model's, between 0 and 1. For
            multiply_adds embeddings, and layers that share a weight with one, stay as they are.
        increase: the largest loss that the result, as small as is found, may add on these data.
        validation: data like ``x``, or (x, y), by which the result is judged. By default every
            fifth input, or batch of a list, is held back for that; of other iterables, such as a
            DataLoader, nothing is, and the result says so.
        calibration: inputs that factors are fitted to, or a `Calibration`; by default those in
            ``x``, as in ``Calibration(call=…)``.
        include, exclude: layers by name or pattern, such as "encoder.*". By default all but
            embeddings, and layers that share a weight with one: words that are rare here would be
            lost.
        multiple_of: ranks are multiples of it, which some processors multiply faster.
        faster: layers stay dense if their factors are no faster, as timed on the first batch.

    Raises:
        ValueError: no budget or several, one that can't be met, a pattern without layers, a model
            with factorized layers or without matrices, calibration or data that do not fit it.

    Warns:
        UserWarning: the loss is more than three times the network's own, or where answers are right
            or wrong, less than half as many are right.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    >>> small = compress(net, torch.rand(64, 100), torch.arange(64) % 60, parameters=0.5)
    >>> sorted(small.ranks), sum(p.numel() for p in small.model.parameters()) <= 0.5 * 12940
    (['0', '2'], True)
    """
    kind, budget = _budget(parameters=parameters, multiply_adds=multiply_adds, increase=increase)
    checks.positive_int(multiple_of, "multiple_of")
    if low_rank_layers(model):
        raise ValueError("the model has factorized layers already; give svdlib.merge(model)")
    data, judges, judged_by = _parted(x if y is None else (x, y), validation)
    inputs = calibration_of(calibration)
    if inputs.data is None:
        inputs = replace(inputs, data=data if y is None else data[0])
    for source in (data, judges, inputs.data):
        refuse_generator(source, "compress")
    net = Network.copy_of(model)
    names = net.matching(include, exclude)
    if include is None:
        spared = net.embeddings()
        names = [name for name in names if name not in spared] or names
    with net.measuring():
        task = task_of(net, data, None, objective, accuracy)
        task.measure(progress)
    batch = first_batch(inputs.data, BATCH)
    layers = net.replaceable(names, batch, inputs.call)
    untied = net.untied(layers)
    with net.measuring():
        slopes = _gradients(task, layers, untied, progress)
    fits: dict[str, Fit | None] = dict.fromkeys(layers.keys() - untied)
    for name, fits[name] in fits_of(net, untied, inputs, slopes, progress):
        if name in slopes and not inputs.sequential:
            slopes[name].square = None  # large, and no longer needed
    if not fits:
        raise ValueError(f"calibration reaches no layer, such as {untied[0]!r}")
    layers = {name: layer for name, layer in layers.items() if name in fits}
    errors = {
        name: expected_losses(layer, fits[name], slopes.get(name)) for name, layer in layers.items()
    }
    costs = counted(net, batch, inputs.call)[kind if kind == "multiply_adds" else "parameters"]
    plan = plan_of(net, layers, errors, costs, multiple_of, f"{kind}={budget:g}")
    maker = _Maker(task, fits, slopes, inputs, progress)
    while True:
        small, ranks, tried = maker.best(plan, budget, kind == "increase")
        repeats = REPEATS if faster else 0
        table = cost(small, batch, call=inputs.call, repeats=repeats).set_index("layer")
        slow = _slow(table) if faster else []
        if not slow:
            break
        plan = plan.without(slow)
    with net.measuring(small):
        task = task_of(net, judges, None, objective, accuracy)
        means = task.means(lambda: [nullcontext(small)], 1, progress, "judging")
    added = means["increase"][1]
    judged = {"loss_added": added, "se": means["se"][1], "data": judged_by}
    kept = tried[tried.kept].iloc[0]
    losses = pd.concat([tried, pd.DataFrame([{**kept, **judged}])], ignore_index=True)
    if not math.isfinite(added):
        raise ValueError(f"ranks {ranks} give NaN or infinite losses on these data")
    net.warn()
    _warn_if_wrecked(means, ranks)
    sides = pd.DataFrame({name: layer.shape for name, layer in net.layers.items()})
    report = sides.set_axis(["rows", "columns"]).T.join(table, how="right")
    return Compressed(small, ranks, report.rename_axis("layer").reset_index(), losses)


def _parted(data: Batches, validation: Batches | None) -> tuple[Batches, Batches, str]:
    """Data to choose by, data to judge by, and what these are called."""
    if validation is not None:
        return data, validation, "validation data"
    if is_single(data):
        with suppress(ValueError):  # a message about such data follows
            if (n := count_inputs(data)) >= FEWEST:
                back = torch.arange(n) % 5 == 4
                part = lambda keep: rebuilt(data, lambda t: t[keep.to(t.device)])
                return part(~back), part(back), "a fifth held back"
    elif isinstance(data, list) and len(data) >= 5:
        rest = [batch for place, batch in enumerate(data) if place % 5 < 4]
        return rest, data[4::5], "a fifth held back"
    return data, data, "the data that chose it"


def _gradients(
    task: Task, layers: Mapping[str, Layer], untied: Collection[str], progress: bool
) -> dict[str, Gradients]:
    """`gradients`, or none, with a warning, where the loss has none."""
    try:
        return gradients(task, layers, layers.keys() - untied, progress)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        checks.warn(f"ranks go by each layer's own output, as the loss has no gradient: {reason}")
        return {}


def _slow(table: pd.DataFrame) -> list[str]:
    """The factorized layers that take no less time than they did."""
    thin = table["rank"].notna() & (table.index != WHOLE_MODEL)
    return table.index[thin & (table.seconds >= table.dense_seconds)].tolist()


def _warn_if_wrecked(means: Mapping[str, list[float]], ranks: Mapping[str, int]) -> None:
    """Warn of a result that is of no use."""
    (before, after), (right, still) = means["loss"], means["accuracy"]
    wrecked = after > 3 * before > 0 if math.isnan(right) else still < right / 2
    if wrecked:
        was = f"loss {before:.3g}, now {after:.3g}"
        was += "" if math.isnan(right) else f"; {right:.1f}% right, now {still:.1f}%"
        checks.warn(f"the result is wrecked ({was}); allow it more, or train it on: {dict(ranks)}")


@dataclass(frozen=True)
class _Maker:
    """Makes smaller copies of a network, and looks for the ranks that meet a budget."""

    task: Task
    fits: Mapping[str, Fit | None]
    slopes: Mapping[str, Gradients]
    inputs: Calibration
    progress: bool

    def made(self, ranks: Mapping[str, int]) -> nn.Module:
        net = self.task.net
        small = Network.copy_of(net.model)
        untied = small.untied(ranks)
        found: Fits = ((name, self.fits[name]) for name in untied)
        if self.inputs.sequential:
            found = one_after_another(small, net, untied, self.inputs, self.slopes, self.progress)
        return factorized(small, ranks, found)

    def added(self, small: nn.Module, progress: bool = False) -> tuple[float, float]:
        """The increase of the loss and its standard error."""
        with self.task.net.measuring(small):
            means = self.task.means(lambda: [nullcontext(small)], 1, progress, "choosing ranks")
        return means["increase"][1], means["se"][1]

    def best(
        self, plan: Plan, budget: float, searched: bool
    ) -> tuple[nn.Module, dict[str, int], pd.DataFrame]:
        """The better of a plan and of even ranks, by the loss or, if ``searched``, by the cost."""
        rows: list[dict[str, object]] = []
        kept, least = 0, math.inf
        for place, (name, choose) in enumerate((("allocated", plan.ranks), ("even", plan.even))):
            spent = budget * plan.total
            if searched:
                added = lambda ranks: self.added(self.made(ranks))[0]
                spent = plan.smallest(choose, added, budget, self.progress)
            small = self.made(ranks := choose(spent))
            loss, se = self.added(small, self.progress)
            share = plan.cost(ranks) / plan.total
            row = {"plan": name, "share": share, "loss_added": loss, "se": se}
            rows.append(row | {"data": "the data that chose"})
            value = share if searched else loss
            if not rows[1:] or value < least or math.isnan(least):
                best, kept, least = (small, ranks), place, value  # the other's memory is freed
        table = pd.DataFrame(rows)
        return *best, table.assign(kept=table.index == kept)


def _budget(**budgets: float | None) -> tuple[str, float]:
    """The name and value of the one budget that is given."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"give one budget of {', '.join(budgets)}, not {found}")
    ((kind, value),) = given.items()
    value = checks.number(value, kind)
    if kind == "increase" and not 0 <= value < np.inf:
        raise ValueError(f"increase must be a loss that may be added, at least 0, not {value:g}")
    if kind != "increase" and not 0 < value < 1:
        raise ValueError(
            f"{kind} must be a share of the whole model's, between 0 and 1, not {value:g}"
        )
    return kind, value
