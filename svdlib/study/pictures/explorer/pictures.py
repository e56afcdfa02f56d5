"""Frames for widgets: figures of which only a few artists move, as PNG in some milliseconds."""

from __future__ import annotations

import base64
import io
import itertools
import threading
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from svdlib.study.pictures import plots
from svdlib.study.pictures.explorer.cuts import Cuts
from svdlib.study.pictures.explorer.sketches import Sketch

# None of a method's colours: what is chosen, and the best.
HERE, BEST = "#882255", "#000000"

# matplotlib is not made for two threads at once: a training draws from its own.
DRAWING = threading.Lock()


class Moving:
    """A figure that is drawn once, and artists that are drawn anew on it for each frame.

    >>> figure = Figure(figsize=(2, 1))
    >>> (point,) = figure.add_subplot().plot([0.5], [0.5], "o")
    >>> frame = Moving(figure, [point]).png()
    >>> frame[1:4]
    b'PNG'
    """

    def __init__(self, figure: Figure, artists: Sequence[Artist]) -> None:
        self.canvas = FigureCanvasAgg(figure)
        self.artists = artists
        with DRAWING:
            for artist in artists:
                artist.set_animated(True)
            self.canvas.draw()
            self.background = self.canvas.copy_from_bbox(figure.bbox)

    def draw(self) -> Image.Image:
        """The frame as it is now."""
        with DRAWING:
            self.canvas.restore_region(self.background)
            for artist in self.artists:
                artist.axes.draw_artist(artist)  # type: ignore[union-attr]
            return picture(self.canvas)

    def png(self) -> bytes:
        """The same as a PNG."""
        return png(self.draw())


def picture(canvas: FigureCanvasAgg) -> Image.Image:
    """What is drawn on a canvas."""
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    return drawn.convert("RGB")


def png(drawn: Image.Image) -> bytes:
    """A PNG of 128 colours: packing a palette takes half the time that packing all colours does."""
    stream = io.BytesIO()
    few = drawn.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(stream, "png", compress_level=1)
    return stream.getvalue()


def ranks_picture(cuts: Cuts) -> Callable[[Sequence[int]], bytes]:
    """What draws a choice of ranks: where it lies among all, and what it keeps of the spectra."""
    layers = len(cuts.layers)
    figure = Figure(figsize=(11, 3.5), dpi=100)
    axes = figure.subplots(1, 1 + layers, width_ratios=[3, *[1.25] * layers])
    cloud, moving = axes[0], []
    cloud.plot(
        cuts.joint.parameters, cuts.joint.loss, ".", color="0.82", markersize=3,
        label=f"all {cuts.combinations:,} combinations",
    )  # fmt: skip
    cloud.step(cuts.best.parameters, cuts.best.loss, where="post", color=BEST, label="the best")
    (best,) = cloud.plot([], [], "o", color=BEST, fillstyle="none", markersize=13,
                         markeredgewidth=2, label="the best with no more parameters")  # fmt: skip
    (here,) = cloud.plot([], [], "o", color=HERE, markersize=9, label="these ranks")
    cloud.set(xlabel="parameters", ylabel="test loss (cross-entropy)", yscale="log")
    cloud.set_ylim(cuts.joint.loss.min() * 0.9, cuts.joint.loss.quantile(0.99) * 1.1)
    plots.plain_numbers(cloud.yaxis)
    cloud.set_title("\n")  # room for the legend, which would narrow the axes if it were counted
    legend = cloud.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, markerscale=0.7)
    legend.set_in_layout(False)
    moving += [best, here]
    kept, lines = [], []
    for number, (axis, name, (_, sigma, _)) in enumerate(
        zip(axes[1:], cuts.layers, cuts.factors, strict=True)
    ):
        index = range(1, len(sigma) + 1)
        axis.plot(index, sigma, "o", color="0.75", markersize=4)
        kept += axis.plot([], [], "o", color=HERE, markersize=5)
        lines.append(axis.axvline(0.5, color=HERE, linewidth=1.5))
        axis.set(xlabel="index i", title=f"layer {name}", ylim=(0, None))
        axis.set_xlim(0, len(sigma) + 1)
        if not number:
            axis.set_ylabel("singular value σᵢ")
    moving += [*kept, *lines]
    frame = Moving(figure, moving)

    def draw(ranks: Sequence[int]) -> bytes:
        at = cuts.at(ranks)
        ahead = cuts.best_within(at.parameters)
        here.set_data([at.parameters], [at.loss])
        best.set_data([ahead.parameters], [ahead.loss])
        for rank, dots, line, (_, sigma, _) in zip(ranks, kept, lines, cuts.factors, strict=True):
            dots.set_data(range(1, rank + 1), sigma[:rank])
            line.set_xdata([rank + 0.5, rank + 0.5])
        return frame.png()

    return draw


