"""Every plot of the study, from DataFrames alone. Each function returns a matplotlib figure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from svdlib.study.evidence.statistics import interval, paired, prediction, summarize

STYLE = Path(__file__).with_name("svdlib.mplstyle")
COLORS = {
    "stock": "#0072B2",
    "rsvd": "#D55E00",
    "rSVD every epoch": "#D55E00",
    "rSVD every step": "#EFA176",
    "truncsvd": "#009E73",
    "truncSVD every epoch": "#009E73",
    "truncSVD every step": "#7CCBB5",
}
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933", "#000000")
LABELS = {"stock": "stock", "rsvd": "rSVD", "truncsvd": "truncSVD"}


def style() -> None:
    """Use the project's style for the figures and tables that follow: no sentence or row is cut."""
    plt.style.use(STYLE)
    pd.set_option(
        "display.max_colwidth", None, "display.max_columns", None, "display.max_rows", 500
    )


def save(figure: Figure | None, name: str, data: pd.DataFrame, folder: str | Path) -> None:
    """Write ``name``.png and its data as ``name``.csv; nothing if ``folder`` is empty.

    Without a figure, the data alone. The PNG carries no metadata, so that equal figures are equal
    files.
    """
    if not str(folder):
        return
    if figure is not None:
        figure.savefig(Path(folder) / f"{name}.png", metadata={"Software": None})
    data.to_csv(Path(folder) / f"{name}.csv", index=False, float_format="%.6g")


