"""Panels of widgets; each is one box that works wherever ipywidgets do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import ipywidgets as widgets
import pandas as pd

from svdlib.ensemble.projection import Projection
from svdlib.study.pictures.explorer import pictures
from svdlib.study.pictures.explorer.cuts import Cuts, sketch
from svdlib.study.pictures.explorer.runs import Session, describe

WIDE = {"description_width": "7em"}
TABLE_STYLE = (
    "<style>.ranks * {padding-left:1em; text-align:right; white-space:nowrap}"
    ".ranks tbody th {padding-left:0; text-align:left}</style>"
)
# The fields that matter for a method; all do for rSVD.
NEEDED = {"": ["seeds"], "truncsvd": ["rank", "every", "seeds"]}


def _slider(name: str, value: float, low: float, high: float, step: float = 1) -> widgets.Widget:
    kind = widgets.FloatSlider if isinstance(value, float) else widgets.IntSlider
    look = {"description": name, "style": WIDE, "layout": {"width": "95%"}}
    return kind(value=value, min=low, max=high, step=step, **look)


def _picture() -> widgets.Image:
    return widgets.Image(format="png", layout={"max_width": "100%", "object_fit": "contain"})


def _warning(sentence: str) -> str:
    return f"<span style='color:#a33'>{sentence}</span>" if sentence else ""


def _follow(sliders: Sequence[widgets.Widget], update: Callable[[object], None]) -> None:
    for slider in sliders:
        slider.observe(update, "value")
    update(None)


def ranks_panel(cuts: Cuts, start: Sequence[int]) -> tuple[widgets.VBox, list[widgets.IntSlider]]:
    """A panel of these ranks' cost and the best of that size, and its sliders, one per layer."""
    sliders = [
        _slider(f"layer {name}", rank, 0, full)
        for name, full, rank in zip(cuts.layers, cuts.full, start, strict=True)
    ]
    table, chart, rows = widgets.HTML(), _picture(), _picture()
    draw = pictures.ranks_picture(cuts)

    def update(_: object) -> None:
        ranks = [slider.value for slider in sliders]
        here, full = cuts.at(ranks), cuts.at(cuts.full)
        best = cuts.best_within(here.parameters)
        found = {"these ranks": here, "the best with no more parameters": best, "full": full}
        cells = pd.DataFrame(found).T
        columns = {
            "ranks": cells[cuts.layers].astype(int).astype(str).agg(", ".join, axis=1),
            "parameters": cells.parameters.map("{:,.0f}".format),
            "test error": (100 - cells.accuracy).map("{:.2f} %".format),
            "test loss": cells.loss.map("{:.4f}".format),
        }
        table.value = TABLE_STYLE + pd.DataFrame(columns).to_html(classes="ranks", border=0)
        chart.value = draw(ranks)
        rows.value = pictures.weights_picture(cuts, ranks[0])

    _follow(sliders, update)
    controls = widgets.VBox([*sliders, table], layout={"flex": "1 1 24em"})
    top = widgets.HBox([controls, rows], layout={"flex_flow": "row wrap"})
    return widgets.VBox([top, chart]), sliders


def digits_panel(cuts: Cuts, sliders: Sequence[widgets.IntSlider], count: int = 12) -> widgets.VBox:
    """The images that this cut misreads first, with the logits before and after."""
    words, table = widgets.HTML(), widgets.HTML()

    def update(_: object) -> None:
        ranks = [slider.value for slider in sliders]
        at, before, after = cuts.misread(ranks, count)
        wrong = int((after.argmax(1) != cuts.y[at]).sum())
        words.value = (
            f"Of the images that the network reads, those that the cut to ranks "
            f"{', '.join(map(str, ranks))} misreads first ({wrong} of these {len(at)}). Bars are "
            "logits: <b style='color:#777'>before</b> and "
            f"<b style='color:{pictures.HERE}'>after</b> the cut."
        )
        table.value = pictures.digits_html(cuts.x[at], cuts.y[at], before, after)

    _follow(sliders, update)
    return widgets.VBox([words, table])


def matrix_panel(max_side: int = 300) -> widgets.HBox:
    """A matrix with a chosen spectrum: a sketch's error, the best error, the bound, the time."""
    sides = [_slider("rows", 200, 20, max_side, 20), _slider("columns", 100, 20, max_side, 20)]
    decay, rank = _slider("decay a", 1.0, 0, 2, 0.05), _slider("rank k", 10, 1, 100)
    controls = [*sides, decay, rank, _slider("p", 5, 0, 100), _slider("q", 0, 0, 4)]
    words, chart = widgets.HTML(), _picture()
    draw = pictures.sketch_picture(max_side)

    def update(_: object) -> None:
        drawn = sketch(*(slider.value for slider in controls))
        bound = "none" if drawn.bound is None else f"{drawn.bound:.3g}"
        ratio = f", {drawn.error / drawn.best:.2f} times the least" if drawn.error else ""
        words.value = (
            f"<b>error {drawn.error:.3g}</b>{ratio}; least possible {drawn.best:.3g}; "
            f"bound of the mean {bound}; {1e3 * drawn.seconds:.1f} ms. {_warning(drawn.note)}"
        )
        chart.value = draw(drawn)

    _follow(controls, update)
    left = widgets.VBox([*controls, words], layout={"flex": "1 1 22em"})
    return widgets.HBox([left, chart], layout={"flex_flow": "row wrap"})


