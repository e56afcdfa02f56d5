import pytest
import torch
from torch import nn

import svdlib
from svdlib.projection import Projection, project_stacks_


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))


@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
def test_every_matrix_gets_the_rank(method):
    net = svdlib.project_(model(), rank=4, method=method)
    for weight in (net[0].weight.flatten(1), net[3].weight):
        assert torch.linalg.matrix_rank(weight) == 4


def test_conv_is_its_out_by_in_kh_kw_matrix():
    before, net = model()[0].weight.detach().flatten(1), model()
    svdlib.project_(net, {"0": 3})
    U, S, Vh = torch.linalg.svd(before, full_matrices=False)
    torch.testing.assert_close(net[0].weight.flatten(1), U[:, :3] * S[:3] @ Vh[:3])
    assert torch.equal(net[3].weight, model()[3].weight), "only the layer named"


def test_biases_flags_and_optimizer_state_stay():
    net = model()
    net[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    places = [p.data_ptr() for p in net.parameters()]
    biases = [net[0].bias.clone(), net[3].bias.clone()]
    svdlib.project_(net, 2)
    assert [p.data_ptr() for p in net.parameters()] == places
    assert torch.equal(net[0].bias, biases[0]) and torch.equal(net[3].bias, biases[1])
    assert net[0].weight.requires_grad and not net[3].weight.requires_grad
    after = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert all(map(torch.equal, state, after))


@pytest.mark.parametrize("rank", [8, 100])
def test_full_rank_leaves_it_untouched(rank):
    net = model()
    svdlib.project_(net, {"0": rank})
    assert torch.equal(net[0].weight, model()[0].weight)


@pytest.mark.parametrize(
    ("rank", "method", "message"),
    [
        (0, "truncsvd", "at least 1, not 0"),
        (-3, "truncsvd", "at least 1, not -3"),
        (2.5, "truncsvd", "whole number"),
        (True, "truncsvd", "whole number"),
        (2, "svd", "unknown method 'svd'; known: rsvd, truncsvd"),
        ({"0": 2, "7": 2}, "truncsvd", "unknown layer '7'; known: 0, 3"),
        ({"0": 2, "3": 0}, "truncsvd", "layer '3'"),
    ],
)
def test_bad_input_changes_nothing(rank, method, message):
    net = model()
    with pytest.raises(ValueError, match=message):
        svdlib.project_(net, rank, method)
    assert all(map(torch.equal, net.parameters(), model().parameters()))


def test_nan_weights_and_no_weights():
    net = model()
    with torch.no_grad():
        net[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer '3'.*finite"):
        svdlib.project_(net, 2)
    assert torch.equal(net[0].weight, model()[0].weight)
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        svdlib.project_(nn.ReLU(), 2)


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
    bases = project_stacks_([ours, kept], [5, 5], projection, generator)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    assert torch.equal(kept, small) and bases[1] is None

    moved = expected + 1e-4 * torch.randn(3, *shape, generator=g)
    warm, cold = moved.clone(), moved.clone()
    project_stacks_([warm, kept], [5, 5], projection, generator, bases)
    project_stacks_([cold, kept], [5, 5], Projection("truncsvd", 5))
    torch.testing.assert_close(warm, cold, atol=1e-5, rtol=0)
