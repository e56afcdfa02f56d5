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
from svdlib.layers.calibrate import BATCH, Calibration, Fit, Mask, fits_of, lost_by
from svdlib.layers.cost import WHOLE_MODEL, cost, counted
from svdlib.layers.factorize import Fits, factorized, one_after_another
from svdlib.network.calls import Batch, Batches, Call, Objective, first_batch, refuse_generator
from svdlib.network.chain import task_of
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.opened import Network
from svdlib.network.task import Task
from svdlib.ranks.allocate import Plan, plan_of
from svdlib.ranks.sensitivity import GRID, added_losses, sensitivities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Timed runs of the report.
REPEATS = 3


@dataclass(frozen=True)
class Compressed:
    """The result of `compress`: the smaller network, the ranks of its factorized layers, a report.

    The ``report`` has one row per layer and one for the whole model: rows, columns, the columns of
    `cost` on the first batch, and the paired increase loss_added of the loss with its standard
    error se, by this layer alone (NaN where that took too long) or by all together.
    """

    model: nn.Module
    ranks: dict[str, int]
    report: pd.DataFrame

    def __str__(self) -> str:
        whole = self.report.set_index("layer").loc[WHOLE_MODEL]
        return (
            f"{whole.parameters / whole.dense_parameters:.1%} of {whole.dense_parameters:,.0f} "
            f"parameters, {whole.multiply_adds / max(whole.dense_multiply_adds, 1):.1%} of the "
            f"multiply-adds, {whole.seconds / whole.dense_seconds:.0%} of the time; loss "
            f"{whole.loss_added:+.3g} ± {1.96 * whole.se:.2g}"
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

    1. Sensitivity of each layer to its rank: the loss that it adds alone (`loss_profile`), if that
       is measured within ``seconds``. Otherwise, or where the loss does not rise, the share of its
       output's variance that it loses on the calibration inputs, by the eigenvalues of W C Wᵀ.
    2. Ranks with the least total under the budget (Everett 1963).
    3. Factors fitted to the calibration inputs, see `factorize`.
    4. The loss of the result, paired with the network's own on the same data, which may have
       decided on the ranks: judge the result by other data.

    Args:
        model: any module; it is not changed.
        x, y, objective, accuracy: data and losses, as in `loss_profile`, read several times.
        parameters, multiply_adds: the largest share of the whole model's, between 0 and 1. For
            multiply_adds embeddings, and layers that share a weight with one, stay as they are.
        increase: the largest loss that the result, as small as is found, may add on these data.
        calibration, call, mask, sequential: as in `factorize`; by default the inputs in ``x``.
        include, exclude: layers by name or pattern, such as "encoder.*"; all by default.
        multiple_of: ranks are multiples of it, which some processors multiply faster.
        faster: layers stay dense if their factors are no faster, as timed on the first batch.
        seconds: about how long losses may be measured for the ranks, and again for single layers in
            the report. What would take longer is left out.

    Raises:
        ValueError: no budget or several, one that can't be met, a pattern without layers, a model
            with factorized layers or without matrices, calibration or data that do not fit it.

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
    inputs = Calibration(x if calibration is None else calibration, call, mask, progress)
    for data in (x, inputs.data):
        refuse_generator(data, "compress")
    net = Network.copy_of(model)
    names = net.matching(include, exclude)
    with net.measuring():
        start = clock.now()
        task = task_of(net, x, y, objective, accuracy)
        task.measure()
        one_pass = clock.now() - start
    few = first_batch(inputs.data, BATCH)
    layers = net.replaceable(names, few, call)
    own = net.untied(layers)
    fits: dict[str, Fit | None] = dict.fromkeys(layers.keys() - own)
    fits |= fits_of(net, own, inputs)
    if not fits:
        raise ValueError(f"calibration reaches no layer, such as {own[0]!r}")
    layers = {name: layer for name, layer in layers.items() if name in fits}
    errors = {name: lost_by(layer, fits[name]) for name, layer in layers.items()}
    costs = counted(net, few, call)[kind if kind == "multiply_adds" else "parameters"]
    if (estimate := one_pass * (GRID + 1) * len(layers)) <= seconds:
        description = f"profile of {len(layers)} layers, about {estimate:.0f} s"
        with net.measuring():
            errors = sensitivities(task, layers, errors, description, progress)
    plan = plan_of(net, layers, errors, costs, multiple_of, f"{kind}={budget:g}")
    maker = _Maker(task, fits, inputs, sequential)
    small, ranks, table = maker.within(plan, budget, kind == "increase", few, faster)
    losses = added_losses(task, small, one_pass * len(ranks) <= seconds, progress)
    net.warn()
    sides = pd.DataFrame({name: layer.shape for name, layer in net.layers.items()})
    report = sides.set_axis(["rows", "columns"]).T.join(table, how="right").join(losses)
    return Compressed(small, ranks, report.rename_axis("layer").reset_index())


@dataclass(frozen=True)
class _Maker:
    """Makes smaller copies of a network, and looks for the ranks that meet a budget."""

    task: Task
    fits: Mapping[str, Fit | None]
    inputs: Calibration
    sequential: bool

    def made(self, ranks: Mapping[str, int]) -> nn.Module:
        net = self.task.net
        small = Network.copy_of(net.model)
        own = small.untied(ranks)
        found: Fits = ((name, self.fits[name]) for name in own)
        if self.sequential:
            found = one_after_another(small, net, own, self.inputs)
        return factorized(small, ranks, found)

    def added(self, ranks: Mapping[str, int]) -> float:
        with self.task.net.measuring(small := self.made(ranks)):
            return self.task.means(lambda: [nullcontext(small)], 1)["increase"][1]

    def within(
        self, plan: Plan, budget: float, searched: bool, few: Batch, faster: bool
    ) -> tuple[nn.Module, dict[str, int], pd.DataFrame]:
        """The smaller network, its ranks and costs; with ``faster``, slow layers become dense."""
        slow: list[str] = []
        while True:
            plan, progress = plan.without(slow), self.inputs.progress
            spent = plan.smallest(self.added, budget, progress) if searched else budget * plan.total
            small = self.made(ranks := plan.ranks(spent))
            costs = cost(small, few, call=self.inputs.call, repeats=REPEATS).set_index("layer")
            thin = costs["rank"].notna() & (costs.index != WHOLE_MODEL)
            slow = costs.index[thin & (costs.seconds >= costs.dense_seconds)].tolist()
            if not faster or not slow:
                return small, ranks, costs


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
