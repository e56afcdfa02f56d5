"""A network of one's own, made smaller in one call that says what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks, clock, threads
from svdlib.bars import bar
from svdlib.layers.calibrate import Fit, Mask, fit, input_sums
from svdlib.layers.cost import WHOLE, cost, measured
from svdlib.layers.factorize import (
    BATCH,
    READ,
    Fits,
    one_after_another,
    shown,
    shrunk,
    weights_read,
)
from svdlib.layers.kinds import (
    Matrix,
    apart,
    choose,
    duplicate,
    evaluating,
    groups,
    low_rank_layers,
    matrix,
    matrix_layers,
    replace_module,
    take_no_fused_way,
    thin_twin,
    ties,
    warn_of,
    whole_layers,
)
from svdlib.objective import Batch, Batches, Call, Objective, cut, first_batch, refuse_once
from svdlib.ranks.allocate import Choices, allocate, choices, least
from svdlib.ranks.losses import Task, measuring, whole_task
from svdlib.ranks.profile import loss_profile

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
        whole = self.report.set_index("layer").loc[WHOLE]
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

        table = self.report[self.report.layer != WHOLE].iloc[::-1]
        ax = plt.subplots(figsize=(7, 1 + 0.25 * len(table)))[1] if ax is None else ax
        ax.barh(table.layer, table.dense_parameters, color="0.85", label="before")
        ax.barh(table.layer, table.parameters, color="C0", label="now")
        ends = table[["parameters", "dense_parameters"]].max(axis=1)
        for name, rank, end in zip(table.layer, table["rank"], ends, strict=True):
            told = "dense" if np.isnan(rank) else f"rank {rank:.0f}"
            ax.annotate(told, (end, name), (4, 0), textcoords="offset points", va="center")
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
        refuse_once(each, "compress")
    names = _named(model, include, exclude)
    with measuring(model):
        task = whole_task(model, data, objective, accuracy)
        one_pass = _seconds(model, task)
    few, dense = first_batch(cut(inputs, BATCH)), apart(duplicate(model))
    layers = _able(dense, names, inputs, call)
    fits = _fits(dense, layers, inputs, call, mask, progress)
    layers = {name: layer for name, layer in layers.items() if name in fits}

    with measuring(model):
        work = measured(apart(model), few, call)
    worth = work["multiply_adds" if kind == "multiply_adds" else "parameters"].astype(float)
    estimate = one_pass * (GRID + 1) * len(layers)
    errors = {name: _lost(layers[name], fits[name]) for name in layers}
    if estimate <= seconds:
        rises = _losses(model, task, layers, f"profile, about {estimate:.0f} s", progress)
        errors = _either(rises, errors)
    plan = _plan(layers, errors, worth, multiple_of)

    def made(ranks: Mapping[str, int]) -> nn.Module:
        if not ranks:
            return duplicate(model)
        fitting: Fits = partial(_found, fits)
        if sequential:
            fitting = partial(one_after_another, inputs, call, mask, dense, progress)
        return shrunk(model, ranks, fitting, depth=6)

    told = f"{kind}={budget:g}"
    while True:
        spent = budget * plan.total
        if kind == "increase":
            spent = _smallest(model, task, plan, made, budget, progress)
        small = made(ranks := plan.ranks(spent, told))
        slow = _slower(small, few, call) if faster else []
        if not slow:
            break
        plan, told = plan.without(slow), f"{kind}={budget:g} with faster=True"
    single = one_pass * len(ranks) <= seconds
    return Compressed(small, ranks, _report(model, small, few, call, task, single, progress))


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


def _named(model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str]) -> list[str]:
    """The layers that these names and patterns leave."""
    names = list(whole_layers(model))
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


def _able(
    dense: nn.Module, names: list[str], inputs: Batches, call: Call | None
) -> dict[str, Matrix]:
    """Those of the layers that can be factorized; the others are named in a warning."""
    found, left = choose(dense, None, "compress", twin=True)
    layers = cast(dict[str, Matrix], found)  # none is factorized
    thin = apart(duplicate(dense))
    for name, layer in matrix_layers(thin).items():
        if name in layers and name in names and name not in left:
            twin = thin_twin(layer, 1)
            for parameter in twin.parameters():
                nn.init.zeros_(parameter)
            thin = replace_module(thin, layer, twin)
    take_no_fused_way(thin)
    left |= dict.fromkeys(weights_read(thin, next(cut(inputs, BATCH)), call), READ)
    for group in ties(matrix_layers(dense)):
        if not set(group) <= set(names) - left.keys():
            others = [name for name in group if name not in left]
            left |= dict.fromkeys(others, "its weight is shared with a layer that is left")
    warn_of({name: why for name, why in left.items() if name in names}, depth=5)
    able = {name: layers[name] for name in names if name in layers and name not in left}
    if not able:
        raise ValueError("the model has no layer that could be factorized, of those asked for")
    return able


def _fits(
    dense: nn.Module,
    layers: Mapping[str, Matrix],
    inputs: Batches,
    call: Call | None,
    mask: Mask | None,
    progress: bool,
) -> dict[str, Fit | None]:
    """The fits of all layers that calibration reaches; None of those that share a weight."""
    tied = {name for group in ties(layers) for name in group}
    alone = {name: layer for name, layer in layers.items() if name not in tied}
    batches = shown(cut(inputs, BATCH), progress, "calibration")
    sums = input_sums(dense, alone, batches, call, mask)
    unseen = [name for name in alone if name not in sums]
    if unseen and len(unseen) == len(layers):
        raise ValueError(f"calibration reaches no layer, such as {unseen[0]!r}")
    warn_of(dict.fromkeys(unseen, "calibration does not reach it"), depth=5)
    found: dict[str, Fit | None] = {}
    for name in shown(list(layers), progress, "eigenvectors"):
        if name in sums or name in tied:
            found[name] = None if name in tied else fit(layers[name], sums.pop(name))
    return found


def _found(
    fits: Mapping[str, Fit | None], model: nn.Module, layers: Mapping[str, Matrix]
) -> Iterator[tuple[str, Fit | None]]:
    """What is known of these layers, for `shrunk`."""
    for name in layers:
        yield name, fits[name]


def _lost(layer: Matrix, found: Fit | None) -> np.ndarray:
    """The share of its output's variance, or of its own squares, that a layer loses at each rank."""
    if found is not None:
        return found.errors().cpu().numpy()
    squares = torch.linalg.svdvals(matrix(layer).double()).square()
    kept = np.append(0.0, squares.reshape(-1, squares.shape[-1]).sum(0).cumsum(0).cpu().numpy())
    return 1 - kept / kept[-1] if kept[-1] > 0 else np.zeros_like(kept)


