import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_kinds import KINDS, inputs, layer
from torch import nn
from torch.nn import functional as F

import svdlib
from svdlib.network.low_rank import low_rank_layers


def matrices(model):
    """The products (g, m, n) of a model's factorized layers, by name."""
    found = {}
    for name, part in low_rank_layers(model).items():
        A = svdlib.network.low_rank.Factorized(part)
        W = A.to_matrix(part.weight.detach())
        found[name] = W if W.ndim == 3 else W[None]
    return found


def thin(kind, share=0.45):
    return svdlib.factorize(nn.Sequential(layer(kind)), share)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_the_best_within_the_tail_for_every_kind_of_layer(kind):
    model = thin(kind)
    before, weights = matrices(model)["0"], list(model.parameters())
    ranks = svdlib.truncate_(model, 0.7)
    after = matrices(model)["0"]
    sigma = torch.linalg.svdvals(before)
    kept = ranks["0"]
    assert kept == model[0].rank < torch.count_nonzero(sigma[0] > 1e-9)
    lost = (before - after).square().sum((-2, -1))
    assert torch.allclose(lost, sigma[:, kept:].square().sum(-1))
    assert (lost.sqrt() <= 0.7 * sigma.norm(dim=-1) + 1e-12).all()
    more = sigma[:, kept - 1 :].norm(dim=-1) > 0.7 * sigma.norm(dim=-1)
    assert kept == 1 or more.any()  # a rank less would discard too much of some group
    assert all(map(lambda a, b: a is b, weights, model.parameters()))
    x = inputs(layer(kind))
    assert torch.isfinite(model(x)).all()
    V, U = (part.weight for part in model[0].factors)
    assert V.is_contiguous() and U.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_layer_computes_the_same_and_then_learns_more(kind):
    model = thin(kind, 0.2)
    x = inputs(layer(kind))
    target = torch.randn_like(model(x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plan = svdlib.LowRankTraining(tail=0.0, every=1, grow=2)
    adaptation = plan.attach(model, optimizer)
    rank = model[0].rank
    before = matrices(model)["0"]
    F.mse_loss(model(x), target).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad.zero_().add_(torch.randn_like(parameter) if parameter.ndim > 1 else 0)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert model[0].rank > rank
    torch.testing.assert_close(matrices(model)["0"], before)
    loss = F.mse_loss(model(x), target)
    loss.backward()
    inner = svdlib.network.low_rank.as_layer(model[0].factors[0])
    added = inner.to_matrix(model[0].factors[0].weight.grad)[..., rank:, :]
    assert torch.count_nonzero(added) > 0
    adaptation.remove()


def teacher(rank=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 24, generator=g)
    W = torch.randn(24, rank, generator=g) @ torch.randn(rank, 20, generator=g) / 5
    return x, x @ W


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda p: torch.optim.Adam(p, lr=0.02),
        lambda p: torch.optim.Adam(p, lr=0.02, foreach=True),
        lambda p: torch.optim.RMSprop(p, lr=0.003),
    ],
    ids=["SGD", "Adam", "Adam, foreach", "RMSprop"],
)
def test_training_finds_the_rank_of_what_it_learns(make):
    x, y = teacher()
    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Linear(24, 20, bias=False)), 10)
    optimizer = make(model.parameters())
    adaptation = svdlib.LowRankTraining(tail=0.02, every=50).attach(model, optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)  # the last one's graph is alive while a rank changes
        loss.backward()
        optimizer.step()
    assert model[0].rank == 3 and loss < 1e-3
    history = adaptation.history
    assert history.step.tolist() == list(range(0, 401, 50)) and history["rank"].iloc[0] == 10
    assert history["rank"].is_monotonic_decreasing and (history.stored == history["rank"]).all()


def test_ranks_rise_to_what_is_needed_and_no_further():
    x, y = teacher(rank=5)
    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Linear(24, 20, bias=False)), 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    plan = svdlib.LowRankTraining(tail=0.02, every=50, grow=2, max_rank=8)
    adaptation = plan.attach(model, optimizer)
    for _ in range(1200):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    assert adaptation.history["rank"].iloc[-1] == 5 and loss < 1e-3
    assert adaptation.history.stored.max() <= 8


def test_closures_and_compiled_models_train_on():
    x, y = teacher()
    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Linear(24, 20, bias=False)), 8)
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    svdlib.LowRankTraining(tail=0.02, every=20).attach(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(compiled(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(300)]
    assert model[0].rank == 3 and losses[-1] < 1e-3
    torch.testing.assert_close(compiled(x), model(x))


def test_layers_that_share_their_factors_are_cut_together():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 30, bias=False))
    model[1].weight = model[0].weight
    small = svdlib.factorize(model, 6)
    ranks = svdlib.truncate_(small, 0.5)
    assert ranks["0"] == ranks["1"] < 6
    product = {name: part.weight for name, part in low_rank_layers(small).items()}
    torch.testing.assert_close(product["0"], product["1"])
    assert torch.isfinite(small(torch.arange(5))).all()


