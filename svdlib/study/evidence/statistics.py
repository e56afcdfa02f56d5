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


def prediction(values: Sequence[float] | np.ndarray | pd.Series, level: float = 0.95) -> pd.Series:
    """n, mean, and between which ends one more run would fall.

    From a hundred values on these are quantiles, below Student's t with √(1 + 1/n) standard
    deviations, which takes the runs for normal. One value has no interval: its ends are NaN.

    >>> prediction(range(1000))[["low", "high"]].round(1).tolist()
    [25.0, 974.0]
    >>> prediction([1.0, 2.0, 3.0]).round(2)[["low", "high"]].tolist()
    [-2.97, 6.97]
    """
    x = np.asarray(values, float)
    if len(x) >= 100:
        low, high = np.quantile(x, [(1 - level) / 2, (1 + level) / 2])
        return pd.Series({"n": len(x), "mean": x.mean(), "low": low, "high": high})
    ends = interval(x, level)
    half = (ends["high"] - ends["mean"]) * np.sqrt(len(x) + 1)
    ends["low"], ends["high"] = ends["mean"] - half, ends["mean"] + half
    return ends


def told(summary: Mapping[str, float] | pd.Series, digits: int = 2) -> str:
    """A mean with its interval as text; the mean alone where there is no interval.

    >>> told(interval([1.0, 2.0, 3.0])), told(interval([1.0]))
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


def placed(
    runs: pd.DataFrame, single: pd.DataFrame, values: Sequence[str], by: Sequence[str]
) -> pd.DataFrame:
    """Where single runs lie among many: is each where 95 % of them would fall?

    Args:
        runs: many runs, a row each, with the columns ``by`` and ``values``.
        single: the single ones, a row each group, with the same columns.

    Returns:
        a row a group and value: n, mean, low, high (`prediction`), single, below (the share of
        the runs under it, per cent), inside. No row without single runs, nor where the many are
        fewer than two, which say nothing of where another would fall.

    >>> runs = pd.DataFrame({"method": "a", "error": range(100)})
    >>> single = pd.DataFrame({"method": ["a"], "error": [98.5]})
    >>> placed(runs, single, ["error"], ["method"])[["single", "below", "inside"]].values.tolist()
    [[98.5, 99.0, False]]
    """
    rows = []
    for one in single.to_dict("records"):
        own = runs[(runs[list(by)] == [one[name] for name in by]).all(axis=1)]
        for value in values if len(own) > 1 else ():
            among = prediction(own[value])
            rows.append(
                {
                    **{name: one[name] for name in by},
                    "value": value,
                    **among,
                    "single": one[value],
                    "below": 100 * (own[value] < one[value]).mean(),
                    "inside": bool(among.low <= one[value] <= among.high),
                }
            )
    columns = [*by, "value", "n", "mean", "low", "high", "single", "below", "inside"]
    return pd.DataFrame(rows, columns=columns)
