"""A network made smaller in one call: the budget kept, the report true, the caller's left alone."""

import copy
import importlib
import re
import warnings
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import svdlib
from svdlib import bars
from svdlib.network.low_rank import low_rank_layers

module = importlib.import_module("svdlib.compress")  # svdlib.compress is the function

QUICK = {"progress": False}
SEQUENTIAL = {"calibration": svdlib.Calibration(sequential=True)}


@pytest.fixture(autouse=True)
def one_timed_run(monkeypatch):
    """Seconds are of no interest here."""
    monkeypatch.setattr(module, "REPEATS", 1)


def perceptron(*sizes, seed=0):
    """Features that matter less and less, so that there are ranks to choose."""
    torch.manual_seed(seed)
    layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
    for layer in layers:
        n = layer.in_features
        layer.weight.data *= 3 * torch.linspace(1, 0.1, n)
    parts = [part for layer in layers for part in (layer, nn.ReLU())][:-1]
    return nn.Sequential(*parts)


def small_task(seed=0, n=200):
    """A network of two layers, inputs, and its own answers as labels: any cut makes it worse."""
    model = perceptron(40, 30, 20, seed=seed)
    return model, *answers(model, torch.randn(n, 40, generator=torch.Generator().manual_seed(1)))


def answers(model, x):
    with torch.no_grad():
        return x, model.eval()(x).argmax(-1)


def count(model):
    return sum(p.numel() for p in model.parameters())


def share(result, what="parameters"):
    total = result.report.iloc[-1]
    return total[what] / total[f"dense_{what}"]


def mean_loss(model, x, y):
    with torch.no_grad():
        return F.cross_entropy(model.eval()(x), y, reduction="none").double().mean().item()


def added(model, small, x, y):
    return mean_loss(small, x, y) - mean_loss(model, x, y)


def test_budgets_are_met_within_one_per_cent_and_never_passed():
    model = perceptron(160, 140, 120, 90)
    x, y = answers(model, torch.randn(150, 160))
    for budget in (0.2, 0.5, 0.8):
        result = svdlib.compress(model, x, y, parameters=budget, **QUICK)
        assert budget - 0.01 < count(result.model) / count(model) <= budget
        assert share(result) == count(result.model) / count(model)
        result = svdlib.compress(model, x, y, multiply_adds=budget, **QUICK)
        assert budget - 0.01 < share(result, "multiply_adds") <= budget


def test_the_budget_is_spent_also_where_no_rank_changes_the_loss():
    """Labels that the network knows nothing of: cut, it is no worse."""
    torch.manual_seed(0)
    model = perceptron(100, 80, 60)
    x, y = torch.rand(64, 100), torch.arange(64) % 60
    result = svdlib.compress(model, x, y, parameters=0.5, **QUICK)
    assert 0.48 < share(result) <= 0.5


@pytest.mark.parametrize("sequential", [False, True])
def test_an_increase_is_not_passed_and_more_of_it_leaves_less(sequential):
    model, x, y = small_task()
    sizes, more = [], {"validation": (x, y), **QUICK}  # none held back
    more["calibration"] = svdlib.Calibration(sequential=sequential)
    for increase in (0.02, 0.2, 1000):
        result = svdlib.compress(model, x, y, increase=increase, **more)
        assert added(model, result.model, x, y) <= increase + 1e-6
        sizes.append(count(result.model))
    assert sizes[0] > sizes[1] > sizes[2] == 70 + 50 + 50  # rank one, and the biases
    none = svdlib.compress(model, x, y, increase=0, **more)
    assert added(model, none.model, x, y) <= 1e-6


