import pytest
import torch
from torch import nn

import svdlib
from svdlib.layers.cost import WHOLE, latency


def test_counts_of_a_known_network():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 10))
    small = svdlib.factorize(model, {"0": 2, "2": 4})
    table = svdlib.cost(small, torch.rand(5, 3, 8, 8), repeats=2).set_index("layer")
    assert table.index.tolist() == ["0", "2", WHOLE]
    assert table["rank"].iloc[:2].tolist() == [2, 4]
    places = 5 * 64
    assert table.multiply_adds.tolist()[:2] == [places * (2 * 27 + 16 * 2), 5 * 4 * (1024 + 10)]
    assert table.dense_multiply_adds.tolist()[:2] == [places * 16 * 27, 5 * 10240]
    for column in ("parameters", "bytes", "multiply_adds"):
        assert table[column].iloc[:-1].sum() == table[column].iloc[-1]
    assert table.dense_parameters[WHOLE] == sum(p.numel() for p in model.parameters())
    assert (table.bytes == 4 * table.parameters).all()
    assert (table[["seconds", "dense_seconds"]] > 0).all(axis=None)


def test_stride_and_other_layers_count_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)).train()
    table = svdlib.cost(model, torch.rand(1, 3, 9, 9), repeats=1).set_index("layer")
    assert table.multiply_adds["0"] == 16 * 4 * 27
    assert table.parameters[WHOLE] == table.parameters["0"] + 8
    assert model.training and not model[0]._forward_hooks


def test_bad_input():
    with pytest.raises(ValueError, match="the inputs are empty"):
        svdlib.cost(nn.Linear(3, 2), torch.rand(0, 3))
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        svdlib.cost(nn.Linear(3, 2), torch.rand(1, 3), repeats=0)
    assert latency(nn.Linear(3, 2), torch.rand(1, 3), repeats=2) > 0
