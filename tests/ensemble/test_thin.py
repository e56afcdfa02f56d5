"""A thin first layer against autograd and LAPACK, in float64, step by step."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import svdlib
from svdlib.data import with_ones
from svdlib.ensemble.descent import Step
from svdlib.ensemble.networks import perceptron
from svdlib.ensemble.projection import Projection, grouped
from svdlib.ensemble.stacks import sketch_generators


class Trained:
    """Two networks, projected after every step, whose first layer becomes thin after the first."""

    def __init__(self, sizes, projection, dtype=torch.float32):
        nets = svdlib.MLPEnsemble(sizes, seeds=range(2), device="cpu").to(dtype)
        self.step = Step(nets)
        own = sketch_generators(range(2), 0, nets.device)
        (self.group,) = grouped([projection] * 2, self.step.weights, own)

    def take(self, x, y, rate):
        x = with_ones(x.to(self.step.weights[0].dtype))
        labels, loss = -F.one_hot(y, 10).T.to(x.dtype).flatten(), torch.zeros(2, dtype=x.dtype)
        with torch.no_grad():
            self.step.take(x, labels, rate, loss, x[:, :-1] @ x[:, :-1].mT)
            self.group.project_()
            if self.step.thin is None:
                self.step.hold(self.group.hold_first(self.step.maps[0]))

    def matrices(self):
        """[W b] of each layer, in float64."""
        return [affine.matrix[:, : affine.out].double() for affine in self.step.dense()]


def stepped(matrices, x, y, rate):
    """[W b] after a step by autograd."""
    matrices = [matrix.clone().requires_grad_() for matrix in matrices]
    h = with_ones(x.double()).mT.expand(2, -1, -1)
    for matrix in matrices[:-1]:
        h = F.pad((matrix @ h).relu(), (0, 0, 0, 1), value=1.0)
    logits = (matrices[-1] @ h).mT
    loss = F.cross_entropy(logits.flatten(0, 1), y.repeat(2), reduction="sum") / len(y)
    gradients = torch.autograd.grad(loss, matrices)
    return [(A - rate * G).detach() for A, G in zip(matrices, gradients, strict=True)]


def truncated(matrix, rank):
    W = matrix[..., :-1]
    if rank < min(W.shape[1:]):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]
    return torch.cat([W, matrix[..., -1:]], -1)


# In float64 ten times the worst seen. In float32 a ReLU at its kink may decide otherwise than the
# reference; that moves a weight by the rate times a delta over the batch, 1e-4 at most.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 6e-7), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rank", [1, 3, 7, 10, 14])
def test_six_hundred_steps_are_lapacks(rank, dtype, tolerance, mnist):
    trained, worst = Trained((784, 15, 15, 10), Projection("truncsvd", rank, "step"), dtype), []
    for x, y in zip(mnist.train_x.split(64)[:600], mnist.train_y.split(64), strict=False):
        exact = [truncated(A, rank) for A in stepped(trained.matrices(), x, y, 0.01)]
        trained.take(x, y, 0.01)
        worst += [(A - B).abs().max() for A, B in zip(trained.matrices(), exact, strict=True)]
    assert len(worst) == 1800 and max(worst) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(784, 10), (784, 15, 40, 15, 12, 10), (784, 30, 15, 10)])
@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
def test_layers_of_any_shape(sizes, dtype, method, mnist):
    """The first layer can be the last; a randomized SVD with power iterations is as good."""
    projection = Projection(method, 6, "step", oversample=4, power_iters=2)
    trained = Trained(sizes, projection, dtype)
    for x, y in zip(mnist.train_x.split(64)[:60], mnist.train_y.split(64), strict=False):
        exact = [truncated(A, 6) for A in stepped(trained.matrices(), x, y, 0.01)]
        cold = trained.step.thin is None
        trained.take(x, y, 0.01)
        for ours, theirs in zip(trained.matrices(), exact, strict=True):
            if not (cold and method == "rsvd"):  # no gap yet after the sixth singular value
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert trained.step.thin is not None


@pytest.mark.parametrize("start", ["rank 2", "zero", "dead units"])
def test_deficient_starts_stay_finite_and_low(start, mnist):
    trained = Trained((784, 15, 15, 10), Projection("truncsvd", 5, "step"))
    W = trained.step.weights[0]
    if start == "rank 2":
        W.copy_(W[..., :2] @ W[:, :2])
    elif start == "zero":
        W.zero_()
    else:
        W[:, 4:] = 0
        trained.step.maps[0].matrix[:, 4:15, -1] = -1
    for x, y in zip(mnist.train_x.split(64)[:60], mnist.train_y.split(64), strict=False):
        trained.take(x, y, 0.1)
        trained.take(torch.zeros_like(x), y, 0.1)
    W = trained.matrices()[0][..., :-1]
    assert W.isfinite().all()
    assert (torch.linalg.matrix_rank(W, rtol=1e-5) <= 5).all()


def test_a_sketch_that_misses_much_breaks_nothing(mnist):
    """Without oversampling the subspace turns by nearly a right angle now and then."""
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(32), device="cpu")
    projection = Projection("rsvd", 10, "step", oversample=0, power_iters=0)
    data = mnist.head(64 * 200, 100)
    history = svdlib.train(nets, data, epochs=3, projection=projection, progress=False)
    losses = history.pivot(index="network", columns="epoch", values="train_loss")
    assert (losses[3] < losses[1]).all()
    assert (torch.linalg.matrix_rank(nets.weights[0], rtol=1e-5) == 10).all()


def test_a_layer_is_thin_only_where_it_pays(monkeypatch, mnist):
    held = []
    hold = Step.hold
    monkeypatch.setattr(Step, "hold", lambda *arguments: held.append(1) or hold(*arguments))

    def holds(sizes=(784, 15, 10), projection=None, **settings):
        held.clear()
        nets = svdlib.MLPEnsemble(sizes, seeds=range(2), device="cpu")
        projection = projection or Projection("truncsvd", 5, "step")
        settings = {"epochs": 1, "progress": False, "projection": projection} | settings
        svdlib.train(nets, mnist.head(640, 100), **settings)
        return bool(held)

    assert holds()
    assert holds(shuffle=True)
    assert not holds(optimizer="adam")
    assert not holds(dropout=0.1)
    assert not holds(batch_size=640)
    assert not holds(projection=Projection("truncsvd", 5, 2))
    assert not holds(projection=Projection("truncsvd", (15, 5), "step"))
    assert not holds(projection=[Projection("truncsvd", 5, "step"), None])
    assert not holds((784, 100, 10), Projection("rsvd", 5, "step"))


@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
def test_a_thin_step_stays_on_the_gpu(method):
    with FakeTensorMode():
        with torch.device("cuda"):
            modules = [perceptron((784, 15, 15, 10)) for _ in range(4)]
            x, y, gram = torch.ones(64, 785), torch.zeros(640), torch.ones(64, 64)
            nets, losses = svdlib.MLPEnsemble.from_modules(modules), torch.zeros(4)
        step = Step(nets)
        (group,) = grouped([Projection(method, 10, "step", 2, 0)] * 4, step.weights)
        with torch.inference_mode():
            for _ in range(3):
                step.take(x, y, 0.01, losses, gram)
                group.project_()
                if step.thin is None:
                    step.hold(group.hold_first(step.maps[0]))
            step.store()
        assert step.thin.C.device.type == "cuda"