def test_groups_of_a_convolution_keep_the_rank_that_any_of_them_needs():
    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)).double(), 5)
    with torch.no_grad():  # the second group has rank 4, the first rank 2
        outer = model[0].factors[1]
        matrix = svdlib.network.low_rank.as_layer(outer).to_matrix(outer.weight).clone()
        matrix[0, :, 2:] = 0
        matrix[1, :, 4:] = 0
        outer.weight.copy_(svdlib.network.low_rank.as_layer(outer).to_weight(matrix))
    before = matrices(model)["0"]
    assert torch.linalg.matrix_rank(before).tolist() == [2, 4]
    assert svdlib.truncate_(model, 1e-9) == {"0": 4}
    torch.testing.assert_close(matrices(model)["0"], before)


def with_spectrum(side, *sigma):
    linear = nn.Linear(side, side, bias=False).double()
    Q = torch.linalg.qr(torch.randn(side, len(sigma), dtype=torch.float64)).Q
    linear.weight.data = (Q * torch.tensor(sigma, dtype=torch.float64)) @ Q.mT
    return svdlib.factorize(linear, len(sigma))


def test_a_budget_keeps_the_terms_that_raise_the_product_of_energies_most():
    torch.manual_seed(0)
    # Terms store 40 numbers in the first layer and 80 in the second. Energies are 16, 20, 21, and
    # 21.04, and 1 to 8. Per 40 numbers the logarithm grows by 0.223, 0.049, and 0.002, and by
    # 0.347, 0.203, 0.144, 0.112, 0.091, 0.077, and 0.067.
    model = nn.ModuleList([with_spectrum(20, 4, 2, 1, 0.2), with_spectrum(40, *[1] * 8)])
    expected = {120: (1, 1), 160: (2, 1), 200: (1, 2), 240: (2, 2), 720: (2, 8), 760: (3, 8)}
    for budget, ranks in expected.items():
        copied = copy.deepcopy(model)
        found = svdlib.truncate_(copied, parameters=budget)
        assert tuple(found.values()) == ranks, budget
    assert tuple(svdlib.truncate_(model, 0.3, parameters=800).values()) == (2, 8)
    with pytest.raises(ValueError, match="120"):
        svdlib.truncate_(model, parameters=119)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), budget=st.integers(250, 900), grow=st.integers(0, 2))
def test_a_budget_is_kept_while_ranks_change(seed, budget, grow):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 20))
    model = svdlib.factorize(model, {"0": 6, "2": 7})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = svdlib.LowRankTraining(every=2, grow=grow, parameters=budget)
    plan.attach(model, optimizer)
    x = torch.randn(40, 14)
    for step in range(1, 9):
        optimizer.zero_grad()
        F.mse_loss(model(x), x.roll(1, 0)[:, :1].expand(-1, 20)).backward()
        optimizer.step()
        assert step < 2 or sum(p.numel() for p in model.parameters()) <= budget


def test_a_budget_falls_geometrically_to_its_value():
    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Linear(60, 50, bias=False)), 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plan = svdlib.LowRankTraining(every=2, parameters=110 * 5, within=4)
    adaptation = plan.attach(model, optimizer)
    for _ in range(6):
        model(torch.ones(1, 60)).sum().backward()
        optimizer.step()
    assert adaptation.history["rank"].tolist() == [20, 10, 5, 5]  # 20 · (5/20)^½ halfway
    other = svdlib.factorize(nn.Sequential(nn.Linear(60, 50, bias=False)), 5)
    resumed = plan.attach(other, torch.optim.SGD(other.parameters(), lr=0.0))
    resumed.load_state_dict(adaptation.state_dict() | {"steps": 0})
    assert resumed._now().parameters == 110 * 20
    with pytest.raises(ValueError, match="within=5"):
        svdlib.LowRankTraining(0.1, within=5)
    # Also where ``within`` is no multiple of ``every``.
    model = svdlib.factorize(nn.Sequential(nn.Linear(60, 50, bias=False)), 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    svdlib.LowRankTraining(every=2, parameters=110 * 5, within=3).attach(model, optimizer)
    for _ in range(3):
        model(torch.ones(1, 60)).sum().backward()
        optimizer.step()
    assert model[0].rank == 5


def test_what_was_cut_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 22))
    small = svdlib.factorize(model, 9)
    svdlib.truncate_(small, 0.5)
    svdlib.save_factorized(small, tmp_path / "small.safetensors")
    again = svdlib.load_factorized(model, tmp_path / "small.safetensors")
    x = torch.randn(3, 24)
    assert torch.equal(small(x), again(x)) and again[0].rank == small[0].rank < 9


