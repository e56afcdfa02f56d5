import numpy as np
import pandas as pd
import pytest
from scipy import stats

from svdlib.study.evidence.statistics import (
    crossed,
    interval,
    locate,
    paired,
    prediction,
    summarize,
    with_interval,
)


def test_interval_is_students():
    x = np.random.default_rng(0).normal(size=9)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    ours = interval(x)
    assert (ours.low, ours.high, ours.n) == pytest.approx((low, high, 9))


def test_one_value_has_no_interval():
    summary = interval([4.0])
    assert summary["mean"] == 4 and np.isnan(summary.low) and np.isnan(summary.high)


def test_a_crossed_interval_covers_seeds_and_images():
    """Of 400 tables with both kinds of scatter, 95% of the intervals hold the mean, 0."""
    rng, held, alone = np.random.default_rng(0), 0, 0
    for _ in range(400):
        x = rng.normal(size=(12, 1)) + rng.normal(size=(1, 40)) * 3 + rng.normal(size=(12, 40))
        ends, seeds = crossed(x), interval(x.mean(1))
        assert (ends.n, ends["mean"]) == (12, pytest.approx(x.mean()))
        held += ends.low <= 0 <= ends.high
        alone += seeds.low <= 0 <= seeds.high
    assert 0.92 <= held / 400 <= 0.99  # three standard errors are 0.03
    assert alone / 400 < 0.9  # an interval over seeds does not know about the images


def test_a_crossed_interval_of_one_seed_is_unknown():
    assert crossed(np.ones((1, 5)))[["low", "high"]].isna().all()


def test_paired_is_the_paired_test():
    rng = np.random.default_rng(0)
    base = rng.normal(size=12)
    table = pd.concat(
        pd.DataFrame({"method": m, "seed": range(12), "error": base + shift})
        for m, shift in (("a", 0), ("b", rng.normal(0.5, 0.1, 12)))
    )
    wide = table.pivot(index="seed", columns="method", values="error")
    expected = stats.ttest_rel(wide.b, wide.a).confidence_interval(0.95)
    ours = paired(table, "error", against="a").iloc[0]
    assert (ours.low, ours.high) == pytest.approx(tuple(expected))


def test_summarize_keeps_groups_in_order():
    table = pd.DataFrame({"m": ["b", "b", "a"], "e": [1, 1, 2], "v": [1.0, 3.0, 5.0]})
    summary = summarize(table, "v", ["m", "e"])
    assert summary.m.tolist() == ["b", "a"]
    assert summary["mean"].tolist() == [2.0, 5.0]


def test_one_more_run_falls_into_the_prediction_interval_as_often_as_said():
    """Of normal runs, by Student's t for few and by quantiles for many."""
    rng = np.random.default_rng(0)
    for n, tries in ((5, 4000), (200, 2000)):
        drawn = rng.normal(size=(tries, n + 1))
        ends = [prediction(row[:-1]) for row in drawn]
        inside = [end.low <= row[-1] <= end.high for end, row in zip(ends, drawn, strict=True)]
        # Four standard errors; quantiles of 200 lie a little inside.
        assert abs(np.mean(inside) - 0.95) < 4 * (0.95 * 0.05 / tries) ** 0.5 + 0.01 * (n > 100)


def test_single_runs_are_compared_with_their_own_group():
    runs = pd.DataFrame(
        {"method": ["a"] * 100 + ["b"] * 100, "loss": [*range(100), *range(1000, 1100)]}
    )
    single = pd.DataFrame({"method": ["a", "b"], "loss": [50.0, 50.0]})
    table = locate(runs, single, ["loss"], ["method"])
    assert table.inside.tolist() == [True, False]
    assert table.below.tolist() == [50.0, 0.0]


def test_an_empty_table_of_single_runs_gives_the_columns_alone():
    runs = pd.DataFrame({"method": "a", "error": range(5)})
    table = locate(runs, runs[:0], ["error"], ["method"])
    assert not len(table) and {"method", "value", "single", "inside"} <= set(table)


def test_a_mean_is_written_with_its_interval_if_it_has_one():
    assert with_interval(interval([1.0, 2.0, 3.0])) == "2.00 [-0.48, 4.48]"
    assert with_interval(interval([1.0])) == "1.00"
