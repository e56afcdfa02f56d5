import copy

import numpy as np
import pytest
import torch

import svdlib
from svdlib.ensemble.descent import Step
from svdlib.ensemble.projection import Group, Projection, grouped
from svdlib.ensemble.stacks import layer_stacks

# Tolerances: ten times the worst seen, on kernels with and without AVX-512; 1e-4 is also the
# perturbation.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("svd", 10), "unknown method"),
        (("rsvd", 0), "rank must be at least 1"),
        (("rsvd", 1.5), "whole number"),
        (("rsvd", (10, 0)), "rank must be at least 1"),
        (("rsvd", 10, "batch"), "unknown every 'batch'; known: epoch, step"),
        (("rsvd", 10, 0), "every must be at least 1"),
        (("rsvd", 10, "step", -1), "oversample"),
        (("rsvd", 10, "step", 0, -1), "power_iters"),
    ],
)
def test_bad_projection(arguments, message):
    with pytest.raises(ValueError, match=message):
        Projection(*arguments)


def test_published_deviations_by_name():
    assert Projection.published("rsvd", 10) == Projection("rsvd", 10, "step", 0, 2)
    assert Projection.published("truncsvd", 10) == Projection("truncsvd", 11, "step")
    with pytest.raises(ValueError, match="2 layers need 2 ranks"):
        Projection("rsvd", (3, 4, 5)).ranks(2)


@pytest.mark.parametrize("shape", [(15, 40), (40, 15), (70, 90)])
@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
def test_stacks_agree_with_the_svd(shape, method, generator):
    """With a gap after the fifth singular value every method finds the same subspace."""
    g = torch.Generator().manual_seed(1)
    U = torch.linalg.qr(torch.randn(3, shape[0], 5, generator=g)).Q
    V = torch.linalg.qr(torch.randn(3, shape[1], 5, generator=g)).Q
    low = U @ V.mT
    W = low + 1e-4 * torch.randn(3, *shape, generator=g)
    full_U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    expected = (full_U[..., :5] * S[:, None, :5]) @ Vh[:, :5]
    small = torch.randn(3, 4, 4, generator=g)
    projection = Projection(method, 5, oversample=2, power_iters=2)
    ours, kept = W.clone(), small.clone()
    (stack,) = layer_stacks([ours, kept], [5, 5], projection, [generator] * 3)
    stack.project_(warm=False)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(kept, small)

    moved = expected + 1e-4 * torch.randn(3, *shape, generator=g)
    cold = moved.clone()
    ours.copy_(moved)
    stack.project_(warm=True)
    layer_stacks([cold], [5], Projection("truncsvd", 5))[0].project_(warm=False)
    torch.testing.assert_close(ours, cold, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 5, 10])
def test_six_hundred_steps_project_as_lapack_does(rank, mnist, monkeypatch):
    """Of the paper's networks, which Adam keeps dense, by warm Cholesky QR."""
    data, worst = mnist.head(64 * 600, 100), []

    project_ = Group.project_

    def compared(group):
        before = [weight.clone() for weight in group.weights]
        project_(group)
        for ours, weight in zip(group.weights, before, strict=True):
            U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
            exact = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
            worst.append((ours - exact).abs().max())

    monkeypatch.setattr(Group, "project_", compared)
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(2), device="cpu")
    every = Projection("truncsvd", rank, "step")
    settings = {"epochs": 1, "optimizer": "adam", "lr": 1e-3, "progress": False}
    svdlib.train(nets, data, projection=every, **settings)
    assert len(worst) == 1800 and max(worst) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "dead rows", "low rank", "graded"])
@pytest.mark.parametrize(("oversample", "power_iters"), [(0, 0), (2, 0), (2, 1)])
def test_warm_projections_of_odd_matrices(kind, dtype, oversample, power_iters, generator):
    """Zero and rank-deficient weights stay finite; those of that rank or less stay as they are."""
    W = torch.randn(2, 12, 30, dtype=dtype, generator=generator)
    if kind == "zero":
        W.zero_()
    elif kind == "dead rows":
        W[:, 3:] = 0
    elif kind == "low rank":
        W = W[..., :2] @ W[:, :2]
    else:
        W = W.mT[:, :5].mT @ (W[:, :5] * 10.0 ** -torch.arange(5, dtype=dtype)[:, None])
    for method in ("truncsvd", "rsvd"):
        projection = Projection(method, 5, "step", oversample, power_iters)
        now = W.clone()
        (stack,) = layer_stacks([now], [5], projection, [generator] * 2)
        for warm in (False, True, True, True):
            stack.project_(warm)
        # A Gram matrix in that precision sees singular values down to √ε σ_1. A sketch without
        # power iterations multiplies what it does not see, here up to 300 times.
        seen = torch.finfo(dtype).eps ** 0.5 * torch.linalg.matrix_norm(W, 2).max().item()
        seen *= 3000 if method == "rsvd" and power_iters == 0 else 1
        torch.testing.assert_close(now, W, atol=seen, rtol=0)
        now += torch.randn(W.shape, dtype=dtype, generator=generator)
        stack.project_(warm=True)
        assert (torch.linalg.matrix_rank(now, rtol=1e-4) == 5).all(), "not held at a lower rank"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sizes", [(784, 15, 30, 10), (20, 15, 15), (15, 20, 15, 10)])