def test_training_goes_on_from_its_state():
    x, y = teacher()

    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()

    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Linear(24, 20, bias=False)), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    plan = svdlib.LowRankTraining(tail=0.02, every=7)
    adaptation = plan.attach(model, optimizer)
    steps(model, optimizer, 10)
    file = io.BytesIO()
    torch.save(adaptation.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    second = torch.optim.SGD(other.parameters(), lr=0.05)
    resumed = plan.attach(other, second)
    resumed.load_state_dict(torch.load(file))
    steps(model, optimizer, 11)
    steps(other, second, 11)
    assert resumed.history.equals(adaptation.history)
    assert resumed.history.step.tolist() == [0, 7, 14, 21]
    assert torch.equal(other[0].weight, model[0].weight)


def test_what_is_truncated_in_inference_mode_can_be_trained():
    model = thin("Linear")
    with torch.inference_mode():
        svdlib.truncate_(model, 0.5)
    model(inputs(layer("Linear"))).sum().backward()
    assert model[0][0].weight.grad is not None


def test_singular_values_are_those_of_the_products():
    for kind in ("Linear", "Conv2d, groups", "Embedding"):
        model = thin(kind)
        table = svdlib.singular_values(model)
        W = matrices(model)["0"]
        for group, A in enumerate(W):
            sigma = table[table.group == group].sigma.to_numpy()
            expected = torch.linalg.svdvals(A)[: model[0].rank].numpy()
            assert sigma == pytest.approx(expected, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), rank=st.integers(1, 5))
def test_penalties_are_what_they_are_called(seed, rank):
    torch.manual_seed(seed)
    model = svdlib.factorize(nn.Sequential(nn.Linear(14, 12)).double(), rank)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    W = model[0][1].weight @ model[0][0].weight
    decay = svdlib.spectral_decay(model)
    torch.testing.assert_close(decay, W.square().sum())
    ours = torch.autograd.grad(decay, list(model[0][0].parameters()))
    theirs = torch.autograd.grad(W.square().sum(), list(model[0][0].parameters()))
    torch.testing.assert_close(ours, theirs)
    assert svdlib.orthogonality(model) >= 0
    with torch.no_grad():
        model[0][0].weight.copy_(3 * torch.linalg.qr(model[0][0].weight.mT).Q.mT)
        model[0][1].weight.copy_(2 * torch.linalg.qr(model[0][1].weight).Q)
    assert svdlib.orthogonality(model).item() == pytest.approx(0, abs=1e-12)


def test_bad_input_is_named():
    dense = nn.Sequential(nn.Linear(14, 12))
    model = svdlib.factorize(dense, 4)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    for call in (
        lambda: svdlib.truncate_(dense, 0.1),
        lambda: svdlib.singular_values(dense),
        lambda: svdlib.spectral_decay(dense),
    ):
        with pytest.raises(ValueError, match="LowRank"):
            call()
    with pytest.raises(ValueError, match="optimizer"):
        svdlib.LowRankTraining(0.1).attach(model, optimizer)
    with pytest.raises(ValueError, match="L-BFGS"):
        svdlib.LowRankTraining(0.1).attach(model, torch.optim.LBFGS(model.parameters()))
    for wrong in (
        {"tail": 1.0},
        {"tail": -0.1},
        {"tail": 0.1, "every": 0},
        {"tail": 0.1, "grow": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(set(wrong) - {"tail"}), "tail")):
            svdlib.LowRankTraining(**wrong)
    with pytest.raises(ValueError, match="max_rank"):
        svdlib.truncate_(model, 0.1, max_rank=0)
    for parameters in (0, 30):  # rank 1 needs 14 + 12 weights and 12 biases
        with pytest.raises(ValueError, match="parameters"):
            svdlib.truncate_(model, 0.1, parameters=parameters)
    with pytest.raises(ValueError, match="90"):
        svdlib.LowRankTraining(grow=2, parameters=89).attach(
            model, torch.optim.SGD(model.parameters())
        )
    with torch.no_grad():
        model[0][0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'0'"):
        svdlib.truncate_(model, 0.1)


def test_a_gradient_scaler_goes_on():
    x, y = teacher()
    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Linear(24, 20, bias=False)), 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu")
    adaptation = svdlib.LowRankTraining(tail=0.02, every=50).attach(model, optimizer)
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert model[0].rank == 3 and loss < 1e-3
    axis = adaptation.plot()
    (line,) = axis.lines
    assert line.get_ydata().tolist() == adaptation.history["rank"].tolist()


class Wrapped(torch.optim.Optimizer):
    """As accelerate wraps an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_a_wrapped_optimizer_is_followed():
    x, y = teacher()
    torch.manual_seed(0)
    model = svdlib.factorize(nn.Sequential(nn.Linear(24, 20, bias=False)), 8)
    optimizer = Wrapped(torch.optim.Adam(model.parameters(), lr=0.02))
    svdlib.LowRankTraining(tail=0.02, every=50).attach(model, optimizer)
    for _ in range(200):
        model.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert model[0].rank == 3
    dense = nn.Linear(24, 20)
    optimizer = Wrapped(torch.optim.SGD(dense.parameters(), lr=0.02))
    svdlib.Projection("truncsvd", 3, "step").attach(dense, optimizer)
    dense(x).sum().backward()
    optimizer.step()
    assert torch.linalg.matrix_rank(dense.weight) == 3
