"""What a notebook claims, beside what it measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from svdlib.study.evidence.statistics import with_interval


def claims_table(claims: Mapping[str, tuple[object, object]]) -> pd.DataFrame:
    """A row per claim {sentence: (measured, holds)}; "unknown" where an `interval` is empty.

    Floats differ between processors, and claims that begin with "time" between machines. Such
    values follow a "≈", after which nbval compares nothing (tests/nbval.cfg).
    """
    rows = []
    for sentence, (measured, holds) in claims.items():
        text, known = str(measured), True
        if isinstance(measured, pd.Series):
            text, known = with_interval(measured), bool(measured[["low", "high"]].notna().all())
        elif isinstance(measured, float | np.floating):
            text = f"≈ {measured:.3g}"
        verdict: object = bool(holds) if known else "unknown"
        if sentence.startswith("time"):
            text, verdict = f"≈ {text.removeprefix('≈ ')}", f"≈ {verdict}"
        rows.append((sentence, text, verdict))
    return pd.DataFrame(rows, columns=["claim", "measured", "holds"])
