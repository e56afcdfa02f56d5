import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import svdlib
from svdlib.layers.cost import WHOLE_MODEL, latency


def test_counts_of_a_known_network():
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 10))
    small = svdlib.factorize(model, {"0": 2, "2": 4})
    table = svdlib.cost(small, torch.rand(5, 3, 8, 8), repeats=2).set_index("layer")
    assert table.index.tolist() == ["0", "2", WHOLE_MODEL]
    assert table["rank"].iloc[:2].tolist() == [2, 4]
    places = 5 * 64
    assert table.multiply_adds.tolist()[:2] == [places * (2 * 27 + 16 * 2), 5 * 4 * (1024 + 10)]
    assert table.dense_multiply_adds.tolist()[:2] == [places * 16 * 27, 5 * 10240]
    for column in ("parameters", "bytes", "multiply_adds"):
        assert table[column].iloc[:-1].sum() == table[column].iloc[-1]
    assert table.dense_parameters[WHOLE_MODEL] == sum(p.numel() for p in model.parameters())
    assert (table.bytes == 4 * table.parameters).all()
    assert (table[["seconds", "dense_seconds"]] > 0).all(axis=None)


def test_stride_and_other_layers_count_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)).train()
    table = svdlib.cost(model, torch.rand(1, 3, 9, 9), repeats=1).set_index("layer")
    assert table.multiply_adds["0"] == 16 * 4 * 27
    assert table.parameters[WHOLE_MODEL] == table.parameters["0"] + 8
    assert model.training and not model[0]._forward_hooks


@pytest.mark.parametrize("layer", [nn.Linear(40, 30), nn.Linear(40, 30, bias=False)])
def test_a_layer_by_itself(layer):
    """Its name is empty."""
    for model, work in ((layer, 5 * 40 * 30), (svdlib.factorize(layer, 3), 5 * 3 * 70)):
        table = svdlib.cost(model, torch.rand(5, 40), repeats=1)
        assert table.multiply_adds.tolist() == [work, work]
        assert table.dense_multiply_adds.tolist() == [5 * 40 * 30] * 2


def test_bad_input():
    with pytest.raises(ValueError, match="the inputs are empty"):
        svdlib.cost(nn.Linear(3, 2), torch.rand(0, 3))
    with pytest.raises(ValueError, match="repeats must be at least 0"):
        svdlib.cost(nn.Linear(3, 2), torch.rand(1, 3), repeats=-1)
    assert latency(nn.Linear(3, 2), torch.rand(1, 3), repeats=2) > 0


def test_weights_that_are_read_without_their_layer():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    x = torch.rand(2, 7, 32)
    table = svdlib.cost(layer, x, repeats=1).set_index("layer")
    assert table.multiply_adds["self_attn.out_proj"] == 14 * 32 * 32
    assert table.multiply_adds["linear1"] == 14 * 32 * 64
    small = svdlib.factorize(layer, {"linear1": 4, "linear2": 4})
    table = svdlib.cost(small, x, repeats=1).set_index("layer")
    assert table.multiply_adds["linear1"] == 14 * 4 * (32 + 64), "no fused operation of torch's"


class Reads(nn.Module):
    """Reads the weight of a layer instead of calling it, as Swin and BEiT do."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(40, 30), nn.Linear(30, 20)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight, self.read.bias))


def test_factors_that_are_multiplied_at_every_call():
    torch.manual_seed(0)
    model, x = Reads(), torch.rand(50, 40)
    small = svdlib.factorize(model, 3)
    table = svdlib.cost(small, x, repeats=1).set_index("layer")
    assert table.multiply_adds["read"] == 30 * 3 * 40 + 50 * 30 * 40
    assert table.multiply_adds["called"] == 50 * 3 * (30 + 20)
    assert table.dense_multiply_adds["read"] == 50 * 30 * 40
    with pytest.raises(ValueError, match="layer 'read': the model reads its weight"):
        svdlib.factorize(model, {"read": 3}, calibration=x)


class Peeks(Reads):
    """Looks at a weight's type, as T5 does, and calls the layer."""

    def forward(self, x):
        return self.called(self.read(x.to(self.read.weight.dtype)))


def test_a_layer_whose_weight_is_read_is_refused_where_inputs_show_it():
    model, x = Peeks(), torch.rand(50, 40)
    with pytest.raises(
        ValueError, match="can't factorize layer 'read': the model reads its weight"
    ):
        svdlib.factorize(model, {"read": 3}, calibration=x)
    with pytest.warns(UserWarning, match="left as they were: 'read' .the model reads its weight"):
        small = svdlib.factorize(model, 3, calibration=x)
    assert type(small.read) is nn.Linear and type(small.called) is svdlib.LowRank


def test_transposed_windows_and_inputs_that_are_written_to():
    class Shifts(nn.Sequential):
        def forward(self, x):
            return super().forward(x.sub_(1.0))

    model, x = Shifts(nn.Linear(6, 4)), torch.rand(3, 6)
    before = x.clone()
    svdlib.cost(model, x, repeats=2)
    svdlib.factorize(model, {"0": 2}, calibration=x)
    assert torch.equal(x, before)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(9, 8), nn.Linear(9, 8)

    def forward(self, a, b):
        return self.left(a) * self.right(b)


def test_several_inputs_keywords_and_batches():
    model, a, b = Product(), torch.rand(5, 9), torch.rand(5, 9)
    batches = DataLoader(TensorDataset(a, b, torch.arange(5)), batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    for data, call in (
        ((a, b), None),
        ({"a": a, "b": b, "labels": a}, None),
        (batches, None),
        (iter([(a, b)]), None),
        (a, lambda model, batch: model(batch, batch)),
    ):
        table = svdlib.cost(model, data, call=call, repeats=1)
        assert table.multiply_adds.tolist() == [5 * 72, 5 * 72, 10 * 72]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"the model does not take float32 .5, 9."):
        svdlib.cost(model, a)
    with pytest.raises(ValueError, match="the data are empty"):
        svdlib.cost(model, [])
    with pytest.raises(ValueError, match="the inputs are empty"):
        svdlib.cost(model, (a[:0], b[:0]))


def test_a_layer_named_as_the_row_of_totals_is_refused():
    model = nn.ModuleDict({"whole model": nn.Linear(4, 4)})
    call = lambda model, x: model["whole model"](x)
    with pytest.raises(ValueError, match="a layer is named 'whole model'"):
        svdlib.cost(model, torch.rand(2, 4), call=call)
