from svdlib import clock


def test_the_median_leaves_out_the_warm_up(monkeypatch):
    times = iter([0.0, 100.0, 200.0, 203.0, 300.0, 301.0, 400.0, 402.0])
    monkeypatch.setattr(clock, "now", lambda device=clock.CPU: next(times))
    calls = []
    assert clock.median(lambda: calls.append(1), repeats=3) == 2.0
    assert len(calls) == 4