@pytest.mark.parametrize("more", [{}, SEQUENTIAL, {"faster": True}])
def test_the_report_is_what_cost_and_the_losses_say(more, monkeypatch):
    monkeypatch.setattr(module, "_slow", lambda table: [])
    model, x, y = small_task()
    data = {"validation": (x, y), **QUICK}
    result = svdlib.compress(model, x, y, parameters=0.5, **more, **data)
    table = result.report.set_index("layer")
    assert table.index.tolist() == ["0", "2", "whole model"]
    expected = svdlib.cost(result.model, x[:128], repeats=1).set_index("layer")
    for name in ("rank", "parameters", "bytes", "multiply_adds"):
        np.testing.assert_array_equal(table[name], expected[name])
        if name != "rank":
            np.testing.assert_array_equal(table[f"dense_{name}"], expected[f"dense_{name}"])
    if "faster" in more:
        assert (table[["seconds", "dense_seconds"]] > 0).all(axis=None)
    else:  # nothing was timed
        assert not {"seconds", "dense_seconds"} & set(table.columns)
    assert table.loc["0", ["rows", "columns"]].tolist() == [30, 40]
    assert result.ranks == {
        name: layer.rank for name, layer in low_rank_layers(result.model).items()
    }
    judged = result.losses.iloc[-1]
    assert judged.loss_added == pytest.approx(added(model, result.model, x, y), abs=1e-6)
    with torch.no_grad():
        paired = F.cross_entropy(result.model(x), y, reduction="none") - F.cross_entropy(
            model(x), y, reduction="none"
        )
    assert judged.se == pytest.approx(paired.double().std().item() / len(x) ** 0.5, rel=1e-4)


def test_the_better_of_two_plans_is_kept_and_judged_by_other_data():
    model, x, y = small_task()
    result = svdlib.compress(model, x, y, parameters=0.5, **QUICK)
    *tried, judged = result.losses.to_dict("records")
    assert [row["plan"] for row in tried] == ["allocated", "even"]
    assert [row["kept"] for row in tried].count(True) == 1
    best = min(tried, key=lambda row: row["loss_added"])
    assert best["kept"] and judged["plan"] == best["plan"]
    assert all(row["share"] <= 0.5 for row in tried) and share(result) == judged["share"]
    held = torch.arange(len(x)) % 5 == 4
    for rows, row in ((~held, best), (held, judged)):
        expected = added(model, result.model, x[rows], y[rows])
        assert row["loss_added"] == pytest.approx(expected, abs=1e-6)
    assert judged["data"] == "a fifth held back"
    batches = [batch for batch in zip(x.split(20), y.split(20), strict=True)]
    result = svdlib.compress(model, batches, parameters=0.5, **QUICK)
    rows = torch.cat([x[80:100], x[180:]]), torch.cat([y[80:100], y[180:]])
    judged = result.losses.iloc[-1]
    assert judged.loss_added == pytest.approx(added(model, result.model, *rows), abs=1e-6)
    few = svdlib.compress(model, x[:49], y[:49], parameters=0.5, **QUICK)
    assert few.losses.data.iloc[-1] == "the data that chose it"
    other = svdlib.compress(model, x[:49], y[:49], validation=(x, y), parameters=0.5, **QUICK)
    assert other.ranks == few.ranks and other.losses.data.iloc[-1] == "validation data"
    assert str(other).endswith(" on validation data")


def test_a_wrecked_result_is_a_warning():
    model, x, y = small_task()
    with pytest.warns(UserWarning, match=r"wrecked .loss 1\..*; 100.0% right, now \d\d") as caught:
        svdlib.compress(model, x, y, parameters=0.15, **QUICK)
    assert [each.filename for each in caught] == [__file__]

    def objective(model, batch):
        return (model(batch[0]) - targets[: len(batch[0])]).square().mean(1) + 0.01

    with torch.no_grad():
        targets = model(x)
    with pytest.warns(UserWarning, match=r"wrecked .loss 0\.01, now"):
        svdlib.compress(model, (x[:40], y[:40]), objective=objective, parameters=0.3, **QUICK)


