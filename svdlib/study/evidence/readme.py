"""The README: the numbers by name, for the template ``docs/README.md.j2``, which has the prose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from scipy.stats import gaussian_kde

from svdlib import files
from svdlib.study import language
from svdlib.study.evidence import records
from svdlib.study.evidence.statistics import interval, locate, paired, prediction, with_interval

ROOT = Path(__file__).parents[3]


def render() -> str:
    options: dict[str, Any] = {"trim_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, **options)
    environment.filters["with_interval"] = with_interval
    environment.filters["mean"] = lambda values, *digits: with_interval(interval(values), *digits)
    numbers = (
        _when()
        | _headline()
        | _ranks_below_ten()
        | _rules()
        | _forms()
        | _lenet()
        | _recall()
        | _language()
    )
    template = (ROOT / "docs" / "README.md.j2").read_text("utf-8")
    return environment.from_string(template).render(numbers)


def write(path: Path = ROOT / "README.md") -> None:
    files.put(path, render())


def _results(name: str) -> pd.DataFrame:
    return pd.read_csv(records.RESULTS / f"{name}.csv")


def _differences(table: pd.DataFrame, value: str, against: str, column: str) -> dict[Any, Any]:
    return paired(table, value, against, column).set_index(column).to_dict("index")


def _when() -> dict[str, Any]:
    """What ways of cutting add to the error, and how much the best ranks keep."""
    rank, epochs = 10, (10, 30, 100)
    cells = _results("when_to_cut")
    names = {"added": "mean", "added_low": "low", "added_high": "high"}
    rows = cells[[*names]].rename(columns=names).to_dict("records")
    by = dict(zip(zip(cells.way, cells["rank"], cells.epoch, strict=True), rows, strict=True))
    when = {(way, epoch): row for (way, k, epoch), row in by.items() if k == rank}
    once = {(k, epoch): row for (way, k, epoch), row in by.items() if way == "cut once"}
    stock = cells[cells.way == "stock"].set_index("epoch").error
    kept = _results("compressible").query("lr == 0.01")
    kept = kept.sort_values(["dataset", "epoch"], ascending=[False, True])
    shares = {
        key: interval(part)
        for key, part in kept.groupby(["dataset", "lr", "epoch"], sort=False).share
    }
    over = int((kept.query("dataset == 'MNIST' and epoch == 10").increase > 0.01).sum())
    wider = _results("when_wide").query("epoch == 30").rename(columns=names)
    wide = {(row["way"], row["rank"]): row for row in wider.to_dict("records")}
    shrunk = _results("when_shrunk").query("epoch == 30 and rank == 10").rename(columns=names)
    penalty = shrunk[shrunk.way.str.contains("weight|nuclear")].nsmallest(1, "mean").iloc[0]
    if penalty.low <= when["every epoch", 30]["high"]:
        raise ValueError("the README says that penalties help less than projecting: no longer so")
    orders, seeds = _results("orders").groupby("order").added.mean(), int(cells.n.max())
    numbers = {"when": when, "when_once": once, "when_stock": stock, "when_seeds": seeds}
    return numbers | {
        "when_rank": rank,
        "when_orders": orders,
        "when_epochs": epochs,
        "compressible": shares,
        "exceeding": over,
        "wide": wide,
        "penalty": penalty,
    }


def _headline() -> dict[str, Any]:
    """What methods add to the test error, and where the paper's numbers lie among our runs."""
    table = _results("headline").rename(columns={"every (parameter)": "every"})
    table = table.assign(accuracy=100 - table.test_error, loss=table.test_loss)
    runs = table[table.every == "epoch"]
    epochs = runs.groupby("epoch")
    added = {epoch: _differences(part, "test_error", "stock", "method") for epoch, part in epochs}
    accuracy = {key: prediction(part) for key, part in runs.groupby(["epoch", "method"]).accuracy}
    paper, values, by = records.from_paper("keene"), ["accuracy", "loss"], ["method", "epoch"]
    text = locate(runs, paper, values, by)
    code = locate(table[table.every == "published"], paper, values, by)
    first = (text.method == "rsvd") & (text.epoch == 1)
    start_at = _results("no_oversampling").query("method == 'rSVD every epoch' and epoch == 1")
    start = text[first & (text.value == "accuracy")].iloc[0]
    numbers = {"added": added, "accuracy": accuracy, "first": start}
    numbers |= {"headline_seeds": runs.seed.nunique(), "in_code": code}
    densities = {
        (every, method): gaussian_kde(part.accuracy)
        for (every, method), part in table[table.epoch == 1].groupby(["every", "method"])
    }
    likely = {
        row.method: float(densities["published", row.method](row.single)[0])
        / float(densities["epoch", row.method](row.single)[0])
        for row in text[(text.epoch == 1) & (text.value == "accuracy")].itertuples()
        if row.method != "stock"
    }
    below = int((100 - start_at.test_error < start.single).sum())
    numbers["without_oversampling"] = {"below": below, "n": len(start_at)}
    return numbers | {"likely": likely}


