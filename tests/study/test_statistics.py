import numpy as np
import pandas as pd
import pytest
from scipy import stats

from svdlib.study.statistics import interval, paired, summarize


def test_interval_is_students():
    x = np.random.default_rng(0).normal(size=9)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    ours = interval(x)
    assert (ours.low, ours.high, ours.n) == pytest.approx((low, high, 9))


def test_one_value_has_no_interval():
    one = interval([4.0])
    assert one["mean"] == 4 and np.isnan(one.low) and np.isnan(one.high)


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
