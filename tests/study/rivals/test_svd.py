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


def test_exact_or_randomized_has_a_row_a_case_with_its_error():
    shapes, cpu = [(8, 30), (20, 20), (2, 9)], torch.device("cpu")
    table = svd_peers.exact_or_randomized(shapes, [10, 2], cpu, repeats=1)
    cases = [["8×30", 2], ["20×20", 2], ["20×20", 10]]
    assert table[["spectrum", "shape", "rank"]].values.tolist() == [
        [spectrum, *case] for spectrum in ("decaying", "flat") for case in cases
    ]
    assert (table[["full", "truncated", "randomized"]] > 0).all(axis=None)
    # Float32, and no approximation of rank k is better than the best.
    assert (table.error > 1 - 1e-5).all() and (table.error < table.zero).all()
    assert (table.error_low <= table.error).all() and (table.error <= table.error_high).all()
    with pytest.raises(ValueError, match=r"ranks \[20\] is below the shorter side"):
        svd_peers.exact_or_randomized([(20, 20)], [20], cpu, repeats=1)


def test_errors_of_the_map_are_those_of_the_decompositions(monkeypatch):
    """Of a broken sketch, which finds nothing, it is the zero matrix's."""

    class Nothing:
        def matrix(self):
            return torch.zeros(20, 30)

    monkeypatch.setattr(svd_peers, "randomized_svd", lambda *args, **kwargs: Nothing())
    table = svd_peers.exact_or_randomized([(20, 30)], [3], torch.device("cpu"), repeats=1)
    assert (table.error - table.zero).abs().max() < 1e-6 and (table.zero > 1.05).all()


def test_calls_are_timed_in_rounds():
    table = svd_peers.call_times([(8, 30), (4, 5, 8)], 6, torch.device("cpu"), repeats=1, rounds=2)
    assert table[["round", "shape"]].values.tolist() == [
        [number, shape] for number in (0, 1) for shape in ("8×30", "4×5×8")
    ]
    assert (table[["svd", "svd_lowrank", "truncated_svd"]] > 0).all(axis=None)
