import copy
import itertools

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import svdlib
from svdlib.ranks.joint import ALL, MOST

# Tolerances: ten times the worst seen, on kernels with and without AVX-512. Losses are near one.


def perceptron(*sizes, activation=nn.ReLU, bias=True):
    torch.manual_seed(0)
    steps = []
    for a, b in itertools.pairwise(sizes):
        steps += [nn.Linear(a, b, bias=bias), activation()]
    return nn.Sequential(*steps[:-1])


def replaced(model, layers, ranks, x):
    """The logits with every weight replaced by its truncated SVD."""
    model = copy.deepcopy(model)
    for name, rank in zip(layers, ranks, strict=True):
        weight = model.get_submodule(name).weight.data
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_((U[:, :rank] * S[:rank]) @ Vh[:rank])
    with torch.no_grad():
        return model(x)


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return torch.rand(50, 7, generator=g), torch.randint(3, (50,), generator=g)


@pytest.mark.parametrize("sizes", [(7, 3), (7, 5, 3), (7, 5, 4, 3), (7, 3, 5, 4, 3)])
@pytest.mark.parametrize(
    ("activation", "bias"),
    [(nn.ReLU, True), (nn.Tanh, False), (lambda: nn.ReLU(inplace=True), True)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_combination_is_the_weights_replaced(data, sizes, activation, bias, dtype, tolerance):
    x, y = data[0].to(dtype), data[1]
    model = perceptron(*sizes, activation=activation, bias=bias).to(dtype).train()
    before = copy.deepcopy(model.state_dict())
    joint = svdlib.joint_profile(model, x, y, progress=False)
    layers = joint.attrs["layers"]
    assert len(joint) == torch.tensor([min(s) + 1 for s in itertools.pairwise(sizes)]).prod()
    full = F.cross_entropy(replaced(model, [], [], x), y, reduction="none")
    assert joint.attrs["loss"] == pytest.approx(full.mean().item(), rel=tolerance)
    for row in joint.iloc[:: max(1, len(joint) // 60)].to_dict("records"):
        ranks = [row[name] for name in layers]
        z = replaced(model, layers, ranks, x)
        losses = F.cross_entropy(z, y, reduction="none")
        assert row["loss"] == pytest.approx(losses.mean().item(), rel=tolerance)
        assert row["accuracy"] == pytest.approx(100 * (z.argmax(1) == y).double().mean().item())
        assert row["increase"] == pytest.approx((losses - full).mean().item(), abs=tolerance)
        told = svdlib.verify_ranks(model, dict(zip(layers, ranks, strict=True)), x, y)
        assert row["parameters"] == told["parameters"]
        assert row["se"] == pytest.approx(told["se"], abs=10 * tolerance)
    assert model.training
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


@pytest.mark.parametrize("memory", [1, 10_000])
def test_blocks_of_images_do_not_change_the_table(data, memory):
    model = perceptron(7, 5, 4, 3)
    whole = svdlib.joint_profile(model, *data, progress=False)
    parts = svdlib.joint_profile(model, *data, memory=memory, progress=False)
    pd.testing.assert_frame_equal(whole, parts, atol=1e-6)


def test_ranks_that_are_asked_for(data):
    model = perceptron(7, 5, 4, 3)
    joint = svdlib.joint_profile(model, *data, ranks=[1, 3, 99], progress=False)
    assert joint.groupby(["0", "2", "4"]).ngroups == len(joint) == 3 * 3 * 2
    joint = svdlib.joint_profile(model, *data, ranks={"2": [2, 2, 0]}, progress=False)
    assert joint[["0", "2", "4"]].values.tolist() == [[5, 0, 3], [5, 2, 3]]


def test_a_wide_network_gets_a_grid(data):
    model = perceptron(7, 60, 60, 50, 3)
    joint = svdlib.joint_profile(model, *data, progress=False)
    assert ALL / 4 < len(joint) <= ALL
    for name, full in (("0", 7), ("2", 60), ("4", 50), ("6", 3)):
        assert {0, 1, full} <= set(joint[name])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Linear(7, 3),
            "takes a perceptron, an nn.Sequential of Linear .*; this Linear has a forward of its own",
        ),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), "step '0' is a Conv2d"),
        (nn.Sequential(nn.Linear(7, 3), nn.Softmax(1)), "step '1' is a Softmax"),
        (nn.Sequential(nn.Linear(7, 3), nn.ReLU()), "the last step must be a Linear layer"),
        (nn.Sequential(), "the last step must be a Linear layer"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(7, 3))), "layer '0'"),
    ],
)
def test_what_is_no_perceptron(data, model, message):
    with pytest.raises(ValueError, match=message):
        svdlib.joint_profile(model, *data, progress=False)


