import copy
import warnings

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import svdlib
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.opened import find_layers

# Tolerances: torch.testing's own, or ten times the worst seen on kernels with and without AVX.


def perceptron(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def unchanged(model):
    """A fixture's worth of proof that the caller's model was not touched."""
    before = copy.deepcopy(model.state_dict())
    return lambda: all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 11), seed=st.integers(0, 20), bias=st.booleans())
def test_output_is_the_projected_model_s(rank, seed, bias):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 30, bias=bias), nn.ReLU(), nn.Linear(30, 20)).double()
    ranks = {"0": rank, "2": rank}
    x = torch.randn(7, 40, dtype=torch.float64)
    small = svdlib.factorize(model, ranks)
    projected = svdlib.project_(copy.deepcopy(model), ranks)
    torch.testing.assert_close(small(x), projected(x))
    assert parameters(small) < parameters(model)


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_any_window(padding_mode, stride, generator):
    window = {"stride": stride, "padding": (2, 1), "dilation": (2, 1), "padding_mode": padding_mode}
    model = nn.Sequential(nn.Conv2d(6, 20, 3, **window), nn.ReLU(), nn.Conv2d(20, 9, 1)).double()
    x = torch.randn(2, 6, 13, 11, generator=generator, dtype=torch.float64)
    ranks = {"0": 5, "2": 3}
    small = svdlib.factorize(model, ranks)
    torch.testing.assert_close(small(x), svdlib.project_(copy.deepcopy(model), ranks)(x))
    torch.testing.assert_close(svdlib.merge(small)(x), small(x))


def test_factors_are_balanced_and_weight_reads_as_before():
    model = perceptron()
    layer = svdlib.factorize(model, {"0": 4})[0]
    first, second = layer.factors
    torch.testing.assert_close(first.weight.norm(dim=1), second.weight.norm(dim=0))
    torch.testing.assert_close(
        layer.weight, svdlib.truncated_svd(model[0].weight.detach(), 4).matrix()
    )
    assert layer.rank == 4 and torch.equal(layer.bias, model[0].bias)


def test_ranks_from_a_number_a_fraction_or_a_profile():
    model = perceptron()
    with pytest.warns(UserWarning, match="left as they were: '2' .rank 14 stores 700 numbers"):
        small = svdlib.factorize(model, 14)
    assert {name: layer.rank for name, layer in low_rank_layers(small).items()} == {"0": 14}
    half = svdlib.factorize(model, 0.25)
    assert {name: layer.rank for name, layer in low_rank_layers(half).items()} == {"0": 8, "2": 5}
    x, y = torch.rand(50, 40), torch.randint(20, (50,))
    profile = svdlib.loss_profile(model, x, y, progress=False)
    ranks = svdlib.reveal_ranks(profile, "budget", parameters=900)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        revealed = svdlib.factorize(model, ranks)
    assert parameters(revealed) <= 900 + 50


def test_calibration_minimises_the_error_of_the_output(generator):
    """Against the plain factors, and against random rank-r changes of its own."""
    layer = nn.Linear(30, 20).double()
    mixing = matrix((30, 30), 3) * torch.logspace(0, -2, 30, dtype=torch.float64)
    x = matrix((400, 30), 4) @ mixing + 1
    small = svdlib.factorize(layer, 5, calibration=x)
    plain = svdlib.factorize(layer, 5)

    def error(model):
        return (model(x) - layer(x)).square().sum().item()

    assert error(small) < 0.8 * error(plain)
    # The optimum: the discarded part of the centred outputs' spectrum (Eckart and Young).
    outputs = layer(x).detach()
    sigma = torch.linalg.svdvals(outputs - outputs.mean(0))
    assert error(small) == pytest.approx(sigma[5:].square().sum().item(), rel=1e-8)


def test_calibration_sees_a_layers_input_as_it_was_when_the_layer_was_called():
    class Overwrites(nn.Sequential):
        def forward(self, x):
            hidden = self[0](x)
            out = self[1](hidden)
            hidden.zero_()
            return out

    model = Overwrites(*list(perceptron())[::2])
    x = torch.randn(1500, 40)  # more rows than are summed at once
    expected = svdlib.factorize(nn.Sequential(*model), {"1": 2}, calibration=x)
    small = svdlib.factorize(model, {"1": 2}, calibration=x)
    assert torch.equal(small[1].weight, expected[1].weight)


