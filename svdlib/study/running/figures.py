"""Where the figures of a run go, and which of the study's own it replaces."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from svdlib import files

TIMES = "times"  # the tag of a notebook's cells that measure seconds


def timed(cells: Iterable[nbformat.NotebookNode]) -> frozenset[str] | None:
    """Names of the figures that a notebook's cells tagged "times" save; None if no cell times."""
    sources = [cell.source for cell in cells if TIMES in cell.metadata.get("tags", ())]
    return frozenset(re.findall(r"\b\d\d_\w+", "\n".join(sources))) if sources else None


def agrees(new: Path, old: Path) -> bool:
    """Whether two tables tell the same, up to what processors differ in.

    Rounding is not the same everywhere, and training multiplies it: a column's numbers may differ
    by a twentieth of its range. Seconds may be any.
    """
    if not (new.is_file() and old.is_file()):
        return False
    one, other = pd.read_csv(new), pd.read_csv(old)
    if list(one) != list(other) or len(one) != len(other):
        return False
    for name in set(one) - {"seconds"}:
        x, y = one[name], other[name]
        if not all(is_numeric_dtype(column) and column.dtype != bool for column in (x, y)):
            if not x.equals(y):
                return False
        elif len(y):
            apart = 0.05 * (y.max() - y.min()) + 1e-3 * y.abs().max()
            if not np.allclose(x, y, rtol=0, atol=np.nan_to_num(apart), equal_nan=True):
                return False
    return True


def publish(
    place: Path, folder: Path, times: Collection[str] = (), rewrite: bool = True
) -> dict[str, bool]:
    """Copy a run's pictures and tables, all of them or none, one process at a time.

    Without ``rewrite`` those stay that are there already and agree, and those of ``times``.

    Returns:
        for each figure or table, by name, whether it was copied.
    """
    with files.alone(folder), files.unfinished(folder) as stage:
        new, old = stage / "new", stage / "old"
        shutil.copytree(place, new, ignore=shutil.ignore_patterns("*.ipynb", "run.json"))
        paths = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
        copied: dict[str, bool] = {}
        for name in sorted({path.with_suffix("").as_posix() for path in paths}):
            there = folder / f"{name}.csv"
            stays = (name in times and there.is_file()) or agrees(new / f"{name}.csv", there)
            copied[name] = rewrite or not stays
        with contextlib.ExitStack() as undo:
            for path in [path for path in paths if copied[path.with_suffix("").as_posix()]]:
                target, copy = folder / path, old / path
                for parent in (target.parent, copy.parent):
                    parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    shutil.copy2(target, copy)
                    undo.callback(copy.replace, target)
                else:
                    undo.callback(target.unlink, missing_ok=True)
                (new / path).replace(target)
            undo.pop_all()  # all are in place
    return copied
