import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix
from torch import nn

import svdlib
from svdlib.ensemble.networks import StackedLayer, perceptron

# Tolerances: torch.testing's own, or in float64 ten times the worst seen.

widths = st.lists(st.integers(1, 9), min_size=2, max_size=5)


@settings(max_examples=30, deadline=None)
@given(sizes=widths, seeds=st.lists(st.integers(0, 2**32), min_size=1, max_size=4))
def test_starts_bit_for_bit_as_torch(sizes, seeds):
    nets = svdlib.MLPEnsemble(sizes, seeds, device="cpu")
    for i, seed in enumerate(seeds):
        torch.manual_seed(seed)
        expected = perceptron(sizes)
        for ours, theirs in zip(nets[i].parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_ensembles_are_made_on_the_device_asked_for_whatever_surrounds_them():
    with torch.inference_mode(), torch.device("meta"):
        nets = svdlib.MLPEnsemble((4, 3, 2), seeds=(7,), device="cpu")
    expected = svdlib.MLPEnsemble((4, 3, 2), seeds=(7,), device="cpu")
    assert all(map(torch.equal, nets.parameters(), expected.parameters()))
    assert not any(parameter.is_inference() for parameter in nets.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_type_changes_no_result(dtype, mnist):
    data = mnist.head(500)
    projection = svdlib.Projection("rsvd", rank=2, every="step")

    def trained():
        nets = svdlib.MLPEnsemble((784, 4, 10), seeds=(0, 1), device="cpu")
        history = svdlib.train(nets, data, epochs=1, projection=projection, progress=False)
        return nets, history.test_error.tolist()

    expected, errors = trained()
    try:
        torch.set_default_dtype(dtype)
        nets, found = trained()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == errors and all(map(torch.equal, nets.parameters(), expected.parameters()))


def test_global_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    svdlib.MLPEnsemble((4, 3, 2), seeds=range(5))[2]
    assert torch.equal(torch.rand(2), expected)


@settings(max_examples=30, deadline=None)
@given(sizes=widths, networks=st.integers(1, 4), n=st.integers(1, 7))
def test_forward_is_that_of_each_network(sizes, networks, n):
    nets = svdlib.MLPEnsemble(sizes, range(networks), device="cpu").double()
    x = torch.rand(n, sizes[0], dtype=torch.float64)
    z = nets(x)
    assert z.shape == (networks, n, sizes[-1])
    for i, net in enumerate(nets):
        torch.testing.assert_close(z[i], net(x))


def test_losses_are_cross_entropy(mnist):
    nets = svdlib.MLPEnsemble((784, 15, 10), seeds=(0, 1), device="cpu")
    losses, correct = nets.losses(mnist.test_x[:500], mnist.test_y[:500], chunk=123)
    z = nets[1](mnist.test_x[:500])
    expected = nn.functional.cross_entropy(z, mnist.test_y[:500], reduction="none")
    torch.testing.assert_close(losses[1], expected)
    assert torch.equal(correct[1], z.argmax(1) == mnist.test_y[:500])


def test_modules_go_in_and_come_out():
    modules = [perceptron((5, 4, 3)) for _ in range(3)]
    nets = svdlib.MLPEnsemble.from_modules(modules)
    for net, module in zip(nets, modules, strict=True):
        assert str(net) == str(module)
        assert all(map(torch.equal, net.parameters(), module.parameters()))
    with torch.no_grad():
        nets[0][0].weight.zero_()
    assert nets.weights[0][0].any(), "ensemble[i] is a copy"


@pytest.mark.parametrize("rank", [None, 2])
def test_state_dict_round_trip(rank):
    nets, other = ensembles(rank, seeds=(1, 2)), ensembles(rank, seeds=(3, 4))
    other.load_state_dict(nets.state_dict())
    assert all(map(torch.equal, other.parameters(), nets.parameters()))
    assert other.ranks == nets.ranks
    x = torch.rand(6, 20)
    assert torch.equal(nets(x), other(x))


def ensembles(rank, seeds):
    nets = svdlib.MLPEnsemble((20, 15, 10), seeds, device="cpu")
    if not rank:
        return nets
    ranks = {"0": rank, "2": rank}
    return svdlib.MLPEnsemble.from_modules([svdlib.factorize(net, ranks) for net in nets])


def test_spectra_are_singular_values():
    nets = svdlib.MLPEnsemble((7, 5, 3), seeds=(0, 1), device="cpu")
    table = nets.spectra()
    ours = table[(table.network == 1) & table.layer.str.startswith("layer 2")].sigma
    theirs = torch.linalg.svdvals(nets[1][2].weight)
    torch.testing.assert_close(torch.tensor(ours.values), theirs)


def test_index_out_of_range():
    nets = svdlib.MLPEnsemble((3, 2), seeds=(0,), device="cpu")
    assert str(nets[-1]) == str(nets[0])
    with pytest.raises(IndexError):
        nets[1]
    with pytest.raises(TypeError, match="one at a time, by a whole number, not slice"):
        nets[0:2]


@pytest.mark.parametrize(
    ("sizes", "seeds", "message"),
    [
        ((784,), (0,), "at least"),
        ((784, 0), (0,), "a layer size must be at least 1, not 0"),
        ((784, 2.5), (0,), "whole number"),
        ((784, 10), (), "at least one seed"),
        ((784, 10), (-1,), "a seed must be at least 0"),
        ((784, 10), 4, r"seeds must be several, such as range\(4\), not 4"),
        ((784, 10), "12", "seeds must be several"),
        (784, (0,), "sizes must be several"),
    ],
)
def test_bad_sizes_and_seeds(sizes, seeds, message):
    with pytest.raises(ValueError, match=message):
        svdlib.MLPEnsemble(sizes, seeds)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "at least one module"),
        ([nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))], "ReLU"),
        ([nn.Sequential(nn.Linear(3, 2), nn.ReLU())], "ReLU"),
        ([nn.Sequential(nn.Linear(3, 2, bias=False))], "bias"),
        ([perceptron((3, 2)), perceptron((4, 2))], "one shape"),
        ([nn.Sequential(nn.Linear(3, 2, dtype=torch.cfloat))], "real weights"),
        (5, "modules must be several"),
    ],
)
def test_bad_modules(modules, message):
    with pytest.raises(ValueError, match=message):
        svdlib.MLPEnsemble.from_modules(modules)


