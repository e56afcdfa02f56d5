"""Trainings that are watched while they go, stopped at will, and kept to be compared."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pandas as pd

from svdlib.data import Data
from svdlib.ensemble.networks import MLPEnsemble
from svdlib.ensemble.projection import Projection
from svdlib.ensemble.training import train
from svdlib.study.evidence.statistics import paired, with_interval
from svdlib.study.pictures.plots import LABELS


class Stopped(Exception):
    """A training that was told to stop."""


@dataclass
class Session:
    """What was trained on one data set, one training at a time.

    Attributes:
        data: what is trained on.
        sizes: the networks' widths.
        epochs: of every training, so that all can be compared.
        runs: the histories (`train`) of what was trained, each with a column ``run``: what was
            chosen, in words; "stock" for the stock networks that go along.
        nets: the networks last trained, the stock ones first.
    """

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
        watch: Callable[[pd.DataFrame], object] | None = None,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Train so many stock networks, and as many from the same seeds with this projection.

        Args:
            watch: called with the history so far, after every epoch.
            progress: show a progress bar.

        Returns:
            the history, which is also kept in ``runs``; of a training that was stopped, what
            there was of it, if that is an epoch at least.

        Raises:
            RuntimeError: another training is under way.

        >>> import svdlib
        >>> session = Session(svdlib.load("MNIST", device="cpu").head(640, 100), epochs=2)
        >>> history = session.train(svdlib.Projection("truncsvd", 5), seeds=2)
        >>> sorted(set(history.run)), len(session.runs)
        (['stock', 'truncSVD, rank 5, every epoch'], 1)
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("a training is under way; stop it, or wait for its end")
        try:
            self._stop.clear()
            numbers = list(range(seeds))
            choices = [None] * seeds + ([choice] * seeds if choice else [])
            nets = MLPEnsemble(
                self.sizes, seeds=numbers * (1 + bool(choice)), device=self.data.device
            )
            self.nets = nets
            history, seen = pd.DataFrame(), 0

            def look(rows: list[dict[str, object]]) -> None:
                nonlocal history, seen
                if self._stop.is_set():
                    raise Stopped
                if len(rows) > seen:
                    seen = len(rows)
                    history = _named(pd.DataFrame(rows), choice)
                    if watch:
                        watch(history)

            with contextlib.suppress(Stopped):
                train(
                    nets,
                    self.data,
                    epochs=self.epochs,
                    projection=choices,
                    watch=look,
                    progress=progress,
                )
            if len(history):
                self.runs.append(history)
            return history
        finally:
            self._busy.release()

    @property
    def busy(self) -> bool:
        """Whether a training is under way."""
        return self._busy.locked()

    def stop(self) -> None:
        """End the training that is under way, within some steps; what it has found stays."""
        self._stop.set()

    def table(self) -> pd.DataFrame:
        """A row a run: what was chosen, networks, epochs, its test error, and what it adds to stock.

        Both after the run's last epoch, the second paired by seed, with 95 % intervals.
        """
        rows = []
        for history in self.runs:
            last = history[history.epoch == history.epoch.max()]
            other = last[last.method != "stock"]
            shown = other if len(other) else last
            row = {
                "run": shown.run.iloc[0],
                "networks": len(shown),
                "epochs": int(shown.epoch.iloc[0]),
                "test error (%)": round(shown.test_error.mean(), 2),
                "points added to stock": "",
            }
            if len(other):
                added = paired(last, "test_error", against="stock").iloc[0]
                row["points added to stock"] = (
                    with_interval(added) if len(shown) > 1 else f"{added['mean']:.2f}"
                )
            rows.append(row)
        return pd.DataFrame(rows)


def named(choice: Projection | None) -> str:
    """A projection in words.

    >>> named(Projection("rsvd", 10, every="epoch", oversample=2, power_iters=0))
    'rSVD, rank 10, p = 2, q = 0, every epoch'
    """
    if choice is None:
        return "stock"
    sketch = (
        f" p = {choice.oversample}, q = {choice.power_iters}," if choice.method == "rsvd" else ""
    )
    often = f"{choice.every} steps" if isinstance(choice.every, int) else choice.every
    return f"{LABELS[choice.method]}, rank {choice.rank},{sketch} every {often}"


def _named(history: pd.DataFrame, choice: Projection | None) -> pd.DataFrame:
    return history.assign(
        run=history.method.map(lambda m: "stock" if m == "stock" else named(choice))
    )
