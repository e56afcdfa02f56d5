import copy
import math
import threading

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from modules import network
from torch import nn

import svdlib
from svdlib.network.opened import find_layers

# Tolerances: ten times the worst seen, on kernels with and without AVX. Losses are near one.


KINDS = ["tanh", "in-place relu", "convolutions", "groups", "tied", "residual", "hooked", "tokens"]


def paper(model, layer, rank, x, y):
    """The paper's procedure: an SVD, the weight replaced, a whole forward pass."""
    model = copy.deepcopy(model).eval()
    part = find_layers(model)[layer].module  # an attention's are views of its packed weight
    weight, groups = part.weight.data, getattr(part, "groups", 1)
    for W in weight.chunk(groups):  # each group of channels has a matrix of its own
        U, S, Vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
        S[rank:] = 0
        W.copy_((U * S @ Vh).view_as(W))
    with torch.no_grad():
        z = model(x)
    return F.cross_entropy(z, y, reduction="none"), 100 * (z.argmax(1) == y).double().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_profile_is_that_of_the_papers_procedure(kind, dtype, tolerance):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(40, 12, generator=g, dtype=dtype)
    y = torch.randint(3, (40,), generator=g)
    model = network(kind).to(dtype)
    model(x)
    model.train()
    before = copy.deepcopy(model.state_dict())
    profile = svdlib.loss_profile(model, x, y, progress=False)
    full, _ = paper(model, profile.layer[0], 999, x, y)
    assert profile.attrs["loss"] == pytest.approx(full.mean().item(), rel=tolerance)
    for row in profile.itertuples():
        losses, accuracy = paper(model, row.layer, row.rank, x, y)
        assert row.loss == pytest.approx(losses.mean().item(), rel=tolerance)
        assert row.accuracy == pytest.approx(accuracy.item())
        paired = (losses - full).double()
        assert row.increase == pytest.approx(paired.mean().item(), abs=tolerance)
        assert row.se == pytest.approx(paired.std().item() / 40**0.5, abs=10 * tolerance)
    assert model.training
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@settings(max_examples=20, deadline=None)
@given(memory=st.sampled_from([1, 1000, 10_000, 2**28]), cached=st.sampled_from([8, 100, 2**20]))
def test_chunks_do_not_change_the_profile(memory, cached):
    from svdlib.network import chain

    model, x, y = network("tanh").double(), torch.rand(7, 12).double(), torch.arange(7) % 3
    expected = svdlib.loss_profile(model, x, y, progress=False)
    kept, chain.CACHED = chain.CACHED, cached
    try:
        ours = svdlib.loss_profile(model, x, y, memory=memory, progress=False)
    finally:
        chain.CACHED = kept
    pd.testing.assert_frame_equal(ours, expected)


def test_some_ranks_of_some_layers():
    model, x, y = network("tanh"), torch.rand(20, 12), torch.arange(20) % 3
    full = svdlib.loss_profile(model, x, y, progress=False)
    part = svdlib.loss_profile(model, x, y, layers=["2"], ranks=[1, 4, 100], progress=False)
    assert part["rank"].tolist() == [1, 4, 7]
    expected = full[(full.layer == "2") & full["rank"].isin([1, 4, 7])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected, rtol=1e-5, atol=1e-6, check_exact=False)
    W = model[2].weight
    torch.testing.assert_close(part.sigma[1], torch.linalg.svdvals(W)[3].item())


def test_trained_network(mnist):
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=(0,), device="cpu")
    svdlib.train(nets, mnist.head(19200, 100), epochs=1, lr=0.1, progress=False)
    model, x, y = nets[0], mnist.train_x[-500:], mnist.train_y[-500:]
    profile = svdlib.loss_profile(model, x, y, progress=False)
    assert len(profile) == 16 + 16 + 11
    for row in profile.iloc[::5].itertuples():
        losses, _ = paper(model, row.layer, row.rank, x, y)
        assert row.loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_search_finds_the_ranks_of_the_whole_profile(trained):
    profile = svdlib.loss_profile(*trained, progress=False)
    found = svdlib.search_ranks(*trained, lambda rows: rows.increase <= rows.se)
    assert found == svdlib.reveal_ranks(profile, "one-se")


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model, x, y = network("tanh").train(), torch.rand(9, 12), torch.arange(9) % 3
    before = copy.deepcopy(model.state_dict())

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("svdlib.network.chain.ChainSweep._add_terms", interrupt)
    with pytest.raises(KeyboardInterrupt):
        svdlib.loss_profile(model, x, y, progress=False)
    assert model.training and not model[0]._forward_hooks
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_the_caller_s_model_can_be_called_meanwhile():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    x, expected, seen = torch.randn(6, 9), None, []

    def objective(measured, batch):
        assert measured is not model and model.training and not measured.training
        seen.append(model[2](model[0](x)).detach())
        return measured(batch).square().mean(1)

    for call in (
        lambda: svdlib.loss_profile(model, [x], objective=objective, progress=False),
        lambda: svdlib.verify_ranks(model, {"0": 2}, [x], objective=objective),
    ):
        expected = model[2](model[0](x)).detach()
        call()
        assert len(seen) > 1 and all(torch.equal(expected, each) for each in seen)


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.lock = nn.Linear(9, 3), threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.layer(x)


def test_a_model_that_can_not_be_copied_is_measured_itself():
    torch.manual_seed(0)
    model = Locked()
    x, y = torch.randn(20, 9), torch.arange(20) % 3
    before = model.layer.weight.clone()
    found = svdlib.loss_profile(model, x, y, progress=False)
    expected = svdlib.loss_profile(nn.Sequential(model.layer), x, y, progress=False)
    assert found.loss.to_numpy() == pytest.approx(expected.loss.to_numpy(), rel=1e-5)
    assert torch.equal(model.layer.weight, before)


