"""Sweeps that the study rests on: ``results/NAME.toml`` asks for one, two tables keep its results."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from svdlib import files
from svdlib.study.evidence.records import RESULTS, gathered
from svdlib.study.running.parameters import Values


@dataclass(frozen=True)
class Sweep:
    """What ``results/NAME.toml`` holds."""

    name: str
    notebook: str
    table: str  # of the notebook, such as "04_figure1"
    columns: list[str]  # of the table, to keep
    parameters: dict[str, str]  # of all runs
    over: dict[str, Values]  # every combination is run; a list, or a range as text


def sweeps(names: Sequence[str] = (), folder: Path = RESULTS) -> list[Sweep]:
    """The sweeps of these names, or all of the folder's."""
    known = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    for name in names or [""] * (not known):
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"no sweep {name!r} in {folder}; known: {listed}")
    return [_read(known[name]) for name in names or known]


def _read(path: Path) -> Sweep:
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    kinds = {"notebook": str, "table": str, "columns": list, "parameters": dict, "over": dict}
    for key, value in content.items():
        if not isinstance(value, kinds.get(key, ())):
            needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise ValueError(f"{path}: {key} = {value!r} does not belong there; known: {needed}")  # noqa: TRY004
    if missing := sorted(kinds.keys() - content.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for name, values in content["over"].items():
        if not isinstance(values, str | list):
            raise ValueError(f"{path}: over {name} takes a list, or a range as text")  # noqa: TRY004
    content["parameters"] = {name: str(value) for name, value in content["parameters"].items()}
    return Sweep(path.stem, **content)


def write(sweep: Sweep, places: Sequence[Path], folder: Path = RESULTS) -> None:
    """Put a finished sweep's table, and a table of how each run came about, into the folder.

    ``NAME.csv`` has the requested columns, to five digits. ``NAME.runs.csv`` has a row per run:
    its values of the sweep's parameters, seconds, date, machine, versions, and hash of the code.
    """
    runs = []
    for place in places:
        about = json.loads((place / "run.json").read_text("utf-8"))
        parameters = about.pop("parameters")
        runs.append(({name: parameters[name] for name in sweep.over}, about, place))
    runs.sort(key=lambda run: list(run[0].values()))
    table = gathered([place for *_, place in runs], sweep.table)
    if lacking := [name for name in sweep.columns if name not in table]:
        raise ValueError(f"{sweep.table}.csv lacks {lacking}; it has {list(table)}")
    summary = pd.DataFrame(values | about for values, about, _ in runs).drop(columns="notebook")
    for name, content in ((sweep.name, table[sweep.columns]), (f"{sweep.name}.runs", summary)):
        files.put(folder / f"{name}.csv", content.to_csv(index=False, float_format="%.5g"))