@pytest.mark.parametrize("n", [16, 64])
def test_few_inputs_are_no_reason_to_cut_what_they_did_not_show(n):
    """Nothing is known about most directions: the weights decide there, and the budget is used."""
    model, x, y = small_task(n=1000)
    result = svdlib.compress(model, x[:n], y[:n], parameters=0.8, **QUICK)
    plain = svdlib.factorize(model, {"0": 14, "2": 9}, progress=False)
    assert count(plain) / count(model) == 0.8
    assert 0.75 < share(result) <= 0.8
    assert mean_loss(result.model, x, y) <= mean_loss(plain, x, y)


def test_told_in_a_sentence_and_a_picture():
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, x, y = small_task()
    result = svdlib.compress(model, x, y, parameters=0.9, include=["0"], **QUICK)
    said = str(result)
    assert said.startswith(f"{share(result):.1%} of 1,850 parameters, ")
    assert f"loss {result.losses.loss_added.iloc[-1]:+.3g} ± " in said
    ax = result.plot()
    assert [text.get_text() for text in ax.texts] == ["dense", f"rank {result.ranks['0']}"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["2", "0"]
    assert "1,850 parameters" in ax.get_title()
    _, other = plt.subplots()
    assert result.plot(other) is other
    plt.close("all")


def test_layers_by_name_or_pattern():
    model = nn.Sequential()
    model.body = perceptron(40, 40, 40)
    model.head = nn.Linear(40, 20)
    x, y = answers(model, torch.randn(60, 40))

    def cut(parameters=0.75, **more):
        return set(svdlib.compress(model, x, y, parameters=parameters, **more, **QUICK).ranks)

    assert cut(0.5, include=["body.*"]) == {"body.0", "body.2"}
    assert cut(exclude=["*.0"]) <= {"body.2", "head"}
    assert cut(include=["body.*"], exclude=("body.0",)) <= {"body.2"}
    assert cut(include=(name for name in ["body.?", "head"])) <= {"body.0", "body.2", "head"}


def test_ranks_are_multiples():
    model, x, y = small_task()
    result = svdlib.compress(model, x, y, parameters=0.6, multiple_of=4, **QUICK)
    assert result.ranks and all(rank % 4 == 0 for rank in result.ranks.values())
    assert share(result) <= 0.6
    with pytest.raises(ValueError, match="no layer of those asked for gets cheaper at any rank"):
        svdlib.compress(model, x, y, parameters=0.6, multiple_of=18, **QUICK)


@pytest.fixture
def slow_first(monkeypatch):
    """By this clock the factors of layer 0 take twice as long as it did, others half as long."""
    real = module.cost

    def cost(*args, **more):
        table = real(*args, **more)
        table["dense_seconds"] = 1.0
        table["seconds"] = np.where(table.layer == "0", 2.0, 0.5)
        return table

    monkeypatch.setattr(module, "cost", cost)


def test_layers_stay_dense_where_factors_are_not_faster(slow_first):
    model, x, y = small_task()
    usual = svdlib.compress(model, x, y, parameters=0.8, **QUICK)
    assert "0" in usual.ranks
    result = svdlib.compress(model, x, y, parameters=0.8, faster=True, **QUICK)
    assert result.ranks.keys() == {"2"}
    assert share(result) <= 0.8
    for increase in (0.05, 0.5):  # ranks for the others are looked for again
        result = svdlib.compress(model, x, y, increase=increase, faster=True, **QUICK)
        assert "0" not in result.ranks and added(model, result.model, x, y) <= increase + 1e-6
    with pytest.raises(ValueError, match=r"parameters=0.3 with faster=True can't be met: .* 0.7"):
        svdlib.compress(model, x, y, parameters=0.3, faster=True, **QUICK)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_without_influence_on_the_loss_is_cut_first(frozen):

    class Ignores(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.ignored, self.used = nn.Linear(40, 30), nn.Linear(40, 30)

        def forward(self, x):
            return 3 * self.used(x) + 1e-6 * self.ignored(x)

    model = Ignores().requires_grad_(not frozen)
    x, y = answers(model, torch.randn(100, 40))
    result = svdlib.compress(model, x, y, parameters=0.6, **QUICK)
    assert result.ranks["ignored"] < 4 < result.ranks.get("used", 30)
    assert {p.requires_grad for p in result.model.parameters()} == {not frozen}


def test_a_loss_at_its_minimum():
    """A distance to the network's own outputs: its gradients vanish, those of outputs don't."""
    model = perceptron(40, 40, 40)
    x = torch.randn(200, 40)
    with torch.no_grad():
        model[2].weight[:, ::2] = 0  # so that half of the first layer's outputs do nothing

    def objective(net, batch):
        with torch.no_grad():
            target = model(batch)
        return (net(batch) - target).square().mean(1)

    more = {"objective": objective, "parameters": 0.4, **QUICK}
    result = svdlib.compress(model, x, **more)
    plain = svdlib.factorize(model, {"0": 8, "2": 8}, calibration=x, progress=False)
    assert count(plain) / count(model) > 0.4
    with torch.no_grad():
        assert objective(result.model, x).mean() < 0.5 * objective(plain, x).mean()


def test_a_loss_without_a_gradient():
    """The outputs decide, or what each layer puts out, where they have no gradient either."""
    model, x, y = small_task()

    def objective(model, batch):
        x, y = batch
        return (model(x).argmax(1) == y).float()

    expected = svdlib.compress(model, x, y, parameters=0.5, **QUICK)
    result = svdlib.compress(model, (x, y), objective=objective, parameters=0.5, **QUICK)
    assert result.losses.loss_added.iloc[-1] < 0  # of what is wrong here, less
    for made in (result, expected):
        assert 0.45 < share(made) <= 0.5

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("no derivative here")

    class Ends(nn.Sequential):
        def forward(self, x):
            return Broken.apply(super().forward(x))

    model = Ends(*model)
    with pytest.warns(UserWarning, match="each layer's own output, as .* no derivative here"):
        result = svdlib.compress(model, x, y, validation=(x, y), parameters=0.5, **QUICK)
    expected = svdlib.factorize(model, result.ranks, calibration=x)
    torch.testing.assert_close(result.model.state_dict(), expected.state_dict())


class Tied(nn.Module):
    """A language model of an embedding and its output layer, which share a weight."""

    def __init__(self, called=True):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.inner = nn.Embedding(60, 40), nn.Linear(40, 40)
        self.head = nn.Linear(40, 60)
        self.head.weight = self.embed.weight
        self.called = called

    def forward(self, ids):
        h = torch.tanh(self.inner(self.embed(ids)))
        return self.head(h) if self.called else F.linear(h, self.head.weight)


@pytest.mark.parametrize("how", [{}, SEQUENTIAL])
def test_shared_weights_count_once_and_stay_shared(how):
    model, ids = Tied(), torch.randint(60, (50, 7), generator=torch.Generator().manual_seed(2))
    more = {"objective": svdlib.next_token_losses, "parameters": 0.5, **how}
    result = svdlib.compress(model, ids, include=["*"], **more, **QUICK)
    assert 0.45 < count(result.model) / count(model) <= 0.5
    assert result.ranks["embed"] == result.ranks["head"]
    assert result.model.embed[0].weight is result.model.head[1].weight
    dense = svdlib.compress(model, ids, **(more | {"parameters": 0.8}), **QUICK)
    assert dense.ranks.keys() == {"inner"}  # words stay as they are unless asked for
    work = svdlib.compress(
        model, ids, objective=svdlib.next_token_losses, multiply_adds=0.8, **QUICK
    )
    assert work.ranks.keys() == {"inner"} and share(work, "multiply_adds") <= 0.8
    with pytest.warns(UserWarning, match="'embed' .its weight is shared with a layer that is left"):
        small = svdlib.compress(
            model,
            ids,
            objective=svdlib.next_token_losses,
            parameters=0.8,
            include=["*"],
            exclude=["head"],
            **QUICK,
        )
    assert small.ranks.keys() == {"inner"}


def test_a_shared_weight_that_is_read_without_its_layer_is_left_everywhere():
    model, ids = Tied(called=False), torch.randint(60, (50, 7))
    with pytest.warns(UserWarning, match="'head' .the model reads its weight.*'embed' .its weight"):
        result = svdlib.compress(
            model, ids, objective=svdlib.next_token_losses, parameters=0.8, include=["*"], **QUICK
        )
    assert result.ranks.keys() == {"inner"}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(32, 20)

    def forward(self, x):
        return 5 * self.head(self.encoder(x).mean(1))


def images():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(288, 20),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape"),
    [(Encoder, (6, 32)), (images, (3, 8, 8))],
    ids=["transformer", "convolutions"],
)
@pytest.mark.parametrize("budget", ["parameters", "multiply_adds"])
@pytest.mark.parametrize("how", [{}, SEQUENTIAL])
def test_networks_of_other_kinds(make, shape, budget, how):
    model = make()
    x, y = answers(model, torch.randn(60, *shape))
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the result is wrecked")
        result = svdlib.compress(model, x, y, **{budget: 0.6}, validation=(x, y), **how, **QUICK)
    assert 0.55 < share(result, budget) <= 0.6
    assert share(result) == count(result.model) / count(model)
    assert result.losses.loss_added.iloc[-1] == pytest.approx(
        added(model, result.model, x, y), abs=1e-5
    )


def test_a_bare_layer():
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    x, y = answers(layer, torch.randn(60, 40))
    for budget in ({"parameters": 0.5}, {"multiply_adds": 0.5}):
        result = svdlib.compress(layer, x, y, **budget, **QUICK)
        assert isinstance(result.model, svdlib.LowRank) and share(result, *budget) <= 0.5


def test_data_of_every_kind():
    model, x, y = small_task()
    expected = svdlib.compress(model, x, y, validation=(x, y), parameters=0.5, **QUICK)
    batches = list(zip(x.split(50), y.split(50), strict=True))
    named = [{"input": a, "labels": b} for a, b in batches]
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)

    def objective(model, batch):
        return F.cross_entropy(model(batch["input"]), batch["labels"], reduction="none")

    for data, more in (
        ((x, y), {}),
        (batches, {}),
        (loader, {}),
        (named, {}),
        (named, {"objective": objective}),
        ({"input": x, "labels": y}, {"objective": objective}),
    ):
        result = svdlib.compress(model, data, validation=data, parameters=0.5, **more, **QUICK)
        assert result.ranks == expected.ranks
        found, expected_loss = (made.losses.iloc[-1].loss_added for made in (result, expected))
        assert found == pytest.approx(expected_loss, abs=1e-4)
    other = [{"x": a, "labels": b} for a, b in batches]
    result = svdlib.compress(
        model, other, validation=other, parameters=0.5,
        objective=lambda model, batch: objective(model, {**batch, "input": batch["x"]}),
        calibration=svdlib.Calibration(call=lambda model, batch: model(batch["x"])), **QUICK,
    )  # fmt: skip
    assert result.ranks == expected.ranks


