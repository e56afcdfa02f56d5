"""What calibration makes of a layer, against least squares and decompositions done another way."""

import copy
import warnings

import layer_kinds
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix
from sklearn.covariance import oas
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import svdlib
from svdlib.layers.calibrate import (
    Calibration,
    Gradients,
    Sums,
    call_order,
    fit,
    input_sums,
    shrunk,
)
from svdlib.network import kinds
from svdlib.network.kinds import layer_of
from svdlib.network.opened import Network

# A share of the outputs' variance, of sums over some hundred float64 numbers.
EXACT = 1e-9


def sums_of(layer, *batches):
    """What one layer alone is called with."""
    return input_sums(Network(layer), [""], Calibration(list(batches)))[""]


def linear(m, n, bias=True, seed=0):
    layer = nn.Linear(n, m, bias=bias).double()
    layer.weight.data = matrix((m, n), seed)
    return layer


def outputs(layer, vectors, centred):
    """What the matrix makes of the vectors (N, n), centred where a bias is fitted too."""
    W = layer.weight.detach().flatten(1)
    z = vectors @ W.mT
    return z - z.mean(0) if centred else z


@settings(max_examples=30, deadline=None)
@given(
    m=st.integers(2, 9),
    n=st.integers(2, 9),
    inner=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_error_at_each_rank_is_that_of_the_truncated_output(m, n, inner, bias, seed):
    """Eckart and Young: of the outputs Z (N × m), Σ σ_j², j > r; inputs of rank ``inner``."""
    layer = linear(m, n, bias, seed)
    x = matrix((50, inner), seed + 1) @ matrix((inner, n), seed + 2) + 1
    found = fit(layer_of(layer), sums_of(layer, x))
    z = outputs(layer, x, centred=bias)
    squares = torch.linalg.svdvals(z).square()
    total = squares.sum()
    for rank in range(1, 1 + min(m, n)):
        left, right, shift = found.at(rank)
        torch.testing.assert_close(left.mT @ left, torch.eye(rank).double(), atol=1e-9, rtol=0)
        error = (x @ (left @ right).mT - x @ layer.weight.detach().mT) + (
            0 if shift is None else shift
        )
        expected = squares[rank:].sum()
        assert abs(error.square().sum() - expected) < EXACT * total
        assert abs(50 * found.energies[rank:].sum() - expected) < EXACT * total
    assert (shift is not None) == bias
    torch.testing.assert_close(50 * found.energies.sum(), total, rtol=1e-9, atol=1e-9)


def test_at_an_offset_that_is_large_beside_the_spread():
    """The covariance is then known to some digits only, and need not have a root."""
    for m, n in ((30, 8), (8, 30)):
        layer = linear(m, n)
        x = matrix((500, 3), 1) @ matrix((3, n), 2) + 1e4
        found = fit(layer_of(layer), sums_of(layer, x))
        left, right, shift = found.at(3)
        error = x @ (left @ right - layer.weight.detach()).mT + shift
        assert error.square().mean().sqrt() < 1e-6 * outputs(layer, x, True).square().mean().sqrt()


@pytest.mark.parametrize("kind", layer_kinds.KINDS)
def test_every_kind_loses_what_its_energies_say(kind):
    layer = layer_kinds.layer(kind)
    x = layer_kinds.inputs(layer, 40)
    found = fit(layer_of(layer), sums_of(layer, x))
    if isinstance(layer, nn.Embedding):
        vectors = [nn.functional.one_hot(x.flatten(), layer.num_embeddings).double()]
    else:
        every = layer_of(layer).vectors(x)
        vectors = [every] if every.ndim == 2 else list(every.unbind(1))
    expected = 0.0
    for v, W in zip(vectors, layer_kinds.matrices(layer), strict=True):
        z = v @ W.mT
        z = z - z.mean(0) if layer_of(layer).is_centered() else z
        expected = expected + torch.linalg.svdvals(z).square() / len(v)
    energies = found.energies.reshape(-1, found.energies.shape[-1]).sum(0)
    torch.testing.assert_close(energies, expected[: len(energies)], rtol=1e-8, atol=1e-10)
    if "Transpose" in kind:
        return  # windows overlap: what the matrix puts out is not yet the output
    full = layer(x)
    rank = 2
    small = svdlib.factorize(layer, rank, calibration=x)
    loss = (small(x) - full).square().sum() / sum(map(len, vectors)) * len(vectors)
    torch.testing.assert_close(loss, energies[rank:].sum(), rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(2, 8), count=st.integers(2, 60), spread=st.floats(0, 3), seed=st.integers(0, 9)
)
def test_shrunk_is_scikit_learn_s_oas(n, count, spread, seed):
    x = matrix((count, n), seed) * torch.linspace(0, spread, n).exp()
    C = x.mT @ x / count
    expected, _ = oas(x.numpy(), assume_centered=True)
    torch.testing.assert_close(shrunk(C, count), torch.from_numpy(expected), rtol=1e-8, atol=1e-10)
    assert torch.linalg.eigvalsh(shrunk(C, count))[0] > 0
    stack = shrunk(torch.stack([C, 2 * C]), count)
    torch.testing.assert_close(stack[1], 2 * stack[0])
    diagonal = C.diagonal()
    whole = shrunk(diagonal.diag(), count).diagonal()
    torch.testing.assert_close(shrunk(diagonal, count), whole)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5)])