def test_calibration_without_bias_with_rank_deficient_inputs_and_for_convolutions(generator):
    torch.manual_seed(0)
    layer = nn.Linear(30, 20, bias=False)
    x = matrix((100, 3)).float() @ matrix((3, 30), 1).float()  # of rank 3
    small = svdlib.factorize(layer, 3, calibration=x)
    torch.testing.assert_close(small(x), layer(x), atol=1e-4, rtol=1e-4)
    conv = nn.Sequential(nn.Conv2d(6, 20, 3, stride=2, padding=1), nn.ReLU())
    images = torch.randn(40, 6, 9, 9, generator=generator).cumsum(-1)
    plain, aware = (svdlib.factorize(conv, 6, calibration=c) for c in (None, images))
    errors = [(model[0](images) - conv[0](images)).norm() for model in (plain, aware)]
    assert errors[1] < errors[0]


def test_type_mode_and_requires_grad_are_kept_and_factors_can_be_trained():
    model = perceptron().bfloat16().eval()
    model[0].weight.requires_grad_(False)
    small = svdlib.factorize(model, {"0": 4, "2": 3})
    assert all(p.dtype == torch.bfloat16 for p in small.parameters())
    assert not any(module.training for module in small.modules())
    assert [p.requires_grad for p in small[0].parameters()] == [False, False, True]
    small = svdlib.factorize(perceptron(), {"0": 4, "2": 3})
    x, y = torch.rand(64, 40), torch.arange(64) % 20
    optimizer = torch.optim.AdamW(small.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(small(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    merged = svdlib.merge(small)
    torch.testing.assert_close(merged(x), small(x))
    assert not low_rank_layers(merged) and list(find_layers(merged)) == ["0", "2"]


def test_a_layer_used_twice_is_replaced_twice_and_a_bare_layer_too():
    shared = nn.Linear(30, 30)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    small = svdlib.factorize(model, {"0": 5})
    assert small[0] is small[2]
    bare = svdlib.factorize(nn.Linear(30, 20), 3)
    assert isinstance(bare, svdlib.LowRank)
    assert isinstance(svdlib.merge(bare), nn.Linear)


def shared_convolutions():
    model = nn.Sequential(nn.Conv2d(30, 30, 3), nn.Conv2d(30, 30, 3))
    model[1].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(30, 30))
    model[0].register_forward_hook(lambda *_: None)
    return model


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(30, 30)))


