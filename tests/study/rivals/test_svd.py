import pytest
import torch

from svdlib.study.rivals import svd as svd_peers


def test_race_times_every_way_and_relates_errors_to_the_least(monkeypatch):
    for package in ("sklearn", "fbpca"):
        pytest.importorskip(package)
    table = svd_peers.svd_race([(60, 50), (40, 70)], (3, 8), repeats=1, progress=False)
    ways = set(table.way) - {"products alone"}
    assert len(ways) == 6 and len(table) == 2 * 2 * 7
    assert (table.seconds > 0).all()
    errors = table[table.way != "products alone"].error
    assert errors.min() == 1 and errors.max() < 1.5
    monkeypatch.setattr(svd_peers, "LIMIT", 1)
    few = svd_peers.svd_race([(60, 50)], (3,), repeats=1, progress=False)
    assert ways - set(few.way) == {"SciPy svds", "SciPy interpolative"}


def test_slow_decay_decays_slowly(generator):
    sigma = torch.linalg.svdvals(svd_peers.slow_decay(400, 300, generator))
    assert 2 < sigma[0] / sigma[8] < 5 and sigma[-1] > 0


def test_times_have_a_row_a_case():
    cpu = torch.device("cpu")
    table = svd_peers.exact_or_randomized([(8, 30), (20, 20)], [2, 10], cpu, repeats=1)
    assert table[["shape", "rank"]].values.tolist() == [["8×30", 2], ["20×20", 2], ["20×20", 10]]
    assert (table[["full", "truncated", "randomized"]] > 0).all(axis=None)
    calls = svd_peers.paper_call_times((30, 8, 5), 6, cpu, repeats=1)
    assert calls["shape"].tolist() == ["8×30", "5×8"]
    assert svd_peers.batch_times(2, 5, 9, 2, cpu, repeats=1)["truncated_svd"] > 0
