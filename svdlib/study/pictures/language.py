"""The plot of `study.language`: what each way of cutting does to a language model."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from pandas import DataFrame

FORMS = {
    "SVD-LLM": "#0072B2",
    "gradients, even ranks": "#009E73",
    "compress": "#D55E00",
}


def perplexities(summary: DataFrame, title: str = "") -> Figure:
    """Perplexity times the dense model's by share, of the forms that do not ruin the model."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for form, color in FORMS.items():
        part = summary[summary.form == form].sort_values("share")
        if part.empty:
            continue
        x = 100 * part.share
        spread = [part.times - part.low, part.high - part.times]
        axis.errorbar(x, part.times, spread, fmt="o-", color=color, capsize=3)
        end = (x.iloc[0], part.times.iloc[0])
        axis.annotate(form, end, (8, 0), textcoords="offset points", color=color, va="center")
    shares = sorted(100 * summary[summary.form.isin(FORMS)].share.unique())
    axis.set(yscale="log", xticks=shares, xlabel="parameters left (%)", title=title)
    axis.set_ylabel("perplexity, times the dense model's")
    axis.axhline(1, color="k", linewidth=1)
    axis.invert_xaxis()
    axis.set_xlim(max(shares) + 2, min(shares) - 12)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    return figure
