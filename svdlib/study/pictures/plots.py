"""Every plot of the study, from DataFrames alone. Each function returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from pandas import DataFrame

from svdlib.study.evidence.statistics import paired, prediction, summarize

STYLE = Path(__file__).with_name("svdlib.mplstyle")
COLORS: dict[Any, str] = {
    "stock": "#0072B2",
    "rsvd": "#D55E00",
    "rSVD every epoch": "#D55E00",
    "rSVD every step": "#EFA176",
    "truncsvd": "#009E73",
    "truncSVD every epoch": "#009E73",
    "truncSVD every step": "#7CCBB5",
}
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#000000")
LABELS: dict[Any, str] = {"stock": "stock", "rsvd": "rSVD", "truncsvd": "truncSVD"}
MARKERS = "osD^vP"
PUBLISHED = ("plain", "FWSVD", "ASVD", "SVD-LLM")  # compression methods of others, drawn in gray
SVD_STYLES: dict[Any, dict[str, Any]] = {
    "products alone": {"color": "0.3", "linestyle": ":"},
    "svdlib": {"color": "#000000", "marker": "o"},
    "torch.svd_lowrank": {"color": "#CC79A7", "marker": "s"},
    "scikit-learn": {"color": "#E69F00", "marker": "D"},
    "fbpca": {"color": "#56B4E9", "marker": "^"},
    "SciPy svds": {"color": "0.6", "marker": "v"},
    "SciPy interpolative": {"color": "0.6", "marker": "x", "linestyle": "--"},
}


def style() -> None:
    """Use the project's style for figures, and show tables in full."""
    plt.style.use(STYLE)
    pd.set_option("display.max_colwidth", None, "display.max_columns", None)
    pd.set_option("display.max_rows", 500, "display.width", 200)


def save(figure: Figure | None, name: str, data: DataFrame, folder: str | Path) -> None:
    """Write ``name``.png (if there is a figure) and ``name``.csv; nothing if ``folder`` is empty."""
    if str(folder):
        if figure is not None:  # without metadata, so that equal figures are equal files
            figure.savefig(Path(folder) / f"{name}.png", metadata={"Software": None})
        data.to_csv(Path(folder) / f"{name}.csv", index=False, float_format="%.6g")


def _panels(
    table: DataFrame, by: Any, title: str, size: tuple[float, float], pad: float = 0, **options: Any
) -> tuple[Figure, list[tuple[Axes, Any, DataFrame]]]:
    """A row of panels (axes, key, rows), one per group of the table in order of appearance."""
    groups = list(table.groupby(by, sort=False))
    figure, axes = _row(len(groups), title, (size[0] * len(groups) + pad, size[1]), **options)
    return figure, [(axis, *group) for axis, group in zip(axes, groups, strict=True)]


def _row(count: int, title: str, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False, **options)
    figure.suptitle(title, x=0.01, ha="left")
    return figure, axes[0]


