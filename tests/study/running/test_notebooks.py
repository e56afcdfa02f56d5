"""Every notebook runs through on a small case, headless."""

from pathlib import Path

import pytest
from notebook_cases import IMAGES, SMALL

from svdlib.study.running import runner

FOLDER = Path(__file__).parents[3] / "notebooks"


def test_every_notebook_has_a_small_case():
    assert sorted(SMALL) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


# nbval executes every notebook at its own parameters; the first is small enough for every day.
CASES = [
    pytest.param(name, marks=pytest.mark.slow if number else ())
    for number, name in enumerate(SMALL)
]


@pytest.mark.parametrize("name", CASES)
def test_small_case(name, tmp_path, mnist):
    (outcome,) = runner.run(
        [name],
        {"progress": "false", **IMAGES.get(name, {}), **SMALL[name]},
        out=tmp_path / "runs",
        figures=tmp_path / "figures",
        folder=FOLDER,
        progress=False,
    )
    assert outcome.error is None
    [copy] = (tmp_path / "runs").rglob(f"{name}.ipynb")
    saved = copy.read_text()
    # A widget is an error in a notebook that is opened again; but the explorer's come with stills.
    assert ("widget-view" in saved) == (name == "09_explorer")
    assert ("1 network, 2 epochs: 100%" in saved) == (SMALL[name].get("progress") == "true")
    drawn = sorted(path.name for path in (tmp_path / "figures").glob(f"{name[:2]}_*"))
    assert drawn and any(figure.endswith(".png") for figure in drawn)