@pytest.mark.parametrize("scattered", [False, True])
def test_every_layer_of_a_step_s_matrices_is_projected(sizes, scattered):
    """Some have a row of ones behind them, some are turned over, some are the last."""
    nets = svdlib.MLPEnsemble(sizes, seeds=range(4), device="cpu")
    weights = Step(nets).weights
    before = [weight.clone() for weight in weights]
    chosen = [0, 2] if scattered else range(4)
    choices = [Projection("truncsvd", 5) if i in chosen else None for i in range(4)]
    with torch.inference_mode():
        for group in grouped(choices, weights):
            group.project_()
    for ours, weight in zip(weights, before, strict=True):
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        low = (U[..., :5] * S[..., None, :5]) @ Vh[..., :5, :]
        for i in range(4):
            torch.testing.assert_close(
                ours[i], (low if i in chosen else weight)[i], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("tail", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize(("oversample", "power_iters"), [(2, 0), (0, 1), (4, 0)])
def test_sketches_miss_as_much_as_those_of_the_matrix_itself(tail, oversample, power_iters):
    """However small the tail: on the mean of 4,000 draws, against QR of A Ω in float64."""
    g = torch.Generator().manual_seed(0)
    U, _, Vh = torch.linalg.svd(torch.randn(15, 60, generator=g), full_matrices=False)
    sigma = torch.tensor([1.0, 0.8, 0.6, 0.5, 0.4] + [tail] * 10)
    W = ((U * sigma) @ Vh).expand(4000, 15, 60)
    A, columns = W.double(), 5 + oversample
    Q = torch.linalg.qr(A @ torch.randn(4000, 60, columns, generator=g, dtype=A.dtype)).Q
    for _ in range(power_iters):
        Q = torch.linalg.qr(A @ torch.linalg.qr(A.mT @ Q).Q).Q
    P, S, Oh = torch.linalg.svd(Q.mT @ A, full_matrices=False)
    expected = torch.linalg.matrix_norm(A - Q @ ((P[..., :5] * S[:, None, :5]) @ Oh[:, :5]))
    ours = W.clone()
    projection = Projection("rsvd", 5, "step", oversample, power_iters)
    layer_stacks([ours], [5], projection, [g] * 4000)[0].project_(warm=False)
    missed = torch.linalg.matrix_norm(A - ours.double())
    # Medians: without oversampling the mean does not exist. Four standard errors of 4,000 draws.
    assert missed.median() == pytest.approx(expected.median().item(), rel=0.05)


@pytest.mark.parametrize("every", ["step", 3])
def test_a_training_loop_of_ones_own_is_the_ensembles(every, blobs):
    """The same steps and the same projections, so the same weights, to rounding."""
    projection = svdlib.Projection("truncsvd", rank=2, every=every)
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0,), device="cpu").double()
    model = nets[0]
    svdlib.train(
        nets, blobs, epochs=3, lr=0.1, batch_size=20, projection=projection, progress=False
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = projection.attach(model, optimizer)

    def epoch():
        for x, y in zip(blobs.train_x.double().split(20), blobs.train_y.split(20), strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    for _ in range(3):
        epoch()
    # a step from the last basis, as train takes for every="step", is exact to the square of a step
    tolerance = 1e-3 if every == "step" else 1e-9
    for one, other in zip(model.parameters(), nets[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    handle.remove()
    epoch()
    assert torch.linalg.matrix_rank(model[0].weight, rtol=1e-9) > 2


def test_steps_that_a_scaler_skips_are_not_counted():
    model = torch.nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    svdlib.Projection("rsvd", rank=np.int64(2), every=2).attach(
        model, optimizer, generator=torch.Generator().manual_seed(0)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ranks = []
    for size in (1.0, torch.inf, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 6), size)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        ranks.append(int(torch.linalg.matrix_rank(model.weight, rtol=1e-5)))
    assert ranks[1] == 5 and ranks[2] == 2 and ranks[3] > 2


class Sharp(torch.optim.Optimizer):
    """Steps twice, as sharpness-aware minimization does, the second time by an optimizer inside."""

    def __init__(self, params, inner):
        super().__init__(params, {})
        self.base_optimizer = inner
        self.param_groups = inner.param_groups

    def second_step(self):
        self.base_optimizer.step()

    def step(self, closure=None):
        self.second_step()
        with torch.no_grad():  # as Lookahead's slow weights would
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.01 * torch.eye(*p.shape) if p.ndim == 2 else 0)


class Plain:
    """A wrapper that is no optimizer of torch's."""

    def __init__(self, inner):
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self):
        self.inner.step()


@pytest.mark.parametrize("way", ["sharp", "second step", "plain", "copy", "inner"])
def test_wrapped_and_copied_optimizers_are_followed(way):
    model = torch.nn.Linear(6, 5)
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped = Plain(inner) if way == "plain" else Sharp(model.parameters(), inner)
    given = inner if way in ("copy", "inner") else wrapped
    handle = svdlib.Projection("truncsvd", 2, every=2).attach(model, given)
    stepping = {"copy": copy.copy(inner), "plain": wrapped}.get(way, wrapped)
    ranks = []
    for _ in range(4):
        model(torch.randn(9, 6)).square().sum().backward()
        stepping.second_step() if way == "second step" else stepping.step()
        ranks.append(int(torch.linalg.matrix_rank(model.weight, rtol=1e-5)))
    assert ranks[0] > 2 and ranks[1] == 2 and ranks[2] > 2 and ranks[3] == 2
    stepping.step()
    handle.project()
    assert torch.linalg.matrix_rank(model.weight, rtol=1e-5) == 2
    handle.remove()
    handle.remove()
    for _ in range(2):
        stepping.step()
    assert torch.linalg.matrix_rank(model.weight, rtol=1e-5) > 2


def test_a_step_that_fails_is_none():
    model = torch.nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    svdlib.Projection("truncsvd", 2, every=2).attach(model, optimizer)

    def fails():
        raise RuntimeError("in the closure")

    model(torch.randn(9, 6)).square().sum().backward()
    for n in range(4):
        with pytest.raises(RuntimeError, match="in the closure"):
            optimizer.step(fails)
        optimizer.step()
        rank = int(torch.linalg.matrix_rank(model.weight, rtol=1e-5))
        assert rank == 2 if n % 2 else rank > 2


def test_a_fused_step_that_a_scaler_skips_is_none():
    model = torch.nn.Linear(6, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    svdlib.Projection("truncsvd", 2, every=2).attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    ranks = []
    for size in (1.0, torch.inf, 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((1, 6), size)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        ranks.append(int(torch.linalg.matrix_rank(model.weight, rtol=1e-5)))
    assert ranks[1] == 5 and ranks[2] == 2 and ranks[3] > 2


def test_only_what_the_optimizer_steps_is_projected():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 5))
    frozen = model[0].weight.clone()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    projection = svdlib.Projection("truncsvd", 2, every="step")
    with pytest.warns(UserWarning, match="'0' .the optimizer does not step it"):
        handle = projection.attach(model, optimizer)
    model(torch.randn(9, 6)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert torch.linalg.matrix_rank(model[1].weight, rtol=1e-5) == 2
    handle.remove()
    with pytest.raises(ValueError, match="does not step layer '0'"):
        projection.attach(model, optimizer, layers=["0", "1"])
    other = torch.optim.SGD(torch.nn.Linear(6, 5).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not step layer '0'"):
        projection.attach(model, other)


def test_attention_is_followed_by_its_packed_weights():
    model = torch.nn.MultiheadAttention(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    svdlib.Projection("truncsvd", 2, every="step").attach(model, optimizer)
    x = torch.randn(3, 8)
    model(x, x, x)[0].square().sum().backward()
    optimizer.step()
    for part in model.in_proj_weight.split(8):
        assert torch.linalg.matrix_rank(part, rtol=1e-5) == 2


def test_attach_refuses_what_it_cannot_project():
    model = torch.nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="an optimizer knows no epochs"):
        svdlib.Projection("truncsvd", 2).attach(model, optimizer)
    with pytest.raises(ValueError, match="takes a model and its optimizer, not SGD and Linear"):
        svdlib.Projection("truncsvd", 2, every="step").attach(optimizer, model)
    with pytest.raises(ValueError, match="1 layers need 1 ranks"):
        svdlib.Projection("truncsvd", (2, 3), every="step").attach(model, optimizer)


def test_ranks_and_steps_may_be_numpy_or_torch_numbers():
    for rank in (np.int64(5), torch.tensor(5)):
        assert svdlib.Projection("rsvd", rank, every=np.int64(3)) == svdlib.Projection("rsvd", 5, 3)


def test_attach_takes_names_of_layers_and_parameters():
    lstm = torch.nn.LSTM(6, 5)
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.1)
    projection = svdlib.Projection("truncsvd", (2, 3), every="step")
    names = ["weight_hh_l0", "weight_ih_l0"]
    handle = projection.attach(lstm, optimizer, layers=names)
    lstm(torch.rand(4, 6))[0].sum().backward()
    optimizer.step()
    assert [int(torch.linalg.matrix_rank(getattr(lstm, name))) for name in names] == [2, 3]
    handle.remove()
    with pytest.raises(ValueError, match=r"no nn\.Linear, convolution or nn\.Embedding to project"):
        projection.attach(lstm, optimizer)
    with pytest.raises(ValueError, match="1 layers need 1 ranks"):
        projection.attach(lstm, optimizer, layers=["weight_hh_l0"])