def _seconds(model: nn.Module, task: Task) -> float:
    """How long a pass over the data takes."""
    start = clock.now(torch.device("cpu"))
    task.means(model, tuple, 0)["loss"][0]
    return clock.now(torch.device("cpu")) - start


def _losses(
    model: nn.Module, task: Task, layers: Mapping[str, Matrix], told: str, progress: bool
) -> dict[str, np.ndarray]:
    """What the loss rises by at each rank of each layer alone, measured at some of them."""
    errors = {}
    for name, layer in bar(layers.items(), progress=progress, desc=told, leave=False):
        m, n = matrix(layer).shape[-2:]
        grid = np.unique(np.linspace(1, max(1, (m * n - 1) // (m + n)), GRID).round().astype(int))
        table = loss_profile(
            model,
            task.data,
            objective=task.objective,
            accuracy=task.accuracy,
            layers=[name],
            ranks=grid.tolist(),
            progress=False,
        )
        full = min(m, n)
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
    layers: Mapping[str, Matrix],
    errors: Mapping[str, np.ndarray],
    worth: pd.Series,
    multiple_of: int,
) -> _Plan:
    """What there is to choose from, by what each layer is worth: its parameters or its work."""
    shared = {group[0]: group for group in ties(layers)}
    later = {name for group in shared.values() for name in group[1:]}
    groups_of = {name: shared.get(name, [name]) for name in layers if name not in later}
    options, total = {}, float(worth[WHOLE])
    fixed = total
    for first, names in groups_of.items():
        m, n = matrix(layers[first]).shape[-2:]
        whole = float(groups(layers[first]) * m * n)
        if worth.name == "multiply_adds":
            # an embedding multiplies nothing until it is factorized
            looked_up = any(isinstance(layers[name], nn.Embedding) for name in names)
            whole = 0.0 if looked_up else float(worth[names].sum())
        if whole > 0 and (m * n - 1) // (m + n) >= multiple_of:
            options[first] = choices(m, n, errors[first], cost=whole, multiple_of=multiple_of)
            fixed -= whole
    if not options:
        raise ValueError("no layer of those asked for gets cheaper at any rank")
    return _Plan(options, groups_of, fixed, total)


def _increase(model: nn.Module, small: nn.Module, task: Task) -> float:
    """The loss that the small one adds."""
    with measuring(model), evaluating(small):
        return task.means(model, lambda: [nullcontext(small)], 1)["increase"][1]


def _smallest(
    model: nn.Module,
    task: Task,
    plan: _Plan,
    made: Callable[[Mapping[str, int]], nn.Module],
    increase: float,
    progress: bool,
) -> float:
    """The smallest cost of a network found to add no more loss, by halving the interval."""
    low, high = plan.least, plan.total
    for step in bar(range(1 + HALVINGS), progress=progress, desc="budgets", leave=False):
        middle = (low + high) / 2 if step else low
        if _increase(model, made(plan.ranks(middle)), task) <= increase:
            high = middle
        else:
            low = middle
        if high == plan.least:
            break
    return high


def _slower(small: nn.Module, few: Batch, call: Call | None) -> list[str]:
    """The factorized layers that take no less time than they did dense."""
    table = cost(small, few, call=call, repeats=REPEATS)
    thin = table["rank"].notna() & (table.layer != WHOLE)
    return table.layer[thin & (table.seconds >= table.dense_seconds)].tolist()


def _report(
    model: nn.Module,
    small: nn.Module,
    few: Batch,
    call: Call | None,
    task: Task,
    single: bool,
    progress: bool,
) -> pd.DataFrame:
    """See `Compressed`; with ``single`` also the loss that each layer adds alone."""
    thin = low_rank_layers(small)
    tied = {name: group for group in ties(thin) for name in group}
    alone = apart(duplicate(model))
    take_no_fused_way(alone)
    names = list(thin) if single else []

    def variants() -> Iterator[AbstractContextManager[nn.Module | None]]:
        for name in names:
            yield _in_place(alone, {each: thin[each] for each in tied.get(name, [name])})
        yield nullcontext(small)

    with measuring(model), evaluating(small), evaluating(alone):
        means = task.means(model, variants, len(names) + 1, progress)
    losses = pd.DataFrame(
        {"loss_added": means["increase"][1:], "se": means["se"][1:]}, index=[*names, WHOLE]
    )
    for name, loss in zip(losses.index, losses.loss_added, strict=True):
        if not math.isfinite(loss):
            ranks = {each: thin[each].rank for each in (thin if name == WHOLE else [name])}
            raise ValueError(f"ranks {ranks} give NaN or infinite losses on these data")
    shapes = {name: matrix(layer).shape[-2:] for name, layer in whole_layers(model).items()}
    sides = pd.DataFrame(shapes, index=["rows", "columns"]).T
    table = cost(small, few, call=call, repeats=REPEATS).set_index("layer")
    return sides.join(table, how="right").join(losses).rename_axis("layer").reset_index()


@contextmanager
def _in_place(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with other layers of these names."""
    own = {name: part for name, part in model.named_modules() if name in layers}
    changed = model
    try:
        for name, layer in layers.items():
            changed = replace_module(changed, own[name], layer)
        yield changed
    finally:
        for name, layer in layers.items():
            replace_module(changed, layer, own[name])