def test_a_sequential_that_does_more_than_its_steps_is_refused(data):
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    hooked = perceptron(7, 5, 3)
    hooked.register_forward_hook(lambda *call: 2 * call[-1])
    inner = perceptron(7, 5, 3)
    inner[0].register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],))
    for model, message in (
        (Residual(nn.Linear(7, 7)), "this Residual has a forward of its own"),
        (hooked, "this Sequential has hooks"),
        (inner, "layer '0': its hooks would be lost"),
    ):
        with pytest.raises(ValueError, match=message):
            svdlib.joint_profile(model, *data, progress=False)


def test_an_interrupt_leaves_the_model_as_it_was(data, monkeypatch):
    model, threads = perceptron(7, 5, 3).train(), torch.get_num_threads()
    monkeypatch.setattr("tqdm.std.tqdm.update", interrupt := Interrupt())
    with pytest.raises(KeyboardInterrupt):
        svdlib.joint_profile(model, *data, progress=False)
    assert interrupt.called and model.training and torch.get_num_threads() == threads


class Interrupt:
    called = False

    def __call__(self, *arguments):
        self.called = True
        raise KeyboardInterrupt


@pytest.mark.parametrize("callers", [1, 3])
def test_the_number_of_threads_changes_no_bit(data, callers):
    model, usual = perceptron(7, 5, 3), torch.get_num_threads()
    whole = svdlib.joint_profile(model, *data, progress=False)
    try:
        torch.set_num_threads(callers)
        pd.testing.assert_frame_equal(
            whole, svdlib.joint_profile(model, *data, progress=False), rtol=0, atol=0
        )
        assert torch.get_num_threads() == callers
    finally:
        torch.set_num_threads(usual)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu(data):
    model = perceptron(7, 5, 4, 3)
    here = svdlib.joint_profile(model, *data, progress=False)
    there = svdlib.joint_profile(model.cuda(), data[0].cuda(), data[1].cuda(), progress=False)
    pd.testing.assert_frame_equal(here, there, rtol=1e-4, atol=1e-4)


def test_shared_layers_are_refused(data):
    layer = nn.Linear(7, 7)
    for steps in ([layer, layer], [layer, nn.ReLU(), nn.Linear(7, 7)]):
        model = nn.Sequential(*steps)
        if len(steps) == 3:
            model[2].weight = layer.weight
        with pytest.raises(ValueError, match=r"used twice|shared with another layer"):
            svdlib.joint_profile(model, data[0], data[1], progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranks": [-1]}, "a rank of layer '0' must be at least 0"),
        ({"ranks": [1.5]}, "whole number"),
        ({"ranks": {"1": [1]}}, "no layer '1'; the model has 0, 2"),
        ({"ranks": []}, "layer '0' has no ranks"),
    ],
)
def test_bad_ranks(data, given, message):
    with pytest.raises(ValueError, match=message):
        svdlib.joint_profile(perceptron(7, 5, 3), *data, progress=False, **given)


def test_more_combinations_than_anybody_waits_for():
    model = perceptron(200, 200, 200, 200)
    x, y = torch.rand(2, 200), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"201 × 201 × 201 = 8,120,601 combinations .* 100 ranks"):
        svdlib.joint_profile(model, x, y, ranks=range(201), progress=False)
    assert MOST < 8_120_601


def test_nan_is_refused(data):
    model = perceptron(7, 5, 3)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '0'"):
        svdlib.joint_profile(model, *data, progress=False)
    with pytest.raises(ValueError, match="NaN or infinite losses"):
        svdlib.joint_profile(perceptron(7, 5, 3), data[0] * float("inf"), data[1], progress=False)


