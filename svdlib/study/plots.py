"""Every plot of the study, from DataFrames alone. Each function returns a matplotlib figure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from svdlib.study.statistics import interval, summarize

STYLE = Path(__file__).with_name("svdlib.mplstyle")
COLORS = {"stock": "#0072B2", "rsvd": "#D55E00", "truncsvd": "#009E73"}
LABELS = {"stock": "stock", "rsvd": "rSVD", "truncsvd": "truncSVD"}


def style() -> None:
    """Use the project's style for the figures and tables that follow: no sentence is cut."""
    plt.style.use(STYLE)
    pd.set_option("display.max_colwidth", None)


def save(figure: Figure, name: str, data: pd.DataFrame, folder: str | Path) -> None:
    """Write ``name``.png and its data as ``name``.csv; nothing if ``folder`` is empty.

    The PNG carries no metadata, so that equal figures are equal files.
    """
    if not str(folder):
        return
    figure.savefig(Path(folder) / f"{name}.png", metadata={"Software": None})
    data.to_csv(Path(folder) / f"{name}.csv", index=False, float_format="%.6g")


def learning_curves(history: pd.DataFrame, title: str = "") -> Figure:
    """Test error, test loss and elapsed seconds by epoch: mean and 95 % interval of each method.

    ``history`` is what `train` returns, of one call or of several concatenated; the seconds
    are those of the whole ensemble, divided by its networks.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4))
    networks = history.groupby("method", sort=False).network.transform("nunique")
    elapsed = history.assign(per_network=history.seconds / networks)
    elapsed["elapsed"] = elapsed.groupby(["method", "network"]).per_network.cumsum()
    for axis, value, label in (
        (axes[0], "test_error", "test error (%)"),
        (axes[1], "test_loss", "test loss (cross-entropy)"),
        (axes[2], "elapsed", "training time (s per network)"),
    ):
        _bands(axis, elapsed, "epoch", value)
        axis.set(xlabel="epoch", ylabel=label, ylim=(0, None))
    axes[0].legend()
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def _bands(axis: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    summary = summarize(table, y, ["method", x])
    others = iter(["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"])
    for method, part in summary.groupby("method", sort=False):
        color = COLORS.get(str(method)) or next(others)
        label = LABELS.get(str(method), str(method))
        axis.plot(part[x], part["mean"], "o-", color=color, label=label)
        axis.fill_between(part[x], part.low, part.high, color=color, alpha=0.2, linewidth=0)


def confusion(counts: pd.DataFrame, title: str = "") -> Figure:
    """A confusion matrix: rows are true classes, columns predicted ones, entries per cent."""
    figure, axis = plt.subplots(figsize=(5.4, 4.4))
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
    axis.set(xlabel="predicted digit", ylabel="true digit (rows add to 100 %)", title=title)
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


def differences(table: pd.DataFrame, value: str, label: str, title: str = "") -> Figure:
    """Paired differences with intervals, a row each: columns ``value``, mean, low, high."""
    figure, axis = plt.subplots(figsize=(7.5, 0.45 * len(table) + 1.3))
    y = np.arange(len(table))[::-1]
    spread = np.stack([table["mean"] - table.low, table.high - table["mean"]])
    axis.errorbar(table["mean"], y, xerr=spread, fmt="o", capsize=3)
    axis.axvline(0, color="0.3", linewidth=1)
    axis.set_yticks(y, list(table[value]))
    axis.set(xlabel=label, title=title, ylim=(-0.6, len(table) - 0.4))
    return figure


def error_by_rank(table: pd.DataFrame, reference: Sequence[float], title: str = "") -> Figure:
    """Final test error against rank, by method: columns method, rank, test_error.

    ``reference`` are the errors of stock networks, drawn as a horizontal band.
    """
    figure, axis = plt.subplots(figsize=(7.5, 3.8))
    _bands(axis, table, "rank", "test_error")
    stock = interval(reference)
    axis.axhline(stock["mean"], color=COLORS["stock"], linestyle="--", label="stock, full rank")
    axis.axvspan(0.5, 9.5, color="0.94", zorder=0)
    axis.text(5, 93, "ranks said to destroy it", ha="center", color="0.35", fontsize=9)
    axis.set(xlabel="rank of every weight matrix", ylabel="test error (%)", title=title)
    axis.set(ylim=(0, 100), xlim=(0.5, table["rank"].max() + 0.5))
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
        grades: what `svdlib.study.grading.grade` returns, of several networks with a column seed.
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
    norm = LogNorm(error.min().min(), 90)
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

    Columns matrix, oversample, power_iters, error, bound: a row a draw, in units of σ_{k+1};
    ``bound`` is that of the mean without power iterations. Bands hold 95 % of the draws.
    """
    names = list(dict.fromkeys(table.matrix))
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.6), sharey=True)
    for axis, name in zip(np.atleast_1d(axes), names, strict=True):
        part = table[table.matrix == name]
        for q, drawn in part.groupby("power_iters"):
            errors = drawn.groupby("oversample").error
            line = axis.plot(errors.mean(), "o-", label=f"q = {q}")[0]
            low, high = errors.quantile(0.025), errors.quantile(0.975)
            axis.fill_between(low.index, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.plot(part.groupby("oversample").bound.first(), "--", color="0.3", label="bound, q = 0")
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set(yscale="log", xlabel="oversampling p", title=name)
        axis.yaxis.set_major_formatter("{x:g}")
    axis.legend()
    np.atleast_1d(axes)[0].set_ylabel("error / best possible")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def exact_or_randomized(table: pd.DataFrame, title: str = "") -> Figure:
    """How many times faster a randomized SVD is than the fastest exact one, by shape and rank.

    Columns shape, rank, full, truncated, randomized: seconds. Under each ratio, the fastest way.
    """
    table = table.assign(
        ratio=table[["full", "truncated"]].min(axis=1) / table.randomized,
        fastest=table[["full", "truncated", "randomized"]].idxmin(axis=1),
    )
    shapes = list(dict.fromkeys(table["shape"]))
    ratio, fastest = (
        table.pivot(index="shape", columns="rank", values=value).loc[shapes]
        for value in ("ratio", "fastest")
    )
    text = ratio.map("{:.2g}×\n".format) + fastest.fillna("")
    figure, axis = plt.subplots(figsize=(7.0, 0.62 * len(shapes) + 1.0))
    sns.heatmap(
        np.log2(ratio),
        annot=text,
        fmt="",
        annot_kws={"fontsize": 9},
        cmap="vlag_r",
        center=0,
        cbar=False,
        linewidths=1,
        ax=axis,
    )
    axis.set(ylabel="", title=title)
    axis.tick_params(axis="y", rotation=0)
    axis.grid(visible=False)
    return figure


def svd_race(table: pd.DataFrame, title: str = "") -> Figure:
    """Seconds against rank, a panel a shape, a line a way; ``products alone`` dotted."""
    shapes = list(dict.fromkeys(table["shape"]))
    figure, axes = plt.subplots(1, len(shapes), figsize=(2.9 * len(shapes), 3.8), sharey=True)
    for axis, shape in zip(np.atleast_1d(axes), shapes, strict=True):
        for way, part in table[table["shape"] == shape].groupby("way", sort=False):
            look = ":" if way == "products alone" else "o-"
            color = "0.3" if way == "products alone" else None
            axis.plot(part["rank"], part.seconds, look, color=color, label=way)
        axis.set(xscale="log", yscale="log", xlabel="rank", title=shape)
        ranks = sorted(table["rank"].unique())
        axis.set_xticks(ranks, list(map(str, ranks)))
        axis.minorticks_off()
    np.atleast_1d(axes)[0].set_ylabel("seconds")
    handles, labels = axis.get_legend_handles_labels()
    for axis in np.atleast_1d(axes):
        if len(axis.lines) > len(handles):
            handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    return figure


def compression(
    table: pd.DataFrame,
    dense: Mapping[str, float],
    published: pd.DataFrame | None = None,
    title: str = "",
) -> Figure:
    """Test error against parameters and against latency: a line a form, with 95 % intervals.

    Columns form, parameters, milliseconds, and mean, low, high of the accuracy in per cent.
    ``dense`` are the dense network's parameters, milliseconds and accuracy, ``published``
    somebody else's points (columns parameters, accuracy).
    """
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), sharey=True)
    labels = {"parameters": "parameters", "milliseconds": "milliseconds for 256 images"}
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        for (form, part), marker in zip(table.groupby("form", sort=False), "osD^vP", strict=False):
            rows = part.sort_values("parameters")
            error, low, high = 100 - rows["mean"], 100 - rows.high, 100 - rows.low
            spread = [error - low.clip(lower=0.5 * error), high - error]
            axis.errorbar(rows[column], error, yerr=spread, marker=marker, label=str(form))
        axis.axhline(100 - dense["accuracy"], color="0.3", linestyle="--", linewidth=1)
        axis.plot(dense[column], 100 - dense["accuracy"], "k*", markersize=12, label="dense")
        if published is not None and column in published:
            named = "published: dynamical low-rank training"
            axis.plot(published[column], 100 - published.accuracy, "x", color="0.35", label=named)
        axis.set(xscale="log", yscale="log", xlabel=label)
        for scale in (axis.xaxis, axis.yaxis):
            low, high = scale.get_view_interval()
            steps = (1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 3, 4, 6, 8)
            scale.set_major_locator(LogLocator(subs=steps))
            scale.set_major_formatter(
                lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,.9g}"
            )
        axis.minorticks_off()
    axes[0].set_ylabel("test error (%)")
    axes[0].legend(fontsize=8.5)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
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
