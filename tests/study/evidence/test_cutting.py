import numpy as np
import pandas as pd
import pytest
import torch

import svdlib
from svdlib.study.evidence import cutting

SIZES, LR = [12, 8, 7, 4], 0.1


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(400, 12, generator=g)
    y = (x @ torch.randn(12, 4, generator=g)).argmax(1)
    return svdlib.Data("made up", x[:300], y[:300], x[300:], y[300:])


@pytest.fixture(scope="module")
def nets(data):
    nets = svdlib.MLPEnsemble(SIZES, range(3), "cpu")
    svdlib.train(nets, data, epochs=3, lr=LR, progress=False)
    return nets


@pytest.fixture(scope="module")
def found(data):
    plan = {"checkpoints": [1, 2, 4], "ranks": [2, 3], "compared": [3], "late": [2]}
    plan["penalties"] = [("weight decay", 0.1), ("nuclear norm", 0.05)]
    return cutting.ways(data, SIZES, 3, **plan, lr=LR, progress=False)


def test_a_cut_is_the_truncated_svd_of_a_copy(nets):
    before = [W.clone() for W in nets.weights]
    for W, A, k in zip(cutting.cut(nets, 5).weights, before, (5, 5, 4), strict=True):
        # The Gram matrix is in float64, the result in float32: its rounding, ten times over.
        torch.testing.assert_close(W, svdlib.truncated_svd(A, k).matrix(), rtol=0, atol=1e-5)
    assert all(map(torch.equal, nets.weights, before))


def test_a_data_aware_cut_loses_the_least_output(nets, data):
    moments = cutting.input_moments(nets, data.train_x)
    aware, plain = cutting.cut(nets, 3, moments), cutting.cut(nets, 3)
    for number, C in enumerate(moments):
        W, A, P = (each.weights[number].double() for each in (nets, aware, plain))
        values, vectors = torch.linalg.eigh(C)
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
        least = torch.linalg.svdvals(W @ root)[:, 3:].square().sum(-1)
        lost, more = ((B - W) @ C @ (B - W).mT for B in (A, P))
        lost, more = (m.diagonal(dim1=-2, dim2=-1).sum(-1) for m in (lost, more))
        torch.testing.assert_close(lost, least, rtol=1e-3, atol=1e-6)
        assert (lost <= more + 1e-6).all()


def test_moments_are_of_what_a_layer_receives(nets, data):
    moments = cutting.input_moments(nets, data.train_x)
    net, x = nets[1], data.train_x
    for number, layers in ((0, 0), (1, 2), (2, 4)):
        h = net[:layers](x).detach().double()
        C = moments[number][min(1, len(moments[number]) - 1)]
        torch.testing.assert_close(C, h.mT @ h / len(x), rtol=1e-5, atol=1e-6)