def test_a_mask_reaches_calibration():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 20))
    x = torch.randn(40, 6, 30)
    keep = torch.arange(6) < torch.randint(1, 6, (40, 1))
    padded = torch.where(keep[..., None], x, 9.0)

    def objective(model, batch):
        return model(batch).square().mean((1, 2))

    more = {"objective": objective, "validation": padded, "parameters": 0.5, **QUICK}
    for sequential in (False, True):
        masked = svdlib.Calibration(mask=lambda batch: batch[..., 0] != 9, sequential=sequential)
        result = svdlib.compress(model, padded, calibration=masked, **more)
        kept = svdlib.Calibration(x[keep], sequential=sequential)
        expected = svdlib.compress(model, padded, calibration=kept, **more)
        torch.testing.assert_close(
            result.model.state_dict(), expected.model.state_dict(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("more", [{}, SEQUENTIAL, {"faster": True}])
def test_nothing_of_the_caller_s_changes(more, slow_first):
    model, x, y = small_task()
    model.train()[2].eval()
    model[2].weight.requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    given = x.clone()
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    result = svdlib.compress(model, loader, parameters=0.8, **more, **QUICK)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert torch.equal(x, given) and torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    for network in (model, result.model):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in result.model.parameters()}
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert result.model.training and not result.model[2].training
    result.model(x).sum().backward()  # it can be trained on


MODEL, X, Y = small_task()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "give one budget of parameters, multiply_adds, increase, not none"),
        ({"parameters": 0.5, "increase": 1}, "not parameters and increase"),
        ({"parameters": 1.0}, "parameters must be a share of the whole model's, between 0 and 1"),
        ({"parameters": 0}, "between 0 and 1, not 0"),
        ({"multiply_adds": -2}, "multiply_adds must be a share .*, not -2"),
        ({"parameters": float("nan")}, "between 0 and 1, not nan"),
        ({"parameters": "half"}, "parameters must be a number, not 'half'"),
        ({"increase": -1}, "increase must be a loss that may be added, at least 0, not -1"),
        ({"increase": float("nan")}, "at least 0, not nan"),
        ({"parameters": 0.01}, r"parameters=0.01 can't be met: .* 0\.0919 of the whole model"),
        ({"multiply_adds": 0.05}, r"multiply_adds=0.05 can't be met: .* 0\.0667 of the whole"),
        ({"parameters": 0.5, "include": "0"}, r"include must be several, .* not '0'"),
        ({"parameters": 0.5, "exclude": "0"}, r"exclude must be several, .* not '0'"),
        ({"parameters": 0.5, "include": ["body.*"]}, r"'body\.\*' fits none of 0, 2"),
        ({"parameters": 0.5, "exclude": ["5"]}, "'5' fits none of 0, 2"),
        ({"parameters": 0.5, "include": [0]}, "0 fits none of 0, 2"),
        ({"parameters": 0.5, "include": 3}, "include must be several, .* not 3"),
        ({"parameters": True}, "parameters must be a number, not True"),
        ({"parameters": 0.5, "exclude": ["*"]}, "no layer that could be factorized, of those"),
        ({"parameters": 0.5, "multiple_of": 0}, "multiple_of must be at least 1, not 0"),
        ({"parameters": 0.5, "validation": iter([(X, Y)])}, "compress looks at the data several"),
        ({"parameters": 0.5, "validation": (X, Y[:5])}, r"200 inputs need labels of shape"),
        ({"parameters": 0.5, "objective": 3}, "objective must be a function"),
        ({"parameters": 0.5, "calibration": torch.rand(0, 40)}, "the data are empty"),
        ({"parameters": 0.5, "calibration": torch.rand(5, 9)}, r"does not take float32 \(5, 9\)"),
        ({"parameters": 0.5, "calibration": torch.full((5, 40), torch.nan)}, "calibration has NaN"),
        ({"parameters": 0.5, "calibration": iter([X])}, "compress looks at the data several times"),
        (
            {"parameters": 0.5, "calibration": svdlib.Calibration(mask=lambda batch: batch[:3, 0])},
            r"mask gives places \(3,\)",
        ),
    ],
)
def test_bad_input(more, message):
    before = copy.deepcopy(MODEL.state_dict())
    with pytest.raises(ValueError, match=message):
        svdlib.compress(MODEL, X, Y, **more, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.rand(5, 9), r"a batch is \(inputs …, targets\)"),
        ((torch.rand(5, 9), Y[:5]), r"the model does not take float32 \(\d, 9\)"),
        ((X, Y[:5]), r"200 inputs need labels of shape \(200,\), not \(5,\)"),
        ([{"wrong": X, "labels": Y}], "the model does not take {wrong: float32"),
        ([{1, 2}], "a batch is .*not set"),
        ("text", "data must be a tensor"),
        ([], "the data are empty"),
        ((part for part in [(X, Y)]), "compress looks at the data several times"),
        ((torch.full((5, 40), torch.nan), Y[:5]), "the model gives NaN or infinite losses"),
    ],
)
def test_data_that_do_not_fit(data, message):
    with pytest.raises(ValueError, match=message):
        svdlib.compress(MODEL, data, parameters=0.5, **QUICK)


