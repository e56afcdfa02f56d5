import pandas as pd
import pytest
import torch

import svdlib
from svdlib.study.evidence import lenet

BUDGET, EPOCHS = 9000, 2


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 10
    x = torch.rand(10, 784, generator=g)[y] + 0.1 * torch.rand(240, 784, generator=g)
    return svdlib.Data("made up", x[:200], y[:200], x[200:], y[200:])


@pytest.fixture(scope="module")
def table(data):
    plan = {"methods": lenet.METHODS, "budgets": [BUDGET], "epochs": EPOCHS, "lr": 0.05}
    return lenet.table(data, [3], **plan, validation=40, progress=False)


def test_lenet_has_the_published_number_of_weights_and_its_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a, b, c = lenet.lenet(5), lenet.lenet(5), lenet.lenet(6)
    assert torch.equal(before, torch.random.get_rng_state())
    assert lenet.weights(a) == 430_500 and lenet.biases(a) == 20 + 50 + 500 + 10
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)


@pytest.mark.parametrize("budget", [5_000, 10_808, 17_871, 49_667, 147_900])
def test_sizes_are_within_the_budget_and_close_to_it(budget):
    narrow, thin = lenet.lenet(0, lenet.narrow(budget)), lenet.cut(lenet.lenet(0), budget)
    # A neuron more of the third width, or a term of the largest layer.
    steps = {narrow: narrow[7].in_features + 10, thin: 1_300}
    for model, step in steps.items():
        assert budget - step < lenet.weights(model) <= budget
    assert set(lenet.ranks(thin)) == set(lenet.THIN) and lenet.ranks(narrow) == {}


def test_untrained_factors_have_the_norms_of_the_dense_weights():
    ranks = {"0": 2, "3": 5, "7": 4}
    thin, dense = lenet.factors(0, ranks), lenet.lenet(0)
    assert lenet.ranks(thin) == ranks
    for name in ranks:
        own, full = thin.get_submodule(name).weight, dense.get_submodule(name).weight
        assert own.norm().item() == pytest.approx(full.norm().item(), rel=1e-5)
        cosine = (own * full).sum() / own.norm() / full.norm()
        best = torch.linalg.svdvals(full.flatten(1))[: ranks[name]].norm() / full.norm()
        assert cosine.item() == pytest.approx(best.item(), rel=1e-4)  # the truncated SVD, scaled


def test_the_schedule_rises_and_falls_and_can_be_entered_anywhere(data):
    whole = lenet.fit(lenet.lenet(0), data, range(2), 2, 0.05, 7)
    half = lenet.fit(lenet.lenet(0), data, range(1), 2, 0.05, 7)
    seen = []
    again = lenet.fit(lenet.lenet(0), data, range(2), 2, 0.05, 7, each_epoch=seen.append)
    assert len(seen) == 2 and all(map(torch.equal, whole.parameters(), again.parameters()))
    assert not torch.equal(whole[0].weight, half[0].weight)
    other = lenet.fit(lenet.lenet(0), data, range(2), 2, 0.05, 8)  # another order of the images
    assert not torch.equal(whole[0].weight, other[0].weight)


def test_every_way_ends_within_its_budget(table):
    assert table.method.tolist() == list(lenet.METHODS) and (table.seed == 3).all()
    sized = table[table.method != "dense"]
    assert (sized.weights <= BUDGET).all() and (sized.weights > BUDGET - 2000).all()
    assert table.accuracy.between(0, 100).all() and table.validation.between(0, 100).all()
    ranks = table.set_index("method").ranks
    assert ranks["fixed factors"] == ranks["adaptive factors"] != ""
    assert ranks["dense"] == ranks["narrow"] == ""


def test_a_projected_network_is_cut_without_loss(data):
    ends = []

    def project(model):
        ends.append(lenet.ranks(lenet.cut(model, BUDGET)))
        svdlib.project_(model, ends[-1])

    model = lenet.fit(lenet.lenet(0), data, range(2), EPOCHS, 0.05, 0, each_epoch=project)
    thin = lenet.cut(model, BUDGET)
    assert lenet.ranks(thin) == ends[-1] and len(ends) == 2
    for own, kept in zip(model.parameters(), svdlib.merge(thin).parameters(), strict=True):
        torch.testing.assert_close(kept, own, rtol=0, atol=1e-5)  # rounding in float32
    same = lenet.ways(data, 0, EPOCHS, 0.05)["projected"](BUDGET)
    assert all(map(torch.equal, same.parameters(), thin.parameters()))


def test_published_means_and_single_runs_are_compared_each_in_its_way():
    own = pd.DataFrame(
        {"budget": [900] * 4, "weights": [880] * 4, "accuracy": [98, 98.2, 98.4, 98.6]}
    )
    published = pd.DataFrame({
        "method": "theirs", "choice": ["a", "b", "c", "d"], "n": [5, 5, 1, 1],
        "accuracy": [97.0, 98.2, 97.0, 97.9], "sd": [0.1, 0.1, None, None],
        "weights": [900, 1000, 950, 100_000],
    })  # fmt: skip
    table = lenet.against(own, published)
    assert table.above.tolist() == [True, False, True, False]
    assert table["our weights"].unique() == [880] and len(lenet.against(own, published[:0])) == 0
    assert len(lenet.against(own, published.assign(weights=100))) == 0


PARAMETERS = {
    "methods": ["narrow"], "budgets": [9000], "epochs": 2, "train_images": 200, "validation": 40,
    "seeds": 1, "lr": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"methods": ["wide"]}, "methods"),
        ({"methods": []}, "methods"),
        ({"budgets": [100]}, "5,000"),
        ({"budgets": [400_000]}, "148,790"),
        ({"epochs": 1}, "epochs"),
        ({"validation": 190}, "validation"),
        ({"lr": 0}, "lr"),
    ],
)
def test_parameters_that_do_not_fit_are_named(wrong, named):
    lenet.check(PARAMETERS)
    with pytest.raises(ValueError, match=named):
        lenet.check(PARAMETERS | wrong)
