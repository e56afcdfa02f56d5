"""Pictures of panels: frames in milliseconds, and stills where no kernel answers."""

from __future__ import annotations

import base64
import io
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets
import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from svdlib.study.pictures import plots
from svdlib.study.pictures.explorer.cuts import Cuts, Sketch

HERE, BEST = "#882255", "#000000"  # the current choice and the best one, unlike any method
DRAWING = threading.Lock()  # a training draws from its own thread; matplotlib is not thread-safe


def animated(figure: Figure, artists: Sequence[Artist]) -> Callable[[], Image.Image]:
    """A function that draws a figure's frames, redrawing only these artists."""
    canvas = FigureCanvasAgg(figure)
    with DRAWING:
        for artist in artists:
            artist.set_animated(True)
        canvas.draw()
        background = canvas.copy_from_bbox(figure.bbox)

    def frame() -> Image.Image:
        with DRAWING:
            canvas.restore_region(background)
            for artist in artists:
                artist.axes.draw_artist(artist)  # type: ignore[union-attr]
            return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    return frame


def png(drawn: Image.Image) -> bytes:
    """A PNG of 128 colors: packing a palette takes half the time that packing all colors does."""
    stream = io.BytesIO()
    palette = drawn.quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette.save(stream, "png", compress_level=1)
    return stream.getvalue()


def ranks_picture(cuts: Cuts) -> Callable[[Sequence[int]], bytes]:
    count, figure = len(cuts.layers), Figure(figsize=(11, 3.5), dpi=100)
    cloud, *axes = figure.subplots(1, 1 + count, width_ratios=[3, *[1.25] * count])
    joint, everything = cuts.joint, f"all {len(cuts.joint):,} combinations"
    cloud.plot(joint.parameters, joint.loss, ".", color="0.82", markersize=3, label=everything)
    cloud.step(cuts.best.parameters, cuts.best.loss, where="post", color=BEST, label="the best")
    ring = {"color": BEST, "fillstyle": "none", "markersize": 13, "markeredgewidth": 2}
    (best,) = cloud.plot([], [], "o", **ring, label="the best with no more parameters")
    (here,) = cloud.plot([], [], "o", color=HERE, markersize=9, label="these ranks")
    cloud.set(xlabel="parameters", yscale="log")
    cloud.set_ylim(joint.loss.min() * 0.9, joint.loss.quantile(0.99) * 1.1)
    plots.log_axis(cloud, "test loss (cross-entropy)")
    cloud.set_title("\n")  # room for the legend, which would narrow the axes if it were counted
    legend = cloud.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=2, markerscale=0.7)
    legend.set_in_layout(False)
    spectra = [sigma for _, sigma, _ in cuts.factors]
    kept, lines = [], []
    for axis, name, sigma in zip(axes, cuts.layers, spectra, strict=True):
        axis.plot(range(1, len(sigma) + 1), sigma, "o", color="0.75", markersize=4)
        kept += axis.plot([], [], "o", color=HERE, markersize=5)
        lines.append(axis.axvline(0.5, color=HERE, linewidth=1.5))
        axis.set(xlabel="index i", title=f"layer {name}", ylim=(0, None))
        axis.set_xlim(0, len(sigma) + 1)
    axes[0].set_ylabel("singular value σᵢ")
    frame = animated(figure, [best, here, *kept, *lines])

    def draw(ranks: Sequence[int]) -> bytes:
        at = cuts.at(ranks)
        ahead = cuts.best_within(at.parameters)
        here.set_data([at.parameters], [at.loss])
        best.set_data([ahead.parameters], [ahead.loss])
        for rank, dots, line, sigma in zip(ranks, kept, lines, spectra, strict=True):
            dots.set_data(range(1, rank + 1), sigma[:rank])
            line.set_xdata([rank + 0.5, rank + 0.5])
        return png(frame())

    return draw


