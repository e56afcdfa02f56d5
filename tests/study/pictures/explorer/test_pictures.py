import io

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from svdlib.study.pictures.explorer import Cuts, pictures, sketch


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def figure(at):
    drawn = Figure(figsize=(2, 1.5))
    axis = drawn.add_subplot()
    (point,) = axis.plot([at], [0.5], "o")
    axis.set(xlim=(0, 1), ylim=(0, 1))
    return drawn, point


def test_a_frame_is_what_drawing_everything_anew_gives():
    moving, point = figure(0.2)
    frame = pictures.animated(moving, [point])
    first = frame()
    point.set_data([0.7], [0.5])
    moved = frame()
    expected = FigureCanvasAgg(figure(0.7)[0])
    expected.draw()
    np.testing.assert_array_equal(np.asarray(moved), np.asarray(expected.buffer_rgba())[..., :3])
    point.set_data([0.2], [0.5])
    assert frame() == first != moved


def test_ranks_weights_and_digits_follow_the_ranks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.rand(50, 16)
    cuts = Cuts(net, x, net(x).argmax(1))
    draw = pictures.ranks_picture(cuts)
    assert len({draw(ranks) for ranks in ((6, 4), (3, 4), (3, 2))}) == 3
    assert draw((3, 4)) == draw((3, 4))
    empty, thin, full = (pictures.weights_picture(cuts, rank) for rank in (0, 2, 6))
    assert (pixels(empty)[:8, :8] == pixels(empty)[0, 0]).all()  # rank 0: one shade
    assert full != thin
    at, before, after = cuts.misread((0, 0), 5)
    html = pictures.digits_html(cuts.x[at], cuts.y[at], before, after)
    assert html.count("<img") == 5 and "now read as" in html


def test_a_sketch_and_learning_curves_are_drawn():
    draw = pictures.sketch_picture(60)
    assert draw(sketch(60, 40, 1.0, 5, 5, 0)) != draw(sketch(60, 40, 1.0, 5, 1, 0))
    run = pd.DataFrame({"run": "stock", "method": "stock", "epoch": [1, 2], "test_error": [9.0, 8],
                        "test_loss": [0.3, 0.2]})  # fmt: skip
    empty, drawn = pictures.curves_picture([], 2), pictures.curves_picture([run], 2)
    assert pixels(empty).shape == pixels(drawn).shape and empty != drawn