def learning_curves(history: pd.DataFrame, title: str = "") -> Figure:
    """Test error and test loss by epoch: mean, its 95 % interval, and where 95 % of runs lie.

    ``history`` is what `train` returns, of one call or of several concatenated.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for axis, value, label in (
        (axes[0], "test_error", "test error (%)"),
        (axes[1], "test_loss", "test loss (cross-entropy)"),
    ):
        _runs(axis, history, value)
        _bands(axis, history, "epoch", value)
        axis.set(xlabel="epoch", ylabel=label, yscale="log")
        if value == "test_error":
            to_hundred(axis)
        plain(axis.yaxis)
        whole(axis.xaxis)
    axes[0].legend()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def against_stock(history: pd.DataFrame, title: str = "") -> Figure:
    """The error of stock networks by epoch, and what each other method adds to it, seed by seed.

    Left the mean with its 95 % interval and, lighter, where 95 % of the runs lie (not below the
    best of them); right the mean of the paired differences with its 95 % interval, on a scale that
    is linear below 0.1.

    Args:
        history: several calls of `train`, concatenated, with a method "stock".
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    stock = history[history.method == "stock"]
    _runs(left, stock, "test_error")
    _bands(left, stock, "epoch", "test_error")
    left.set(xlabel="epoch", ylabel="test error (%)", title="stock", yscale="log")
    to_hundred(left)
    plain(left.yaxis)
    added = pd.concat(
        paired(part, "test_error", against="stock").assign(epoch=epoch)
        for epoch, part in history.groupby("epoch")
    )
    for method, part in added.groupby("method", sort=False):
        _line(right, part, "epoch", str(method))
    right.axhline(0, color="0.3", linewidth=1)
    right.set_yscale("symlog", linthresh=0.1)
    right.set_yticks(_ticks(added.low.min(), added.high.max()))
    right.yaxis.set_major_formatter("{x:g}")
    right.set(xlabel="epoch", ylabel="points of test error", title="added to it")
    right.legend()
    for axis in (left, right):
        whole(axis.xaxis)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from 0.1 on, in both directions, as far as they are needed."""
    steps = [step * 10.0**power for power in (-1, 0, 1) for step in (1, 2, 5)]
    return [s for s in (*(-step for step in steps), 0, *steps) if min(low, 0) <= s <= max(high, 0)]


def plain(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, as many as its range has room for."""
    low, high = axis.get_view_interval()
    steps = (1, 2, 5) if high > 8 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def whole(axis: Axis) -> None:
    """Whole numbers alone on an axis, of a single epoch too."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def to_hundred(axis: Axes) -> None:
    """No axis of errors, in per cent, goes beyond 100."""
    axis.set_ylim(top=min(axis.get_ylim()[1], 100))


def _runs(axis: Axes, table: pd.DataFrame, value: str) -> None:
    """Where 95 % of the runs lie, by epoch; not below the best of them."""
    for method, part in table.groupby("method", sort=False):
        groups = part.groupby("epoch")[value]
        ends = pd.DataFrame({epoch: prediction(v) for epoch, v in groups}).T
        color = COLORS.get(str(method), "0.5")
        low = ends.low.clip(lower=groups.min())
        axis.fill_between(ends.index, low, ends.high, color=color, alpha=0.12, linewidth=0)


def reproduction(places: Mapping[str, pd.DataFrame], title: str = "") -> Figure:
    """Single runs among many: bands hold 95 % of the runs, dots are their means, crosses single.

    Args:
        places: tables of `svdlib.study.evidence.statistics.locate`, by what the runs do; columns method,
            epoch, value.
    """
    first = next(iter(places.values()))
    groups = first[["value", "epoch"]].drop_duplicates().sort_values("epoch", kind="stable")
    methods = list(first.method.unique())
    size = (2.9 * len(groups), 3.9)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False)
    shades = np.linspace(0.25, 0.6, len(places))
    for axis, (value, epoch) in zip(axes[0], groups.itertuples(index=False), strict=True):
        for number, (table, shade) in enumerate(zip(places.values(), shades, strict=True)):
            for row in table[(table.value == value) & (table.epoch == epoch)].to_dict("records"):
                x = methods.index(row["method"]) + 0.32 * (number - (len(places) - 1) / 2)
                color = COLORS.get(row["method"])
                bar = axis.plot([x, x], [row["low"], row["high"]], color=color, alpha=shade)
                bar[0].set(linewidth=9, solid_capstyle="butt")
                axis.plot(x, row["mean"], "o", color=color)
                axis.plot(x, row["single"], "kx", markersize=8, markeredgewidth=2)
        axis.set_xticks(range(len(methods)), [LABELS.get(m, m) for m in methods])
        axis.set(title=f"{value}, epoch {epoch}", xlim=(-0.6, len(methods) - 0.4))
    keys: list[Artist] = [
        Patch(color="0.3", alpha=a, label=how) for how, a in zip(places, shades, strict=True)
    ]
    keys.append(Line2D([], [], color="k", marker="x", linestyle="", label="the single run"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _bands(axis: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """The mean and its 95 % interval, a line a method."""
    summary = summarize(table, y, ["method", x])
    for method, part in summary.groupby("method", sort=False):
        _line(axis, part, x, str(method))


def _line(axis: Axes, part: pd.DataFrame, x: str, method: str) -> None:
    color = COLORS.get(method)
    if color is None:
        taken = {line.get_color() for line in axis.lines}
        color = next(other for other in OTHERS if other not in taken)
    axis.plot(part[x], part["mean"], "o-", color=color, label=LABELS.get(method, method))
    axis.fill_between(part[x], part.low, part.high, color=color, alpha=0.25, linewidth=0)


def confusion(counts: pd.DataFrame, title: str = "") -> Figure:
    """A confusion matrix: rows are true classes, columns predicted ones, entries per cent.

    Classes that are never predicted have their columns too.
    """
    figure, axis = plt.subplots(figsize=(5.4, 4.4))
    counts = counts.reindex(columns=counts.index, fill_value=0)
    share = 100 * counts.div(counts.sum(axis=1), axis=0)
    sns.heatmap(
        share,
        annot=True,
        fmt=".0f",
        cmap="Blues",
        vmin=0,
        vmax=10,
        cbar=False,
        square=True,
        ax=axis,
    )
    axis.set(
        xlabel="predicted class (colours end at 10 %)",
        ylabel="true class (rows add to 100 %)",
        title=title,
    )
    return figure


def weight_pictures(weights: np.ndarray, title: str = "") -> Figure:
    """The rows (n, 784) of a first layer as 28×28 pictures on one scale: red adds, blue takes."""
    columns = min(len(weights), 8)
    rows = -(-len(weights) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.1 * columns, 1.15 * rows + 0.4))
    limit = np.abs(weights).max()
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, row in zip(np.ravel(axes), weights, strict=False):
        axis.imshow(row.reshape(28, 28), cmap="RdBu_r", vmin=-limit, vmax=limit)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def spectra(values: pd.DataFrame, title: str = "") -> Figure:
    """Singular values by index, a panel a layer: columns layer, method, network, index, sigma.

    Lines are means over networks, bands 95 % intervals.
    """
    layers = list(values.layer.unique())
    figure, axes = plt.subplots(1, len(layers), figsize=(3.5 * len(layers), 3.3), squeeze=False)
    for axis, layer in zip(axes[0], layers, strict=True):
        _bands(axis, values[values.layer == layer], "index", "sigma")
        axis.set(xlabel="index i", ylabel="singular value σᵢ", title=str(layer), ylim=(0, None))
    axes[0][0].legend()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def sketch_grid(table: pd.DataFrame, title: str = "") -> Figure:
    """What rSVD adds to the error against oversampling, a panel a method and epoch, a line a q.

    Columns method, epoch, p, q, mean, low, high.
    """
    groups = list(table.groupby(["method", "epoch"], sort=False))
    figure, axes = plt.subplots(1, len(groups), figsize=(2.9 * len(groups), 3.6), squeeze=False)
    for axis, ((method, epoch), part) in zip(axes[0], groups, strict=True):
        shades = sns.light_palette(COLORS["rsvd"], part.q.nunique() + 1)[1:]
        for shift, ((q, rows), shade) in enumerate(zip(part.groupby("q"), shades, strict=True)):
            spread = np.stack([rows["mean"] - rows.low, rows.high - rows["mean"]])
            x = rows.p + 0.08 * (shift - 1)
            style = {"fmt": "o-", "capsize": 3, "color": shade, "label": f"q = {q}"}
            axis.errorbar(x, rows["mean"], spread, **style)
        axis.axhline(0, color="0.3", linewidth=1)
        axis.set_xticks(sorted(part.p.unique()))
        axis.set(xlabel="oversampling p", title=f"{method}, epoch {epoch}")
        axis.title.set_fontsize(10)
    axes[0][0].set_ylabel("points of test error added")
    axes[0][-1].legend()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def effects(table: pd.DataFrame, title: str = "") -> Figure:
    """Paired differences with intervals, a row each, a panel an epoch on a scale of its own.

    Columns what, epoch, mean, low, high.
    """
    epochs = sorted(table.epoch.unique())
    names = list(table.what.unique())
    size = (4.6 * len(epochs) + 2, 0.42 * len(names) + 1.5)
    figure, axes = plt.subplots(1, len(epochs), figsize=size, sharey=True, squeeze=False)
    for axis, epoch in zip(axes[0], epochs, strict=True):
        rows = table[table.epoch == epoch].set_index("what").loc[names]
        spread = np.stack([rows["mean"] - rows.low, rows.high - rows["mean"]])
        axis.errorbar(rows["mean"], np.arange(len(rows))[::-1], xerr=spread, fmt="o", capsize=3)
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set_yticks(np.arange(len(rows))[::-1], names)
        axis.set(xlabel="points of test error", title=f"epoch {epoch}")
        axis.set_ylim(-0.6, len(rows) - 0.4)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def error_by_rank(table: pd.DataFrame, reference: Sequence[float], title: str = "") -> Figure:
    """Final test error against rank, by method: mean, 95 % interval; light: best to worst network.

    Args:
        table: columns method, rank, test_error.
        reference: errors of stock networks; their mean is a dashed line.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.0))
    for method, part in table.groupby("method", sort=False):
        ends = part.groupby("rank").test_error.agg(["min", "max"])
        color = COLORS.get(str(method), "0.5")
        axis.fill_between(ends.index, ends["min"], ends["max"], color=color, alpha=0.1, linewidth=0)
    _bands(axis, table, "rank", "test_error")
    stock = interval(reference)
    axis.axhline(stock["mean"], color=COLORS["stock"], linestyle="--", label="stock, full rank")
    axis.set(xlabel="rank of every weight matrix", ylabel="test error (%)", title=title)
    axis.set(yscale="log", xlim=(0.5, table["rank"].max() + 0.5))
    to_hundred(axis)
    plain(axis.yaxis)
    axis.set_xticks(sorted(table["rank"].unique()))
    axis.legend()
    return figure


