import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from svdlib.study.pictures import plots as figures


@pytest.fixture(autouse=True)
def style():
    mpl.use("Agg")
    with mpl.rc_context(), pd.option_context("display.max_rows", 60, "display.max_columns", 20):
        figures.style()
        yield
    plt.close("all")


def history(methods=("stock", "rsvd"), networks=3, epochs=2) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [methods, range(networks), range(1, epochs + 1)], names=["method", "network", "epoch"]
    )
    table = index.to_frame(index=False)
    for column in ("test_error", "test_loss", "seconds"):
        table[column] = 1 + rng.random(len(table))
    return table.assign(seed=table.network)


def test_learning_curves_draw_every_method():
    figure = figures.learning_curves(history(), "a title")
    labels = [axis.get_ylabel() for axis in figure.axes]
    assert labels == ["test error (%)", "test loss (cross-entropy)"]
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == ["stock", "rSVD"]
    line = figure.axes[0].lines[0]
    table = history()
    expected = table[table.method == "stock"].groupby("epoch").test_error.mean()
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_what_is_added_to_stock_is_paired_by_seed():
    table = history()
    figure = figures.against_stock(table)
    (line, _) = figure.axes[1].lines
    wide = table.pivot(index=["epoch", "seed"], columns="method", values="test_error")
    expected = (wide.rsvd - wide.stock).groupby("epoch").mean()
    np.testing.assert_allclose(line.get_ydata(), expected)
    low, high = figure.axes[1].get_ylim()
    assert low <= expected.min() and high >= expected.max()


