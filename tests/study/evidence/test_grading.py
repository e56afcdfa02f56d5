import itertools

import pandas as pd
import pytest
import torch
from torch import nn

import svdlib
from svdlib.study.evidence import grading


@pytest.fixture(scope="module")
def graded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.rand(200, 12)
    y = (x @ torch.rand(12, 3)).argmax(1)
    for _ in range(200):
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.5 * parameter.grad
                parameter.grad = None
    here, there = (x[:100], y[:100]), (x[100:], y[100:])
    return model, here, there, grading.grade(model, here, there, tolerance=0.01, shares=[0.6, 0.8])


def losses(model, data):
    """By every combination of ranks above 0, with the weights replaced."""
    found = {}
    layers = [model[0], model[2], model[4]]
    full = [layer.weight.data.clone() for layer in layers]
    factors = [torch.linalg.svd(weight, full_matrices=False) for weight in full]
    for ranks in itertools.product(range(1, 9), range(1, 7), range(1, 4)):
        for layer, (U, S, Vh), rank in zip(layers, factors, ranks, strict=True):
            layer.weight.data = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        with torch.no_grad():
            found[ranks] = nn.functional.cross_entropy(model(data[0]), data[1]).item()
    for layer, weight in zip(layers, full, strict=True):
        layer.weight.data = weight
    return pd.Series(found)


def parameter_count(ranks):
    shapes = [(8, 12), (6, 8), (3, 6)]
    weights = sum(min(r * (m + n), m * n) for r, (m, n) in zip(ranks, shapes, strict=True))
    return weights + 8 + 6 + 3


def stored(ranks):
    sides = zip(ranks, [(8, 12), (6, 8), (3, 6)], strict=True)
    return all(r * (m + n) < m * n or r == m for r, (m, n) in sides)


def test_cuts_that_save_nothing_are_undone(graded):
    model, here, there, (grades, _) = graded
    assert all(map(stored, grades[["0", "2", "4"]].itertuples(index=False, name=None)))
    joint = svdlib.joint_profile(model, *here, progress=False)
    tested = svdlib.joint_profile(model, *there, progress=False)
    row = grading.regrets(joint, tested, {"any": {"0": 4, "2": 5, "4": 2}}).iloc[0]
    assert (row["0"], row["2"], row["4"], row.parameters) == (4, 6, 3, 80 + 48 + 18 + 17)


def test_regrets_are_differences_to_the_best_by_trying_all(graded):
    model, here, there, (grades, _) = graded
    chosen, measured = losses(model, here), losses(model, there)
    spent = pd.Series({ranks: parameter_count(ranks) for ranks in filter(stored, chosen.index)})
    chosen = chosen[spent.index]  # a rank that saves nothing would not be stored
    total = sum(p.numel() for p in model.parameters())
    assert set(grades.share.dropna()) == {0.6, 0.8}
    for row in grades.to_dict("records"):
        ranks = (row["0"], row["2"], row["4"])
        budget = row["parameters"] if pd.isna(row["share"]) else int(row["share"] * total)
        assert row["parameters"] == parameter_count(ranks) <= budget
        best = chosen[spent <= budget].idxmin()
        assert row["loss"] == pytest.approx(measured[ranks], rel=1e-4)
        assert row["regret"] == pytest.approx(measured[ranks] - measured[best], abs=1e-4)
        assert row["needed"] == spent[chosen <= chosen[ranks] + 1e-6].min()


def test_the_optimum_regrets_nothing_and_every_rule_is_there(graded):
    *_, (grades, tested) = graded
    assert (grades[grades.rule == "optimal"].regret == 0).all()
    own = set(grades[grades.share.isna()].rule)
    assert own == {
        "printed", "marginal", "one-se", "energy", "effective-rank", "stable-rank",
        "gavish-donoho", "evbmf", "budget", "refined", "optimal",
    }  # fmt: skip
    under = set(grades[grades.share == 0.6].rule)
    assert under == {
        "budget", "level", "output", "gradient", "fisher", "removal", "gain", "optimal"
    }  # fmt: skip
    assert len(tested) == 9 * 7 * 4


def test_the_sum_of_single_increases_is_that_of_loss_profile(graded):
    model, here, *_ = graded
    joint = svdlib.joint_profile(model, *here, progress=False)
    alone = grading.summed_increases(joint)
    profile = svdlib.loss_profile(model, *here, progress=False)
    single = profile.set_index(["layer", "rank"]).increase
    for at, row in joint.iloc[::17].iterrows():
        expected = sum(single[name, row[name]] for name in ("0", "2", "4"))
        assert alone[at] == pytest.approx(expected, abs=1e-5)
