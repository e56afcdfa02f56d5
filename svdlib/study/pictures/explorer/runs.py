"""Trainings to watch, stop, keep, and compare."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from svdlib.data import Data
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.projection import Projection
from svdlib.ensemble.training import train
from svdlib.study.evidence.statistics import paired, with_interval
from svdlib.study.pictures.plots import LABELS

Watch = Callable[[pd.DataFrame], object]


class Stopped(Exception):
    """A training was stopped by its user."""


@dataclass
class Session:
    """Trainings on one data set, all of the same length: their histories, and the last networks."""

    data: Data
    sizes: Sequence[int] = (784, 15, 15, 10)
    epochs: int = 10
    runs: list[pd.DataFrame] = field(default_factory=list)
    nets: MLPEnsemble | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _busy: threading.Lock = field(default_factory=threading.Lock)

    def train(
        self,
        choice: Projection | None,
        seeds: int,
        watch: Watch | None = None,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Train ``seeds`` stock networks, and as many with this projection from the same seeds.

        ``watch`` is called after every epoch with the history so far; its column ``run`` has the
        projection in words. That of the complete epochs is added to ``runs`` unless it is empty.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("a training is under way; stop it, or wait for its end")
        try:
            self._stop.clear()
            projections = [None] * seeds + [choice] * seeds if choice else [None] * seeds
            numbers = [number % seeds for number in range(len(projections))]
            nets = self.nets = MLPEnsemble(self.sizes, seeds=numbers, device=self.data.device)
            history = pd.DataFrame()

            def look(rows: list[dict[str, object]]) -> None:
                nonlocal history
                if self._stop.is_set():
                    raise Stopped
                if len(rows) > len(history):
                    history = pd.DataFrame(rows)
                    stock = history.method == "stock"
                    history["run"] = history.method.where(stock, describe(choice))
                    if watch:
                        watch(history)

            options: dict[str, Any] = {"watch": look, "progress": progress}
            with contextlib.suppress(Stopped):
                train(nets, self.data, epochs=self.epochs, projection=projections, **options)
            if len(history):
                self.runs.append(history)
            return history
        finally:
            self._busy.release()

    def stop(self) -> None:
        """End the training that is under way within a few steps, and keep its complete epochs."""
        self._stop.set()

    def table(self) -> pd.DataFrame:
        """One row per run: networks, epochs, test error, and what its projection adds to it."""
        rows = []
        for history in self.runs:
            last = history[history.epoch == history.epoch.max()]
            added = paired(last, "test_error", against="stock")
            shown = last[last.method != "stock"] if len(added) else last
            numbers = len(shown), int(last.epoch.iloc[0]), round(shown.test_error.mean(), 2)
            difference = with_interval(added.iloc[0]) if len(added) else ""
            rows.append((shown.run.iloc[0], *numbers, difference))
        columns = ["run", "networks", "epochs", "test error (%)", "points added to stock"]
        return pd.DataFrame(rows, columns=columns)


def describe(choice: Projection | None) -> str:
    """A projection in words."""
    if choice is None:
        return "stock"
    every = f"{choice.every} steps" if isinstance(choice.every, int) else choice.every
    parts = [LABELS[choice.method], f"rank {choice.rank}", f"every {every}"]
    if choice.method == "rsvd":
        parts[2:2] = [f"p = {choice.oversample}", f"q = {choice.power_iters}"]
    return ", ".join(parts)
