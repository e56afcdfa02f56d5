import pandas as pd
import pytest
from nbformat.v4 import new_code_cell

from svdlib.study.running.figures import agrees, publish, timed

TABLE = pd.DataFrame(
    {
        "method": ["stock", "rsvd"],
        "error": [8.0, 10.0],
        "rank": [None, 3.0],
        "inside": [True, False],
        "seconds": [1.0, 2.0],
    }
)


def written(folder, table, name="a"):
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.png").write_bytes(table.to_csv().encode())
    return folder / f"{name}.csv"


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"error": [8.09, 9.91]}, True),  # a twentieth of the range is 0.1
        ({"error": [8.0, 10.2]}, False),
        ({"error": [8.0, None]}, False),
        ({"rank": [None, 4.0]}, False),
        ({"method": ["stock", "truncsvd"]}, False),
        ({"inside": [True, True]}, False),
        ({"seconds": [10.0, 2.0]}, True),
        ({"more": [1, 2]}, False),
    ],
)
def test_tables_agree_up_to_what_processors_differ_in(tmp_path, change, same):
    old = written(tmp_path / "old", TABLE)
    assert agrees(written(tmp_path / "new", TABLE.assign(**change)), old) == same
    assert not agrees(written(tmp_path / "longer", pd.concat([TABLE, TABLE])), old)
    assert not agrees(tmp_path / "missing.csv", old)


def test_figures_that_agree_or_are_timings_stay(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "figures"
    for name in ("near", "far", "timing"):
        written(folder, TABLE, name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written(run, TABLE.assign(error=[8.01, 10.0]), "near")
    for name in ("far", "timing", "new"):
        written(run, TABLE.assign(error=[80.0, 10.0]), name)
    copied = publish(run, folder, ["timing"], rewrite=False)
    assert copied == {"far": True, "near": False, "new": True, "timing": False}
    changed = {p.name for p in folder.iterdir() if before.get(p.name) != p.read_bytes()}
    assert changed == {"far.csv", "far.png", "new.csv", "new.png"}
    assert all(publish(run, folder, ["timing"]).values())
    assert (folder / "timing.png").read_bytes() == (run / "timing.png").read_bytes()


def test_a_notebook_says_which_of_its_figures_are_timings():
    cells = [
        new_code_cell("plots.save(figure, '01_curves', table, figures)"),
        new_code_cell("plots.save(f, '05_speed', t, figures)", metadata={"tags": ["times"]}),
        new_code_cell("t.to_csv(f'{figures}/05_busy.csv')", metadata={"tags": ["times"]}),
    ]
    assert timed(cells) == {"05_speed", "05_busy"}
    assert timed(cells[:1]) is None
    assert timed([new_code_cell("race()", metadata={"tags": ["times"]})]) == frozenset()
