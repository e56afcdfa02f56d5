"""A network of one's own, made smaller in one call that says what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks, clock, threads
from svdlib.bars import bar
from svdlib.layers.calibrate import Fit, Mask, fit, input_sums
from svdlib.layers.cost import WHOLE_MODEL, cost, counted
from svdlib.layers.factorize import BATCH, Fits, factorized, one_after_another, shown
from svdlib.network.batches import Batch, Batches, batches, first_batch, refuse_generator
from svdlib.network.calls import Call, Objective
from svdlib.network.chain import task_of
from svdlib.network.kinds import Layer, max_factor_rank
from svdlib.network.low_rank import low_rank_layers, tied
from svdlib.network.opened import READ, Network
from svdlib.network.task import Task
from svdlib.ranks.allocate import Choices, allocate, choices, least
from svdlib.ranks.profile import profile_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The ranks of a layer at which its loss is measured; between them it is drawn straight.
GRID = 10

# What the output's whole error counts for beside the largest rise of the loss.
LITTLE = 1e-3

# Halvings of the interval in which the smallest network within an increase is looked for.
HALVINGS = 7

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
    data = x if y is None else (x, y)
    inputs = x if calibration is None else calibration
    for each in (data, inputs):
        refuse_generator(each, "compress")
    net = Network.copy_of(model)
    names = _named(list(net.layers), include, exclude)
    with net.measuring():
        start = clock.now()
        task = task_of(net, data, None, objective, accuracy)
        task.measure()
        one_pass = clock.now() - start
        few = first_batch(inputs, BATCH)
        layers = _eligible(net, names, few, call)
        fits = _fits(net, layers, inputs, call, mask, progress)
        layers = {name: layer for name, layer in layers.items() if name in fits}
        work = counted(net, few, call)
        errors = {name: _lost(layers[name], fits[name]) for name in layers}
        estimate = one_pass * (GRID + 1) * len(layers)
        if estimate <= seconds:
            rises = _losses(task, layers, f"profile, about {estimate:.0f} s", progress)
            errors = _either(rises, errors)
    worth = work["multiply_adds" if kind == "multiply_adds" else "parameters"].astype(float)
    plan = _plan(layers, errors, worth, multiple_of)

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

    asked = f"{kind}={budget:g}"
    while True:
        spent = budget * plan.total
        if kind == "increase":
            spent = _smallest(plan, added, budget, progress)
        small = made(ranks := plan.ranks(spent, asked))
        slow = _slower(small, few, call) if faster else []
        if not slow:
            break
        plan, asked = plan.without(slow), f"{kind}={budget:g} with faster=True"
    single = one_pass * len(ranks) <= seconds
    report = _report(net, small, ranks, task, single, progress)
    costs = cost(small, few, call=call, repeats=REPEATS).set_index("layer")
    report = report.join(costs, how="right")
    net.warn()
    losses = ["loss_added", "se"]
    report = report[[*(name for name in report if name not in losses), *losses]]
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


def _named(names: list[str], include: Iterable[str] | None, exclude: Iterable[str]) -> list[str]:
    """The layers that these names and patterns leave."""
    wanted = ["*"] if include is None else checks.several(include, "include", '["encoder.*"]')
    barred = checks.several(exclude, "exclude", '["encoder.*"]')
    for pattern in (*wanted, *barred) if names else ():
        fits = isinstance(pattern, str) and any(fnmatchcase(name, pattern) for name in names)
        if not fits:
            raise ValueError(
                f"include and exclude name layers; {pattern!r} fits none of {', '.join(names)}"
            )
    return [
        name
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in wanted)
        and not any(fnmatchcase(name, pattern) for pattern in barred)
    ]


def _eligible(net: Network, names: list[str], few: Batch, call: Call | None) -> dict[str, Layer]:
    """Those of the layers that can be factorized; why others can't is in ``net.left``."""
    layers = net.choose(None, "compress", replace=True)
    left = {**net.left, **dict.fromkeys(net.weights_read(layers, few, call), READ)}
    for group in tied(net.layers):
        if not set(group) <= set(names) - left.keys():
            others = [name for name in group if name not in left]
            left |= dict.fromkeys(others, "its weight is shared with a layer that is left")
    net.left = {name: why for name, why in left.items() if name in names}
    found = {name: layers[name] for name in names if name in layers and name not in left}
    if not found:
        raise ValueError("the model has no layer that could be factorized, of those asked for")
    return found


def _fits(
    net: Network,
    layers: Mapping[str, Layer],
    inputs: Batches,
    call: Call | None,
    mask: Mask | None,
    progress: bool,
) -> dict[str, Fit | None]:
    """The fits of all layers that calibration reaches; None of those that share a weight."""
    alone = net.untied(layers)
    sums = input_sums(
        net, alone, shown(batches(inputs, BATCH), progress, "calibration"), call, mask
    )
    unseen = [name for name in alone if name not in sums]
    if unseen and len(unseen) == len(layers):
        raise ValueError(f"calibration reaches no layer, such as {unseen[0]!r}")
    net.left |= dict.fromkeys(unseen, "calibration does not reach it")
    found: dict[str, Fit | None] = {}
    for name in shown(list(layers), progress, "eigenvectors"):
        if name not in unseen:
            found[name] = fit(layers[name], sums.pop(name)) if name in sums else None
    return found


def _lost(layer: Layer, found: Fit | None) -> np.ndarray:
    """The share of its output's variance, or of its own squares, that a layer loses at each rank."""
    if found is not None:
        return found.errors().cpu().numpy()
    squares = torch.linalg.svdvals(layer.matrix().double()).square()
    kept = np.append(0.0, squares.reshape(-1, squares.shape[-1]).sum(0).cumsum(0).cpu().numpy())
    return 1 - kept / kept[-1] if kept[-1] > 0 else np.zeros_like(kept)


