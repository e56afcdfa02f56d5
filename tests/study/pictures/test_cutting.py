import matplotlib.pyplot as plt
import pandas as pd
import pytest

from svdlib.study.pictures import cutting


@pytest.fixture(autouse=True)
def plain_style():
    with plt.style.context("default"):
        yield
    plt.close("all")


@pytest.fixture
def cells():
    rows = [
        (way, rank, epoch, {"cut once": 0.0}.get(way, rank * epoch - 20.0))
        for way in cutting.COLORS
        for rank in (4, 8)
        for epoch in (1, 5)
    ]
    table = pd.DataFrame(rows, columns=["way", "rank", "epoch", "ahead"])
    ends = {
        f"{name}_{end}": table.ahead + shift
        for name in ("ahead", "added")
        for end, shift in (("low", -13), ("high", 13))
    }
    return table.assign(added=table.ahead, **ends)


def test_the_map_says_where_which_way_is_better(cells):
    axis = cutting.when_map(cells, "title").axes[0]
    texts = {text.get_text() for text in axis.texts}
    assert texts == {"-16", "≈", "+20"}  # -16 ± 13, -12 ± 13, 0 ± 13, 20 ± 13
    assert len(axis.lines) == 4  # around the only cell where projecting is better
    assert [label.get_text() for label in axis.get_yticklabels()] == ["8", "4"]
    assert axis.get_title() == "title"


def test_a_panel_per_rank_and_a_line_per_way(cells):
    figure = cutting.added(cells, [8, 4], "title")
    assert [axis.get_title() for axis in figure.axes] == ["rank 8", "rank 4"]
    for axis in figure.axes:
        lines = {line.get_label() for line in axis.lines}
        assert set(cutting.COLORS) <= lines


def test_why_compares_the_stock_networks_with_the_projected():
    rows = [
        {"rank": 4, "epoch": epoch, "seed": seed, "tail": 0.1 * epoch, "gap": 0.5, "overlap": 0.9,
         "tail projected": 0.01, "overlap projected": 1.0}
        for epoch in (1, 2) for seed in (0, 1)
    ]  # fmt: skip
    left, _, right = cutting.why(pd.DataFrame(rows), 4, "title").axes
    assert left.lines[0].get_ydata() == pytest.approx([10, 20])  # percent
    assert right.lines[1].get_ydata() == pytest.approx([100, 100])