class OwnAttention(nn.MultiheadAttention):
    """Who knows what a subclass does with its weights."""


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (hooked(), "0", "its hooks would be lost"),
        (parametrized(), "0", "its weight is computed from other parameters"),
        (shared_convolutions(), "0", "its weight is shared with '1'"),
        (nn.Sequential(nn.Embedding(30, 20, max_norm=1.0)), "0", "max_norm"),
        (OwnAttention(32, 2), "out_proj", "NonDynamicallyQuantizableLinear may do"),
    ],
)
def test_what_can_not_be_factorized_is_refused_by_name(model, name, message):
    with pytest.raises(ValueError, match=f"can't factorize layer '{name}': .*{message}"):
        svdlib.factorize(model, {name: 2})
    with pytest.warns(UserWarning, match=message):
        assert not low_rank_layers(svdlib.factorize(model, 2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.attention = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 20)

    def forward(self, x):
        return self.head(self.attention(self.lstm(x)[0])[:, -1])


def test_a_recurrent_network_with_attention():
    torch.manual_seed(0)
    model = Recurrent().eval()
    same = unchanged(model)
    x = torch.randn(3, 7, 16)
    small = svdlib.factorize(model, 6)
    ranks = {name: layer.rank for name, layer in low_rank_layers(small).items()}
    parts = ["q_proj", "k_proj", "v_proj", "out_proj"]
    attention = [f"attention.self_attn.{part}" for part in parts]
    assert list(ranks) == [*attention, "attention.linear1", "attention.linear2", "head"]
    expected = svdlib.project_(copy.deepcopy(model), ranks)
    for training in (False, True):  # torch reads the weights itself in evaluation mode
        torch.manual_seed(1)
        found = small.train(training)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(found, expected.train(training)(x))
    assert same()
    with pytest.raises(ValueError, match=r"unknown layer 'lstm'; known: attention"):
        svdlib.factorize(model, {"lstm": 3})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16"])
def test_networks_of_real_size(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = svdlib.factorize(model, 16)
    ranks = {layer: part.rank for layer, part in low_rank_layers(small).items()}
    assert len(ranks) >= 20
    assert parameters(small) < 0.45 * parameters(model)
    said = " ".join(str(warning.message) for warning in caught)
    left = set(find_layers(model)) - set(ranks)
    assert left and all(f"'{layer}'" in said for layer in left)
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = svdlib.project_(copy.deepcopy(model), ranks)(x)
        torch.testing.assert_close(small(x), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("ranks", "more", "message"),
    [
        (0, {}, "rank must be at least 1"),
        (1.5, {}, "fraction of the ranks must be between 0 and 1"),
        (0.0, {}, "fraction of the ranks must be between 0 and 1"),
        ({"0": 2.5}, {}, "the rank of layer '0' must be a whole number"),
        ({"9": 2}, {}, "unknown layer '9'; known: 0, 2"),
        (2, {"calibration": torch.rand(0, 40)}, "the data are empty"),
        (2, {"calibration": svdlib.Calibration()}, "calibration has no data"),
        (2, {"calibration": torch.full((3, 40), torch.nan)}, "calibration has NaN"),
    ],
)
def test_bad_input(ranks, more, message):
    model = perceptron()
    same = unchanged(model)
    with pytest.raises(ValueError, match=message):
        svdlib.factorize(model, ranks, **more)
    assert same()


def test_models_without_matrices_or_with_nan():
    with pytest.raises(ValueError, match=r"no nn\.Linear, convolution or nn\.Embedding to"):
        svdlib.factorize(nn.LSTM(4, 4), 2)
    model = perceptron()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight of layer '2' has NaN"):
        svdlib.factorize(model, 2)
    idle = Recurrent()
    idle.spare = nn.Linear(20, 20)
    with pytest.raises(ValueError, match="calibration does not reach layer 'spare'"):
        svdlib.factorize(idle, {"spare": 2}, calibration=torch.rand(5, 3, 16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu():
    model, x = perceptron(), torch.rand(200, 40)
    for calibration in (None, x):
        expected = svdlib.factorize(model, 0.25, calibration=calibration)(x)
        inputs = None if calibration is None else x.cuda()
        small = svdlib.factorize(copy.deepcopy(model).cuda(), 0.25, calibration=inputs)
        torch.testing.assert_close(small(x.cuda()).cpu(), expected, atol=1e-4, rtol=1e-4)


class Product(nn.Module):
    """Two inputs, by position or keyword."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(9, 8), nn.Linear(9, 8)

    def forward(self, a, b):
        return self.left(a) * self.right(b)


def test_calibration_takes_batches_of_every_kind(generator):
    model, x, y = perceptron(), torch.rand(100, 40, generator=generator), torch.zeros(100).long()
    expected = svdlib.factorize(model, {"0": 2}, calibration=x)[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=30, shuffle=True)
    state = torch.get_rng_state()
    for data, call in (
        ((x, y), None),
        (loader, None),
        (iter(x.split(30)), None),
        (({"name": part} for part in x.split(30)), lambda model, batch: model(batch.pop("name"))),
    ):
        small = svdlib.factorize(model, {"0": 2}, calibration=svdlib.Calibration(data, call))
        torch.testing.assert_close(small[0].weight, expected.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small[0].bias, expected.bias, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    two, a, b = Product(), torch.rand(50, 9), torch.rand(50, 9)
    ranks = {"left": 2, "right": 3}
    small = svdlib.factorize(two, ranks, calibration=(a, b))
    named = svdlib.factorize(two, ranks, calibration={"b": b, "a": a, "labels": a})
    torch.testing.assert_close(small(a, b), named(a, b))
    error = (small(a, b) - two(a, b)).square().mean()
    assert error < (svdlib.factorize(two, ranks)(a, b) - two(a, b)).square().mean()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data are empty"),
        ([torch.rand(4, 8)], r"the model does not take float32 \(4, 8\)"),
        ([{1}], "a batch must be a tensor, tuple or mapping, not set"),
        ((torch.rand(4, 9), torch.full((4, 9), torch.nan)), "calibration gives to layer 'right'"),
        (3, "data must be a tensor"),
    ],
)
def test_calibration_that_does_not_fit(data, message):
    with pytest.raises(ValueError, match=message):
        svdlib.factorize(Product(), {"right": 2}, calibration=data)


def test_a_factorized_model_is_profiled_by_its_whole_layers():
    model, x, y = perceptron(), torch.rand(50, 40), torch.arange(50) % 20
    small = svdlib.factorize(model, {"0": 9, "2": 8})
    profile = svdlib.loss_profile(small, x, y, progress=False)
    assert profile.groupby("layer")["rank"].max().to_dict() == {"0": 30, "2": 20}
    assert profile[profile["rank"] >= 9].increase.abs().max() < 1e-5
    ranks = svdlib.reveal_ranks(profile, "budget", parameters=600)
    smaller = svdlib.factorize(small, ranks)
    verified = svdlib.verify_ranks(small, ranks, x, y)
    loss = nn.functional.cross_entropy(smaller(x), y).item()
    assert verified["loss"] == pytest.approx(loss, rel=1e-5)
    assert (
        verified["parameters"]
        == parameters(smaller)
        == 50 + sum(ranks[name] * size for name, size in (("0", 70), ("2", 50)))
    )
    lower = {"0": 3}
    count = svdlib.verify_ranks(small, lower, x, y)["parameters"]
    assert count == parameters(svdlib.factorize(small, lower))
    assert svdlib.verify_ranks(small, {"0": 12}, x, y)["parameters"] == parameters(small)
    assert svdlib.search_ranks(small, x, y, lambda rows: rows.increase < 1).keys() == {"0", "2"}
    assert svdlib.predicted_profile(small, x, y).layer.unique().tolist() == ["0", "2"]


def test_data_parallel():
    """Without a GPU it passes on to the model itself."""
    small = svdlib.factorize(perceptron(), 5)
    if torch.cuda.is_available():
        small.cuda()
    x = torch.rand(8, 40, device=next(small.parameters()).device)
    parallel = nn.DataParallel(small)
    torch.testing.assert_close(parallel(x), small(x))
    parallel(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    lower = svdlib.factorize(parallel, {"module.0": 2})
    assert lower.module[0].rank == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel_replicas():
    small = svdlib.factorize(perceptron(), 5).cuda()
    attention = svdlib.factorize(nn.MultiheadAttention(40, 4, batch_first=True), 5).cuda()
    x = torch.rand(8, 40, device="cuda")
    torch.testing.assert_close(nn.DataParallel(small)(x), small(x))
    x = x.view(8, 1, 40)
    torch.testing.assert_close(nn.DataParallel(attention)(x, x, x), attention(x, x, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_factors_can_be_quantized_and_keep_their_rank():
    torch.manual_seed(0)
    small = svdlib.factorize(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20)), 6)
    x = torch.randn(16, 40)
    int8 = torch.ao.quantization.quantize_dynamic(small, {nn.Linear}, dtype=torch.qint8)
    assert int8[0].rank == int8[2].rank == 6
    # Weights and inputs of 8 bits: ten times the error seen.
    assert (int8(x) - small(x)).norm() < 0.1 * small(x).norm()
    with pytest.raises(ValueError, match="quantize"):
        svdlib.merge(int8)


def test_a_product_can_be_read_and_not_written_to():
    layer = svdlib.factorize(nn.Sequential(nn.Linear(30, 20)), 4)[0]
    before = layer.weight.clone()

    def set_item(weight):
        weight[0] = 1

    def add_to(weight):
        weight += 1

    def set_data(weight):
        weight.data = torch.zeros(2)

    for write in (
        *(lambda w: w.mul_(2), lambda w: w.data.clamp_(0, 1), lambda w: w[0].zero_()),
        *(lambda w: w.detach().fill_(2), lambda w: w.T.copy_(w.T), nn.init.zeros_, set_item),
        *(add_to, set_data, lambda w: torch.add(w, w, out=w)),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"layer\[0\].weight and layer"):
            write(layer.weight)
    assert torch.equal(layer.weight, before) and type(before) is torch.Tensor
    for read in (lambda w: w + 1, lambda w: w @ w.T, lambda w: w.double(), copy.deepcopy):
        with torch.no_grad():
            assert type(read(layer.weight)) is torch.Tensor
    layer.weight.square().sum().backward()
    assert all(factor.weight.grad is not None for factor in layer)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)

    x, model = torch.randn(4, 30), Reads()
    for other in (torch.export.export(model, (x,)).module(), torch.func.vmap(model)):
        torch.testing.assert_close(other(x), layer(x))
