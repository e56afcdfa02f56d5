import time

import ipywidgets as widgets
import pytest
import torch
from torch import nn

import svdlib
from svdlib.study.pictures import explorer
from svdlib.study.pictures.explorer.panels import Field


def leaves(panel, kind):
    found = [panel] if isinstance(panel, kind) else []
    for child in getattr(panel, "children", ()):
        found += leaves(child, kind)
    return found


def words(panel):
    return " ".join(leaf.value for leaf in leaves(panel, widgets.HTML))


@pytest.fixture(scope="module")
def cuts():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.rand(50, 16)
    return explorer.Cuts(net, x, net(x).argmax(1))


def test_a_slider_changes_numbers_pictures_and_digits(cuts):
    panel, sliders = explorer.ranks_panel(cuts, (6, 4))
    digits = explorer.digits_panel(cuts, sliders, count=4)
    before = [image.value for image in leaves(panel, widgets.Image)], words(digits)
    sliders[0].value = 2
    after = [image.value for image in leaves(panel, widgets.Image)], words(digits)
    assert all(a != b for a, b in zip(before[0], after[0], strict=True)) and before[1] != after[1]
    row = cuts.at((2, 4))
    assert f"{row.loss:.4f}" in words(panel) and f"{int(row.parameters):,}" in words(panel)


def test_the_matrix_panel_says_when_nothing_is_random_any_more():
    panel = explorer.matrix_panel(max_side=60)
    by_name = {s.description: s for s in leaves(panel, (widgets.IntSlider, widgets.FloatSlider))}
    assert "exact" not in words(panel)
    by_name["p"].value = 100
    assert "nothing is random any more" in words(panel)
    by_name["p"].value, by_name["rank k"].value = 5, 100
    assert "has no rank above" in words(panel)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "rank must be from 1 to 15, not nothing"),
        ("0", "rank must be from 1 to 15, not 0"),
        ("16", "not 16"),
        ("ten", "not ten"),
        ("1.5", "not 1.5"),
        ("--3", "not --3"),
        ("²", "not ²"),
    ],
)
def test_bad_fields_say_so_beside_themselves(text, error):
    field = Field("rank", "10", 1, 15)
    field.text.value = text
    assert field.value is None and error in field.message.value
    field.text.value = " 7 "
    assert field.value == 7 and not field.message.value


def waited(what, seconds=60):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.05)
    return what()


def test_train_draws_and_tells_and_stop_stops(mnist):
    session = explorer.Session(svdlib.load("MNIST", device="cpu").head(640, 100), epochs=3)
    panel = explorer.runs_panel(session)
    train, stop = leaves(panel, widgets.Button)
    fields = {text.description: text for text in leaves(panel, widgets.Text)}
    fields["rank"].value = "none"
    train.click()
    assert not train.disabled and "correct the fields" in words(panel) and not session.runs
    fields["rank"].value, fields["seeds"].value = "5", "2"
    train.click()
    assert waited(lambda: session.runs and not train.disabled)
    assert "truncSVD, rank 5, every epoch" in words(panel)
    session.epochs = 500
    train.click()
    assert waited(lambda: "epoch 2 of" in words(panel))
    stop.click()
    assert waited(lambda: not train.disabled, 20) and "stopped after epoch" in words(panel)
    assert len(session.runs) == 2 and session.runs[1].epoch.max() < 500