def speed(table: pd.DataFrame, bound: float, title: str = "") -> Figure:
    """Seconds per network and epoch against the number of networks: median, least and most.

    Columns way, networks, seconds, several a way and number; ``bound``, the products alone, is
    drawn as a line.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.0))
    for way, part in table[table.way != "the products alone"].groupby("way", sort=False):
        seconds = part.groupby("networks").seconds
        middle = seconds.median()
        spread = [middle - seconds.min(), seconds.max() - middle]
        axis.errorbar(middle.index, middle, spread, fmt="o-", capsize=3, label=str(way))
    axis.axhline(bound, color="0.3", linestyle=":", label="matrix products alone")
    axis.set(xscale="log", yscale="log", title=title)
    axis.set(xlabel="networks trained at once", ylabel="seconds per network and epoch")
    counts = sorted(table.networks.unique())
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.legend()
    return figure


def loss_profiles(profile: pd.DataFrame, title: str = "") -> Figure:
    """Loss increase against rank, a line a layer: mean and 95 % interval over networks.

    Columns layer, rank, increase, rows, columns, as `loss_profile` gives them for each network.
    """
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    named = profile.assign(
        method="layer "
        + profile.layer
        + ": "
        + profile.rows.astype(str)
        + "×"
        + profile["columns"].astype(str)
    )
    _bands(axis, named, "rank", "increase")
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


def front(grades: pd.DataFrame, full: tuple[int, float], title: str = "") -> Figure:
    """Rules for ranks against the best ranks of as many parameters, means and 95 % intervals.

    Left the test error of rules that choose their own size, beside the front of the best;
    right the test loss over the best of the same budget, of rules that take one.

    Args:
        grades: what `svdlib.study.evidence.grading.grade` returns, of several networks with a column seed.
        full: parameters and test error of the full network.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2))
    under = grades[grades.share.notna()]
    best = under[under.rule == "optimal"]
    line = summarize(best, "error", ["share"]).assign(
        parameters=best.groupby("share", sort=False).parameters.mean().values
    )
    left.plot(line.parameters, line["mean"], "-", color="0.2", label="the best ranks", zorder=1)
    left.fill_between(line.parameters, line.low, line.high, color="0.2", alpha=0.2, linewidth=0)
    styles = dict(zip(grades.rule.unique(), _styles(), strict=False))
    own = grades[grades.share.isna()]
    points = summarize(own, "error", ["rule"]).assign(
        parameters=own.groupby("rule", sort=False).parameters.mean().values
    )
    for row in points.to_dict("records"):
        ends = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
        color, marker = styles[row["rule"]]
        bar = left.errorbar(row["parameters"], row["mean"], ends, fmt=marker, color=color)
        bar.lines[0].set(label=row["rule"], markersize=7)
    left.plot(*full, "*", color="k", markersize=12, label="full network")
    left.set(yscale="log", xlabel="parameters", ylabel="test error (%)")
    to_hundred(left)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    left.minorticks_off()
    left.legend(fontsize=8.5, loc="upper right")
    regret = summarize(under[under.rule != "optimal"], "regret", ["rule", "share"])
    for rule, part in regret.groupby("rule", sort=False):
        spread = np.stack([part["mean"] - part.low, part.high - part["mean"]])
        color, marker = styles[rule]
        style = {"fmt": f"{marker}-", "color": color, "label": rule, "capsize": 2}
        right.errorbar(part.share, part["mean"], spread, **style)
    right.axhline(0, color="0.3", linewidth=1)
    right.set_yscale("symlog", linthresh=0.01)
    right.set(xlabel="budget, share of the parameters", ylabel="test loss above the best's")
    right.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _styles() -> Iterator[tuple[tuple[float, float, float], str]]:
    """Colours and markers without end, each pair different from those before."""
    colors = itertools.cycle(sns.color_palette("colorblind", 10))
    markers = itertools.cycle("osD^vP*X<>p")
    return zip(colors, markers, strict=False)


