"""Whatever a reader sets: each notebook runs to its end, or refuses in one sentence at the start.

The cells are executed in this process, on few images; a failure names the parameters.
"""

import warnings
from pathlib import Path
from random import Random

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from notebook_cases import drawn, small

import svdlib
from svdlib.study.running import sweeps
from svdlib.study.running.parameters import find

FOLDER = Path(__file__).parents[3] / "notebooks"
NOTEBOOKS = find(folder=FOLDER)


def cells(path: Path) -> list[str]:
    return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def refusal(source: str, given: dict[str, object]) -> str | None:
    """Why the cell that reads the parameters refuses them, in one sentence; None if it doesn't."""
    try:
        exec(sweeps._check([source]), dict(given))  # noqa: S102
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return None


@pytest.fixture
def few_images(mnist, monkeypatch):
    data = mnist.head(640, 300)
    monkeypatch.setattr(svdlib, "load", lambda name, device="auto": data)
    monkeypatch.setattr("svdlib.layers.cost.latency", lambda *_: 1.0)
    monkeypatch.setattr("svdlib.study.rivals.training.TURN", 0.0)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_draws_are_often_enough_legal_and_never_an_internal_error(path):
    random, own, (_, source, *_) = Random(0), small(path), cells(path)
    refused = [refusal(source, drawn(own, random)) for _ in range(200)]
    assert refused.count(None) > 10
    assert path.stem == "01_baseline" or refused.count(None) < 200


# All but 10, which reads sentences for a minute; its small case is executed in test_notebooks.
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS[:-1], ids=lambda path: path.stem)
def test_what_is_not_refused_runs(path, few_images, tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER)
    mpl.use("Agg")
    random, own, sources = Random(path.stem), small(path), cells(path)
    given = drawn(own, random)
    while refusal(sources[1], given):
        given = drawn(own, random)
    space: dict[str, object] = {}
    with mpl.rc_context(), pd.option_context("display.max_rows", 60), warnings.catch_warnings():
        try:
            for number, source in enumerate(sources):
                if number == 1:
                    space |= given | {"figures": str(tmp_path)}
                exec(compile(source, f"{path.stem}, code cell {number + 1}", "exec"), space)  # noqa: S102
            for source in sources[:2]:  # as when all are run again
                exec(source, space)  # noqa: S102
        except Exception as error:
            raise AssertionError(f"{path.stem} fails at {given}") from error
        finally:
            plt.close("all")
    assert list(tmp_path.glob("*.png"))
