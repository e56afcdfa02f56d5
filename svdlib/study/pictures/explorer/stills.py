"""Panels where no kernel answers: still pictures and words in their place."""

from __future__ import annotations

import io
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from PIL import Image

from svdlib.study.pictures import plots
from svdlib.study.pictures.explorer.pictures import data_uri


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