def joint_map(joint: pd.DataFrame, layers: Sequence[str], title: str = "") -> Figure:
    """The test error of every pair of ranks of the first two layers, the others full.

    Args:
        joint: what `joint_profile` returns, or a mean of several.
        layers: its columns of ranks, two at least.
    """
    whole = joint[joint[list(layers[2:])].eq(joint[list(layers[2:])].max()).all(axis=1)]
    error = (100 - whole.pivot(index=layers[1], columns=layers[0], values="accuracy"))[::-1]
    figure, axis = plt.subplots(figsize=(0.42 * error.shape[1] + 1.2, 0.28 * len(error) + 1.2))
    norm = LogNorm(min(max(error.min().min(), 0.1), 45), 90)
    sns.heatmap(
        error, annot=True, fmt=".0f", cmap="viridis_r", norm=norm, cbar=False, ax=axis,
        annot_kws={"size": 8},
    )  # fmt: skip
    axis.set(xlabel="rank of the first layer", ylabel="rank of the second layer", title=title)
    return figure


def joint_cloud(
    joint: pd.DataFrame, best: pd.DataFrame, points: pd.DataFrame, title: str = ""
) -> Figure:
    """Every combination of ranks by parameters and loss, the front of the best, and some points.

    Args:
        joint: what `joint_profile` returns.
        best: what `front` makes of it.
        points: columns rule, parameters, loss.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    axis.plot(joint.parameters, joint.loss, ".", color="0.75", markersize=3, label="combinations")
    best = best[best.excess == 0]
    axis.step(best.parameters, best.loss, where="post", color="0.2", label="the best of them")
    for row, marker in zip(points.to_dict("records"), "osD^vP", strict=False):
        axis.plot(row["parameters"], row["loss"], marker, markersize=8, label=row["rule"])
    axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="validation loss")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.set_title(title)
    axis.legend()
    return figure


def profile_times(times: pd.DataFrame, title: str = "") -> Figure:
    """Seconds of a loss profile: a row a network (the index), a column a way; ``bound`` dotted."""
    figure, axis = plt.subplots(figsize=(7.5, 4.0))
    places = range(len(times))
    for way in times.drop(columns="bound"):
        axis.plot(places, times[way], "o-", label=str(way))
    axis.plot(places, times.bound, ":", color="0.3", label="products behind the layer alone")
    axis.set(yscale="log", ylabel="seconds for all layers and ranks", title=title)
    axis.set_xticks(places, list(times.index))
    axis.set_xlim(-0.2, len(times) - 0.8)
    axis.legend()
    return figure


def sketch_errors(table: pd.DataFrame, title: str = "") -> Figure:
    """Spectral error against oversampling, a panel a matrix, a line a number of power iterations.

    Columns matrix, oversample, power_iters, error, bound, sharp_bound, worst: a row a draw, in
    units of σ_{k+1}; ``bound`` is that of the mean without power iterations (dashed),
    ``sharp_bound`` with those of the row (dotted, in its colour), ``worst`` the largest error that
    any Q can have, told above each panel. Bands hold 95 % of the draws.
    """
    names = list(dict.fromkeys(table.matrix))
    figure, axes = plt.subplots(1, len(names), figsize=(3.1 * len(names), 4.0), sharey=True)
    counts = sorted(table.power_iters.unique())
    colors = sns.light_palette(COLORS["rsvd"], len(counts) + 1)[:0:-1]
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        part = table[table.matrix == name]
        for q, color in zip(counts, colors, strict=True):
            drawn = part[part.power_iters == q].groupby("oversample")
            low, high = drawn.error.quantile(0.025), drawn.error.quantile(0.975)
            axis.plot(drawn.error.mean(), "o-", color=color, label=f"mean, q = {q}")
            axis.fill_between(low.index, low, high, color=color, alpha=0.25, linewidth=0)
            axis.plot(drawn.sharp_bound.first(), ":", color=color, label=f"sharper bound, q = {q}")
        printed = part.groupby("oversample").bound.first()
        axis.plot(printed, "--", color="0.3", label="printed bound, q = 0")
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set(yscale="log", xlabel="oversampling p")
        worst = f"{part.worst.iloc[0]:,.1f}".removesuffix(".0")
        axis.set_title(f"{name}\nworst Q: {worst}", fontsize=10)
        axis.yaxis.set_major_formatter("{x:g}")
    np.atleast_1d(axes)[0].set_ylabel("error / best possible")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def exact_or_randomized(table: pd.DataFrame, title: str = "") -> Figure:
    """How many times faster a randomized SVD is than the fastest exact one, and what its error is.

    A panel a spectrum, a row a shape, a column a rank. Columns spectrum, shape, rank; full,
    truncated, randomized: seconds; error: of the randomized, over the best possible.
    """
    table = table.assign(ratio=table[["full", "truncated"]].min(axis=1) / table.randomized)
    spectra, shapes = (list(dict.fromkeys(table[name])) for name in ("spectrum", "shape"))
    limit = np.abs(np.log2(table.ratio)).max()
    size = (0.9 + 1.05 * table["rank"].nunique() * len(spectra), 0.6 * len(shapes) + 1.2)
    figure, axes = plt.subplots(1, len(spectra), figsize=size, sharey=True, squeeze=False)
    for axis, spectrum in zip(axes[0], spectra, strict=True):
        part = table[table.spectrum == spectrum]
        ratio, error = (
            part.pivot(index="shape", columns="rank", values=value).loc[shapes]
            for value in ("ratio", "error")
        )
        sns.heatmap(
            np.log2(ratio),
            annot=ratio.map("{:.2g}×\n".format) + error.map("error {:.3f}".format),
            fmt="",
            annot_kws={"fontsize": 8.5},
            cmap="vlag_r",
            vmin=-limit,
            vmax=limit,
            cbar=False,
            linewidths=1,
            ax=axis,
        )
        axis.set(ylabel="", title=f"{spectrum} spectrum")
        axis.tick_params(axis="y", rotation=0)
        axis.grid(visible=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


# Apart from the colours of the three methods.
WAYS = {
    "products alone": {"color": "0.3", "linestyle": ":"},
    "svdlib": {"color": "#000000", "marker": "o"},
    "torch.svd_lowrank": {"color": "#CC79A7", "marker": "s"},
    "scikit-learn": {"color": "#E69F00", "marker": "D"},
    "fbpca": {"color": "#56B4E9", "marker": "^"},
    "SciPy svds": {"color": "0.6", "marker": "v"},
    "SciPy interpolative": {"color": "0.6", "marker": "x", "linestyle": "--"},
}


def svd_race(table: pd.DataFrame, title: str = "") -> Figure:
    """Seconds against rank, a panel a shape, a line a way; ``products alone`` dotted."""
    shapes = list(dict.fromkeys(table["shape"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(2.9 * len(shapes), 3.8), sharey=True)
    for axis, shape in zip(np.atleast_1d(axes), shapes, strict=True):
        for way, part in table[table["shape"] == shape].groupby("way", sort=False):
            axis.plot(part["rank"], part.seconds, label=way, **WAYS.get(str(way), {}))
        axis.set(xscale="log", yscale="log", xlabel="rank", title=shape)
        ranks = sorted(table["rank"].unique())
        axis.set_xticks(ranks, list(map(str, ranks)))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    np.atleast_1d(axes)[0].set_ylabel("seconds")
    shown = {line.get_label(): line for axis in np.atleast_1d(axes) for line in axis.lines}
    figure.legend(shown.values(), shown.keys(), loc="outside right center")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def compression(
    table: pd.DataFrame,
    published: pd.DataFrame | None = None,
    title: str = "",
    size: str = "parameters",
) -> Figure:
    """Test error against size: mean and 95 % interval of each form and size.

    Sizes of one form are joined, but for those that are networks of different kinds.

    Args:
        table: columns form ("dense" is a star), size, mean, low, high (of the accuracy).
        published: columns size, accuracy.
        size: "parameters", or "weights" (without biases).
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    markers = itertools.cycle("osD^vP")
    for form, part in table.groupby("form", sort=False):
        rows = part.sort_values(size)
        error = 100 - rows["mean"]
        spread = np.stack([rows.high - rows["mean"], rows["mean"] - rows.low])
        style = "" if form == "factors from the start" else "-"
        shape = "k*" if form == "dense" else next(markers) + style
        bar = axis.errorbar(rows[size], error, spread, fmt=shape, label=str(form), capsize=2)
        bar.lines[0].set_markersize(12 if form == "dense" else 6)
    if published is not None:
        named = "published: dynamical low-rank training"
        axis.plot(published[size], 100 - published.accuracy, "x", color="0.35", label=named)
    label = {"weights": "weights (biases not counted)"}.get(size, size)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="test error (%)", title=title)
    to_hundred(axis)
    for scale in (axis.xaxis, axis.yaxis):
        plain(scale)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.legend(fontsize=8.5)
    return figure


