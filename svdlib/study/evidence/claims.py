"""What a notebook claims, beside what it measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from svdlib.study.evidence.statistics import with_interval


def claims_table(claims: Mapping[str, tuple[object, object]]) -> pd.DataFrame:
    """A row per claim: the sentence, what was measured, and whether it holds.

    Args:
        claims: {sentence: (measured, holds)}. What was measured is a number, a text, or a mean
            with its interval; where a single run leaves that empty, holds becomes "unknown".

    >>> from svdlib.study.evidence.statistics import interval
    >>> lost = interval([0.5, 0.7])
    >>> claims_table({"costs under a point": (lost, lost["mean"] < 1)}).values.tolist()
    [['costs under a point', '0.60 [-0.67, 1.87]', True]]
    """
    rows: list[tuple[str, str, object]] = []
    for sentence, (measured, holds) in claims.items():
        if isinstance(measured, pd.Series):
            known = measured[["low", "high"]].notna().all()
            rows.append((sentence, with_interval(measured), bool(holds) if known else "unknown"))
        else:
            is_float = isinstance(measured, float | np.floating)
            rows.append((sentence, f"{measured:.3g}" if is_float else str(measured), bool(holds)))
    return pd.DataFrame(rows, columns=["claim", "measured", "holds"])