def test_no_factors_are_better_for_inputs_and_gradients(m, n, bias, pair):
    """Each that is tried leaves more of E (gᵀe)², which is what the energies say."""
    layer, x = linear(m, n, bias), matrix((4000, n), 1) + 0.5
    cut = x @ matrix((n, n), 2) + 0.3 * matrix((4000, n), 3) if pair else x
    g = matrix((3000, m), 4) @ matrix((m, m), 5)
    gradients = Gradients(g.mT @ g / 100, len(g))
    found = fit(layer_of(layer), paired(x, cut) if pair else sums_of(layer, x), gradients)
    W = layer.weight.detach()

    G = shrunk(gradients.square, len(g))

    def lost(left, right, shift):
        e = x @ W.mT - cut @ (left @ right).mT - (0 if shift is None else shift)
        if pair:  # what shrinking C changes is small here
            return ((e.mT @ e) * G).sum() / len(x)
        error, mean = W - left @ right, x.mean(0)
        z = x - mean if bias else x
        rest = error @ mean - shift if bias else torch.zeros(m).double()
        return (error.mT @ G @ error * shrunk(z.mT @ z / len(x), len(x))).sum() + rest @ G @ rest

    for rank in range(1, min(m, n)):
        left, right, shift = found.at(rank)
        best = lost(left, right, shift)
        if not pair:
            torch.testing.assert_close(best, found.energies[rank:].sum())
        best = best * (0.999 if pair else 1)
        for seed in range(20):
            left_too = left + 0.1 * left.norm() * matrix(left.shape, seed) / left.numel() ** 0.5
            assert lost(left_too, right, shift) > best
            right_too = (
                right + 0.1 * right.norm() * matrix(right.shape, seed) / right.numel() ** 0.5
            )
            assert lost(left, right_too, shift) > best
            change = matrix((m, n), seed)
            U, S, Vh = torch.linalg.svd(left @ right + 0.05 * W.norm() / change.norm() * change)
            mean = cut.mean(0)
            other = (U[:, :rank] * S[:rank], Vh[:rank])
            moved = None if shift is None else W @ x.mean(0) - other[0] @ (other[1] @ mean)
            assert lost(*other, moved) > best


def paired(x, cut):
    """`Sums` of inputs and what takes their place."""
    sums = Sums()
    sums.add(len(x), cut.sum(0), cut.mT @ cut, x.sum(0), x.mT @ cut)
    return sums


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n"), [(5, 8), (8, 5)])
def test_sequential_fit_is_reduced_rank_regression(m, n, bias):
    """Least squares by QR, and then the truncated SVD of what it fits (Izenman 1975)."""
    layer, x = linear(m, n, bias), matrix((200, n), 1) + 0.5
    cut = x @ matrix((n, n), 2) + 0.3 * matrix((200, n), 3)
    found = fit(layer_of(layer), paired(x, cut))
    W = layer.weight.detach()
    target = outputs(layer, x, bias)
    given_ = cut - cut.mean(0) if bias else cut
    slope = torch.linalg.lstsq(given_, target).solution
    fitted = given_ @ slope
    U, S, Vh = torch.linalg.svd(fitted, full_matrices=False)

    def error(left, right, shift):
        z = cut @ (left @ right).mT + (0 if shift is None else shift)
        return (x @ W.mT - z).square().sum()

    for rank in range(1, min(m, n)):
        least = (target - U[:, :rank] * S[:rank] @ Vh[:rank]).square().sum()
        left, right, shift = found.at(rank)
        best = error(left, right, shift)
        # the covariance is inverted with RIDGE more
        assert least * (1 - EXACT) <= best <= least * (1 + 1e-3)
        for seed in range(20):
            change = 0.05 * left.norm() * matrix(left.shape, seed)
            assert error(left + change, right, shift) > best
            change = 0.05 * right.norm() * matrix(right.shape, seed)
            assert error(left, right + change, shift) > best
            if shift is not None:
                assert error(left, right, shift + 0.05 * matrix(shift.shape, seed)) > best


