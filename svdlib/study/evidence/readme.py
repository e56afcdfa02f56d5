"""The README's numbers, each written from the table it comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pandas as pd

from svdlib import files
from svdlib.study.evidence import records
from svdlib.study.evidence.statistics import interval, locate, paired, prediction, with_interval

ROOT = Path(__file__).parents[3]
NAMES = {"stock": "stock", "rsvd": "rSVD (p = 2, q = 0)", "truncsvd": "truncSVD"}


def render(text: str) -> str:
    """The text with each block ``<!-- name -->…<!-- end -->`` made anew.

    Raises:
        ValueError: a block of a name that is not known, or the lack of one that is.
    """
    found = re.findall(r"<!-- ([\w ]+?) -->.*?<!-- end -->", text, re.DOTALL)
    if sorted(found) != sorted(BLOCKS):
        raise ValueError(f"the README has the blocks {found}, known are {list(BLOCKS)}")

    def block(match: re.Match[str]) -> str:
        content = BLOCKS[match[1]]()
        space = "\n" if "\n" in content else ""
        return f"<!-- {match[1]} -->{space}{content}{space}<!-- end -->"

    return re.sub(r"<!-- ([\w ]+?) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def write(path: Path = ROOT / "README.md") -> None:
    """Write the README's numbers anew."""
    files.put(path, render(path.read_text()))


@cache
def _results(name: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "results" / f"{name}.csv")


def _table(rows: Iterator[tuple[str, ...]], *heads: str) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    lines.insert(1, "|---" * len(heads) + "|")
    return "\n".join(lines)


@cache
def _headline(every: str) -> pd.DataFrame:
    table = _results("headline").rename(columns={"every (parameter)": "every"})
    table = table[table.every == every]
    return table.assign(accuracy=100 - table.test_error, loss=table.test_loss)


def _finding() -> str:
    runs = _headline("epoch")
    cost = _gains(runs[runs.epoch == 10], "test_error", "stock", "method")
    best = _own_ranks()["optimal"]
    kept = interval(100 * best.parameters / _full_size())
    return (
        "Cutting every weight matrix to rank 10 after each of ten epochs costs the paper's network "
        f"{cost['truncsvd']} points of error on MNIST, {cost['rsvd']} where the SVD is randomized "
        f"(n = {runs.seed.nunique():,}). Ranks that are the best for its layers, which the paper "
        f"called unfeasible to find, keep {with_interval(kept, 0)} % of its parameters for a loss within "
        f"0.01 (n = {len(best)})."
    )


def _full_size() -> int:
    """Parameters of the paper's network."""
    return int(_results("joint").parameters.max())


def _share(parameters: float) -> str:
    return f"{100 * parameters / _full_size():.0f} %"


@cache
def _among(every: str) -> pd.DataFrame:
    """Where the paper's single runs lie."""
    paper = records.from_paper("keene")
    return locate(_headline(every), paper, ["accuracy", "loss"], ["method", "epoch"])


def _curves() -> str:
    runs = _headline("epoch")
    first, last = runs[runs.epoch == 1], runs[runs.epoch == 10]
    added = _gains(last, "test_error", "stock", "method")

    def rows() -> Iterator[tuple[str, ...]]:
        for method, name in NAMES.items():
            early = prediction(first[first.method == method].accuracy)
            late = prediction(last[last.method == method].accuracy)
            cost = added.get(method, "")
            yield name, f"{with_interval(early, 1)} %", f"{with_interval(late, 1)} %", cost

    heads = ("method", "accuracy, epoch 1 [95 % of runs]", "epoch 10 [95 % of runs]")
    count = f"n = {runs.seed.nunique():,}"
    return _table(rows(), *heads, f"points of error added after epoch 10, {count} [95 %]")


def _reproduced() -> str:
    text, code = _among("epoch"), _among("published")
    first = text[(text.method == "rsvd") & (text.value == "accuracy") & (text.epoch == 1)].iloc[0]
    stock = code[(code.method == "stock") & (code.value == "accuracy") & (code.epoch == 10)].iloc[0]
    rest = text[(text.method != "rsvd") | (text.epoch > 1)]
    return (
        f"Of the {len(code)} numbers that the paper prints, {code.inside.sum()} lie where 95 % of "
        "our runs of its code lie, which projects every step. Among runs of its text, which "
        f"projects every epoch, {rest.inside.sum()} of {len(rest)} do, but not rSVD's first epoch: "
        f"{100 - first.below:.0f} % of the runs start better than its {first.single:.0f} %. (Read "
        f"off a figure to the point; stock's {stock.single:.0f} % is at the edge, {stock.low:.2f}.)"
    )


def _later() -> str:
    runs = _headline("epoch")
    means = runs.pivot_table(index="epoch", columns="method", values="test_error")
    least = int((means.truncsvd - means.stock).to_numpy().argmin()) + 1
    cost = _gains(runs[runs.epoch == least], "test_error", "stock", "method")["truncsvd"]
    return f"truncSVD's cost is least after epoch {least}, {cost} points, and then rises."


