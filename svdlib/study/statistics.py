"""Means with intervals, and paired differences, from tidy tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats


def interval(values: Sequence[float] | np.ndarray | pd.Series, level: float = 0.95) -> pd.Series:
    """n, mean, and the two ends of Student's t interval for the mean.

    One value has no interval: its ends are NaN.

    >>> interval([1.0, 2.0, 3.0]).round(2).to_dict()
    {'n': 3.0, 'mean': 2.0, 'low': -0.48, 'high': 4.48}
    """
    x = np.asarray(values, float)
    half = np.nan
    if len(x) > 1:
        half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
    return pd.Series(
        {"n": len(x), "mean": x.mean(), "low": x.mean() - half, "high": x.mean() + half}
    )


def told(summary: Mapping[str, float] | pd.Series, digits: int = 2) -> str:
    """A mean with its interval as text.

    >>> told(interval([1.0, 2.0, 3.0]))
    '2.00 [-0.48, 4.48]'
    """
    # Zero is added so that nothing reads −0.00.
    mean, low, high = (
        f"{round(summary[key], digits) + 0.0:.{digits}f}" for key in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"


def summarize(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """`interval` of a column for each group.

    >>> runs = pd.DataFrame({"method": ["a", "a", "b", "b"], "error": [1.0, 3.0, 2.0, 2.0]})
    >>> summarize(runs, "error", ["method"])[["method", "n", "mean"]].values.tolist()
    [['a', 2.0, 2.0], ['b', 2.0, 2.0]]
    """
    groups = table.groupby(list(by), sort=False, dropna=False)[value]
    rows = {key: interval(group) for key, group in groups}
    index = pd.MultiIndex.from_tuples(
        [key if isinstance(key, tuple) else (key,) for key in rows], names=list(by)
    )
    return pd.DataFrame(list(rows.values()), index=index).reset_index()


def paired(
    table: pd.DataFrame,
    value: str,
    against: str,
    column: str = "method",
    unit: str = "seed",
) -> pd.DataFrame:
    """The difference of each group to the group ``against``, unit by unit, as `interval`.

    Pairing takes the spread between units out of the comparison.

    >>> runs = pd.DataFrame({"method": ["a", "a", "b", "b"], "seed": [0, 1, 0, 1],
    ...                      "error": [1.0, 5.0, 2.0, 6.5]})
    >>> paired(runs, "error", against="a")[["method", "mean"]].values.tolist()
    [['b', 1.25]]
    """
    wide = table.pivot(index=unit, columns=column, values=value)
    rows = [
        {column: group, **interval((wide[group] - wide[against]).dropna())}
        for group in table[column].unique()
        if group != against
    ]
    return pd.DataFrame(rows)