def test_objectives_that_do_not_fit():
    def mean(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(ValueError, match="objective gives one number, a mean perhaps"):
        svdlib.compress(MODEL, (X, Y), objective=mean, parameters=0.5, **QUICK)

    def brittle(model, batch):
        z = model(batch[0])
        low = torch.linalg.matrix_rank(model[2].weight) < 12
        return z.square().mean(1) * (torch.nan if low else 1)

    more = {"objective": brittle, "parameters": 0.5, **QUICK}
    with pytest.raises(ValueError, match=r"ranks {'0': \d+, '2': \d+} give NaN or infinite losses"):
        svdlib.compress(MODEL, (X, Y), **more)


def test_models_that_do_not_fit():
    small = svdlib.factorize(MODEL, {"0": 5})
    with pytest.raises(ValueError, match=r"factorized layers already; give svdlib\.merge"):
        svdlib.compress(small, X, Y, parameters=0.5, **QUICK)
    with pytest.raises(ValueError, match=r"no nn\.Linear, convolution or nn\.Embedding"):
        svdlib.compress(nn.Tanh(), X, Y, parameters=0.5, **QUICK)
    tiny = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no layer of those asked for gets cheaper at any rank"):
        svdlib.compress(tiny, torch.rand(9, 2), Y[:9] % 2, parameters=0.9, **QUICK)


STAGES = ["losses", "gradients", "calibration", "factors", "choosing ranks", "judging"]


@pytest.mark.parametrize("budget", [{"parameters": 0.8}, {"increase": 0.1}])
def test_progress_names_the_stages_in_their_order(budget, capsys, monkeypatch):
    real = bars.tqdm
    monkeypatch.setattr(bars, "tqdm", lambda *args, **more: real(*args, **{**more, "delay": 0}))
    svdlib.compress(MODEL, X, Y, **budget)
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    named = [line.partition(":")[0] for line in lines if ":" in line]
    assert list(dict.fromkeys(named)) == STAGES


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.spare = nn.Linear(40, 20), nn.Linear(20, 20)

    def forward(self, x):
        return self.used(x)


def test_calibration_that_reaches_no_layer_or_some_only():
    model = Idle()
    with pytest.warns(UserWarning, match="'spare' .calibration does not reach it") as caught:
        result = svdlib.compress(model, X, Y, parameters=0.8, **QUICK)
    assert [each.filename for each in caught] == [__file__]  # where the call is
    assert result.ranks.keys() == {"used"} and share(result) <= 0.8
    assert torch.equal(result.model.spare.weight, model.spare.weight)
    with pytest.raises(ValueError, match="calibration reaches no layer, such as 'spare'"):
        svdlib.compress(model, X, Y, parameters=0.8, include=["spare"], **QUICK)


def test_layers_that_can_not_be_replaced_are_left_with_a_warning():
    model, x, y = small_task()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="'0' .its hooks would be lost") as caught:
        result = svdlib.compress(model, x, y, parameters=0.8, **QUICK)
    assert [each.filename for each in caught] == [__file__]
    assert result.ranks.keys() == {"2"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody asked for it
        svdlib.compress(model, x, y, parameters=0.8, exclude=["0"], **QUICK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", [{}, SEQUENTIAL])
def test_cuda_agrees_with_cpu(how):
    model, x, y = small_task()
    more = {"parameters": 0.5, **how, **QUICK}
    expected = svdlib.compress(model, x, y, **more)
    there = copy.deepcopy(model).cuda()
    for data in ((x.cuda(), y.cuda()), DataLoader(TensorDataset(x, y), batch_size=64)):
        result = svdlib.compress(there, data, **more)
        assert next(result.model.parameters()).is_cuda and share(result) <= 0.5
        found, expected_loss = (made.losses.iloc[-1].loss_added for made in (result, expected))
        assert found == pytest.approx(expected_loss, abs=0.02)