def test_factors_compute_what_the_cut_network_does(nets, data):
    thin = cutting.factors(nets, 3)
    assert thin.ranks == [(3, 3, 3)] * 3 and thin.seeds == nets.seeds
    torch.testing.assert_close(
        thin(data.test_x), cutting.cut(nets, 3)(data.test_x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rank", [1, 4, 10, 15])
def test_a_narrow_network_is_as_wide_as_the_parameters_allow(rank):
    def count(sizes):
        return sum(p.numel() for p in svdlib.MLPEnsemble(sizes, device="cpu")[0].parameters())

    sides = [(15, 784), (15, 15), (10, 15)]
    limit = sum(min(rank * (m + n), m * n) + m for m, n in sides)
    widths = cutting.narrow([784, 15, 15, 10], rank)
    width = widths[1]
    assert widths == [784, width, width, 10] and count(widths) <= limit
    assert width == 15 or count([784, width + 1, width + 1, 10]) > limit


def test_ways_are_those_of_train(data, found):
    answers, _ = found
    for way, projection in {
        "stock": None,
        "every epoch": svdlib.Projection("truncsvd", 3, "epoch"),
        "every step": svdlib.Projection("truncsvd", 3, "step"),
    }.items():
        nets = svdlib.MLPEnsemble(SIZES, range(3), "cpu")
        history = svdlib.train(nets, data, epochs=4, lr=LR, projection=projection, progress=False)
        history = history.pivot(index="epoch", columns="network", values="test_error")
        for epoch in (1, 2, 4):
            right = answers[way, 8 if way == "stock" else 3, epoch]
            wrong = 100 * (~right).double().mean(1).numpy()
            # An epoch ends with a decomposition anew, so that rounding may move an answer.
            assert wrong == pytest.approx(history.loc[epoch].to_numpy(), abs=1.01)


def test_one_cut_after_an_epoch_is_one_projection(found):
    answers, _ = found
    assert torch.equal(answers["cut once", 3, 1], answers["every epoch", 3, 1])
    assert {way for way, *_ in answers} == {
        "stock", "cut once", "cut once, data-aware", "every epoch", "every epoch, data-aware",
        "every step", "last 2 epochs", "factors", "narrow", "weight decay 0.1", "nuclear norm 0.05",
    }  # fmt: skip


def test_penalties_shrink_weights_and_their_singular_values(nets):
    decayed, thinner = cutting.cut(nets, 8), cutting.cut(nets, 8)  # copies
    cutting.shrink_(decayed, "weight decay", 0.1)
    cutting.shrink_(thinner, "nuclear norm", 0.3)
    for W, D, T in zip(nets.weights, decayed.weights, thinner.weights, strict=True):
        assert torch.equal(D, W * 0.9)
        expected = (torch.linalg.svdvals(W) - 0.3).clamp(min=0)
        torch.testing.assert_close(torch.linalg.svdvals(T), expected, rtol=0, atol=1e-5)


def test_penalized_networks_are_cut_at_checkpoints(data, found):
    answers, _ = found
    nets = svdlib.MLPEnsemble(SIZES, range(3), "cpu")
    for _ in range(4):
        svdlib.train(nets, data, epochs=1, lr=LR, progress=False)
        cutting.shrink_(nets, "weight decay", 0.1)
    for rank in (8, 3):
        right = cutting.cut(nets, rank).losses(data.test_x, data.test_y)[1]
        assert torch.equal(answers["weight decay 0.1", rank, 4], right)


def test_cells_are_differences_of_means(found):
    answers, _ = found
    table = cutting.cells(answers).set_index(["way", "rank", "epoch"])
    assert len(table) == len(answers) and (table.n == 3).all()
    assert (table.loc["stock"].added == 0).all() and (table.loc["cut once"].ahead == 0).all()
    row = table.loc["every epoch", 2, 4]
    once, stock = table.error["cut once", 2, 4], table.error["stock", 8, 4]
    assert row.added == pytest.approx(row.error - stock)
    assert row.ahead == pytest.approx(once - row.error)


def test_the_table_by_seed_joins_errors_and_shapes(found):
    table = cutting.seeds_of(*found)
    assert len(table) == 2 * 3 * 3 and table.notna().all(axis=None)
    last = table[table.epoch == 4]
    assert last.overlap.to_numpy() == pytest.approx(1) and table["tail"].between(0, 1).all()


def test_geometry_of_a_turned_matrix():
    A = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    table = cutting.geometry({1: A[None], 2: A.flip(1)[None]}, [1, 2, 3], "stock")
    first = table[table.epoch == 1].set_index("rank")
    assert first["tail"].to_numpy() == pytest.approx([5 / 14, 1 / 14])
    assert first.gap.to_numpy() == pytest.approx([2 / 3, 1 / 2])
    assert first.overlap.to_numpy() == pytest.approx([0, 1 / 2])


def test_flips_are_where_intervals_leave_out_zero():
    def row(rank, epoch, low, high):
        return {
            "way": "every epoch",
            "rank": rank,
            "epoch": epoch,
            "ahead_low": low,
            "ahead_high": high,
        }

    table = pd.DataFrame([
        row(1, 1, -1, 1), row(1, 2, 1, 2), row(1, 3, -1, 1), row(1, 4, 1, 2), row(1, 5, 1, 2),
        row(2, 1, -2, -1), row(2, 2, -2, -1), row(2, 3, -1, 1),
        row(3, 1, 1, 2), row(3, 2, 1, 2),
    ])  # fmt: skip
    found = cutting.flips(table).astype(object).where(lambda t: t.notna(), None)
    assert found.values.tolist() == [[None, 4], [2, None], [None, 1]]


def test_orders_begin_with_the_data_s_own(data, found):
    answers, _ = found
    table = cutting.orders(data, SIZES, 3, 4, 3, LR, 2)
    wrong = {
        way: 100 * (~answers[way, k, 4]).double().mean(1)
        for way, k in (("stock", 8), ("every epoch", 3))
    }
    own = table[table.order == 0].added.to_numpy()
    assert own == pytest.approx((wrong["every epoch"] - wrong["stock"]).numpy(), abs=1.01)
    assert table.order.tolist() == [0] * 3 + [1] * 3 and np.isfinite(table.added).all()


def test_the_best_ranks_meet_the_tolerance(data):
    table = cutting.kept(data, SIZES, 2, [1, 4], LR, 0.02, 100)
    assert table.epoch.tolist() == [1, 1, 4, 4] and table.share.between(1, 100).all()
    shown = cutting.kept_table(table.assign(dataset="made up", lr=LR), 0.02)
    assert shown.n.tolist() == [2, 2] and list(shown.index.get_level_values("epoch")) == [1, 4]
    counted = (table.increase > 0.02).groupby(table.epoch).sum()
    assert shown["over the tolerance on test"].tolist() == counted.tolist()
    exact = cutting.kept(data, SIZES, 2, [4], LR, 1e-9, 100)
    assert (exact.share >= table[table.epoch == 4].share.to_numpy()).all()


PARAMETERS = {
    "sizes": [784, 15, 15, 10], "checkpoints": [1, 5], "ranks": [4, 6], "compared": [6],
    "late": [1], "lr": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"checkpoints": [5, 1]}, "checkpoints"),
        ({"ranks": [15]}, "15"),
        ({"compared": [6, 7]}, "7"),
        ({"late": [5]}, "5"),
        ({"lr": 0}, "lr"),
        ({"orders": -1}, "orders"),
        ({"decays": [2]}, "decays"),
        ({"norms": [0.1, -1]}, "norms"),
    ],
)
def test_parameters_that_do_not_fit_are_named(wrong, named):
    cutting.check(PARAMETERS)
    with pytest.raises(ValueError, match=named):
        cutting.check(PARAMETERS | wrong)


def test_a_rule_is_chosen_on_even_seeds_and_graded_on_odd_ones():
    rows = [
        {"rank": 4, "epoch": epoch, "seed": seed, "tail": tail, "gap": 0.5, "stock": 1.0,
         "cut once": 2.0 if tail > 0.3 else 0.0, "every epoch": 1.0}
        for seed in range(4)
        for epoch, tail in ((1, 0.1), (2, 0.2), (4, 0.4), (8, 0.8))
    ]  # fmt: skip
    found = cutting.rules(pd.DataFrame(rows)).set_index("sign")
    assert found.networks.tolist() == [2] * 5  # the odd seeds
    assert found["project if"]["tail"] == "above 0.1"
    assert found["correct (%)"]["tail"] == "100 [100, 100]"
    assert found["correct (%)"]["always"] == "67 [67, 67]" == found["correct (%)"]["gap"]
    assert cutting.rules(pd.DataFrame(rows[:4])).empty  # no odd seed
