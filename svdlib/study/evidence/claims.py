"""What a notebook claims, beside what it measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from svdlib.study.evidence.statistics import told


def claims_table(claims: Mapping[str, tuple[object, object]]) -> pd.DataFrame:
    """A row a claim: the sentence, what was measured, and whether it holds.

    Args:
        claims: {sentence: (measured, holds)}. What was measured may be a mean with its interval
            (as `svdlib.study.evidence.statistics.interval` gives it), a number, or a text. Of a single
            run, which has no interval, it is unknown whether the claim holds.

    >>> from svdlib.study.evidence.statistics import interval
    >>> lost = interval([0.5, 0.7])
    >>> claims_table({"costs under a point": (lost, lost["mean"] < 1)}).values.tolist()
    [['costs under a point', '0.60 [-0.67, 1.87]', True]]
    """
    rows = [
        (sentence, _told(measured), "unknown" if _is_single(measured) else bool(holds))
        for sentence, (measured, holds) in claims.items()
    ]
    return pd.DataFrame(rows, columns=["claim", "measured", "holds"])


def _is_single(measured: object) -> bool:
    return isinstance(measured, pd.Series) and bool(measured[["low", "high"]].isna().any())


def _told(measured: object) -> str:
    if isinstance(measured, pd.Series):
        return told(measured)
    return f"{measured:.3g}" if isinstance(measured, float | np.floating) else str(measured)
