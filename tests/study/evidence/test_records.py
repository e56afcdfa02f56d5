import json
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import svdlib
from svdlib import Projection
from svdlib.study.evidence.records import RESULTS, committed, larger
from svdlib.study.running import results, runner
from svdlib.study.running.parameters import combinations


def test_a_table_is_that_of_its_parameters_or_none(tmp_path):
    pd.DataFrame({"seed": [0, 1]}).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps({"parameters": {"epochs": 4, "wide": [3, 2]}}))
    assert committed("a", {"epochs": 4}, tmp_path).seed.tolist() == [0, 1]
    assert committed("a", {"epochs": 4, "wide": [3, 2]}, tmp_path) is not None
    assert committed("a", {"epochs": 5}, tmp_path) is None
    assert committed("a", {"unheard": 1}, tmp_path) is None
    assert committed("b", {}, tmp_path) is None


def test_of_a_sweep_s_table_the_rows_that_were_asked_for(tmp_path):
    table = pd.DataFrame({"dataset": ["x", "y"], "n": [1, 2], "n (parameter)": [5, 6]})
    table.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.toml").write_text(
        '[parameters]\nepochs = 4\n[over]\ndataset = ["x", "y"]\nn = [5, 6]\n'
    )
    found = committed("a", {"epochs": 4, "dataset": "y"}, tmp_path)
    assert found.to_dict("list") == {"n": [2], "n (parameter)": [6]}
    assert committed("a", {"n": 5}, tmp_path).dataset.tolist() == ["x"]
    assert committed("a", {"dataset": "z"}, tmp_path) is None
    assert committed("a", {"epochs": 5}, tmp_path) is None
    assert committed("a", {"seeds": 5}, tmp_path) is None


def test_every_committed_table_says_how_it_came_about():
    tables = sorted(path.stem for path in RESULTS.glob("*.csv") if ".runs" not in path.stem)
    assert tables
    for name in tables:
        if (RESULTS / f"{name}.json").is_file():
            about = json.loads((RESULTS / f"{name}.json").read_text())
            assert {"command", "date", "machine", "versions", "parameters"} <= set(about)
            assert len(committed(name, about["parameters"])) > 0
        else:
            runs = pd.read_csv(RESULTS / f"{name}.runs.csv")
            (sweep,) = results.sweeps([name])
            asked = combinations(
                Path("notebooks", f"{sweep.notebook}.ipynb"), {}, [*sweep.over.items()]
            )
            assert len(runs) == len(asked)
            assert {"seconds", "date", "processor", "python", "svdlib", "torch", "code"} <= {*runs}
            assert list(pd.read_csv(RESULTS / f"{name}.csv", nrows=1)) == sweep.columns


SWEEP = """
notebook = "a"
table = "table"
columns = ["n (parameter)", "square"]
[parameters]
text = "b"
[over]
n = "1:3"
"""


def test_a_sweep_is_run_and_written(tmp_path, monkeypatch, scheduler, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("notebooks", "results"):
        Path(folder).mkdir()
    cells = [
        new_code_cell(
            "n: int = 0\ntext: str = ''\nfigures: str = ''", metadata={"tags": ["parameters"]}
        ),
        new_code_cell("open(f'{figures}/table.csv', 'w').write(f'n,square\\n0,{n * n / 3}\\n')"),
    ]
    nbformat.write(new_notebook(cells=cells), "notebooks/a.ipynb")
    Path("results/own.toml").write_text(SWEEP)
    sweep = partial(runner.sweep, scheduler=scheduler, target=Path("results"))
    assert [outcome.error for outcome in sweep(["own"])] == [None, None]
    table = pd.read_csv("results/own.csv")
    assert table["n (parameter)"].tolist() == [1, 2] and table.square.tolist() == [0.33333, 1.3333]
    runs = pd.read_csv("results/own.runs.csv")
    assert runs.n.tolist() == [1, 2] and (runs.seconds > 0).all()
    assert sorted(path.name for path in Path("results").iterdir()) == [
        "own.csv",
        "own.runs.csv",
        "own.toml",
    ]
    capsys.readouterr()
    sweep(dry_run=True)
    assert "0 runs, 2 there already" in capsys.readouterr().err
    Path("results/own.toml").write_text(SWEEP.replace("square", "cube"))
    with pytest.raises(ValueError, match=r"table.csv lacks \['cube'\]; it has"):
        sweep()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("notebook =", "own.toml is no TOML"),
        (SWEEP + "[more]", "more = {} does not belong there; known: notebook"),
        (SWEEP.replace('"table"', "3"), "table = 3 does not belong there"),
        (SWEEP.replace('"1:3"', "5"), "over n takes a list, or a range as text"),
        ("notebook = 'a'", "own.toml lacks columns, over, parameters, table"),
    ],
)
def test_bad_sweeps(tmp_path, content, message):
    (tmp_path / "own.toml").write_text(content)
    with pytest.raises(ValueError, match=message):
        results.sweeps([], tmp_path)
    with pytest.raises(ValueError, match=r"no sweep 'other' in .*; known: own"):
        results.sweeps(["other"], tmp_path)
    with pytest.raises(ValueError, match="known: none"):
        results.sweeps([], tmp_path / "none")


@pytest.mark.parametrize("every", ["epoch", "published"])
def test_a_small_part_of_the_headline_sweep_agrees(mnist, every):
    """Three of its thousand seeds, an epoch: within a point, since processors round differently."""
    stored = pd.read_csv(RESULTS / "headline.csv")
    stored = stored[(stored["every (parameter)"] == every) & (stored.epoch == 1)]
    published = Projection.published
    projections = {
        "epoch": [
            None,
            Projection("rsvd", 10, oversample=2, power_iters=0),
            Projection("truncsvd", 10),
        ],
        "published": [None, published("rsvd"), published("truncsvd")],
    }[every]
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=[500, 501, 502] * 3, device="cpu")
    per_network = [projection for projection in projections for _ in range(3)]
    history = svdlib.train(nets, mnist, epochs=1, projection=per_network, progress=False)
    both = history.merge(stored, on=["method", "seed"], suffixes=("", " stored"))
    assert len(both) == 9
    assert (both.test_error - both["test_error stored"]).abs().max() < 1
    assert (both.test_loss - both["test_loss stored"]).abs().max() < 0.05


def test_the_committed_table_is_drawn_where_it_has_more_of_the_same_runs():
    live = pd.DataFrame({"seed": [0], "error": [9.0], "method": "a"})
    table = pd.DataFrame({"seed": [0, 1], "error": [9.5, 8.0], "method": "a"})
    keys = ["seed", "method"]
    drawn, apart = larger(live, table, keys, "error", "method")
    assert drawn is table and apart == 0.5
    for stored in (None, table[:1], table.assign(seed=[1, 2])):
        drawn, apart = larger(live, stored, keys, "error", "method")
        assert drawn is live and apart is None
