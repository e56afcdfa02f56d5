"""Results too dear to measure in a notebook: measured once, committed, with their provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parents[2] / "results"


def stored(
    name: str, parameters: Mapping[str, object], folder: Path = RESULTS
) -> pd.DataFrame | None:
    """The committed table of that name, if it was measured with these parameters, else None.

    ``results/NAME.csv`` is the table and ``results/NAME.json`` says how it came about: command,
    parameters, versions, machine. Parameters that the caller leaves out may be anything.

    >>> stored("08_wide_network", {"dataset": "a data set of my own"}) is None
    True
    """
    about = folder / f"{name}.json"
    if not about.is_file():
        return None
    measured = json.loads(about.read_text())["parameters"]
    if any(measured.get(key) != value for key, value in parameters.items()):
        return None
    return pd.read_csv(folder / f"{name}.csv")