def runs_panel(session: Session) -> widgets.HBox:
    """Choose a method, train it beside stock, and watch; all trainings are compared."""
    options = [("truncSVD", "truncsvd"), ("rSVD", "rsvd"), ("stock alone", "")]
    method = widgets.Dropdown(options=options, description="method", style=WIDE)
    fields = _fields(max(map(min, pairwise(session.sizes))))
    train = widgets.Button(description="Train", button_style="primary", icon="play")
    stop = widgets.Button(description="Stop", icon="stop", disabled=True)
    state, table, chart = widgets.HTML(), widgets.HTML(), _picture()

    def draw() -> None:
        chart.value = pictures.curves_picture(session.runs, session.epochs)
        table.value = session.table().to_html(index=False, border=0) if session.runs else ""

    def watch(history: pd.DataFrame) -> None:
        state.value = f"epoch {int(history.epoch.max())} of {session.epochs}"
        chart.value = pictures.curves_picture([*session.runs, history], session.epochs)

    def work(choice: Projection | None, seeds: int) -> None:
        try:
            history = session.train(choice, seeds, watch)
            last = int(history.epoch.max()) if len(history) else 0
            state.value = "done" if last == session.epochs else f"stopped after epoch {last}"
        except Exception as error:  # noqa: BLE001 - nobody catches what a thread raises
            state.value = _warning(f"{error}")
        finally:
            draw()
            train.disabled, stop.disabled = False, True

    def start(_: object) -> None:
        needed = NEEDED.get(method.value, [*fields])
        values: dict[str, Any] = {name: fields[name].value for name in needed}
        if None in values.values():
            state.value = _warning("correct the fields with a message beside them first")
            return
        seeds = values.pop("seeds")
        choice = Projection(method.value, **values) if method.value else None
        train.disabled, stop.disabled = True, False
        state.value = f"training {describe(choice)} …"
        threading.Thread(target=work, args=(choice, seeds), daemon=True).start()

    def show_needed(_: object) -> None:
        for name, field in fields.items():
            field.layout.display = None if name in NEEDED.get(method.value, fields) else "none"

    _follow([method], show_needed)
    train.on_click(start)
    stop.on_click(lambda _: session.stop())
    draw()
    buttons = widgets.HBox([train, stop, state])
    left = widgets.VBox([method, *fields.values(), buttons], layout={"flex": "0 1 26em"})
    right = widgets.VBox([chart, table], layout={"flex": "1 1 30em"})
    return widgets.HBox([left, right], layout={"flex_flow": "row wrap"})


def _fields(full: int) -> dict[str, Field]:
    rank, oversample = Field("rank", str(min(10, full)), 1, full), Field("p", "2", 0, 1000)

    def note(_: object) -> None:
        oversample.check()
        k, p = rank.value, oversample.value
        if isinstance(k, int) and isinstance(p, int) and k + p >= full:
            spanned = f"k + p = {k + p} columns span all {full} of a layer"
            oversample.message.value = _warning(f"{spanned}: this is truncSVD there")

    for field in (rank, oversample):
        field.text.observe(note, "value")
    return {
        "rank": rank,
        "every": Field("every", "epoch", 1, 100_000, words=("epoch", "step")),
        "oversample": oversample,
        "power_iters": Field("q", "0", 0, 20),
        "seeds": Field("seeds", "4", 1, 96),
    }


class Field(widgets.HBox):
    """A field for a whole number or one of some words, with a message beside it if it is neither."""

    def __init__(self, name: str, value: str, low: int, high: int, words: Sequence[str] = ()):
        self.text = widgets.Text(value, description=name, style=WIDE, layout={"width": "14em"})
        self.message = widgets.HTML()
        super().__init__([self.text, self.message])
        self.name, self.low, self.high, self.words = name, low, high, words
        _follow([self.text], self.check)

    def check(self, _: object = None) -> None:
        text = self.text.value.strip()
        number = text.removeprefix("-").isdecimal() and self.low <= int(text) <= self.high
        self.value = int(text) if number else text if text in self.words else None
        allowed = ", or ".join([*self.words, f"from {self.low} to {self.high}"])
        error = f"{self.name} must be {allowed}, not {text or 'nothing'}"
        self.message.value = _warning(error if self.value is None else "")
