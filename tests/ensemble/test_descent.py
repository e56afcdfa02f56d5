from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import svdlib
from svdlib.data import with_ones
from svdlib.ensemble import descent
from svdlib.ensemble.descent import Step
from svdlib.ensemble.networks import StackedLayer, perceptron
from svdlib.ensemble.projection import Projection, grouped
from svdlib.ensemble.stacks import sketch_generators
from svdlib.linalg.factors import truncated

# Tolerances in float64 are some hundred ε for sums of a dozen terms.


def stepped(nets, x, y, **settings):
    """The ensemble after one step at rate 0.1; each network's loss before it."""
    step = Step(nets, **settings)
    losses = torch.zeros(len(nets), dtype=x.dtype)
    labels = -F.one_hot(y, nets.sizes[-1]).T.to(x.dtype).flatten()
    with torch.no_grad():
        step.take(with_ones(x), labels, 0.1, losses)
        step.store()
    return losses / len(x)


def by_autograd(net, x, y):
    """The network after such a step, and its loss before."""
    loss = F.cross_entropy(net(x), y)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter -= 0.1 * gradient
    return loss.item()


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=2, max_size=5),
    networks=st.integers(1, 4),
    batch=st.integers(1, 9),
    rank=st.integers(0, 3),
)
def test_a_step_is_that_of_autograd(sizes, networks, batch, rank):
    """Of any shape, dense or with every layer factorized that gains by it."""
    nets = svdlib.MLPEnsemble(sizes, seeds=range(networks), device="cpu").double()
    pairs = enumerate(pairwise(sizes))
    layers = [str(2 * i) for i, (n, m) in pairs if rank * (m + n) < m * n]
    if rank and layers:
        nets = svdlib.MLPEnsemble.from_modules(
            [svdlib.factorize(net, dict.fromkeys(layers, rank)) for net in nets]
        )
    singles = list(nets)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(batch, sizes[0], generator=g, dtype=torch.float64)
    y = torch.randint(sizes[-1], (batch,), generator=g)
    losses = stepped(nets, x, y)
    for i, single in enumerate(singles):
        assert losses[i].item() == pytest.approx(by_autograd(single, x, y), rel=1e-12, abs=1e-14)
        for ours, theirs in zip(nets[i].parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-12)


def test_dropout_has_the_gradient_of_the_network_it_left(monkeypatch, generator):
    """Against autograd through the same masks; inputs are dropped too."""
    masks, mask = [], descent._mask

    def noted(*arguments):
        masks.append(mask(*arguments))
        return masks[-1]

    monkeypatch.setattr(descent, "_mask", noted)
    nets = svdlib.MLPEnsemble((6, 8, 3), device="cpu").double()
    single = nets[0]
    x = torch.rand(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    losses = stepped(nets, x, y, dropout=0.25, generator=generator)
    assert 0.6 < (masks[0] > 0).double().mean() < 0.9 and masks[0].max() == 1 / 0.75
    hidden = single[0](x * masks[0]).relu() * masks[1].T
    expected = F.cross_entropy(single[2](hidden), y)
    assert losses.item() == pytest.approx(expected.item(), rel=1e-12)
    parameters = list(single.parameters())
    for ours, old, gradient in zip(
        nets[0].parameters(), parameters, torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, old - 0.1 * gradient, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_row_of_ones_and_the_inner_bias_stay(blobs, optimizer):
    nets = svdlib.MLPEnsemble((12, 10, 9, 3), seeds=(0, 1), device="cpu")
    nets = svdlib.MLPEnsemble.from_modules([svdlib.factorize(net, {"0": 4}) for net in nets])
    step = Step(nets, optimizer=optimizer)
    before = [map.matrix.clone() for map in step.maps]
    labels = -F.one_hot(blobs.train_y, 3).T.float().flatten()
    with torch.inference_mode():
        for _ in range(5):
            step.take(with_ones(blobs.train_x), labels, 0.1, torch.zeros(2))
    for old, map in zip(before, step.maps, strict=True):
        assert torch.equal(old[:, map.out :], map.matrix[:, map.out :])
        assert not torch.equal(old, map.matrix)
    assert not step.maps[0].matrix[:, :-1, -1].any(), "V has no bias"


CHOICES = [
    None,
    Projection("truncsvd", 10, "step"),
    Projection("rsvd", 10, "step", oversample=2, power_iters=0),
    Projection.published("rsvd"),
    Projection("truncsvd", 2, "step"),
]


def on_fake_gpu():
    """Four networks on a GPU that need not be there; inside a ``FakeTensorMode``."""
    with torch.device("cuda"):
        return svdlib.MLPEnsemble.from_modules([perceptron((784, 15, 15, 10)) for _ in range(4)])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("scattered", [False, True])
def test_a_step_stays_on_the_gpu(choice, optimizer, scattered):
    """Fake tensors know their device, and refuse to be read or mixed with another's."""
    with FakeTensorMode():
        nets = on_fake_gpu()
        step = Step(nets, optimizer=optimizer, dropout=0.1)
        groups = grouped([choice, None] * 2 if scattered else [choice] * 4, step.weights)
        x, y = torch.ones(64, 785, device="cuda"), torch.zeros(640, device="cuda")
        losses = torch.zeros(4, device="cuda")
        with torch.inference_mode():
            for _ in range(2):  # the first projection is cold, the second warm
                step.take(x, y, 0.01, losses)
                for group in groups:
                    group.project_()
            step.store()
        assert step.maps[0].matrix.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            losses.sum().item()


def test_factors_and_their_truncation_stay_on_the_gpu():
    with FakeTensorMode():
        nets = on_fake_gpu()
        with torch.device("cuda"):
            V, U, ranks = torch.ones(4, 5, 784), torch.ones(4, 15, 5), torch.full((4,), 5)
        nets.layers[0] = StackedLayer([V, U], nets.biases[0].detach(), ranks)
        step = Step(nets)
        x, y = torch.ones(64, 785, device="cuda"), torch.zeros(640, device="cuda")
        with torch.inference_mode():
            step.take(x, y, 0.01, torch.zeros(4, device="cuda"))
            V, U, ranks = truncated(*nets.layers[0].weights, tail=0.1)
        assert V.device.type == U.device.type == ranks.device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("choice", CHOICES)
def test_no_synchronisation_inside_a_step(choice):
    device = torch.device("cuda")
    step = Step(svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(4), device=device))
    groups = grouped([choice] * 4, step.weights, sketch_generators(range(4), 0, device))
    x, y = torch.ones(64, 785, device=device), torch.zeros(640, device=device)
    losses = torch.zeros(4, device=device)
    y[:64] = -1
    with torch.inference_mode():
        for mode in ("default", "error"):  # the first projection solves an eigenvalue problem
            torch.cuda.set_sync_debug_mode(mode)
            try:
                step.take(x, y, 0.01, losses)
                for group in groups:
                    group.project_()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()