def weights_picture(cuts: Cuts, columns: int = 5) -> Callable[[int], bytes]:
    """What draws the first layer's rows as pictures, at a rank: red adds, blue takes."""
    full = cuts.weights(cuts.full[0])
    limit, colors = float(full.abs().max()), mpl.colormaps["RdBu_r"]
    side = round(full.shape[1] ** 0.5)

    def draw(rank: int) -> bytes:
        shades = ((cuts.weights(rank) / limit).clamp(-1, 1) + 1) / 2
        pictures = colors(shades.view(-1, side, side).numpy(), bytes=True)[..., :3]
        return png(Image.fromarray(_mosaic(pictures, columns, zoom=3)))

    return draw


def _mosaic(pictures: np.ndarray, columns: int, zoom: int, gap: int = 2) -> np.ndarray:
    """Pictures (n, side, side, 3) in rows, on white."""
    number, side = pictures.shape[:2]
    rows = -(-number // columns)
    padded = np.full((rows * columns, side + gap, side + gap, 3), 255, np.uint8)
    padded[:number, :side, :side] = pictures
    grid = padded.reshape(rows, columns, side + gap, side + gap, 3).swapaxes(1, 2)
    flat = grid.reshape(rows * (side + gap), columns * (side + gap), 3)
    return flat.repeat(zoom, 0).repeat(zoom, 1)


def sketch_picture(most: int) -> Callable[[Sketch], bytes]:
    """What draws a sketch: the spectrum, what was found of it, the error, the best, the bound."""
    figure = Figure(figsize=(7.5, 4), dpi=100)
    axis = figure.subplots()
    spectrum = axis.plot([], [], color="0.6", label="singular values σᵢ")[0]
    found = axis.plot([], [], "o", color=HERE, markersize=4, label="those found")[0]
    bound = axis.axhline(1, color=plots.OTHERS[1], linestyle="--", label="bound of the mean error")
    error = axis.axhline(1, color=HERE, label="error of this sketch")
    best = axis.axhline(1, color=BEST, linestyle=":", label="least error possible, σₖ₊₁")
    axis.set(xscale="log", yscale="log", xlabel="index i", ylabel="relative to σ₁")
    axis.set_xlim(0.9, most * 1.1)
    axis.set_ylim(1e-6, 1e3)
    axis.legend(loc="lower left", ncols=2)
    frame = Moving(figure, [spectrum, found, bound, error, best])

    def draw(one: Sketch) -> bytes:
        spectrum.set_data(range(1, len(one.sigma) + 1), one.sigma)
        found.set_data(range(1, len(one.found) + 1), one.found)
        for line, value in ((bound, one.bound), (error, one.error), (best, one.best)):
            line.set_ydata([value or np.nan] * 2)
        return frame.png()

    return draw


def curves_picture(runs: Sequence[pd.DataFrame], epochs: int) -> bytes:
    """Test error and loss by epoch of every run's networks, stock and otherwise: means and ranges.

    Args:
        runs: histories with a column ``run``, what was chosen in words. Of stock, the networks of
            the last run alone are drawn; a method's first run has the method's colour.
    """
    figure = Figure(figsize=(10, 3.8))
    canvas = FigureCanvasAgg(figure)
    with DRAWING:
        axes = figure.subplots(1, 2)
        colors, others = dict(plots.COLORS), itertools.cycle(plots.OTHERS)
        for history in runs:
            for (run, method), part in history.groupby(["run", "method"], sort=False):
                if method == "stock" and history is not runs[-1]:
                    continue
                color = colors.pop(str(method), None) or next(others)
                _curve(axes[0], part, "test_error", color, str(run))
                _curve(axes[1], part, "test_loss", color, str(run))
        for axis, label in zip(axes, ("test error (%)", "test loss"), strict=True):
            axis.set_xlim(0.8, epochs + 0.2)
            plots.epoch_axis(axis)
            plots.log_axis(axis, label)
        if axes[0].lines:
            axes[0].legend()
        canvas.draw()
        return png(picture(canvas))


def _curve(axis: Axes, part: pd.DataFrame, value: str, color: str, label: str) -> None:
    by = part.groupby("epoch")[value].agg(["mean", "min", "max"])
    axis.plot(by.index, by["mean"], "o-", color=color, label=label)
    axis.fill_between(by.index, by["min"], by["max"], color=color, alpha=0.12, linewidth=0)


def digits_html(cuts: Cuts) -> Callable[[Tensor, Tensor, Tensor], str]:
    """What shows images, by their indices, with their logits before and after a cut, as HTML.

    Beside each, what the cut reads; bars are grey before and coloured after.
    """
    seen: dict[int, str] = {}
    style = "display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px"

    def draw(at: Tensor, before: Tensor, after: Tensor) -> str:
        scale = max(before.abs().max().item(), after.abs().max().item(), 1e-9)
        cells = ""
        for i, b, a in zip(at.tolist(), before.tolist(), after.tolist(), strict=True):
            if i not in seen:
                seen[i] = _uri(cuts.x[i])
            cells += _digit(seen[i], int(cuts.y[i]), b, a, scale)
        return f'<div style="{style}">{cells}</div>'

    return draw


def _digit(uri: str, label: int, before: list[float], after: list[float], scale: float) -> str:
    read = after.index(max(after))
    wrong = read != label
    verdict = f"a {label}, now read as {read}" if wrong else f"a {label}, still read"
    width, half = 14, 32
    bars = ""
    for digit, pair in enumerate(zip(before, after, strict=True)):
        for side, (value, color) in enumerate(zip(pair, ("#999999", HERE), strict=True)):
            height = half * abs(value) / scale
            top = half - height if value > 0 else half
            bars += (
                f'<rect x="{digit * width + 6 * side}" y="{top:.1f}" width="6" '
                f'height="{height:.1f}" fill="{color}"/>'
            )
        bars += (
            f'<text x="{digit * width + 6}" y="{2 * half + 11}" text-anchor="middle">{digit}</text>'
        )
    weight = "bold" if wrong else "normal"
    return (
        f'<figure style="margin:0;line-height:1.3"><img src="{uri}" width="56" height="56" '
        f'alt="{verdict}" style="image-rendering:pixelated"><figcaption style="font-weight:{weight}">'
        f'{verdict}</figcaption><svg width="{10 * width}" height="{2 * half + 14}" '
        f'font-size="10" role="img" aria-label="logits before and after">'
        f'<line x1="0" x2="{10 * width}" y1="{half}" y2="{half}" stroke="#bbb"/>{bars}</svg></figure>'
    )


def _uri(image: Tensor) -> str:
    """A digit, dark on white, as a data URI."""
    side = round(len(image) ** 0.5)
    pixels = (255 * (1 - image.clamp(0, 1))).byte().view(side, side, 1).expand(-1, -1, 3).numpy()
    return data_uri(png(Image.fromarray(np.ascontiguousarray(pixels))))


def data_uri(picture: bytes) -> str:
    """A PNG as the source of an <img>."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()