def test_sequential_fit_of_constant_or_no_inputs_is_the_mean_output():
    layer = linear(5, 8)
    x = torch.ones(10, 8).double()
    left, right, shift = fit(layer_of(layer), paired(x, 2 * x)).at(2)
    torch.testing.assert_close(2 * x @ (left @ right).mT + shift, x @ layer.weight.detach().mT)
    empty = fit(layer_of(layer), paired(0 * x, 0 * x))
    assert empty.energies.tolist() == [0.0] * 5


def test_batches_of_any_cut_give_the_same_sums():
    layer, x = linear(4, 6), matrix((5000, 6), 1)
    expected = sums_of(layer, x)
    assert expected.count == 5000
    torch.testing.assert_close(expected.square, x.mT @ x)
    for size in (1000, 4096, 4999):
        parts = sums_of(layer, *x.split(size))
        torch.testing.assert_close(vars(parts), vars(expected))
    conv = nn.Conv2d(3, 4, 3).double()
    images = matrix((11, 3, 7, 7), 2)
    torch.testing.assert_close(vars(sums_of(conv, *images.split(3))), vars(sums_of(conv, images)))
    assert vars(sums_of(conv, images[0]))["count"] == 25  # one image without a batch


@pytest.mark.parametrize("kind", ["Conv2d", "Conv2d, groups", "ConvTranspose2d", "Conv3d"])
def test_convolutions_are_summed_in_blocks(kind, monkeypatch):
    layer = layer_kinds.layer(kind)
    x = layer_kinds.inputs(layer, 9)
    expected = sums_of(layer, x)
    sizes = []

    kind = type(layer_of(layer))
    real = kind.vectors

    def noting(self, x):
        sizes.append(len(x))
        return real(self, x)

    monkeypatch.setattr(kind, "vectors", noting)
    one = len(layer_of(layer).vectors(x[:1]))
    monkeypatch.setattr(kinds, "BLOCK", 2 * one)
    torch.testing.assert_close(vars(sums_of(layer, x)), vars(expected))
    assert max(sizes) == 2
    monkeypatch.setattr(kinds, "BLOCK", 1)  # an image at least
    torch.testing.assert_close(vars(sums_of(layer, x)), vars(expected))


class Attends(nn.Module):
    """q, k and v of one input, then a layer behind them; tokens padded by a mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 24)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))
        self.out, self.head = nn.Linear(24, 24), nn.Linear(24, 20)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.mT / 5
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        x = x + self.out(scores.softmax(-1) @ v)
        if attention_mask is not None:
            x = x * (attention_mask[..., None] != 0)
        return self.head(x.sum(1))


def texts(n=12, length=9):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(50, (n, length), generator=g)
    lengths = torch.randint(2, length, (n,), generator=g)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask, mask


def weights_of(small):
    return {
        name: layer.weight for name, layer in svdlib.network.low_rank.low_rank_layers(small).items()
    }


def test_one_input_of_several_layers_is_multiplied_once(monkeypatch):
    model, (ids, _) = Attends(), texts()
    layers = {name: getattr(model, name) for name in ("q", "k", "v", "out", "head")}
    seen = []
    real = kinds.Layer.sums

    def counting(self, *blocks):
        seen.append(self.module)
        return real(self, *blocks)

    monkeypatch.setattr(kinds.Layer, "sums", counting)
    sums = input_sums(Network(model), layers, Calibration([ids]))
    assert seen == [model.q, model.out, model.head]
    x = model.embed(ids).detach().flatten(0, 1).double()
    for name in "qkv":
        torch.testing.assert_close(sums[name].square, x.mT @ x)
        assert sums[name].count == ids.numel()
    assert call_order(Network(model), layers, Calibration([ids])) == (
        [["q", "k", "v"], ["out"], ["head"]],
        {*layers},
    )


def test_one_input_is_not_the_same_for_other_layers_or_once_it_is_changed():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.few, self.many = nn.Embedding(40, 8), nn.Embedding(60, 8)
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.narrow, self.wide = nn.Conv1d(8, 4, 1), nn.Conv1d(8, 4, 3)

        def forward(self, ids):
            x = self.few(ids) + self.many(ids)
            y = self.one(x)
            x += 1
            z = (y + self.two(x)).mT
            return self.narrow(z).sum() + self.wide(z).sum()

    model, ids = Several(), torch.arange(40).view(5, 8)
    layers = dict(model.named_children())
    sums = input_sums(Network(model), layers, Calibration([ids]))
    assert sums["few"].total.shape == (40,) and sums["many"].total.shape == (60,)
    torch.testing.assert_close(sums["two"].total, sums["one"].total + 40)
    assert sums["narrow"].total.shape == (8,) and sums["wide"].total.shape == (24,)
    assert call_order(Network(model), layers, Calibration([ids]))[0] == [[name] for name in layers]


class Twice(nn.Module):
    """One layer on two inputs, and another on the second of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared = nn.Linear(30, 30), nn.Linear(30, 30)
        self.other = nn.Linear(30, 20)

    def forward(self, x):
        x = torch.relu(self.first(x))
        y = torch.tanh(self.shared(x))
        self.shared(y)
        return self.other(y) + self.shared(y)[:, :20]


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_is_called_twice_and_one_that_shares_an_input_with_it(sequential):
    model, x = Twice(), torch.randn(100, 30)
    layers = dict(model.named_children())
    assert call_order(Network(model), layers, Calibration([x])) == (
        [["first"], ["shared"], ["other"]],
        {"first", "other"},
    )
    hidden = torch.relu(model.first(x))
    inner = torch.tanh(model.shared(hidden)).detach()
    sums = input_sums(Network(model), layers, Calibration([x]))
    assert sums["shared"].count == 300 and sums["other"].count == 100
    torch.testing.assert_close(sums["other"].total, inner.double().sum(0))
    # alone, it is fitted as on its own: by its own inputs, not those of the layer that shares one
    calibration = Calibration(x, sequential=sequential)
    small = svdlib.factorize(model, {"other": 4}, calibration=calibration)
    alone = svdlib.factorize(model.other, 4, calibration=inner)
    away = (small.other.weight - alone.weight).norm() / alone.weight.norm()
    assert away < (0.02 if sequential else 1e-5)  # RIDGE, or rounding


