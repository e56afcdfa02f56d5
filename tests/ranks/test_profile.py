import copy

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import svdlib

# Tolerances: ten times the worst seen, on kernels with and without AVX. Losses are near one.


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "tanh":
        return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7, bias=False), nn.GELU(),
                             nn.Linear(7, 3))  # fmt: skip
    if kind == "in-place relu":
        return nn.Sequential(nn.Linear(12, 9), nn.ReLU(inplace=True), nn.Linear(9, 3))
    if kind == "convolutions":
        return nn.Sequential(
            nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 5, 2, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, 4, 3, stride=2), nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(3),
        )  # fmt: skip
    if kind == "groups":
        return nn.Sequential(
            nn.Unflatten(1, (2, 2, 3)), nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(8, 3)
        )
    if kind == "tied":
        shared = nn.Linear(12, 12)
        return nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(12, 3))
    if kind == "hooked":
        model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 3))
        model[0].register_forward_hook(lambda layer, inputs, output: output * 2)
        return model

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x.view(-1, 3, 4)).relu_()
            return self.out(self.attention(x, x, x)[0].mean(1))

    if kind == "tokens":
        return Tokens()

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(12, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.out(x + torch.relu(self.inner(x)))

    return Residual()


KINDS = ["tanh", "in-place relu", "convolutions", "groups", "tied", "residual", "hooked", "tokens"]


def paper(model, layer, rank, x, y):
    """The paper's procedure: an SVD, the weight replaced, a whole forward pass."""
    model = copy.deepcopy(model).eval()
    weight = model.get_submodule(layer).weight.data
    U, S, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    S[rank:] = 0
    weight.copy_((U * S @ Vh).view_as(weight))
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
    from svdlib.ranks import profile as ranks

    model, x, y = network("tanh").double(), torch.rand(7, 12).double(), torch.arange(7) % 3
    expected = svdlib.loss_profile(model, x, y, progress=False)
    kept, ranks.CACHED = ranks.CACHED, cached
    try:
        ours = svdlib.loss_profile(model, x, y, memory=memory, progress=False)
    finally:
        ranks.CACHED = kept
    pd.testing.assert_frame_equal(ours, expected)


def test_some_ranks_of_some_layers():
    model, x, y = network("tanh"), torch.rand(20, 12), torch.arange(20) % 3
    whole = svdlib.loss_profile(model, x, y, progress=False)
    part = svdlib.loss_profile(model, x, y, layers=["2"], ranks=[1, 4, 100], progress=False)
    assert part["rank"].tolist() == [1, 4, 7]
    expected = whole[(whole.layer == "2") & whole["rank"].isin([1, 4, 7])].reset_index(drop=True)
    pd.testing.assert_frame_equal(part, expected, rtol=1e-5, check_exact=False)
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


def test_verified_ranks_are_those_of_the_projected_model():
    model, x, y = network("convolutions"), torch.rand(30, 12), torch.arange(30) % 3
    model(x)
    model.eval()
    ranks = {"1": 2, "4": 3, "7": 1}
    verified = svdlib.verify_ranks(model, ranks, x, y)
    reduced = svdlib.project_(copy.deepcopy(model), ranks)
    with torch.no_grad():
        z, full = reduced(x), model(x)
    assert verified["loss"] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    increase = F.cross_entropy(z, y) - F.cross_entropy(full, y)
    assert verified["increase"] == pytest.approx(increase.item(), abs=1e-6)
    assert verified["accuracy"] == pytest.approx(100 * (z.argmax(1) == y).double().mean().item())
    errors = (z.argmax(1) != y).double().mean() - (full.argmax(1) != y).double().mean()
    assert verified["error_increase"] == pytest.approx(100 * errors.item(), abs=1e-5)
    dense = sum(p.numel() for p in model.parameters())
    shapes = [model[int(name)].weight.flatten(1).shape for name in ranks]
    saved = sum(
        m * n - min(r * (m + n), m * n) for r, (m, n) in zip(ranks.values(), shapes, strict=True)
    )
    assert verified["parameters"] == dense - saved


@pytest.fixture(scope="module")
def trained(mnist):
    nets = svdlib.MLPEnsemble((784, 40, 40, 10), seeds=(0,), device="cpu")
    svdlib.train(nets, mnist.head(12800, 100), epochs=3, lr=0.1, progress=False)
    return nets[0], mnist.train_x[-1000:], mnist.train_y[-1000:]


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("start", [1, 40])
def test_refined_ranks_meet_the_tolerance(trained, tolerance, start):
    ranks = svdlib.refine_ranks(*trained, {"0": start, "2": start}, tolerance=tolerance)
    model, x, y = trained
    verified = svdlib.verify_ranks(model, ranks, x, y)
    assert verified["increase"] <= tolerance + 1e-5
    for name, rank in ranks.items():  # no single rank can still be lowered
        if rank > 1:
            fewer = svdlib.verify_ranks(model, {**ranks, name: rank - 1}, x, y)
            assert fewer["increase"] > tolerance


def test_search_finds_the_ranks_of_the_whole_profile(trained):
    profile = svdlib.loss_profile(*trained, progress=False)
    found = svdlib.search_ranks(*trained, lambda rows: rows.increase <= rows.se)
    assert found == svdlib.reveal_ranks(profile, "one-se")


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model, x, y = network("tanh").train(), torch.rand(9, 12), torch.arange(9) % 3
    before = copy.deepcopy(model.state_dict())

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("svdlib.ranks.profile._Sweep._add_terms", interrupt)
    with pytest.raises(KeyboardInterrupt):
        svdlib.loss_profile(model, x, y, progress=False)
    assert model.training and not model[0]._forward_hooks
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_bad_input():
    model, x, y = network("tanh"), torch.rand(9, 12), torch.arange(9) % 3

    def refused(message, model=model, x=x, y=y, **keywords):
        with pytest.raises(ValueError, match=message):
            svdlib.loss_profile(model, x, y, progress=False, **keywords)

    refused("data are empty", x=x[:0], y=y[:0])
    refused("9 inputs need labels of shape", y=y[:5])
    refused("labels run to 3 but the model has 3 outputs", y=y + 1)
    refused("labels must be at least 0", y=y - 1)
    refused(r"no nn\.Linear or nn\.Conv2d", model=nn.Flatten())
    refused("unknown layer '9'; known: 0, 2, 4", layers=["9"])
    refused("a rank must be at least 0", ranks=[-1])
    refused("whole number", ranks=[1.5])
    refused("NaN or infinite losses", x=x * torch.inf)
    broken = copy.deepcopy(model)
    broken[4].weight.data[0, 0] = torch.nan
    refused("NaN", model=broken)
    with pytest.raises(ValueError, match="tolerance must be at least 0"):
        svdlib.refine_ranks(model, x, y, {"0": 2}, tolerance=-1)
    with pytest.raises(ValueError, match="unknown layer 'x'"):
        svdlib.verify_ranks(model, {"x": 2}, x, y)
    with pytest.raises(ValueError, match="rank 9 at most, not 10"):
        svdlib.verify_ranks(model, {"0": 10}, x, y)