def test_the_front_is_what_nothing_beats(data):
    joint = svdlib.joint_profile(perceptron(7, 5, 4, 3), *data, progress=False)
    for cost in ("parameters", "multiply_adds"):
        front = svdlib.front(joint, cost)
        best = front[front.excess == 0]
        assert best[cost].is_monotonic_increasing and best.loss.is_monotonic_decreasing
        for row in joint.to_dict("records"):
            cheaper = best[best[cost] <= row[cost]]
            assert cheaper.loss.min() <= row["loss"]
        assert (front.excess <= front.se)[front.excess > 0].all()
    with pytest.raises(ValueError, match="unknown cost"):
        svdlib.front(joint, "seconds")
    with pytest.raises(ValueError, match="the table lacks parameters; see joint_profile"):
        svdlib.front(joint.drop(columns="parameters"))


def test_the_optimum_and_the_walks(data):
    joint = svdlib.joint_profile(perceptron(7, 5, 4, 3), *data, progress=False)
    joint = joint[(joint[["0", "2", "4"]] > 0).all(axis=1)]
    cheapest = svdlib.reveal_ranks(joint, "optimal", increase=joint.increase.min())
    budgets = sorted(set(joint.parameters))
    for budget in budgets[:: max(1, len(budgets) // 9)]:
        able = joint[joint.parameters <= budget]
        at = joint.set_index(["0", "2", "4"])
        found = {
            rule: at.loc[tuple(svdlib.reveal_ranks(joint, rule, parameters=budget).values())]
            for rule in ("optimal", "removal", "gain")
        }
        assert found["optimal"].loss == able.loss.min()
        assert all(row.parameters <= budget for row in found.values())
    least = joint[joint.increase <= joint.increase.min()].parameters.min()
    assert joint.set_index(["0", "2", "4"]).parameters[tuple(cheapest.values())] == least
    for rule in ("optimal", "removal", "gain"):
        with pytest.raises(ValueError, match="no combination of ranks meets the budget; "):
            svdlib.reveal_ranks(joint, rule, parameters=10)
    with pytest.raises(ValueError, match="every combination of the table's ranks, once"):
        svdlib.reveal_ranks(joint[1:], "gain", parameters=100)
    with pytest.raises(ValueError, match="exactly one of them"):
        svdlib.reveal_ranks(joint, "optimal")
    with pytest.raises(ValueError, match=r"takes parameters=…, got increase=0\.1"):
        svdlib.reveal_ranks(joint, "gain", increase=0.1)
    with pytest.raises(ValueError, match=r"exactly one of them, got tolerance=0\.1"):
        svdlib.reveal_ranks(joint, "optimal", tolerance=0.1, parameters=100)
    with pytest.raises(ValueError, match="the table lacks increase, se, parameters"):
        svdlib.reveal_ranks(joint[["0", "2", "4", "loss"]], "optimal", parameters=99)
    for rule in ("optimal", "removal", "gain"):
        with pytest.raises(ValueError, match="more than once; give one network's at a time"):
            svdlib.reveal_ranks(
                pd.concat([joint, joint.assign(loss=joint.loss + 1)]), rule, parameters=1000
            )
    with pytest.raises(ValueError, match="NaN or infinite losses"):
        svdlib.front(joint.assign(loss=float("nan")))


def test_equal_logits_go_to_the_first_class_as_by_argmax():
    """Without biases every logit at rank 0 is 0."""
    model, x = perceptron(7, 5, 3, bias=False), torch.rand(9, 7)
    for label, accuracy in ((0, 100.0), (2, 0.0)):
        joint = svdlib.joint_profile(model, x, torch.full((9,), label), progress=False)
        assert joint.accuracy[0] == accuracy


def test_batches_give_what_tensors_do():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.rand(40, 12), torch.arange(40) % 3
    whole = svdlib.joint_profile(model, x, y, progress=False)
    pair = svdlib.joint_profile(model, (x, y), progress=False)
    pd.testing.assert_frame_equal(pair, whole, check_exact=True)
    loader = DataLoader(TensorDataset(x, y), batch_size=11, shuffle=True)
    state = torch.get_rng_state()
    batched = svdlib.joint_profile(model, loader, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    pd.testing.assert_frame_equal(batched, whole, rtol=1e-5, atol=1e-6)
    assert batched.attrs["loss"] == pytest.approx(whole.attrs["loss"], rel=1e-6)
    for data, message in (
        ([], "the data are empty"),
        ([x], r"takes batches \(inputs, labels\), not float32 \(40, 12\)"),
        (x, r"takes batches \(inputs, labels\), not float32 \(40, 12\)"),
        ([(x, y.float())], "labels must be class numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            svdlib.joint_profile(model, data, progress=False)
