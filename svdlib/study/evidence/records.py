"""Tables of many runs: put together, and what the study rests on committed with its provenance."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from svdlib import checks

RESULTS = Path(__file__).parents[3] / "results"


def from_paper(name: str) -> pd.DataFrame:
    """Numbers that others printed: ``published_NAME.csv`` beside the notebooks."""
    path = RESULTS.with_name("notebooks") / f"published_{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the notebooks from a clone of the project")
    return pd.read_csv(path)


def committed(
    name: str, parameters: Mapping[str, object], folder: Path = RESULTS
) -> pd.DataFrame | None:
    """The committed table ``results/NAME.csv`` if it was measured with these parameters, else None.

    ``NAME.toml`` (a `Sweep`) or ``NAME.json`` has its parameters; those not given may have any
    value. A sweep's table is reduced to the given parameters' rows, without them.
    """
    path, sweep, other = (folder / f"{name}.{kind}" for kind in ("csv", "toml", "json"))
    if not path.is_file() or not (sweep.is_file() or other.is_file()):
        return None
    source, load = (sweep, tomllib.loads) if sweep.is_file() else (other, json.loads)
    about = load(source.read_text("utf-8"))
    table = pd.read_csv(path)
    if list(table) != about.get("columns", list(table)):
        return None  # an older sweep's
    for key, value in parameters.items():
        if key in about.get("over", {}):
            noted = f"{key} (parameter)"
            column = noted if noted in table else key
            table = table[table[column] == value].drop(columns=column)
        elif about["parameters"].get(key) != value:
            return None
    return table if len(table) else None


def larger(
    live: pd.DataFrame, committed: pd.DataFrame | None, keys: Sequence[str], value: str, by: str
) -> tuple[pd.DataFrame, float | None]:
    """The committed table, if it has the live one's ``keys`` and more rows; else the live one.

    With it the largest difference of the two in the mean ``value`` over a group ``by``, or None.
    """
    if committed is None or len(live) >= len(committed):
        return live, None
    both = live.merge(committed, on=list(keys), suffixes=("", " stored"))
    if len(both) < len(live):
        return live, None
    distances = (both[value] - both[f"{value} stored"]).groupby(both[by], dropna=False).mean()
    return committed, float(distances.abs().max())


def collect(out: str | Path, notebook: str, table: str) -> pd.DataFrame:
    """One table of all runs of a notebook in ``out``, with their parameters as columns.

    A parameter named as a column of the runs' ``table`` becomes the column ``NAME (parameter)``.
    Of several versions of the notebook or of svdlib, only the runs of the latest are taken.

    Warns:
        UserWarning: runs of other versions are left out.
    """
    paths = sorted(Path(out, notebook).glob("*/run.json"))
    versions: dict[tuple[str | None, ...], list[Path]] = {}
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        if path.parent.suffix != ".failed" and not path.parent.name.startswith("."):
            about = json.loads(path.read_text("utf-8"))
            version = about.get("code"), about.get("source")
            versions[version] = [*versions.pop(version, []), path.parent]
    *others, latest = versions.values() or [[]]
    if others:
        number = sum(map(len, others))
        checks.warn(
            f"{number} runs are of other versions of {notebook} or svdlib and left out; "
            f"{len(latest)} are of the latest"
        )
    return gathered(sorted(latest), table)


def gathered(places: Sequence[Path], table: str) -> pd.DataFrame:
    """The table that `collect` makes, of these runs."""
    parts = []
    for path in (place / f"{table}.csv" for place in places):
        if path.is_file():
            part = pd.read_csv(path)
            run = json.loads(path.with_name("run.json").read_text("utf-8"))
            for name, value in run["parameters"].items():
                part[f"{name} (parameter)" if name in part else name] = [value] * len(part)
            parts.append(part)
    if not parts:
        raise FileNotFoundError(f"no run has a table {table}.csv: {len(places)} runs looked at")
    return pd.concat(parts, ignore_index=True)