def weights_picture(cuts: Cuts, rank: int) -> bytes:
    limit = float(cuts.weights(cuts.full[0]).abs().max())
    shades = ((cuts.weights(rank) / limit).clamp(-1, 1) + 1) / 2
    count, side = len(shades), round(shades.shape[1] ** 0.5)
    pixels = mpl.colormaps["RdBu_r"](shades.view(count, side, side).numpy(), bytes=True)[..., :3]
    columns, gap = 5, 2
    rows = -(-count // columns)
    pads = ((0, rows * columns - count), (0, gap), (0, gap), (0, 0))
    grid = np.pad(pixels, pads, constant_values=255).reshape(rows, columns, *[side + gap] * 2, 3)
    mosaic = grid.swapaxes(1, 2).reshape(rows * (side + gap), columns * (side + gap), 3)
    return png(Image.fromarray(mosaic.repeat(3, 0).repeat(3, 1)))


def sketch_picture(max_side: int) -> Callable[[Sketch], bytes]:
    figure = Figure(figsize=(7.5, 4), dpi=100)
    axis = figure.subplots()
    (spectrum,) = axis.plot([], [], color="0.6", label="singular values σᵢ")
    (found,) = axis.plot([], [], "o", color=HERE, markersize=4, label="those found")
    bound = axis.axhline(1, color=plots.OTHERS[1], linestyle="--", label="bound of the mean error")
    error = axis.axhline(1, color=HERE, label="error of this sketch")
    best = axis.axhline(1, color=BEST, linestyle=":", label="least error possible, σₖ₊₁")
    axis.set(xscale="log", yscale="log", xlabel="index i", ylabel="relative to σ₁")
    axis.set(xlim=(0.9, max_side * 1.1), ylim=(1e-6, 1e3))
    axis.legend(loc="lower left", ncols=2)
    frame = animated(figure, [spectrum, found, bound, error, best])

    def draw(drawn: Sketch) -> bytes:
        for line, values in ((spectrum, drawn.sigma), (found, drawn.found)):
            line.set_data(range(1, len(values) + 1), values)
        for line, value in ((bound, drawn.bound), (error, drawn.error), (best, drawn.best)):
            line.set_ydata([value or np.nan] * 2)
        return png(frame())

    return draw


def curves_picture(runs: Sequence[pd.DataFrame], epochs: int) -> bytes:
    """Test error and loss by epoch of every run (`Session`); stock networks of the last only."""
    figure = Figure(figsize=(10, 3.8))
    with DRAWING:
        panels = (("test_error", "test error (%)"), ("test_loss", "test loss"))
        for axis, (value, label) in zip(figure.subplots(1, 2), panels, strict=True):
            colors, others = dict(plots.COLORS), itertools.cycle(plots.OTHERS)
            for history in runs:
                for (run, method), part in history.groupby(["run", "method"], sort=False):
                    if method == "stock" and history is not runs[-1]:
                        continue
                    color = colors.pop(method, None) or next(others)
                    by = part.groupby("epoch")[value].agg(["mean", "min", "max"])
                    axis.plot(by["mean"], "o-", color=color, label=run)
                    band = {"color": color, "alpha": 0.12, "linewidth": 0}
                    axis.fill_between(by.index, by["min"], by["max"], **band)
            axis.set_xlim(0.8, epochs + 0.2)
            plots.epoch_axis(axis)
            plots.log_axis(axis, label)
        if runs:
            figure.axes[0].legend()
    return png(animated(figure, [])())


def digits_html(x: Tensor, y: Tensor, before: Tensor, after: Tensor) -> str:
    """Images (n, pixels) with labels, and their logits before (gray) and after a cut, as HTML."""
    style = "display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px"
    scale = max(before.abs().max().item(), after.abs().max().item(), 1e-9)
    side = round(x.shape[1] ** 0.5)
    grays = (255 * (1 - x.clamp(0, 1))).byte().view(-1, side, side).numpy()  # dark on white
    uris = [data_uri(png(Image.fromarray(gray).convert("RGB"))) for gray in grays]
    rows = zip(uris, y.tolist(), before.tolist(), after.tolist(), strict=True)
    cells = (_digit(*row, scale) for row in rows)
    return f'<div style="{style}">{"".join(cells)}</div>'


def _digit(uri: str, label: int, before: list[float], after: list[float], scale: float) -> str:
    verdict, weight = f"a {label}, still read", "normal"
    if (read := after.index(max(after))) != label:
        verdict, weight = f"a {label}, now read as {read}", "bold"
    width, half = 14, 32
    bars = f'<line x1="0" x2="{10 * width}" y1="{half}" y2="{half}" stroke="#bbb"/>'
    for digit, pair in enumerate(zip(before, after, strict=True)):
        for side, (value, color) in enumerate(zip(pair, ("#999999", HERE), strict=True)):
            height = half * abs(value) / scale
            top = half - height if value > 0 else half
            bars += (
                f'<rect x="{digit * width + 6 * side}" y="{top:.1f}" width="6" '
                f'height="{height:.1f}" fill="{color}"/>'
            )
        place = f'x="{digit * width + 6}" y="{2 * half + 11}"'
        bars += f'<text {place} text-anchor="middle">{digit}</text>'
    return (
        f'<figure style="margin:0;line-height:1.3"><img src="{uri}" width="56" height="56" '
        f'alt="{verdict}" style="image-rendering:pixelated">'
        f'<figcaption style="font-weight:{weight}">{verdict}</figcaption>'
        f'<svg width="{10 * width}" height="{2 * half + 14}" font-size="10" role="img" '
        f'aria-label="logits before and after">{bars}</svg></figure>'
    )


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


def show(panel: widgets.Widget) -> None:
    """Display a panel; where no kernel answers for it, `static_html` stands in its place."""
    views = {"text/plain": "a panel of widgets", "text/html": static_html(panel)}
    display({**panel._repr_mimebundle_(), **views}, raw=True)


def static_html(panel: widgets.Widget) -> str:
    """A panel's words and pictures as they are now, as HTML."""
    parts = []
    for widget in _leaves(panel):
        if isinstance(widget, widgets.HTML) and widget.value:
            parts.append(f"<div>{widget.value}</div>")
        elif isinstance(widget, widgets.Image):
            packed = io.BytesIO()
            Image.open(io.BytesIO(widget.value)).save(packed, "png", optimize=True)
            source = f'style="max-width:100%" src="{data_uri(packed.getvalue())}"'
            parts.append(f'<img alt="a picture of the panel" {source}>')
    return "".join(parts)


def save(panel: widgets.Widget, name: str, data: pd.DataFrame, folder: str | Path) -> None:
    """Write the panel's pictures in one column, and its data; nothing if ``folder`` is empty."""
    if not str(folder):
        return
    images = (w for w in _leaves(panel) if isinstance(w, widgets.Image))
    pictures = [Image.open(io.BytesIO(image.value)) for image in images]
    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    page, top = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        page.paste(picture, (0, top))
        top += picture.height
    page.save(Path(folder) / f"{name}.png", optimize=True)
    plots.save(None, name, data, folder)


def _leaves(widget: widgets.Widget) -> list[widgets.Widget]:
    if not isinstance(widget, widgets.Box):
        return [widget]
    return [leaf for child in widget.children for leaf in _leaves(child)]
