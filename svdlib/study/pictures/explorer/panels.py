"""Widgets around it all: each panel is one box, that works wherever ipywidgets do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import ipywidgets as widgets
import pandas as pd

from svdlib.ensemble.projection import Projection
from svdlib.study.pictures.explorer import pictures
from svdlib.study.pictures.explorer.cuts import Cuts
from svdlib.study.pictures.explorer.runs import Session, named
from svdlib.study.pictures.explorer.sketches import sketch

WIDE = {"description_width": "7em"}


def _slider(most: int, name: str, value: int, least: int = 0, step: int = 1) -> widgets.IntSlider:
    return widgets.IntSlider(
        value, least, most, step, description=name, style=WIDE, layout={"width": "95%"}
    )


def _picture() -> widgets.Image:
    return widgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})


def ranks_panel(cuts: Cuts, start: Sequence[int]) -> tuple[widgets.VBox, list[widgets.IntSlider]]:
    """One slider a layer; what exactly these ranks cost, against the best, and what is left.

    Returns:
        the panel, and its sliders, which another panel can follow.
    """
    sliders = [
        _slider(full, f"layer {name}", rank)
        for name, full, rank in zip(cuts.layers, cuts.full, start, strict=True)
    ]
    words = widgets.HTML()
    chart = _picture()
    rows = _picture()
    draw, draw_rows = pictures.ranks_picture(cuts), pictures.weights_picture(cuts)

    def update(_: object = None) -> None:
        ranks = [slider.value for slider in sliders]
        words.value = _told(cuts, ranks)
        chart.value = draw(ranks)
        rows.value = draw_rows(ranks[0])

    _follow(sliders, update)
    controls = widgets.VBox([*sliders, words], layout={"flex": "1 1 24em"})
    top = widgets.HBox([controls, rows], layout={"flex_flow": "row wrap"})
    return widgets.VBox([top, chart]), sliders


def _follow(sliders: Sequence[widgets.Widget], update: Callable[[object], None]) -> None:
    for slider in sliders:
        slider.observe(update, "value")
    update(None)


def _told(cuts: Cuts, ranks: Sequence[int]) -> str:
    here, full = cuts.at(ranks), cuts.at(cuts.full)
    best = cuts.best_within(here.parameters)
    rows = "".join(
        f"<tr><th style='text-align:left;padding-right:1em'>{what}</th>"
        f"<td>{', '.join(str(int(row[name])) for name in cuts.layers)}</td>"
        f"<td style='text-align:right'>{int(row.parameters):,}</td>"
        f"<td style='text-align:right'>{100 - row.accuracy:.2f} %</td>"
        f"<td style='text-align:right'>{row.loss:.4f}</td></tr>"
        for what, row in (
            ("these ranks", here),
            ("the best with no more parameters", best),
            ("full", full),
        )
    )
    heads = "".join(
        f"<th style='padding-left:1em'>{head}</th>"
        for head in ("ranks", "parameters", "test error", "test loss")
    )
    return (
        f"<table class='ranks' style='white-space:nowrap'><tr><th></th>{heads}</tr>{rows}</table>"
    )


def digits_panel(cuts: Cuts, sliders: Sequence[widgets.IntSlider], count: int = 12) -> widgets.VBox:
    """The images that this cut misreads first, with the logits before and after."""
    words, table, draw = widgets.HTML(), widgets.HTML(), pictures.digits_html(cuts)

    def update(_: object = None) -> None:
        ranks = [slider.value for slider in sliders]
        at, before, after = cuts.misread(ranks, count)
        wrong = int((after.argmax(1) != cuts.y[at]).sum())
        words.value = (
            f"Of the images that the network reads, those that the cut to ranks "
            f"{', '.join(map(str, ranks))} misreads first ({wrong} of these {len(at)}). Bars are "
            "logits: <b style='color:#777'>before</b> and "
            f"<b style='color:{pictures.HERE}'>after</b> the cut."
        )
        table.value = draw(at, before, after)

    _follow(sliders, update)
    return widgets.VBox([words, table])


def matrix_panel(most: int = 300) -> widgets.VBox:
    """A matrix with a spectrum of one's choice: a sketch's error, the best, the bound, the time."""
    shape = [
        _slider(most, name, value, 20, 20) for name, value in (("rows", 200), ("columns", 100))
    ]
    decay = widgets.FloatSlider(
        1.0, min=0.0, max=2.0, step=0.05, description="decay a", style=WIDE, layout={"width": "95%"}
    )
    rank, p, q = _slider(100, "rank k", 10, 1), _slider(100, "p", 5), _slider(4, "q", 0)
    words, chart = widgets.HTML(), _picture()
    draw = pictures.sketch_picture(most)

    def update(_: object = None) -> None:
        one = sketch(*(s.value for s in (*shape, decay, rank, p, q)))
        bound = "none" if one.bound is None else f"{one.bound:.3g}"
        ratio = f", {one.error / one.best:.2f} times the least" if one.error else ""
        words.value = (
            f"<b>error {one.error:.3g}</b>{ratio}; least possible {one.best:.3g}; "
            f"bound of the mean {bound}; {1e3 * one.seconds:.1f} ms. {_warned(one.note)}"
        )
        chart.value = draw(one)

    controls = [*shape, decay, rank, p, q]
    _follow(controls, update)
    left = widgets.VBox([*controls, words], layout={"flex": "1 1 22em"})
    return widgets.HBox([left, chart], layout={"flex_flow": "row wrap"})


def _warned(sentence: str) -> str:
    return f"<span style='color:#a33'>{sentence}</span>" if sentence else ""


def runs_panel(session: Session) -> widgets.VBox:
    """Choose a method and train it beside stock, watched; all that was trained is compared."""
    method = widgets.Dropdown(
        options=[("truncSVD", "truncsvd"), ("rSVD", "rsvd"), ("stock alone", "")],
        description="method", style=WIDE,
    )  # fmt: skip
    full = max(map(min, pairwise(session.sizes)))
    fields = {
        "rank": Field("rank", str(min(10, full)), 1, full),
        "every": Field("every", "epoch", 1, 100_000, words=("epoch", "step")),
        "oversample": Field("p", "2", 0, 1000),
        "power_iters": Field("q", "0", 0, 20),
        "seeds": Field("seeds", "4", 1, 96),
    }
    press = widgets.Button(description="Train", button_style="primary", icon="play")
    halt = widgets.Button(description="Stop", icon="stop", disabled=True)
    state, table = widgets.HTML(), widgets.HTML()
    chart = _picture()

    def draw() -> None:
        chart.value = pictures.curves_picture(session.runs, session.epochs)
        table.value = session.table().to_html(index=False, border=0) if session.runs else ""

    def watch(history: pd.DataFrame) -> None:
        state.value = f"epoch {int(history.epoch.max())} of {session.epochs}"
        chart.value = pictures.curves_picture([*session.runs, history], session.epochs)

    def work(choice: Projection | None, seeds: int) -> None:
        try:
            history = session.train(choice, seeds, watch)
            ended = int(history.epoch.max()) if len(history) else 0
            state.value = "done" if ended == session.epochs else f"stopped after epoch {ended}"
        except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell
            state.value = _warned(f"{error}")
        finally:
            draw()
            press.disabled, halt.disabled = False, True

    def start(_: object) -> None:
        values: dict[str, Any] = {n: field.value for n, field in fields.items() if not field.hidden}
        if any(value is None for value in values.values()):
            state.value = _warned("mend what is said beside the fields first")
            return
        seeds = values.pop("seeds")
        choice = Projection(method.value, **values) if method.value else None
        press.disabled, halt.disabled = True, False
        state.value = f"training {named(choice)} …"
        threading.Thread(target=work, args=(choice, seeds), daemon=True).start()

    def fit(_: object = None) -> None:
        for name in ("rank", "every"):
            fields[name].hidden = not method.value
        for name in ("oversample", "power_iters"):
            fields[name].hidden = method.value != "rsvd"

    def note(_: object = None) -> None:
        k, p = fields["rank"].value, fields["oversample"].value
        fields["oversample"].look()
        if isinstance(k, int) and isinstance(p, int) and k + p >= full:
            fields["oversample"].said.value = _warned(
                f"k + p = {k + p} columns span all {full} of a layer: this is truncSVD there"
            )

    method.observe(fit, "value")
    for name in ("rank", "oversample"):
        fields[name].text.observe(note, "value")
    press.on_click(start)
    halt.on_click(lambda _: session.stop())
    fit()
    draw()
    controls = [method, *(field.box for field in fields.values())]
    buttons = widgets.HBox([press, halt, state])
    left = widgets.VBox([*controls, buttons], layout={"flex": "0 1 26em"})
    right = widgets.VBox([chart, table], layout={"flex": "1 1 30em"})
    return widgets.HBox([left, right], layout={"flex_flow": "row wrap"})


class Field:
    """A field for a whole number, with what is wrong with it said beside it.

    >>> field = Field("rank", "10", 1, 15)
    >>> field.text.value = "16"
    >>> field.value, field.said.value
    (None, "<span style='color:#a33'>rank must be from 1 to 15, not 16</span>")
    """

    def __init__(
        self, name: str, value: str, least: int, most: int, words: Sequence[str] = ()
    ) -> None:
        self.name, self.least, self.most, self.words = name, least, most, words
        self.text = widgets.Text(value, description=name, style=WIDE, layout={"width": "14em"})
        self.said = widgets.HTML()
        self.box = widgets.HBox([self.text, self.said])
        self.text.observe(self.look, "value")

    @property
    def value(self) -> int | str | None:
        """The number, or one of the words; None while there is none."""
        text = self.text.value.strip()
        if text in self.words:
            return text
        return int(text) if not self._wrong(text) else None

    @property
    def hidden(self) -> bool:
        """Whether it doesn't matter now."""
        return self.box.layout.display == "none"

    @hidden.setter
    def hidden(self, hidden: bool) -> None:
        self.box.layout.display = "none" if hidden else None

    def look(self, _: object = None) -> None:
        """Say what is wrong with the text as it is, or nothing."""
        text = self.text.value.strip()
        self.said.value = _warned("" if text in self.words else self._wrong(text))

    def _wrong(self, text: str) -> str:
        others = "".join(f"{word}, or " for word in self.words)
        if not text.removeprefix("-").isdecimal() or not self.least <= int(text) <= self.most:
            given = text or "nothing"
            return f"{self.name} must be {others}from {self.least} to {self.most}, not {given}"
        return ""