def plain_numbers(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, as many as its range has room for."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def log_axis(axis: Axes, label: str) -> None:
    """A logarithmic y axis with plain numbers, below 100 if in percent. Call it after drawing."""
    axis.set(yscale="log", ylabel=label)
    if label.endswith("(%)"):
        axis.set_ylim(top=min(axis.get_ylim()[1], 100))
    plain_numbers(axis.yaxis)


def epoch_axis(axis: Axes) -> None:
    """Only whole numbers on an x axis of epochs, even if there is a single one."""
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _label_values(axis: Axes, values: pd.Series) -> None:
    ticks = sorted(values.unique())
    axis.set_xticks(ticks, list(map(str, ticks)))
    axis.minorticks_off()


def _mean_lines(axis: Axes, summary: DataFrame, x: str) -> None:
    others = cycle(OTHERS)
    for method, part in summary.groupby("method", sort=False):
        color, label = COLORS.get(method) or next(others), LABELS.get(method, method)
        axis.plot(part[x], part["mean"], "o-", color=color, label=label)
        axis.fill_between(part[x], part.low, part.high, color=color, alpha=0.25, linewidth=0)


def _error_bars(axis: Axes, x: Any, rows: DataFrame, fmt: str, **line: Any) -> Line2D:
    """The line of means; its error bars go from the column low to the column high."""
    spread = np.stack([rows["mean"] - rows.low, rows.high - rows["mean"]])
    return axis.errorbar(x, rows["mean"], spread, fmt=fmt, **line).lines[0]


def _by_epoch(axis: Axes, table: DataFrame, value: str, label: str) -> None:
    """Means by epoch with intervals; lighter, where 95% of runs lie, but not below the best run."""
    for method, part in table.groupby("method", sort=False):
        groups = part.groupby("epoch")[value]
        ends = groups.apply(prediction).unstack()
        color, low = COLORS.get(method, "0.5"), ends.low.clip(lower=groups.min())
        axis.fill_between(ends.index, low, ends.high, color=color, alpha=0.12, linewidth=0)
    _mean_lines(axis, summarize(table, value, ["method", "epoch"]), "epoch")
    log_axis(axis, label)
    epoch_axis(axis)


def learning_curves(history: DataFrame, title: str = "") -> Figure:
    """Test error and test loss by epoch (`train`): mean, its 95% interval, where 95% of runs lie."""
    figure, (left, right) = _row(2, title, (9.5, 3.6))
    _by_epoch(left, history, "test_error", "test error (%)")
    _by_epoch(right, history, "test_loss", "test loss (cross-entropy)")
    left.legend()
    return figure


def against_stock(history: DataFrame, title: str = "") -> Figure:
    """The error of stock networks by epoch, and what every other method adds, paired by seed."""
    figure, (left, right) = _row(2, title, (10.5, 3.8))
    _by_epoch(left, history[history.method == "stock"], "test_error", "test error (%)")
    left.set_title("stock")
    groups = history.groupby("epoch")
    added = pd.concat(paired(part, "test_error", "stock").assign(epoch=n) for n, part in groups)
    _mean_lines(right, added, "epoch")
    right.axhline(0, color="0.3", linewidth=1)
    right.set_yscale("symlog", linthresh=0.1)
    steps = [step * 10.0**power for power in (-1, 0, 1) for step in (1, 2, 5)]
    low, high = min(added.low.min(), 0), max(added.high.max(), 0)
    right.set_yticks([t for t in (*(-step for step in steps), 0, *steps) if low <= t <= high])
    right.yaxis.set_major_formatter("{x:g}")
    right.set(ylabel="points of test error", title="added to it")
    right.legend()
    epoch_axis(right)
    return figure


def reproduction(places: Mapping[str, DataFrame], title: str = "") -> Figure:
    """Single runs (crosses) among each group's, of which bands hold 95%: tables of `locate`."""
    table = pd.concat(places, names=["group"]).reset_index("group")
    methods, groups = list(table.method.unique()), list(places)
    alphas = np.linspace(0.25, 0.6, len(groups))
    table = table.sort_values("epoch", kind="stable")
    figure, panels = _panels(table, ["value", "epoch"], title, (2.9, 3.9))
    for axis, (value, epoch), part in panels:
        for row in part.to_dict("records"):
            group, color = groups.index(row["group"]), COLORS.get(row["method"])
            x = methods.index(row["method"]) + 0.32 * (group - (len(groups) - 1) / 2)
            bar = {"linewidth": 9, "solid_capstyle": "butt", "alpha": alphas[group]}
            axis.plot([x, x], [row["low"], row["high"]], color=color, **bar)
            axis.plot(x, row["mean"], "o", color=color)
            axis.plot(x, row["single"], "kx", markersize=8, markeredgewidth=2)
        axis.set_xticks(range(len(methods)), [LABELS.get(m, m) for m in methods])
        axis.set(title=f"{value}, epoch {epoch}", xlim=(-0.6, len(methods) - 0.4))
    bands = (Patch(color="0.3", alpha=a, label=g) for g, a in zip(groups, alphas, strict=True))
    single = Line2D([], [], color="k", marker="x", linestyle="", label="the single run")
    figure.legend(handles=[*bands, single], loc="outside lower center", ncols=len(groups) + 1)
    return figure


def confusion(counts: DataFrame, title: str = "") -> Figure:
    """A confusion matrix in percent: rows are true classes, columns are predicted classes."""
    figure, axis = plt.subplots(figsize=(5.4, 4.4))
    counts = counts.reindex(columns=counts.index, fill_value=0)  # with those never predicted
    share = 100 * counts.div(counts.sum(axis=1), axis=0)
    colors = {"cmap": "Blues", "vmin": 0, "vmax": 10, "cbar": False}
    sns.heatmap(share, annot=True, fmt=".0f", square=True, ax=axis, **colors)
    axis.set(xlabel="predicted class (colours end at 10 %)", title=title)
    axis.set_ylabel("true class (rows add to 100 %)")
    return figure


def weight_pictures(weights: np.ndarray, title: str = "") -> Figure:
    """The rows (n, 784) of a first layer as 28×28 pictures: red is positive, blue negative."""
    columns, limit = min(len(weights), 8), np.abs(weights).max()
    rows = -(-len(weights) // columns)
    figure = plt.figure(figsize=(1.1 * columns, 1.15 * rows + 0.4))
    figure.suptitle(title, x=0.01, ha="left")
    for place, row in enumerate(weights, 1):
        axis = figure.add_subplot(rows, columns, place)
        axis.imshow(row.reshape(28, 28), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.axis("off")
    return figure


def spectra(values: DataFrame, title: str = "") -> Figure:
    """Singular values (columns layer, method, network, index, sigma), one panel per layer."""
    figure, panels = _panels(values, "layer", title, (3.5, 3.3))
    for axis, layer, part in panels:
        _mean_lines(axis, summarize(part, "sigma", ["method", "index"]), "index")
        axis.set(xlabel="index i", ylabel="singular value σᵢ", title=str(layer), ylim=(0, None))
    figure.axes[0].legend()
    return figure


def sketch_grid(table: DataFrame, title: str = "") -> Figure:
    """What rSVD adds to the error, by oversampling: columns method, epoch, p, q, mean, low, high."""
    figure, panels = _panels(table, ["method", "epoch"], title, (2.9, 3.6))
    for axis, (method, epoch), part in panels:
        shades = sns.light_palette(COLORS["rsvd"], part.q.nunique() + 1)[1:]
        for shift, ((q, rows), shade) in enumerate(zip(part.groupby("q"), shades, strict=True)):
            x = rows.p + 0.08 * (shift - 1)
            _error_bars(axis, x, rows, "o-", capsize=3, color=shade, label=f"q = {q}")
        axis.axhline(0, color="0.3", linewidth=1)
        axis.set(xlabel="oversampling p", title=f"{method}, epoch {epoch}")
        axis.set_xticks(sorted(part.p.unique()))
    figure.axes[0].set_ylabel("points of test error added")
    figure.axes[-1].legend()
    return figure


def effects(table: DataFrame, title: str = "") -> Figure:
    """Paired differences (columns what, epoch, mean, low, high), one panel per epoch."""
    names = list(table.what.unique())[::-1]
    ordered, size = table.sort_values("epoch", kind="stable"), (4.6, 0.42 * len(names) + 1.5)
    figure, panels = _panels(ordered, "epoch", title, size, 2, sharey=True)
    for axis, epoch, part in panels:
        rows = part.set_index("what").loc[names]
        spread = [rows["mean"] - rows.low, rows.high - rows["mean"]]
        axis.errorbar(rows["mean"], range(len(names)), xerr=spread, fmt="o", capsize=3)
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="points of test error", title=f"epoch {epoch}")
        axis.set_ylim(-0.6, len(names) - 0.4)
    return figure


def error_by_rank(table: DataFrame, reference: Sequence[float], title: str = "") -> Figure:
    """Test error by rank and method: mean, 95% interval, and range; ``reference``: stock errors."""
    figure, axis = plt.subplots(figsize=(7.5, 4.0))
    for method, part in table.groupby("method", sort=False):
        ends = part.groupby("rank").test_error.agg(["min", "max"])
        color = COLORS.get(method, "0.5")
        axis.fill_between(ends.index, ends["min"], ends["max"], color=color, alpha=0.1, linewidth=0)
    _mean_lines(axis, summarize(table, "test_error", ["method", "rank"]), "rank")
    stock, ranks = float(np.mean(reference)), sorted(table["rank"].unique())
    axis.axhline(stock, color=COLORS["stock"], linestyle="--", label="stock, full rank")
    axis.set(xlim=(0.5, ranks[-1] + 0.5), xticks=ranks, xlabel="rank of every weight matrix")
    axis.set_title(title)
    log_axis(axis, "test error (%)")
    axis.legend()
    return figure


def speed(table: DataFrame, bound: float, title: str = "") -> Figure:
    """Seconds by way and number of networks: median, minimum, maximum; dotted, the ``bound``."""
    figure, axis = plt.subplots(figsize=(7.5, 4.0))
    for way, part in table[table.way != "the products alone"].groupby("way", sort=False):
        seconds = part.groupby("networks").seconds
        rows = DataFrame({"mean": seconds.median(), "low": seconds.min(), "high": seconds.max()})
        _error_bars(axis, rows.index, rows, "o-", capsize=3, label=str(way))
    axis.axhline(bound, color="0.3", linestyle=":", label="matrix products alone")
    axis.set(xlabel="networks trained at once", ylabel="seconds per network and epoch")
    axis.set(xscale="log", yscale="log", title=title)
    _label_values(axis, table.networks)
    axis.legend()
    return figure


def loss_profiles(profile: DataFrame, title: str = "") -> Figure:
    """Increase of the loss by rank (`loss_profile`), one line per layer: mean and 95% interval."""
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    names = [f"layer {row.layer}: {row.rows}×{row.columns}" for row in profile.itertuples()]
    table = profile.assign(method=names)
    _mean_lines(axis, summarize(table, "increase", ["method", "rank"]), "rank")
    axis.axhline(0, color="0.3", linewidth=1)
    axis.set(xlabel="rank of this layer, the others full", ylabel="increase of the validation loss")
    axis.set_title(title)
    axis.set_yscale("symlog", linthresh=0.01)
    axis.set_ylim(bottom=min(-0.005, axis.dataLim.y0))
    if profile["rank"].max() > 100:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
    axis.legend()
    return figure


def front(grades: DataFrame, full: tuple[int, float], title: str = "") -> Figure:
    """Rules for ranks beside the best (`grade`); ``full``: all parameters, and their test error."""
    figure, (left, right) = _row(2, title, (12, 4.6), width_ratios=(3, 2))
    colors, markers = cycle(sns.color_palette("colorblind")), cycle(MARKERS + "*X<>p")
    looks = {rule: (next(colors), next(markers)) for rule in grades.rule.unique()}
    by = ["rule", "share"]
    sizes = grades.groupby(by, sort=False, dropna=False).parameters.mean()
    errors = summarize(grades, "error", by).assign(parameters=sizes.values)
    best = errors[(errors.rule == "optimal") & errors.share.notna()]
    left.plot(best.parameters, best["mean"], "-", color="0.2", label="the best ranks", zorder=1)
    left.fill_between(best.parameters, best.low, best.high, color="0.2", alpha=0.2, linewidth=0)
    for rule, part in errors[errors.share.isna()].groupby("rule", sort=False):
        color, marker = looks[rule]
        point = _error_bars(left, part.parameters, part, marker, capsize=0, color=color)
        point.set(label=rule, markersize=7)
    left.plot(*full, "*", color="k", markersize=12, label="full network")
    left.set_xlabel("parameters")
    log_axis(left, "test error (%)")
    left.legend(fontsize=8.5, loc="upper right")
    regret = summarize(grades[grades.share.notna() & (grades.rule != "optimal")], "regret", by)
    for rule, part in regret.groupby("rule", sort=False):
        color, marker = looks[rule]
        _error_bars(right, part.share, part, f"{marker}-", color=color, label=rule)
    right.axhline(0, color="0.3", linewidth=1)
    right.set_yscale("symlog", linthresh=0.01)
    right.set(xlabel="budget, share of the parameters", ylabel="test loss above the best's")
    right.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def joint_map(joint: DataFrame, layers: Sequence[str], title: str = "") -> Figure:
    """The test error at every pair of ranks of the first two layers of a `joint_profile`."""
    rest = joint[list(layers[2:])]
    pairs = joint[rest.eq(rest.max()).all(axis=1)]
    error = (100 - pairs.pivot(index=layers[1], columns=layers[0], values="accuracy"))[::-1]
    figure, axis = plt.subplots(figsize=(0.42 * error.shape[1] + 1.2, 0.28 * len(error) + 1.2))
    norm = LogNorm(min(max(error.min().min(), 0.1), 45), 90)
    text = {"annot": True, "fmt": ".0f", "annot_kws": {"size": 8}}
    sns.heatmap(error, cmap="viridis_r", norm=norm, cbar=False, ax=axis, **text)
    axis.set(xlabel="rank of the first layer", ylabel="rank of the second layer", title=title)
    return figure


def joint_cloud(joint: DataFrame, best: DataFrame, points: DataFrame, title: str = "") -> Figure:
    """The loss of every combination in a `joint_profile`, its `front`, and each rule's ``points``."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    axis.plot(joint.parameters, joint.loss, ".", color="0.75", markersize=3, label="combinations")
    best = best[best.excess == 0]
    axis.step(best.parameters, best.loss, where="post", color="0.2", label="the best of them")
    for row, marker in zip(points.to_dict("records"), MARKERS, strict=False):
        axis.plot(row["parameters"], row["loss"], marker, markersize=8, label=row["rule"])
    axis.set(xscale="log", xlabel="parameters", title=title)
    log_axis(axis, "validation loss")
    axis.minorticks_off()
    axis.legend()
    return figure


def profile_times(times: DataFrame, title: str = "") -> Figure:
    """Seconds of a loss profile by network (the index) and way (the columns); ``bound`` dotted."""
    figure, axis = plt.subplots(figsize=(7.5, 4.0))
    ways = times.drop(columns="bound")
    axis.plot(ways.index, ways, "o-", label=list(ways))
    axis.plot(times.bound, ":", color="0.3", label="products behind the layer alone")
    axis.set(yscale="log", ylabel="seconds for all layers", title=title)
    axis.set_xlim(-0.2, len(times) - 0.8)
    axis.legend()
    return figure


def sketch_errors(table: DataFrame, title: str = "") -> Figure:
    """`svdlib.study.evidence.theory.sketch_errors` by matrix: means, bands of 95% of draws, bounds."""
    figure, panels = _panels(table, "matrix", title, (3.1, 4.0), sharey=True)
    counts = sorted(table.power_iters.unique())
    colors = sns.light_palette(COLORS["rsvd"], len(counts) + 1)[:0:-1]
    for axis, name, part in panels:
        for q, color in zip(counts, colors, strict=True):
            draws = part[part.power_iters == q].groupby("oversample")
            low, high = draws.error.quantile(0.025), draws.error.quantile(0.975)
            axis.plot(draws.error.mean(), "o-", color=color, label=f"mean, q = {q}")
            axis.fill_between(low.index, low, high, color=color, alpha=0.25, linewidth=0)
            axis.plot(draws.sharp_bound.first(), ":", color=color, label=f"sharper bound, q = {q}")
        printed = part.groupby("oversample").bound.first()
        axis.plot(printed, "--", color="0.3", label="printed bound, q = 0")
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set(yscale="log", xlabel="oversampling p")
        worst = f"{part.worst.iloc[0]:,.1f}".removesuffix(".0")
        axis.set_title(f"{name}\nworst Q: {worst}", fontsize=10)
        axis.yaxis.set_major_formatter("{x:g}")
    figure.axes[0].set_ylabel("error / best possible")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    return figure


def exact_or_randomized(table: DataFrame, title: str = "") -> Figure:
    """How many times faster a randomized SVD is than the fastest exact one, and its error."""
    table = table.assign(ratio=table[["full", "truncated"]].min(axis=1) / table.randomized)
    shapes, limit = table["shape"].unique(), np.abs(np.log2(table.ratio)).max()
    colors = {"cmap": "vlag_r", "vmin": -limit, "vmax": limit, "cbar": False, "linewidths": 1}
    size = (1.05 * table["rank"].nunique(), 0.6 * len(shapes) + 1.2)
    figure, panels = _panels(table, "spectrum", title, size, 0.9, sharey=True)
    for axis, spectrum, part in panels:
        grid = part.pivot(index="shape", columns="rank", values=["ratio", "error"]).loc[shapes]
        text = grid.ratio.map("{:.2g}×\n".format) + grid.error.map("error {:.3f}".format)
        text_style = {"fmt": "", "annot_kws": {"fontsize": 8.5}}
        sns.heatmap(np.log2(grid.ratio), annot=text, ax=axis, **text_style, **colors)
        axis.set(ylabel="", title=f"{spectrum} spectrum")
        axis.tick_params(axis="y", rotation=0)
        axis.grid(visible=False)
    return figure


def svd_race(table: DataFrame, title: str = "") -> Figure:
    """Seconds by rank: one panel per shape, a line per way; ``products alone`` dotted."""
    figure, panels = _panels(table, "shape", title, (2.9, 3.8), sharey=True)
    for axis, shape, part in panels:
        for way, rows in part.groupby("way", sort=False):
            axis.plot(rows["rank"], rows.seconds, label=way, **SVD_STYLES.get(way, {}))
        axis.set(xscale="log", yscale="log", xlabel="rank", title=shape)
        _label_values(axis, table["rank"])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter("{x:g}")
    figure.axes[0].set_ylabel("seconds")
    lines = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    figure.legend(handles=list(lines.values()), loc="outside right center")
    return figure


def compression(
    table: DataFrame, published: DataFrame | None = None, title: str = "", size: str = "parameters"
) -> Figure:
    """Test error by size, "parameters" or "weights" (without biases): mean and 95% interval."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    markers = cycle(MARKERS)
    errors = table.assign(mean=100 - table["mean"], low=100 - table.high, high=100 - table.low)
    for form, part in errors.groupby("form", sort=False):
        rows = part.sort_values(size)
        line = "" if form == "factors from the start" else "-"
        shape, marker_size = ("k*", 12) if form == "dense" else (next(markers) + line, 6)
        _error_bars(axis, rows[size], rows, shape, label=str(form), markersize=marker_size)
    if published is not None:
        named = "published: dynamical low-rank training"
        axis.plot(published[size], 100 - published.accuracy, "x", color="0.35", label=named)
    label = "weights (biases not counted)" if size == "weights" else size
    axis.set(xscale="log", xlabel=label, title=title)
    log_axis(axis, "test error (%)")
    plain_numbers(axis.xaxis)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.legend(fontsize=8.5)
    return figure


def payoff(table: DataFrame, side: int, title: str = "") -> Figure:
    """Seconds (columns batch, rank, ratio) and parameters of a factorized square layer over dense."""
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    ratios = table.pivot(index="rank", columns="batch", values="ratio")
    axis.plot(ratios, "o-", label=[f"seconds, batch {batch}" for batch in ratios])
    parameters = 2 * ratios.index / side
    axis.plot(ratios.index, parameters, ":", color="0.3", label="parameters and multiply-adds")
    axis.axhline(1, color="0.3", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="rank", ylabel="factorized / dense", title=title)
    _label_values(axis, table["rank"])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
    return figure


def share_kept(reports: DataFrame, title: str = "") -> Figure:
    """The share of its weights that each layer named "….NUMBER.KIND" keeps, a panel per network."""
    reports = reports.sort_values("share", ascending=False, kind="stable", ignore_index=True)
    names = reports.layer.str.extract(r"\.(?P<number>\d+)\.(?P<kind>.+)$")
    table = reports.join(names).dropna(subset="number")
    table["percent"] = (100 * table.parameters / table.dense_parameters).clip(upper=100)
    figure, panels = _panels(table, "share", "", (2.9, 3.4), 2.4, sharey=True)
    figure.suptitle(f"{title} (%)", fontsize=12, x=0.01, ha="left")
    colors = {"vmin": 0, "vmax": 100, "cmap": "viridis", "cbar": False}
    for axis, share, part in panels:
        grid = part.pivot(index="kind", columns="number", values="percent")
        sns.heatmap(grid.loc[part.kind.unique()], ax=axis, annot=True, fmt=".0f", **colors)
        axis.set_title(f"{share:.0%} left", fontweight="normal", fontsize=11)
        axis.set(xlabel="layer", ylabel="")
    return figure


def retrieval(table: DataFrame, title: str = "") -> Figure:
    """Change of recall@1 (`paired_bootstrap`) from the dense network, by share and form."""
    figure, axis = plt.subplots(figsize=(8, 4.6))
    table = table[table.form != "dense"]
    forms = table.groupby("form").more_recall.mean().sort_values(ascending=False).index
    markers, grays = cycle(MARKERS), cycle(["0.2", "0.4", "0.55", "0.7"])
    columns = {"more_recall": "mean", "more_recall_low": "low", "more_recall_high": "high"}
    for form in forms:
        part = table[table.form == form].sort_values("share").rename(columns=columns)
        line, color = ("--", next(grays)) if form in PUBLISHED else ("-", None)
        look = {"color": color, "label": form, "linewidth": 0.8}
        _error_bars(axis, 100 * part.share, part, next(markers) + line, **look)
    axis.axhline(0, color="k", linewidth=1)
    axis.set(xlabel="weights left in the encoder (%)", ylabel="change in recall@1 (points)")
    axis.set(title=title, xticks=sorted(100 * table.share.unique()))
    axis.legend(fontsize=8.5)
    return figure
