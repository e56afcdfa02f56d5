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
    frames = pictures.Moving(moving, [point])
    first = frames.draw()
    point.set_data([0.7], [0.5])
    moved = frames.draw()
    whole = FigureCanvasAgg(figure(0.7)[0])
    whole.draw()
    np.testing.assert_array_equal(np.asarray(moved), np.asarray(whole.buffer_rgba())[..., :3])
    point.set_data([0.2], [0.5])
    assert frames.draw() == first != moved


def test_ranks_weights_and_digits_follow_the_ranks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.rand(50, 16)
    cuts = Cuts.of(net, x, net(x).argmax(1))
    draw, rows = pictures.ranks_picture(cuts), pictures.weights_picture(cuts)
    assert len({draw(ranks) for ranks in ((6, 4), (3, 4), (3, 2))}) == 3
    assert draw((3, 4)) == draw((3, 4))
    assert (pixels(rows(0))[:8, :8] == pixels(rows(0))[0, 0]).all()  # rank 0: one shade
    assert rows(6) != rows(2)
    html = pictures.digits_html(cuts)(*cuts.misread((0, 0), 5))
    assert html.count("<img") == 5 and "now read as" in html


def test_a_sketch_and_learning_curves_are_drawn():
    draw = pictures.sketch_picture(60)
    assert draw(sketch(60, 40, 1.0, 5, 5, 0)) != draw(sketch(60, 40, 1.0, 5, 1, 0))
    run = pd.DataFrame({"run": "stock", "method": "stock", "epoch": [1, 2], "test_error": [9.0, 8],
                        "test_loss": [0.3, 0.2]})  # fmt: skip
    none, one = pictures.curves_picture([], 2), pictures.curves_picture([run], 2)
    assert pixels(none).shape == pixels(one).shape and none != one
