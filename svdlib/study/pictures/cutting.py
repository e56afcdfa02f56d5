"""Plots of `study.evidence.cutting`: when to cut, and why it matters."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from pandas import DataFrame

from svdlib.study.pictures.plots import log_axis, plain_numbers

COLORS = {
    "cut once": "#0072B2",
    "cut once, data-aware": "#56B4E9",
    "every epoch": "#D55E00",
    "every epoch, data-aware": "#CC79A7",
    "every step": "#E69F00",
    "factors": "#009E73",
    "narrow": "0.45",
}


def when_map(cells: DataFrame, title: str = "") -> Figure:
    """Points of test error that projecting every epoch saves against one cut, by rank and epochs.

    Blue: one cut is better. Orange: projecting is better. Cells whose interval holds zero are
    white. A black line surrounds the cells where projecting is better.
    """
    part = cells[cells.way == "every epoch"]
    ahead, low, high = (
        part.pivot(index="rank", columns="epoch", values=name).sort_index(ascending=False)
        for name in ("ahead", "ahead_low", "ahead_high")
    )
    clear = (low > 0) | (high < 0)
    figure, axis = plt.subplots(figsize=(0.75 * len(ahead.columns) + 2.6, 0.36 * len(ahead) + 1.5))
    norm = SymLogNorm(0.1, vmin=-30, vmax=30)
    axis.imshow(ahead.where(clear, 0), cmap="PuOr_r", norm=norm, aspect="auto")
    for (y, x), value in np.ndenumerate(ahead.to_numpy()):
        text, color = f"{value:+.2g}" if abs(value) < 10 else f"{value:+.0f}", "black"
        if not clear.iat[y, x]:
            text, color = "≈", "0.4"
        elif abs(value) > 5:
            color = "white"
        axis.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    better = np.pad((low > 0).to_numpy(), 1)
    for y, x in np.argwhere(better[1:-1, 1:-1]):
        edges = {(-0.5, -0.5, -0.5, 0.5): (0, -1), (0.5, 0.5, -0.5, 0.5): (0, 1)}
        edges |= {(-0.5, 0.5, -0.5, -0.5): (-1, 0), (-0.5, 0.5, 0.5, 0.5): (1, 0)}
        for (x0, x1, y0, y1), (dy, dx) in edges.items():
            if not better[y + 1 + dy, x + 1 + dx]:
                axis.plot([x + x0, x + x1], [y + y0, y + y1], color="black", linewidth=2)
    axis.set_xticks(range(len(ahead.columns)), ahead.columns)
    axis.set_yticks(range(len(ahead)), ahead.index)
    axis.grid(visible=False)
    axis.set(xlabel="epochs of training", ylabel="rank")
    axis.set_title(title)
    return figure


def added(cells: DataFrame, ranks: Sequence[int], title: str = "") -> Figure:
    """Points of test error added to the stock networks' by epochs of training, a panel per rank."""
    shown = cells[cells["rank"].isin(ranks)]
    figure, axes = plt.subplots(
        1, len(ranks), figsize=(3.4 * len(ranks) + 1.6, 3.7), squeeze=False, sharey=True
    )
    figure.suptitle(title, x=0.01, ha="left")
    for axis, rank in zip(axes[0], ranks, strict=True):
        for way, color in COLORS.items():
            part = shown[(shown["rank"] == rank) & (shown.way == way)].sort_values("epoch")
            axis.plot(part.epoch, part.added, "o-", color=color, label=way, markersize=3.5)
            axis.fill_between(
                part.epoch, part.added_low, part.added_high, color=color, alpha=0.2, linewidth=0
            )
        axis.axhline(0, color="0.3", linewidth=1)
        axis.set(title=f"rank {rank}", xlabel="epochs of training", xscale="log")
        axis.set_yscale("symlog", linthresh=1)
        low, high = min(0, shown.added_low.min()), shown.added_high.max()
        axis.set_ylim(low - 0.1, 1.1 * high)
        ticks = [-5, -2, -1, 0, 1, 2, 5, 10, 20, 50]
        axis.set_yticks([tick for tick in ticks if low <= tick <= high])
        axis.yaxis.set_major_formatter("{x:g}")
        plain_numbers(axis.xaxis)
    axes[0, 0].set_ylabel("points added to the stock error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")
    return figure


def why(seeds: DataFrame, rank: int, title: str = "") -> Figure:
    """Of the first layer, by epoch: what lies beyond a rank, the gap there, and how its space turns."""
    part = seeds[seeds["rank"] == rank].groupby("epoch")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.5))
    figure.suptitle(title, x=0.01, ha="left")
    pairs = {
        "": ("stock", COLORS["cut once"]),
        " projected": ("every epoch", COLORS["every epoch"]),
    }
    for axis, name, scale in ((left, "tail", 100), (right, "overlap", 100)):
        for suffix, (label, color) in pairs.items():
            found = scale * part[name + suffix].describe()
            axis.plot(found.index, found["mean"], "o-", color=color, label=label)
            axis.fill_between(found.index, found["min"], found["max"], color=color, alpha=0.2, lw=0)
    gap = part["gap"].describe()
    middle.plot(gap.index, gap["mean"], "o-", color=COLORS["cut once"])
    middle.fill_between(
        gap.index, gap["min"], gap["max"], color=COLORS["cut once"], alpha=0.2, lw=0
    )
    log_axis(left, "squares beyond the rank (%)")
    middle.set(ylabel=f"σ{rank + 1} / σ{rank}", title="gap of the stock networks")
    left.set_title("tail")
    right.set(ylabel="overlap with the last epoch's (%)", title="leading subspace")
    for axis in (left, middle, right):
        axis.set(xlabel="epochs of training", xscale="log")
        plain_numbers(axis.xaxis)
    left.legend()
    return figure
