"""Panels where no kernel answers: still pictures and words in their place."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from PIL import Image

from svdlib.study.pictures import plots
from svdlib.study.pictures.explorer.pictures import data_uri


def show(panel: widgets.Widget) -> None:
    """Display a panel; where no kernel answers for it, `still` stands in its place."""
    view = panel._repr_mimebundle_()
    display({**view, "text/plain": "a panel of widgets", "text/html": still(panel)}, raw=True)


def still(panel: widgets.Widget) -> str:
    """A panel's words and pictures as they are now, as HTML.

    >>> still(widgets.VBox([widgets.HTML("rank 3"), widgets.IntSlider(3)]))
    '<div>rank 3</div>'
    """
    parts = []
    for widget in _leaves(panel):
        if isinstance(widget, widgets.HTML) and widget.value:
            parts.append(f"<div>{widget.value}</div>")
        elif isinstance(widget, widgets.Image):
            source = data_uri(_small(widget.value))
            parts.append(
                f'<img alt="a picture of the panel" style="max-width:100%" src="{source}">'
            )
    return "".join(parts)


def save(panel: widgets.Widget, name: str, data: pd.DataFrame, folder: str | Path) -> None:
    """Write the panel's pictures, one above another, and its data; nothing if ``folder`` is empty."""
    if not str(folder):
        return
    parts = [
        Image.open(io.BytesIO(widget.value))
        for widget in _leaves(panel)
        if isinstance(widget, widgets.Image)
    ]
    whole = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    whole.save(Path(folder) / f"{name}.png", optimize=True)
    plots.save(None, name, data, folder)


def _leaves(widget: widgets.Widget) -> Iterator[widgets.Widget]:
    if isinstance(widget, widgets.Box):
        for child in widget.children:
            yield from _leaves(child)
    else:
        yield widget


def _small(picture: bytes) -> bytes:
    """A PNG made for speed, packed."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(stream, "png", optimize=True)
    return stream.getvalue()
