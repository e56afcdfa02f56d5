import json

import pandas as pd

from svdlib.study.evidence import RESULTS, stored


def test_a_table_is_that_of_its_parameters_or_none(tmp_path):
    pd.DataFrame({"seed": [0, 1]}).to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps({"parameters": {"epochs": 4, "wide": [3, 2]}}))
    assert stored("a", {"epochs": 4}, tmp_path).seed.tolist() == [0, 1]
    assert stored("a", {"epochs": 4, "wide": [3, 2]}, tmp_path) is not None
    assert stored("a", {"epochs": 5}, tmp_path) is None
    assert stored("a", {"unheard": 1}, tmp_path) is None
    assert stored("b", {}, tmp_path) is None


def test_every_committed_table_says_how_it_came_about():
    tables = sorted(path.stem for path in RESULTS.glob("*.csv"))
    assert tables
    for name in tables:
        about = json.loads((RESULTS / f"{name}.json").read_text())
        assert {"command", "date", "machine", "versions", "parameters"} <= set(about)
        assert len(stored(name, about["parameters"])) > 0
