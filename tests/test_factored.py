import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrices import matrix

import svdlib
from svdlib.factored import cut, truncate_


@settings(max_examples=30, deadline=None)
@given(tail=st.floats(0.01, 0.9), seed=st.integers(0, 50))
def test_the_cut_is_the_smallest_that_keeps_the_tail(tail, seed):
    V, U = matrix((3, 5, 12), seed), matrix((3, 9, 5), seed + 1)
    U *= 0.5 ** torch.arange(5, dtype=U.dtype)
    first, second = cut(V, U, tail)
    for before, after in zip(U @ V, second @ first, strict=True):
        sigma = torch.linalg.svdvals(before)[:5]
        tails = torch.stack([sigma[rank:].norm() for rank in range(6)])
        rank = max(1, int((tails > tail * sigma.norm()).sum()))
        error = torch.linalg.matrix_norm(before - after)
        torch.testing.assert_close(error, tails[rank], atol=1e-10, rtol=1e-8)
        assert torch.linalg.matrix_rank(after) == rank


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
    truncate_(nets, 1e-4)  # changes nothing but the order of the terms
    assert nets.ranks == [(3, 5, None), (6, 2, None), (4, 4, None)]
    torch.testing.assert_close(nets(x)[1], singles[1](x))
    assert nets.spectra().groupby("layer").sigma.count().tolist() == [60, 60, 12]
    again = svdlib.MLPEnsemble.from_modules(list(nets))
    again.load_state_dict(nets.state_dict())
    torch.testing.assert_close(again(x), nets(x))