@pytest.mark.parametrize("sequential", [False, True])
def test_padding_counts_for_nothing(sequential):
    model, (ids, mask) = Attends().double(), texts()
    ranks = {"embed": 4, "q": 5, "v": 5, "out": 4, "head": 3}

    def cut(data, **how):
        calibration = Calibration(data, sequential=sequential, **how)
        return svdlib.factorize(model, ranks, calibration=calibration, progress=False)

    expected = cut(
        [{"input_ids": row[keep != 0][None]} for row, keep in zip(ids, mask, strict=True)]
    )
    batch = {"input_ids": ids, "attention_mask": mask}
    halves = [{name: t[at : at + 6] for name, t in batch.items()} for at in (0, 6)]
    labeled = [(each, each["input_ids"][:, 0]) for each in halves]
    for small in (
        cut(batch),
        cut(halves),
        cut(labeled, call=lambda model, batch: model(**batch[0])),
        cut((ids, mask), mask=lambda batch: batch[1], call=lambda model, batch: model(*batch)),
    ):
        torch.testing.assert_close(weights_of(small), weights_of(expected))
    padded = cut(batch, mask=lambda batch: torch.ones_like(mask))
    assert (padded.q.weight - expected.q.weight).abs().max() > 1e-3


def test_a_mask_is_of_places_not_of_features():
    """A layer behind pooling, with as many features as there are places, has no such places."""
    layer, x = linear(6, 9), matrix((9, 9), 1)
    model = nn.Sequential(linear(9, 9), layer)
    keep = torch.zeros(9, 9, dtype=torch.bool).fill_diagonal_(True)
    with pytest.raises(ValueError, match=r"mask gives places \(9, 9\), and no layer has such inp"):
        input_sums(Network(model), ["1"], Calibration([x], mask=lambda batch: keep))
    with pytest.raises(ValueError, match=r"mask gives places \(9, 9\)"):
        bad = Calibration(x, mask=lambda batch: keep, sequential=True)
        svdlib.factorize(model, {"0": 2}, calibration=bad, progress=False)
    some = Calibration([x], mask=lambda batch: torch.arange(9) < 4)
    kept = input_sums(Network(model), ["0"], some)["0"]
    assert kept.count == 4
    torch.testing.assert_close(kept.total, x[:4].sum(0))
    with pytest.raises(ValueError, match="mask must give a tensor of places"):
        bad = Calibration(x, mask=lambda batch: None)
        svdlib.factorize(model, {"0": 2}, calibration=bad)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare, self.empty = (nn.Linear(20, 20) for _ in range(3))

    def forward(self, x):
        self.empty(x[:0])
        return self.used(x)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_is_not_reached_is_left_with_a_warning(sequential):
    model, x = Idle(), torch.randn(50, 20)
    more = {"calibration": Calibration(x, sequential=sequential)}
    with pytest.warns(UserWarning, match="left as they were: 'spare' .*; 'empty' .*not reach it"):
        small = svdlib.factorize(model, 3, **more)
    assert weights_of(small).keys() == {"used"}
    assert torch.equal(small.spare.weight, model.spare.weight)
    with pytest.raises(ValueError, match="calibration does not reach layer 'spare', nor any other"):
        svdlib.factorize(model, {"spare": 2, "empty": 2}, **more)


