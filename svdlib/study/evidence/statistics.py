"""Means with intervals, and paired differences, from tidy tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats


def interval(values: ArrayLike, level: float = 0.95) -> pd.Series:
    """n, mean, and the two ends of Student's t interval for the mean; NaN for a single value.

    >>> interval([1.0, 2.0, 3.0]).round(2).to_dict()
    {'n': 3.0, 'mean': 2.0, 'low': -0.48, 'high': 4.48}
    """
    x = np.asarray(values, float)
    n, mean = len(x), x.mean()
    half = stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(x) if n > 1 else np.nan
    return pd.Series({"n": n, "mean": mean, "low": mean - half, "high": mean + half})


def prediction(values: ArrayLike) -> pd.Series:
    """n, mean, and the ends of the interval into which one more run falls with 95% probability.

    The ends are quantiles for 100 values or more. For fewer, they assume normal runs: Student's t
    with √(1 + 1/n) standard deviations. They are NaN for a single value.

    >>> prediction([1.0, 2.0, 3.0]).round(2)[["low", "high"]].tolist()
    [-2.97, 6.97]
    """
    x = np.asarray(values, float)
    ends = interval(x)
    half = (ends["high"] - ends["mean"]) * np.sqrt(len(x) + 1)
    ends["low"], ends["high"] = ends["mean"] - half, ends["mean"] + half
    if len(x) >= 100:
        ends["low"], ends["high"] = np.quantile(x, [0.025, 0.975])
    return ends


def with_interval(summary: Mapping[str, Any] | pd.Series, digits: int = 2) -> str:
    """A mean with its interval, if any, as text.

    >>> with_interval(interval([1.0, 2.0, 3.0])), with_interval(interval([1.0]))
    ('2.00 [-0.48, 4.48]', '1.00')
    """
    # Zero is added so that nothing reads −0.00.
    mean, low, high = (
        "" if np.isnan(summary[key]) else f"{round(summary[key], digits) + 0.0:.{digits}f}"
        for key in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]" if low and high else mean


def summarize(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """`interval` of a column for each group.

    >>> runs = pd.DataFrame({"method": ["a", "a", "b", "b"], "error": [1.0, 3.0, 2.0, 2.0]})
    >>> summarize(runs, "error", ["method"])[["method", "n", "mean"]].values.tolist()
    [['a', 2.0, 2.0], ['b', 2.0, 2.0]]
    """
    groups = table.groupby(list(by), sort=False, dropna=False)[value]
    rows = [dict(zip(by, key, strict=True)) | dict(interval(part)) for key, part in groups]
    return pd.DataFrame(rows)


def paired(table: pd.DataFrame, value: str, against: Any, column: str = "method") -> pd.DataFrame:
    """`interval` of the differences, paired by seed, of each group to the group ``against``.

    >>> runs = pd.DataFrame({"method": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1],
    ...                      "error": [1.0, 5.0, 2.0, 6.5]})
    >>> paired(runs, "error", against="a")[["method", "mean"]].values.tolist()
    [['b', 1.25]]
    """
    wide = table.pivot(index="seed", columns=column, values=value)
    others = [group for group in table[column].unique() if group != against]
    rows = [{column: group, **interval((wide[group] - wide[against]).dropna())} for group in others]
    return pd.DataFrame(rows)


def locate(
    runs: pd.DataFrame, single: pd.DataFrame, values: Sequence[str], by: Sequence[str]
) -> pd.DataFrame:
    """Whether the single runs, one per group ``by``, lie where 95% of many ``runs`` do.

    Returns:
        A row per group and value: n, mean, low, high (`prediction`), single, below (the percentage
        of the runs under it), inside. Groups with fewer than two of the many runs are left out.

    >>> runs = pd.DataFrame({"method": "a", "error": range(100)})
    >>> single = pd.DataFrame({"method": ["a"], "error": [98.5]})
    >>> locate(runs, single, ["error"], ["method"])[["single", "below", "inside"]].values.tolist()
    [[98.5, 99.0, False]]
    """
    rows = []
    for run in single.to_dict("records"):
        key = {name: run[name] for name in by}
        group = runs[(runs[list(by)] == list(key.values())).all(axis=1)]
        for value in values if len(group) > 1 else ():
            ends, own = prediction(group[value]), run[value]
            below, inside = 100 * (group[value] < own).mean(), bool(ends.low <= own <= ends.high)
            row = {"value": value, **ends, "single": own, "below": below, "inside": inside}
            rows.append(key | row)
    columns = [*by, "value", "n", "mean", "low", "high", "single", "below", "inside"]
    return pd.DataFrame(rows, columns=columns)