def error_axes(table):
    """Every axis of test errors by epoch, rank or size, drawn of errors near 100 %."""
    ranks = table.assign(rank=table.epoch, share=[np.nan, 0.5] * (len(table) // 2))
    rules = ["optimal", "optimal", "budget", "budget"] * (len(table) // 4)
    grades = ranks.assign(rule=rules, parameters=9, error=ranks.test_error, regret=0.1)
    sizes = pd.DataFrame({"form": "a", "parameters": [9, 99], "mean": 3.0, "low": -9.0, "high": 15})
    drawn = [
        figures.learning_curves(table),
        figures.against_stock(table),
        figures.error_by_rank(ranks, [97.0]),
        figures.front(grades, (9, 97.0)),
        figures.compression(sizes),
    ]
    return [figure.axes[0] for figure in drawn]


def test_no_table_is_cut():
    long = pd.DataFrame({f"column {i}": ["a sentence" * 20] * 100 for i in range(30)})
    for shown in (repr(long), long._repr_html_()):
        assert "..." not in shown and shown.count("a sentence" * 20) == 3000


def test_error_axes_end_at_a_hundred():
    table = history(epochs=2)
    table["test_error"] = 96 + table.test_error
    axes = error_axes(table)
    assert len(axes) == 5
    for axis in axes:
        assert axis.get_ylabel() == "test error (%)" and axis.get_ylim()[1] <= 100


@pytest.mark.parametrize("epochs", [1, 2, 3, 10])
def test_epochs_are_whole_numbers(epochs):
    for draw in (figures.learning_curves, figures.against_stock):
        figure = draw(history(epochs=epochs))
        figure.canvas.draw()
        for axis in figure.axes:
            low, high = axis.get_xlim()
            ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
            assert ticks and all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("accuracy", [[0.0, 1, 2, 3], [97.0, 98, 99, 100], [10.0, 20, 30, 90]])
def test_a_map_of_errors_takes_the_best_and_the_worst_networks(accuracy):
    joint = pd.DataFrame({"0": [0, 0, 1, 1], "2": [0, 1, 0, 1], "accuracy": accuracy})
    figures.joint_map(joint, ["0", "2"]).canvas.draw()


def test_a_confusion_matrix_keeps_classes_that_are_never_predicted():
    figure = figures.confusion(pd.crosstab(pd.Series([0, 1, 2]), pd.Series([0, 0, 2])))
    [axis] = figure.axes
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "2"]


def test_a_method_has_one_colour_everywhere():
    both = history(("stock", "truncsvd", "rsvd"))
    for figure in (figures.learning_curves(both), figures.against_stock(both)):
        for axis in figure.axes:
            for line in axis.lines:
                if line.get_label() in ("stock", "rSVD", "truncSVD"):
                    method = {v: k for k, v in figures.LABELS.items()}[line.get_label()]
                    assert line.get_color() == figures.COLORS[method]


def test_a_table_is_saved_without_a_figure(tmp_path):
    figures.save(None, "runs", history(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_unknown_methods_get_colours_of_their_own():
    figure = figures.learning_curves(history(("stock", "one", "two")))
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert len(colors) == 3


def test_saved_files_are_reproducible(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        figures.save(figures.learning_curves(history()), "curves", history(), tmp_path / run)
    for name in ("curves.png", "curves.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_is_saved_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures.save(figures.learning_curves(history()), "curves", history(), "")
    assert not list(tmp_path.iterdir())


def test_other_plots():
    counts = pd.DataFrame(np.eye(3) + 1)
    spread = pd.DataFrame({"what": ["x"], "mean": [1.0], "low": [0.0], "high": [2.0]})
    place = pd.DataFrame(
        {"method": ["stock", "rsvd"], "epoch": 1, "value": "loss", "mean": 1.0, "low": 0.5,
         "high": 2.0, "single": 3.0}
    )  # fmt: skip
    ranks = pd.DataFrame(
        {"method": ["rsvd"] * 4, "rank": [1, 1, 2, 2], "test_error": [90.0, 80, 20, 10]}
    )
    sigma = pd.DataFrame(
        {"layer": "one", "method": "stock", "index": [1, 2, 1, 2], "sigma": [2.0, 1, 3, 1]}
    )
    profile = pd.DataFrame(
        {"layer": "0", "rank": [1, 500], "increase": [1.0, 0], "rows": 500, "columns": 600}
    )
    rule = pd.DataFrame(
        {"rule": ["a"], "parameters": [9.0], "mean": [90.0], "low": [89.0], "high": [91.0]}
    )
    joint = pd.DataFrame(
        {"0": [0, 0, 1, 1], "2": [0, 1, 0, 1], "4": 1, "accuracy": [10.0, 20, 30, 90],
         "loss": [3.0, 2, 1, 4], "parameters": [1, 2, 3, 4]}
    )  # fmt: skip
    grades = pd.DataFrame(
        {"rule": ["printed"] * 2 + ["budget", "optimal"] * 2, "parameters": 9, "error": 8.0,
         "seed": [0, 1, 0, 0, 1, 1], "share": [np.nan] * 2 + [0.5] * 4, "regret": 0.1}
    )  # fmt: skip
    race = pd.DataFrame(
        {"paper": [9.0, 90], "nested": [1.0, 2], "bound": [0.5, 1]}, index=["a", "b"]
    )
    times = pd.DataFrame({"way": ["a", "a"], "networks": [1, 8], "seconds": [1.0, 0.1]})
    sketches = pd.DataFrame(
        {"matrix": "A", "power_iters": [0, 0, 1, 1], "oversample": [2, 5] * 2, "error": 2.0}
    ).assign(bound=9.0, sharp_bound=5.0, worst=1e6)
    exact = pd.DataFrame(
        {"shape": ["a", "a", "b"], "rank": [1, 5, 1], "full": 3.0, "truncated": 2.0}
    ).assign(randomized=[1.0, 4.0, 2.5], error=1.01)
    exact = pd.concat([exact.assign(spectrum=name) for name in ("decaying", "flat")])
    ways = pd.DataFrame(
        {"shape": "a", "rank": [1, 5] * 2, "way": ["products alone"] * 2 + ["svdlib"] * 2}
    ).assign(seconds=[1.0, 2.0, 3.0, 4.0])
    forms = rule.rename(columns={"rule": "form"}).assign(milliseconds=1.0)
    rows = pd.DataFrame({"batch": 1, "rank": [2, 4], "ratio": [0.1, 0.2]})
    published = pd.DataFrame({"accuracy": [90.0], "parameters": [10]})
    layers = ["embeddings", "layer.0.query", "layer.1.query"]
    kept = pd.DataFrame({"layer": layers * 2, "parameters": 5, "dense_parameters": [10, 10, 4] * 2})
    recall = pd.DataFrame({"form": ["dense", "plain", "ours"], "share": [1.0, 0.5, 0.5]})
    more = {"more_recall": -2.0, "more_recall_low": -3.0, "more_recall_high": 1.0}
    drawn = [
        figures.compression(forms),
        figures.compression(pd.concat([forms, forms.assign(form="dense")]), published),
        figures.payoff(rows, side=16),
        figures.share_kept(kept.assign(share=[0.5] * 3 + [0.8] * 3)),
        figures.retrieval(recall.assign(**more)),
        figures.sketch_errors(sketches),
        figures.exact_or_randomized(exact),
        figures.svd_race(ways),
        figures.confusion(counts),
        figures.effects(spread.assign(epoch=1)),
        figures.effects(pd.concat([spread.assign(epoch=1), spread.assign(epoch=2)])),
        figures.sketch_grid(spread.assign(method="rsvd", epoch=1, p=0, q=2)),
        figures.reproduction({"here": place, "there": place}),
        figures.error_by_rank(ranks, [9.0, 10.0]),
        figures.front(grades, (12, 9.0)),
        figures.joint_map(joint, ["0", "2", "4"]),
        figures.joint_cloud(joint, joint.assign(excess=[0, 0, 0, 1]), rule.assign(loss=2.0)),
        figures.loss_profiles(profile.assign(network=0)),
        figures.profile_times(race),
        figures.spectra(sigma),
        figures.speed(times, bound=0.01),
        figures.weight_pictures(np.ones((15, 784))),
        figures.weight_pictures(np.ones((3, 784))),
    ]
    assert all(isinstance(figure, Figure) for figure in drawn)