def test_bad_input():
    model, x, y = network("tanh"), torch.rand(9, 12), torch.arange(9) % 3

    def refused(message, model=model, x=x, y=y, **keywords):
        with pytest.raises(ValueError, match=message):
            svdlib.loss_profile(model, x, y, progress=False, **keywords)

    refused("data are empty", x=x[:0], y=y[:0])
    refused("9 inputs need labels of shape", y=y[:5])
    refused("labels run to 3 but the model has 3 outputs", y=y + 1)
    refused("labels must be at least 0", y=y - 1)
    refused(r"no nn\.Linear, convolution or nn\.Embedding", model=nn.Flatten())
    refused("unknown layer '9'; known: 0, 2, 4", layers=["9"])
    refused("a rank must be at least 0", ranks=[-1])
    refused("whole number", ranks=[1.5])
    refused("NaN or infinite losses", x=x * torch.inf)
    broken = copy.deepcopy(model)
    broken[4].weight.data[0, 0] = torch.nan
    refused("NaN", model=broken)


class Skips(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def peculiar(kind):
    """Models that do more than their children in a row."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)]
    if kind == "skips":
        return Skips(*layers)
    if kind == "perceptron":
        return torchvision.ops.MLP(12, [9, 3])
    if kind == "batch norm":
        norm = nn.BatchNorm1d(12, track_running_stats=False)
        return nn.Sequential(nn.Linear(12, 12), norm, nn.Linear(12, 3))
    if kind == "bare batch norm":
        return nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))
    model = nn.Sequential(*layers)
    if kind == "hooks":
        model.register_forward_hook(lambda module, inputs, output: inputs[0] + output)
    if kind == "patched":
        model.forward = lambda x: x + model[2](model[1](model[0](x)))
    if kind == "reads":

        class Reads(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = layers[0]

            def forward(self, x):
                return F.linear(self.inner(x), self.inner.weight)

        return Reads()
    if kind == "writes":

        class Writes(nn.Sequential):
            def forward(self, x):
                return super().forward(x.sub_(1.0))

        return Writes(*layers)
    return model


@pytest.mark.parametrize(
    "kind",
    ["skips", "perceptron", "batch norm", "bare batch norm", "hooks", "patched", "reads", "writes"],
)
@pytest.mark.parametrize("memory", [1000, 2**28])
def test_models_that_do_more_than_their_structure_tells(kind, memory):
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(40, 12, generator=g), torch.randint(3, (40,), generator=g)
    model, before = peculiar(kind).eval(), x.clone()
    profile = svdlib.loss_profile(model, x, y, memory=memory, progress=False)
    alone = svdlib.loss_profile(model, x, y, ranks=[2], memory=memory, progress=False)
    assert torch.equal(x, before)
    for row in [*profile.itertuples(), *alone.itertuples()]:
        cut = peculiar(kind).eval()
        weight = cut.get_submodule(row.layer).weight.data
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(U[:, : row.rank] * S[: row.rank] @ Vh[: row.rank])
        loss = F.cross_entropy(cut(x.clone()), y).item()
        assert row.loss == pytest.approx(loss, rel=1e-5)
    ranks = {layer: 2 for layer in profile.layer.unique()}
    assert math.isfinite(svdlib.verify_ranks(model, ranks, x, y, memory=memory)["loss"])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The losses are those of the projected weights, rounded once."""
    x, y = torch.rand(40, 12).to(dtype), torch.arange(40) % 3
    model = network("tanh").to(dtype)
    profile = svdlib.loss_profile(model, x, y, progress=False)
    assert profile.loss.notna().all()
    for row in profile[profile["rank"] > 0].iloc[::4].itertuples():
        cut = svdlib.project_(copy.deepcopy(model), {row.layer: row.rank})
        loss = F.cross_entropy(cut(x).float(), y).item()
        assert row.loss == pytest.approx(loss, rel=1e-2 if row.increase == 0 else 2e-3)
    svdlib.search_ranks(model, x, y, lambda rows: rows.increase <= 0.1)
    svdlib.predicted_profile(model, x, y)
    ranks = svdlib.refine_ranks(model, x, y, {"0": 3, "2": 3}, tolerance=0.1)
    assert svdlib.verify_ranks(model, ranks, x, y)["increase"] <= 0.1 + 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"y": torch.rand(9)},
            r"labels must be class numbers of type torch\.int64, not torch\.float",
        ),
        ({"x": [[1.0]]}, "inputs must be a tensor with numbers, .n, ….*list"),
        ({"ranks": []}, "there are no ranks to evaluate"),
        ({"memory": -1}, "memory must be at least 1"),
        ({"model": nn.Flatten()}, r"no nn\.Linear"),
        (
            {"model": nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Linear(4, 3))},
            "must give class scores",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(change, message):
    given = {"model": network("tanh"), "x": torch.rand(9, 12), "y": torch.arange(9) % 3, **change}
    with pytest.raises(ValueError, match=message):
        svdlib.loss_profile(**given, progress=False)
    if "ranks" not in change:
        with pytest.raises(ValueError, match=message):
            svdlib.search_ranks(**given, accept=lambda rows: rows.increase <= 0)


def test_a_window_is_a_number_of_ranks():
    x, y = torch.rand(9, 12), torch.arange(9) % 3
    with pytest.raises(ValueError, match="window must be at least 1, not -5"):
        svdlib.search_ranks(network("tanh"), x, y, lambda rows: rows.increase <= 0, window=-5)
