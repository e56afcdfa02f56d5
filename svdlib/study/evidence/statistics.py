"""Means with intervals, and paired differences, from tidy tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats


def interval(values: ArrayLike, level: float = 0.95) -> pd.Series:
    """n, mean, and the ends of Student's interval for the mean; NaN for a single value."""
    x = np.asarray(values, float)
    n, mean = len(x), x.mean()
    half = stats.t.ppf((1 + level) / 2, n - 1) * stats.sem(x) if n > 1 else np.nan
    return pd.Series({"n": n, "mean": mean, "low": mean - half, "high": mean + half})


def crossed(values: ArrayLike) -> pd.Series:
    """n, mean, and a 95% interval for the mean of values (n seeds, N images) that covers both.

    With the mean squares of seeds, images, and what is left, s_s², s_i², s_e², the variance of the
    mean is (s_s² + s_i² − s_e²) / (n N), and seeds and images are both taken as drawn at random
    (Searle, Casella and McCulloch 1992, section 4.4). Student's t has n − 1 degrees of freedom.

    >>> crossed([[1.0, 3.0], [1.0, 3.0]]).round(1).tolist()  # equal seeds: the images remain
    [2.0, 2.0, -10.7, 14.7]
    """
    x = np.asarray(values, float)
    n, images = x.shape
    mean, by_seed, by_image = x.mean(), x.mean(1), x.mean(0)
    if n < 2 or images < 2:
        return pd.Series({"n": n, "mean": mean, "low": np.nan, "high": np.nan})
    rest = x - by_seed[:, None] - by_image + mean
    error = (rest**2).sum() / ((n - 1) * (images - 1))
    seeds, pictures = images * by_seed.var(ddof=1), n * by_image.var(ddof=1)
    variance = max(seeds + pictures - error, error) / x.size
    half = stats.t.ppf(0.975, n - 1) * np.sqrt(variance)
    return pd.Series({"n": n, "mean": mean, "low": mean - half, "high": mean + half})


def welch(values: ArrayLike, mean: float, sd: float, n: int) -> pd.Series:
    """n, and how much the mean of values exceeds that of another sample, with a 95% interval.

    Student's t with the degrees of freedom of unequal variances (Welch 1947). The ends are NaN for
    a single value.

    >>> welch([2.0, 4.0, 6.0], mean=1.0, sd=2.0, n=3).round(2).tolist()  # equal variances: 4 degrees
    [3.0, 3.0, -1.53, 7.53]
    """
    x = np.asarray(values, float)
    ours, theirs = x.var(ddof=1) / len(x), sd**2 / n
    freedom = (ours + theirs) ** 2 / (ours**2 / (len(x) - 1) + theirs**2 / (n - 1))
    difference = x.mean() - mean
    half = stats.t.ppf(0.975, freedom) * np.sqrt(ours + theirs)
    ends = {"low": difference - half, "high": difference + half}
    return pd.Series({"n": len(x), "mean": difference, **ends})


def prediction(values: ArrayLike, level: float = 0.95) -> pd.Series:
    """n, mean, and the ends of the interval into which one more run falls with this probability.

    The ends are quantiles for 100 values or more. For fewer, they assume normal runs: Student's t
    with √(1 + 1/n) standard deviations.
    """
    x = np.asarray(values, float)
    ends = interval(x, level)
    half = (ends["high"] - ends["mean"]) * np.sqrt(len(x) + 1)
    ends["low"], ends["high"] = ends["mean"] - half, ends["mean"] + half
    if len(x) >= 100:
        ends["low"], ends["high"] = np.quantile(x, [(1 - level) / 2, (1 + level) / 2])
    return ends


def with_interval(summary: Mapping[str, Any] | pd.Series, digits: int = 2) -> str:
    """A mean with its interval, if any, as text."""
    # Zero is added so that nothing reads −0.00.
    mean, low, high = (
        "" if np.isnan(summary[key]) else f"{round(summary[key], digits) + 0.0:.{digits}f}"
        for key in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]" if low and high else mean


def summarize(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """`interval` of a column for each group."""
    groups = table.groupby(list(by), sort=False, dropna=False)[value]
    rows = [dict(zip(by, key, strict=True)) | dict(interval(part)) for key, part in groups]
    return pd.DataFrame(rows)


def paired(table: pd.DataFrame, value: str, against: Any, column: str = "method") -> pd.DataFrame:
    """`interval` of the differences, paired by seed, of each group to the group ``against``."""
    wide = table.pivot(index="seed", columns=column, values=value)
    others = (group for group in table[column].unique() if group != against)
    differences = {group: (wide[group] - wide[against]).dropna() for group in others}
    return pd.DataFrame({column: group, **interval(part)} for group, part in differences.items())


def locate(
    runs: pd.DataFrame, single: pd.DataFrame, values: Sequence[str], by: Sequence[str]
) -> pd.DataFrame:
    """Whether single runs, one per group, lie where 95% of many do (``below``: in percent)."""
    rows = []
    for run in single.to_dict("records"):
        key = {name: run[name] for name in by}
        group = runs[(runs[list(by)] == list(key.values())).all(axis=1)]
        for value in values if len(group) > 1 else ():
            ends, own = prediction(group[value]), run[value]
            row = {
                "value": value,
                **ends,
                "single": own,
                "below": 100 * (group[value] < own).mean(),
            }
            rows.append(key | row | {"inside": bool(ends.low <= own <= ends.high)})
    columns = [*by, "value", "n", "mean", "low", "high", "single", "below", "inside"]
    return pd.DataFrame(rows, columns=columns)