def payoff(table: pd.DataFrame, side: int, title: str = "") -> Figure:
    """Seconds and parameters of a factorized square layer, over the dense one's, by rank.

    Columns batch, rank, ratio (of the seconds); ``side`` is the layer's number of inputs and of
    outputs. Below 1 the factors win.
    """
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    for batch, part in table.groupby("batch", sort=False):
        axis.plot(part["rank"], part.ratio, "o-", label=f"seconds, batch {batch}")
    ranks = np.array(sorted(table["rank"].unique()))
    axis.plot(ranks, 2 * ranks / side, ":", color="0.3", label="parameters and multiply-adds")
    axis.axhline(1, color="0.3", linewidth=1)
    axis.set(xscale="log", yscale="log", xlabel="rank", ylabel="factorized / dense", title=title)
    axis.set_xticks(ranks, list(map(str, ranks)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.legend()
    return figure


def kept(reports: pd.DataFrame, title: str = "") -> Figure:
    """The share of its weights that each layer of a transformer keeps, a panel a network.

    Columns share, layer ("….N.KIND"), rank (NaN if dense), parameters, dense_parameters; rows
    without a number N in the layer's name are left out.
    """
    reports = reports.reset_index(drop=True)
    names = reports.layer.str.extract(r"\.(?P<number>\d+)\.(?P<kind>.+)$")
    table = reports.join(names).dropna(subset="number")
    table["kept"] = (table.parameters / table.dense_parameters).clip(upper=1)
    shares = sorted(table.share.unique(), reverse=True)
    figure, axes = plt.subplots(
        1, len(shares), figsize=(2.4 + 2.9 * len(shares), 3.4), sharey=True, squeeze=False
    )
    for axis, share in zip(axes[0], shares, strict=True):
        part = table[table.share == share]
        grid = part.pivot(index="kind", columns="number", values="kept")
        grid = grid.loc[part.kind.unique()]
        sns.heatmap(100 * grid, ax=axis, vmin=0, vmax=100, cmap="viridis", annot=True, fmt=".0f")
        axis.set_title(f"{share:.0%} left", fontweight="normal", fontsize=11)
        axis.set(xlabel="layer", ylabel="")
        axis.collections[0].colorbar.remove()
    figure.suptitle(f"{title} (%)", x=0.01, ha="left", fontweight="bold")
    return figure


# What these papers do, or anybody, in grey.
OF_OTHERS = ("plain", "FWSVD", "ASVD", "SVD-LLM")


def retrieval(table: pd.DataFrame, title: str = "") -> Figure:
    """Differences of recall@1 to the dense network, with 95 % intervals, by share and form.

    Columns form, share, more_recall, more_recall_low, more_recall_high.
    """
    figure, axis = plt.subplots(figsize=(8, 4.6))
    table = table[table.form != "dense"]
    forms = table.groupby("form").more_recall.mean().sort_values(ascending=False).index
    markers, greys = itertools.cycle("osD^vP"), itertools.cycle(["0.2", "0.4", "0.55", "0.7"])
    for place, form in enumerate(forms):
        part = table[table.form == form].sort_values("share")
        low, high = part.more_recall - part.more_recall_low, part.more_recall_high
        spread = np.stack([low, high - part.more_recall])
        at = 100 * part.share + 0.7 * (place - (len(forms) - 1) / 2)
        theirs = form in OF_OTHERS
        axis.errorbar(
            at,
            part.more_recall,
            spread,
            fmt=next(markers) + ("--" if theirs else "-"),
            color=next(greys) if theirs else None,
            label=form,
            capsize=2,
            linewidth=0.8,
        )
    axis.axhline(0, color="k", linewidth=1)
    axis.set(xlabel="weights left in the encoder (%)", ylabel="points of recall@1 more than dense")
    axis.set(title=title, xticks=sorted(100 * table.share.unique()))
    axis.legend(fontsize=8.5)
    return figure