@settings(max_examples=30, deadline=None)
@given(tail=st.floats(0.01, 0.9), seed=st.integers(0, 50))
def test_truncation_keeps_the_smallest_rank_within_the_tail(tail, seed):
    V, U = matrix((3, 5, 12), seed), matrix((3, 9, 5), seed + 1)
    U *= 0.5 ** torch.arange(5, dtype=U.dtype)
    layer = StackedLayer([V, U], torch.zeros(3, 9), torch.full((3,), 5))
    layer.truncate_(tail)
    for before, after, kept in zip(U @ V, layer.matrix(), layer.ranks, strict=True):
        sigma = torch.linalg.svdvals(before)[:5]
        tails = torch.stack([sigma[rank:].norm() for rank in range(6)])
        rank = max(1, int((tails > tail * sigma.norm()).sum()))
        error = torch.linalg.matrix_norm(before - after)
        torch.testing.assert_close(error, tails[rank], atol=1e-10, rtol=1e-8)
        assert torch.linalg.matrix_rank(after) == rank == kept


def test_networks_of_an_ensemble_have_ranks_of_their_own():
    dense = svdlib.MLPEnsemble((30, 20, 20, 4), seeds=range(3), device="cpu")
    ranks = ({"0": 3, "2": 5}, {"0": 6, "2": 2}, {"0": 4, "2": 4})
    singles = [svdlib.factorize(net, r) for net, r in zip(dense, ranks, strict=True)]
    nets = svdlib.MLPEnsemble.from_modules(singles)
    assert nets.ranks == [(3, 5, None), (6, 2, None), (4, 4, None)]
    assert nets.sizes == (30, 20, 20, 4) and nets.factorized
    x = torch.rand(8, 30)
    for i, single in enumerate(singles):
        torch.testing.assert_close(nets(x)[i], single(x))
        assert [p.shape for p in nets[i].parameters()] == [p.shape for p in single.parameters()]
        torch.testing.assert_close(nets[i](x), single(x))
    nets.truncate_(1e-4)  # changes nothing but the order of the terms
    assert nets.ranks == [(3, 5, None), (6, 2, None), (4, 4, None)]
    torch.testing.assert_close(nets(x)[1], singles[1](x))
    assert nets.spectra().groupby("layer").sigma.count().tolist() == [60, 60, 12]
    again = svdlib.MLPEnsemble.from_modules(list(nets))
    again.load_state_dict(nets.state_dict())
    torch.testing.assert_close(again(x), nets(x))