def _losses(
    task: Task, layers: Mapping[str, Layer], description: str, progress: bool
) -> dict[str, np.ndarray]:
    """What the loss rises by at each rank of each layer alone, measured at some of them."""
    errors = {}
    for name, layer in bar(layers.items(), progress=progress, desc=description, leave=False):
        limit, full = max(1, max_factor_rank(*layer.shape)), layer.full_rank
        grid = np.unique(np.linspace(1, limit, GRID).round().astype(int)).tolist()
        table = profile_of(task, {name: layer}, grid, progress=False)
        ranks, rises = [*table["rank"], full], [*table["increase"], 0.0]
        errors[name] = np.interp(np.arange(full + 1), ranks, rises)
    return errors


def _either(
    rises: Mapping[str, np.ndarray], lost: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What the loss rises by; where a higher rank makes it no better, the output's error decides."""
    falling = {name: np.minimum.accumulate(rise).clip(min=0) for name, rise in rises.items()}
    share = LITTLE * (max(each.max() for each in falling.values()) or 1.0)
    return {name: each + share * lost[name] for name, each in falling.items()}


@dataclass(frozen=True)
class _Plan:
    """Ranks under any budget.

    Args:
        options: what each weight may become, by its first layer.
        ties: for each of these all layers with that weight.
        fixed, total: what all else costs, and the whole model.
    """

    options: Mapping[str, Choices]
    ties: Mapping[str, list[str]]
    fixed: float
    total: float

    @property
    def least(self) -> float:
        return self.fixed + least(self.options)

    def ranks(self, spent: float, told: str = "") -> dict[str, int]:
        """Those below full rank, of a model that costs at most so much."""
        if spent < self.least:
            raise ValueError(
                f"{told} can't be met: with the lowest ranks in all layers that can be factorized "
                f"{self.least / self.total:.4f} of the whole model is left"
            )
        found = allocate(self.options, spent - self.fixed)
        return {
            name: rank
            for first, rank in found.items()
            if rank < self.options[first].ranks[-1]
            for name in self.ties[first]
        }

    def without(self, names: Iterable[str]) -> _Plan:
        """With these layers dense."""
        options = dict(self.options)
        for first, each in self.options.items():
            if set(names) & set(self.ties[first]):
                options[first] = Choices(each.ranks[-1:], each.costs[-1:], each.errors[-1:])
        return replace(self, options=options)


def _plan(
    layers: Mapping[str, Layer],
    errors: Mapping[str, np.ndarray],
    worth: pd.Series,
    multiple_of: int,
) -> _Plan:
    """What there is to choose from, by what each layer is worth: its parameters or its work."""
    shared = {group[0]: group for group in tied(layers)}
    later = {name for group in shared.values() for name in group[1:]}
    groups_of = {name: shared.get(name, [name]) for name in layers if name not in later}
    options, total = {}, float(worth[WHOLE_MODEL])
    fixed = total
    for first, names in groups_of.items():
        m, n = layers[first].shape
        whole = float(layers[first].weight.numel())
        if worth.name == "multiply_adds":
            # an embedding multiplies nothing until it is factorized
            multiplies = all(layers[name].multiplies for name in names)
            whole = float(worth[names].sum()) if multiplies else 0.0
        if whole > 0 and max_factor_rank(m, n) >= multiple_of:
            options[first] = choices(m, n, errors[first], cost=whole, multiple_of=multiple_of)
            fixed -= whole
    if not options:
        raise ValueError("no layer of those asked for gets cheaper at any rank")
    return _Plan(options, groups_of, fixed, total)


def _smallest(
    plan: _Plan, added: Callable[[Mapping[str, int]], float], increase: float, progress: bool
) -> float:
    """The smallest cost of a network found to add no more loss, by halving the interval."""
    low, high = plan.least, plan.total
    for step in bar(range(1 + HALVINGS), progress=progress, desc="budgets", leave=False):
        middle = (low + high) / 2 if step else low
        if added(plan.ranks(middle)) <= increase:
            high = middle
        else:
            low = middle
        if high == plan.least:
            break
    return high


def _slower(small: nn.Module, few: Batch, call: Call | None) -> list[str]:
    """The factorized layers that take no less time than they did dense."""
    table = cost(small, few, call=call, repeats=REPEATS)
    thin = table["rank"].notna() & (table.layer != WHOLE_MODEL)
    return table.layer[thin & (table.seconds >= table.dense_seconds)].tolist()


def _report(
    net: Network,
    small: nn.Module,
    ranks: Mapping[str, int],
    task: Task,
    single: bool,
    progress: bool,
) -> pd.DataFrame:
    """Shapes and added losses, by layer; with ``single`` also of each layer alone."""
    thin = low_rank_layers(small)
    groups = {name: group for group in tied(net.layers) for name in group}
    names = list(thin) if single else []

    def variants() -> Iterator[AbstractContextManager[nn.Module | None]]:
        for name in names:
            yield net.with_modules({each: thin[each] for each in groups.get(name, [name])})
        yield nullcontext(small)

    with net.measuring(small):
        means = task.means(variants, len(names) + 1, progress)
    losses = pd.DataFrame(
        {"loss_added": means["increase"][1:], "se": means["se"][1:]}, index=[*names, WHOLE_MODEL]
    )
    for name, loss in losses.loss_added.items():
        if not math.isfinite(loss):
            found = dict(ranks) if name == WHOLE_MODEL else {name: thin[str(name)].rank}
            raise ValueError(f"ranks {found} give NaN or infinite losses on these data")
    shapes = {name: layer.shape for name, layer in net.layers.items()}
    return pd.DataFrame(shapes, index=["rows", "columns"]).T.join(losses, how="outer")
