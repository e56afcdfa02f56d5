"""A network of one's own, made smaller in one call that says what it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks, clock, threads
from svdlib.layers.calibrate import Fit, Mask, fits_of, lost_by
from svdlib.layers.cost import WHOLE_MODEL, cost, counted
from svdlib.layers.factorize import BATCH, Fits, factorized, one_after_another
from svdlib.network.batches import Batches, batches, first_batch, refuse_generator
from svdlib.network.calls import Call, Objective
from svdlib.network.chain import task_of
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.opened import Network
from svdlib.ranks.plan import plan_of
from svdlib.ranks.sensitivity import GRID, added_losses, sensitivities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Timed runs of the report.
REPEATS = 3


@dataclass(frozen=True)
class Compressed:
    """What `compress` made.

    Args:
        model: the smaller network.
        ranks: of the layers that are factorized.
        report: a row a layer and one for the whole model: rows, columns, rank (NaN of a dense
            layer), and of now, and with dense_… of before, parameters, bytes, multiply_adds and
            seconds on the first batch, see `cost`; loss_added, paired, and its standard error se:
            by this layer alone, NaN where that took too long to measure, and by all together.
    """

    model: nn.Module
    ranks: dict[str, int]
    report: pd.DataFrame

    def __str__(self) -> str:
        """All in a sentence."""
        whole = self.report.set_index("layer").loc[WHOLE_MODEL]
        work = whole.multiply_adds / max(whole.dense_multiply_adds, 1)
        return (
            f"{whole.parameters / whole.dense_parameters:.1%} of {whole.dense_parameters:,.0f} "
            f"parameters, {work:.1%} of the multiply-adds, "
            f"{whole.seconds / whole.dense_seconds:.0%} of the time; loss "
            f"{whole.loss_added:+.3g} ± {1.96 * whole.se:.2g}"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The layers' parameters before and now, with their ranks, as matplotlib draws them."""
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
@torch.random.fork_rng(devices=[])  # a DataLoader draws random numbers
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
    calibration: Batches | None = None,
    call: Call | None = None,
    mask: Mask | None = None,
    sequential: bool = False,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    multiple_of: int = 1,
    faster: bool = False,
    seconds: float = 60.0,
    progress: bool = True,
) -> Compressed:
    """A smaller copy of a network, its layers factorized at ranks that share a budget.

    1. How sensitive each layer is to its rank: the loss that it adds alone (`loss_profile`) where
       that is measured within ``seconds``, else, or where the loss does not rise, the share of
       its output's variance that it loses on the calibration inputs, by the eigenvalues of W C Wᵀ.
    2. Ranks of the least total under the budget, see `allocate`.
    3. Factors that are fitted on the calibration inputs, see `factorize`.
    4. The loss of the result, paired with the network's own on the same data.

    The loss that is reported is one of data that may have decided on the ranks: judge the
    result by others.

    Args:
        model: any module; it is not changed.
        x, y, objective, accuracy: data and losses, as in `loss_profile`, looked at several times.
        parameters, multiply_adds: what the result may have at most, as a share of the whole
            model's, between 0 and 1; it comes as near as whole ranks allow. For multiply_adds
            embeddings, and layers that share a weight with one, stay as they are.
        increase: the loss that may be added at most: the smallest network that is found to
            add no more on these data. Every step is measured.
        calibration, call, mask, sequential: see `factorize`; by default the inputs in ``x``.
        include, exclude: layers to look at, all by default, and layers to leave alone, by name
            or by pattern, such as "encoder.*".
        multiple_of: ranks are multiples of it; some processors multiply such matrices faster.
        faster: a layer stays dense where its factors are not faster than it, by the clock, with
            the first batch, on this device; the others give way.
        seconds: how long losses may be measured, about, once for the ranks and once for the
            report of single layers. What would take longer is left out.
        progress: show progress bars; before losses are measured they say how long it will take.

    Raises:
        ValueError: no budget or several, one out of range or below the least, a pattern that
            fits no layer, a model with factorized layers or without any to factorize, calibration
            that reaches none, data or an objective that do not fit the model, NaN losses.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 60))
    >>> small = compress(net, torch.rand(64, 100), torch.arange(64) % 60, parameters=0.5)
    >>> sorted(small.ranks), sum(p.numel() for p in small.model.parameters()) <= 0.5 * 12940
    (['0', '2'], True)
    """
    kind, budget = _budget(parameters=parameters, multiply_adds=multiply_adds, increase=increase)
    checks.positive_int(multiple_of, "multiple_of")
    seconds = checks.number(seconds, "seconds")
    if low_rank_layers(model):
        raise ValueError("the model has factorized layers already; give svdlib.merge(model)")
    inputs = x if calibration is None else calibration
    for each in (x, inputs):
        refuse_generator(each, "compress")
    net = Network.copy_of(model)
    names = net.matching(include, exclude)
    with net.measuring():
        start = clock.now()
        task = task_of(net, x, y, objective, accuracy)
        task.measure()
        one_pass = clock.now() - start
        few = first_batch(inputs, BATCH)
        layers = net.replaceable(names, few, call)
        own = net.untied(layers)
        fits: dict[str, Fit | None] = dict.fromkeys(layers.keys() - own)
        fits |= fits_of(net, own, batches(inputs, BATCH), call, mask, progress)
        layers = {name: layer for name, layer in layers.items() if name in fits}
        if not layers:
            raise ValueError(f"calibration reaches no layer, such as {own[0]!r}")
        errors = {name: lost_by(layers[name], fits[name]) for name in layers}
        work = counted(net, few, call)
        if (estimate := one_pass * (GRID + 1) * len(layers)) <= seconds:
            errors = sensitivities(task, layers, errors, estimate, progress)
    worth = work["multiply_adds" if kind == "multiply_adds" else "parameters"].astype(float)
    plan = plan_of(net, layers, errors, worth, multiple_of, f"{kind}={budget:g}")

    def made(ranks: Mapping[str, int]) -> nn.Module:
        small = Network.copy_of(net.model)
        own = small.untied(ranks)
        found: Fits = ((name, fits[name]) for name in own)
        if sequential:
            found = one_after_another(small, net, own, inputs, call, mask, progress)
        return factorized(small, ranks, found)

    def added(ranks: Mapping[str, int]) -> float:
        small = made(ranks)
        with net.measuring(small):
            return task.means(lambda: [nullcontext(small)], 1)["increase"][1]

    slow: list[str] = []
    while True:
        plan = plan.without(slow)
        spent = budget * plan.total
        if kind == "increase":
            spent = plan.smallest(added, budget, progress)
        small = made(ranks := plan.ranks(spent))
        costs = cost(small, few, call=call, repeats=REPEATS).set_index("layer")
        thin = costs["rank"].notna() & (costs.index != WHOLE_MODEL)
        slow = costs.index[thin & (costs.seconds >= costs.dense_seconds)].tolist()
        if not faster or not slow:
            break
    single = one_pass * len(ranks) <= seconds
    losses = added_losses(net, small, ranks, task, single, progress)
    net.warn()
    sides = pd.DataFrame({name: layer.shape for name, layer in net.layers.items()})
    report = sides.set_axis(["rows", "columns"]).T.join(costs, how="right").join(losses)
    return Compressed(small, ranks, report.rename_axis("layer").reset_index())


def _budget(**budgets: float | None) -> tuple[str, float]:
    """Which of the budgets is given, and what."""
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        told = " and ".join(given) or "none"
        raise ValueError(f"give one budget of {', '.join(budgets)}, not {told}")
    ((kind, value),) = given.items()
    value = checks.number(value, kind)
    if kind == "increase" and not 0 <= value < float("inf"):
        raise ValueError(f"increase must be a loss that may be added, at least 0, not {value:g}")
    if kind != "increase" and not 0 < value < 1:
        raise ValueError(
            f"{kind} must be a share of the whole model's, between 0 and 1, not {value:g}"
        )
    return kind, value