def _ranks_below_ten() -> dict[str, Any]:
    table = _results("error_by_rank").query("dataset == 'MNIST' and method == 'truncsvd'")
    errors = table.pivot(index="seed", columns="rank", values="test_error")
    below = {rank: interval(errors[rank] - errors[10]) for rank in (9, 5)}
    last = max(range(2, 11), key=lambda rank: (errors[rank - 1] - errors[rank]).mean())
    return {"errors": errors, "below_ten": below, "break": last}


def _rules() -> dict[str, Any]:
    grades, joint = (_results(name).query("dataset == 'MNIST'") for name in ("ranks", "joint"))
    full = joint.iloc[-1]
    shares = 100 * grades[["parameters", "needed"]] / full.parameters
    grades = grades.assign(kept=shares.parameters, enough=shares.needed)
    rules = dict(list(grades[grades.share.isna()].groupby("rule")))
    best, knapsack = rules["optimal"], dict(list(grades[grades.rule == "budget"].groupby("share")))
    shared = grades[(grades.rule == "optimal") & grades.share.notna()]
    numbers = {"kept": interval(best.kept), "ranks_seeds": len(best)}
    numbers |= {"best_error": shared.groupby("share").error.mean()}
    return numbers | {"rules": rules, "knapsack": knapsack, "full_error": 100 - full.accuracy}


def _forms() -> dict[str, Any]:
    """The wide network's forms, the largest first, and their accuracy against the dense one's."""
    dense = _results("narrow_dense").query("form == 'narrow dense'")
    table = pd.concat([_results("08_wide_network"), dense.astype({"choice": str})])
    control = {
        int(str(budget)): _differences(part, "accuracy", "narrow dense", "form")[
            "trained on as factors"
        ]
        for budget, part in table[table.choice.isin(dense.choice.astype(str))].groupby("choice")
    }
    choice = table.choice.map(lambda text: f"{int(text):,}" if text.isdigit() else text)
    table["what"] = table.form.where(table.form == "dense", table.form + ", " + choice)
    table = table.sort_values("weights", ascending=False, kind="stable")
    gained = _differences(table, "accuracy", "dense", "what")
    return {"forms": list(table.groupby("what", sort=False)), "gained": gained, "control": control}


def _lenet() -> dict[str, Any]:
    """LeNet-5 in factors of adaptive ranks, against a narrow dense one, by data set."""
    table, found = _results("lenet"), {}
    for dataset, runs in table.groupby("dataset"):
        own = runs[runs.method == "adaptive factors"].accuracy
        more = _differences(runs, "accuracy", "narrow", "method")["adaptive factors"]
        found[dataset] = {"n": len(own), "own": with_interval(interval(own)), "more": more}
    return {"lenet": found}


def _language() -> dict[str, Any]:
    """SmolLM2's perplexity, times the dense one's, by share and form; rows of the table by form."""
    table = language.stored()
    if table is None:
        raise ValueError("results/language_model.csv is missing or has other columns")
    found = language.perplexities(table).rename(columns={"times": "mean"})
    cut = found[found.share < 1]
    shares = [(share, part.set_index("form")) for share, part in cut.groupby("share")]
    dense = table[table.form == "dense"]
    counts = {"draws": table.draw.nunique(), "passages": dense.document.nunique()}
    return {"language": shares[::-1], "language_counts": counts}


def _recall() -> dict[str, Any]:
    names = {"more_recall": "mean", "more_recall_low": "low", "more_recall_high": "high"}
    table = _results("10_your_network").rename(columns=names)
    shares = []
    for share in (0.8, 0.6, 0.4):
        forms = table[table.share == share].set_index("form", drop=False)
        rival = forms.loc[["FWSVD", "ASVD", "SVD-LLM"]].nlargest(1, "recall").iloc[0]
        shares.append((share, forms.to_dict("index") | {"rival": rival}))
    return {"recall": shares, "dense": table[table.form == "dense"].iloc[0]}
