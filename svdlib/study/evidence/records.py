"""Tables of many runs: put together, and what the study rests on committed with its provenance."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parents[3] / "results"


def from_paper(name: str) -> pd.DataFrame:
    """Numbers that others printed: ``published_NAME.csv`` beside the notebooks.

    Raises:
        FileNotFoundError: the file is missing, as where svdlib is installed without the study.

    >>> list(from_paper("keene"))
    ['method', 'epoch', 'accuracy', 'loss']
    """
    path = RESULTS.with_name("notebooks") / f"published_{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the notebooks from a clone of the project")
    return pd.read_csv(path)


def committed(
    name: str, parameters: Mapping[str, object], folder: Path = RESULTS
) -> pd.DataFrame | None:
    """The committed table ``results/NAME.csv`` if it was measured with these parameters, else None.

    ``results/NAME.toml`` (a `Sweep`) or ``results/NAME.json`` has its parameters; those not given
    may have any value. A sweep's table is reduced to the given parameters' rows, without them.
    """
    path, sweep, other = (folder / f"{name}.{kind}" for kind in ("csv", "toml", "json"))
    if not path.is_file() or not (sweep.is_file() or other.is_file()):
        return None
    about = tomllib.loads(sweep.read_text()) if sweep.is_file() else json.loads(other.read_text())
    table = pd.read_csv(path)
    if list(table) != about.get("columns", list(table)):
        return None  # an older sweep's
    for key, value in parameters.items():
        if key in about.get("over", {}):
            column = _column(table, key)
            table = table[table[column] == value].drop(columns=column)
        elif about["parameters"].get(key) != value:
            return None
    return table if len(table) else None


def larger(
    live: pd.DataFrame, committed: pd.DataFrame | None, keys: Sequence[str], value: str, by: str
) -> tuple[pd.DataFrame, float | None]:
    """The table that a notebook draws: the committed one if it has all that was measured live.

    Returns:
        The committed table and the largest difference between the two in the mean of a ``value``
        over a group ``by``; or the live table and None if it has as many rows, or rows, named by
        ``keys``, that the committed one lacks.

    >>> live = pd.DataFrame({"seed": [0], "error": [9.0], "method": "a"})
    >>> table = pd.DataFrame({"seed": [0, 1], "error": [9.5, 8.0], "method": "a"})
    >>> larger(live, table, ["seed", "method"], "error", "method")[1]
    0.5
    """
    if committed is None or len(live) >= len(committed):
        return live, None
    both = live.merge(committed, on=list(keys), suffixes=("", " stored"))
    if len(both) < len(live):
        return live, None
    distances = (both[value] - both[f"{value} stored"]).groupby(both[by], dropna=False).mean()
    return committed, float(distances.abs().max())


def _column(table: pd.DataFrame, parameter: str) -> str:
    """The column of a parameter: its name, or with a note where the table has one of its own."""
    noted = f"{parameter} (parameter)"
    return noted if noted in table else parameter


def collect(out: str | Path, notebook: str, table: str) -> pd.DataFrame:
    """One table of all runs of a notebook in ``out``, with their parameters as columns.

    ``table`` names the CSV file that each run has, without ``.csv``. A parameter named as a column
    of that file becomes the column ``NAME (parameter)``.

    Raises:
        FileNotFoundError: no run of that notebook has the table.
    """
    places = sorted(path.parent for path in Path(out, notebook).glob("*/run.json"))
    complete = [p for p in places if p.suffix != ".failed" and not p.name.startswith(".")]
    return gathered(complete, table)


def gathered(places: Sequence[Path], table: str) -> pd.DataFrame:
    """The table that `collect` makes, of these runs."""
    parts = []
    for path in (place / f"{table}.csv" for place in places):
        if path.is_file():
            part = pd.read_csv(path)
            parameters = json.loads(path.with_name("run.json").read_text())["parameters"]
            for name, value in parameters.items():
                column = f"{name} (parameter)" if name in part else name
                part[column] = [value] * len(part)
            parts.append(part)
    if not parts:
        raise FileNotFoundError(f"no run has a table {table}.csv: {len(places)} runs looked at")
    return pd.concat(parts, ignore_index=True)