def test_a_layer_that_only_later_batches_reach_is_in_the_order_too():
    class Switches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.negative, self.positive = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x):
            return self.positive(x) if x.mean() > 0 else self.negative(x)

    x = torch.rand(40, 20)
    model, data = Switches(), [-x, x]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = svdlib.factorize(model, 3, calibration=Calibration(data, sequential=True))
    assert weights_of(small).keys() == {"negative", "positive"}


def test_what_is_refused():
    model, x = Idle(), torch.randn(50, 20)
    batches = (part for part in x.split(10))
    with pytest.raises(ValueError, match=r"one layer after the other looks at the data several"):
        svdlib.factorize(model, {"used": 2}, calibration=Calibration(batches, sequential=True))
    assert next(batches) is not None  # not one was taken
    with pytest.raises(ValueError, match=r"calibration has no data"):
        svdlib.factorize(model, {"used": 2}, calibration=Calibration(sequential=True))
    with pytest.raises(ValueError, match="mask must be a function, got Tensor"):
        Calibration(x, mask=torch.ones(50))
    bad = x.clone()
    bad[3, 4] = torch.nan
    for sequential in (False, True):
        calibration = Calibration([(bad,)], sequential=sequential)
        with pytest.raises(ValueError, match="calibration gives to layer 'used' has NaN"):
            svdlib.factorize(model, {"used": 2}, calibration=calibration, progress=False)
    with pytest.raises(ValueError, match="calibration has NaN"):
        svdlib.factorize(model, {"used": 2}, calibration=bad)


def test_layers_whose_inputs_change_in_number_are_not_fitted_one_after_the_other():
    class Selects(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(20, 20), nn.Linear(20, 20)

        def forward(self, x):
            z = self.first(x)
            return self.second(z[z[:, 0] > 0])

    with pytest.raises(ValueError, match="'second' has other numbers of inputs once layers before"):
        data = Calibration(torch.randn(99, 20), sequential=True)
        svdlib.factorize(Selects(), 1, calibration=data)


def two_layers(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30)).double()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [2, 5])
def test_sequential_is_no_worse_in_what_the_network_puts_out(seed, rank):
    model = two_layers(seed)
    x = matrix((400, 30), seed + 10)
    errors = []
    for sequential in (True, False):
        calibration = Calibration(x, sequential=sequential)
        small = svdlib.factorize(model, rank, calibration=calibration, progress=False)
        errors.append((small(x) - model(x)).square().sum().item())
    assert errors[0] <= errors[1] * (1 + 1e-9)


@pytest.mark.parametrize("sequential", [False, True])
def test_nothing_of_the_caller_s_changes(sequential):
    model, x, y = two_layers(0), matrix((60, 30), 1), torch.zeros(60).long()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [part.training for part in model.modules()]
    given_ = x.clone()
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True)
    state = torch.get_rng_state()
    more = {"sequential": sequential}
    small = svdlib.factorize(model, 4, calibration=Calibration(loader, **more), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, given_)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_pre_hooks for part in [*model.modules(), *small.modules()])
    expected = svdlib.factorize(model, 4, calibration=Calibration(x, **more))
    torch.testing.assert_close(weights_of(small), weights_of(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sequential", [False, True])
def test_cuda_agrees_with_cpu(sequential):
    model, (ids, mask) = Attends().double(), texts()
    ranks, data = {"embed": 4, "q": 5, "out": 4}, {"input_ids": ids, "attention_mask": mask}
    more = {"calibration": Calibration(data, sequential=sequential), "progress": False}
    expected = svdlib.factorize(model, ranks, **more)
    small = svdlib.factorize(copy.deepcopy(model).cuda(), ranks, **more)
    torch.testing.assert_close(
        {name: weight.cpu() for name, weight in weights_of(small).items()},
        weights_of(expected),
        rtol=1e-6,
        atol=1e-8,
    )