def _ranks_below_ten() -> str:
    table = _results("error_by_rank")
    table = table[(table.dataset == "MNIST") & (table.method == "truncsvd")]
    by_seed = table.set_index("seed")
    wide = {rank: by_seed[by_seed["rank"] == rank].test_error for rank in range(1, 16)}
    nine, five = (with_interval(interval(wide[rank] - wide[10])) for rank in (9, 5))
    most = max(range(2, 11), key=lambda rank: (wide[rank - 1] - wide[rank]).mean())
    above, below = (with_interval(interval(wide[rank]), 0) for rank in (most, most - 1))
    return (
        f"Rank 9 instead of 10 costs {nine} points (truncSVD every epoch, n = {len(wide[9])}), rank "
        f"5 {five}. The break is between ranks {most} and {most - 1}, with {above} and {below} % "
        f"error: at rank {most - 1} networks part into some that learn ({wide[most - 1].min():.0f} "
        f"% at the best) and others that are stuck ({wide[most - 1].max():.0f} %)."
    )


def _gains(table: pd.DataFrame, value: str, against: str, column: str) -> dict[str, str]:
    """Paired differences to a group as texts, by group."""
    rows = paired(table, value, against=against, column=column)
    return {str(row[column]): with_interval(row) for _, row in rows.iterrows()}


def _own_ranks() -> dict[str, pd.DataFrame]:
    """What each rule chose and lost that chooses its own size, a row a network."""
    table = _results("ranks")
    own = table[(table.dataset == "MNIST") & table.share.isna()]
    return {str(rule): part for rule, part in own.groupby("rule")}


def _rules() -> str:
    names = {
        "budget": "a knapsack over single layers, loss within 0.01",
        "marginal": "the paper's Algorithm 3, sensibly read",
        "printed": "the paper's Algorithm 3, as printed",
        "energy": "99 % of the energy",
        "stable-rank": "stable rank",
        "gavish-donoho": "Gavish and Donoho's threshold",
    }
    table = _own_ranks()
    joint = _results("joint")
    whole = joint[(joint.dataset == "MNIST")].iloc[-1]
    best = table["optimal"]

    def rows() -> Iterator[tuple[str, ...]]:
        yield "full network", "100 %", f"{100 - whole.accuracy:.1f} %", "", ""
        error = f"{with_interval(interval(best.error), 1)} %"
        yield "the best ranks, loss within 0.01", _share(best.parameters.mean()), error, "", ""
        for rule, name in names.items():
            part = table[rule]
            error, needed = (
                f"{with_interval(interval(part.error), 1)} %",
                _share(part.needed.mean()),
            )
            kept = _share(part.parameters.mean())
            yield name, kept, error, with_interval(interval(part.regret), 3), needed

    heads = ("rule", "parameters kept", "test error", "test loss above the best's of that size")
    return _table(rows(), *heads, "parameters that would do")


def _alone() -> str:
    table = _results("ranks")
    under = table[(table.dataset == "MNIST") & (table.rule == "budget")]
    losses = {share: interval(under[under.share == share].regret) for share in (0.6, 0.5, 0.4, 0.3)}
    return ", ".join(
        f"{with_interval(lost, 3)} at {100 * share:.0f} %" for share, lost in losses.items()
    )


def _shrunk() -> str:
    table = _results("08_wide_network")
    choice = table.choice.map(lambda text: f"{int(text):,}" if text.isdigit() else text)
    table["what"] = table.form.where(table.form == "dense", table.form + ", " + choice)
    table = table.sort_values("weights", ascending=False, kind="stable")
    gained = _gains(table, "accuracy", "dense", "what")

    def rows() -> Iterator[tuple[str, ...]]:
        for what, part in table.groupby("what", sort=False):
            accuracy = f"{with_interval(interval(part.accuracy))} %"
            yield str(what), f"{part.weights.max():,}", accuracy, gained.get(str(what), "")

    heads = ("form, parameters at most", "weights", "test accuracy", "points gained over dense")
    return _table(rows(), *heads)


def _your_network() -> str:
    table = _results("10_your_network")
    dense = table[table.form == "dense"].iloc[0]

    def more(row: pd.Series) -> str:
        return f"{row.more_recall:.1f} [{row.more_recall_low:.1f}, {row.more_recall_high:.1f}]"

    def rows() -> Iterator[tuple[str, ...]]:
        for share in (0.8, 0.6, 0.4):
            here = table[table.share == share].set_index("form")
            best = here.loc[["FWSVD", "ASVD", "SVD-LLM"]].nlargest(1, "recall").iloc[0]
            ours = (more(here.loc[[form]].iloc[0]) for form in ("compress", "trained on"))
            yield (
                f"{100 * share:.0f} %",
                more(here.loc[["plain"]].iloc[0]),
                f"{more(best)}, {best.name}",
                *ours,
            )

    count = f"{dense.queries:,.0f} queries, {dense.recall:.1f} % by the dense network"
    heads = ("weights left in the encoder", "truncated SVD", "best of three other formulas")
    return f"Points of recall@1 more than dense ({count}):\n\n" + _table(
        rows(), *heads, "`compress`", "`compress`, trained on"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "finding": _finding,
    "curves": _curves,
    "reproduced": _reproduced,
    "later": _later,
    "ranks below ten": _ranks_below_ten,
    "rules": _rules,
    "one layer at a time": _alone,
    "shrunk": _shrunk,
    "your network": _your_network,
}
