"""Tables of many runs: put together, and what the study rests on committed with its provenance."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from svdlib import files

if TYPE_CHECKING:  # would bring Jupyter along
    from svdlib.study.running.parameters import Values

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


@dataclass(frozen=True)
class Sweep:
    """What ``results/NAME.toml`` asks for: a notebook, run over parameters, and one of its tables.

    ::

        notebook = "04_comparison"
        table = "04_figure1"
        columns = ["first_seed", "method", "epoch", "test_error"]

        [parameters]  # of all runs
        epochs = 10

        [over]  # every combination; a list, or a range as text
        first_seed = "0:1000:100"
    """

    name: str
    notebook: str
    table: str
    columns: list[str]
    parameters: dict[str, str]
    over: list[tuple[str, Values]]


def sweeps(names: Sequence[str] = (), folder: Path = RESULTS) -> list[Sweep]:
    """The sweeps of these names, or all of the folder's.

    Raises:
        ValueError: no sweep of that name (the known ones are listed), a file that is no TOML, or
            lacks a key, or has one too many.
    """
    known = {path.stem: path for path in sorted(folder.glob("*.toml"))}
    for name in names or [""] * (not known):
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"no sweep {name!r} in {folder}; known: {listed}")
    return [_sweep(known[name]) for name in names or known]


def _sweep(path: Path) -> Sweep:
    try:
        read = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    kinds = {"notebook": str, "table": str, "columns": list, "parameters": dict, "over": dict}
    for key, value in read.items():
        if key not in kinds or not isinstance(value, kinds[key]):
            needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise ValueError(f"{path}: {key} = {value!r} does not belong there; known: {needed}")
    if missing := kinds.keys() - read.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    parameters = {name: str(value) for name, value in read["parameters"].items()}
    wrong = [name for name, values in read["over"].items() if type(values) not in (str, list)]
    for name in wrong:
        raise ValueError(f"{path}: over {name} takes a list, or a range as text")
    return Sweep(
        path.stem,
        read["notebook"],
        read["table"],
        read["columns"],
        parameters,
        list(read["over"].items()),
    )


def write(sweep: Sweep, places: Sequence[Path], folder: Path = RESULTS) -> None:
    """Put a finished sweep's table, and a table of how each run came about, into the folder.

    ``NAME.csv`` has the columns asked for, to five digits; ``NAME.runs.csv`` has, for each run,
    what it was run over, its seconds, date, machine and versions, and the hash of the code.

    Raises:
        ValueError: the table lacks a column.
    """
    table = gathered(places, sweep.table)
    over = [name for name, _ in sweep.over]
    table = table.sort_values([_column(table, name) for name in over], kind="stable")
    if lacking := [name for name in sweep.columns if name not in table]:
        raise ValueError(f"{sweep.table}.csv lacks {lacking}; it has {list(table)}")
    runs = [json.loads((place / "run.json").read_text()) for place in places]
    told = pd.DataFrame(
        {name: each["parameters"][name] for name in over}
        | {key: value for key, value in each.items() if key not in ("parameters", "notebook")}
        for each in runs
    ).sort_values(over, kind="stable")
    for name, content in ((sweep.name, table[sweep.columns]), (f"{sweep.name}.runs", told)):
        files.put(folder / f"{name}.csv", content.to_csv(index=False, float_format="%.5g"))
