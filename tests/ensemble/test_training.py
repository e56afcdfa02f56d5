import copy
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import svdlib
from svdlib import threads
from svdlib.ensemble import training
from svdlib.ensemble.descent import Step
from svdlib.ensemble.projection import Projection

# Tolerances in float64 are some hundred ε for sums of a dozen terms; in float32 ten times the
# worst seen, on kernels with and without AVX.


def projected(weight, projection):
    """By LAPACK, the best approximation of that rank."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    rank = projection.rank
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def trained_by_torch(net, data, *, epochs, batch_size, lr, optimizer="sgd", schedule="constant",
                     shuffle=False, seed=0, projection=None):  # fmt: skip
    """The same training by autograd and torch's optimizers; each epoch's mean loss."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    stepper = kinds[optimizer](net.parameters(), lr=lr)
    steps = epochs * -(-len(data.train_x) // batch_size)
    if schedule == "cosine":
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, T_max=steps)
    generator = torch.Generator().manual_seed(seed)
    done, means = 0, []
    every = projection and {"epoch": steps // epochs, "step": 1}.get(projection.every)
    every = every or (projection and projection.every)
    for _ in range(epochs):
        order = torch.arange(len(data.train_x))
        if shuffle:
            order = torch.randperm(len(order), generator=generator)
        total = 0.0
        for chosen in order.split(batch_size):
            stepper.zero_grad()
            loss = F.cross_entropy(net(data.train_x[chosen].double()), data.train_y[chosen])
            loss.backward()
            stepper.step()
            if schedule == "cosine":
                scheduler.step()
            done += 1
            if projection and done % every == 0:
                with torch.no_grad():
                    for layer in net[::2]:
                        layer.weight.copy_(projected(layer.weight, projection))
            total += len(chosen) * loss.item()
        means.append(total / len(data.train_x))
    return means


VARIANTS = {
    "paper": {},
    "one last image": {"batch_size": 199},
    "one batch": {"batch_size": 300},
    "cosine": {"schedule": "cosine"},
    "shuffled": {"shuffle": True, "seed": 3},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "all": {"optimizer": "adam", "lr": 0.01, "schedule": "cosine", "shuffle": True},
    "every epoch": {"projection": Projection("truncsvd", 2)},
    "every step": {"projection": Projection("truncsvd", 2, "step")},
    "every third": {"projection": Projection("truncsvd", 2, 3), "optimizer": "adam", "lr": 0.01},
    "wide sketch": {"projection": Projection("rsvd", 2, "step", oversample=6)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["dense", "factors", "one layer"])
def test_training_is_that_of_autograd(blobs, kind, variant):
    """Weights and losses in float64. A sketch as wide as the matrix is its exact projection."""
    settings = {"epochs": 2, "batch_size": 64, "lr": 0.1} | VARIANTS[variant]
    projection = settings.get("projection")
    if kind == "factors":
        if projection:
            pytest.skip("factorized networks take no projection")
        nets = factorized((12, 10, 9, 3), {"0": 4, "2": 2}).double()
    else:
        sizes = (12, 3) if kind == "one layer" else (12, 8, 3)
        nets = svdlib.MLPEnsemble(sizes, seeds=range(3), device="cpu").double()
    single = nets[1]
    history = svdlib.train(nets, blobs, progress=False, **settings)
    means = trained_by_torch(single, blobs, **settings)
    # A warm start is exact to the square of a step's change, the float64 rest to rounding.
    tolerance = 1e-3 if projection and projection.every == "step" else 1e-10
    np.testing.assert_allclose(history[history.network == 1].train_loss, means, rtol=tolerance)
    for ours, theirs in zip(nets[1].parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    last = history[history.epoch == 2].iloc[1]
    z = single(blobs.test_x.double())
    expected = F.cross_entropy(z, blobs.test_y).item()
    assert last.test_loss == pytest.approx(expected, rel=10 * tolerance)
    right = 100 * (z.argmax(1) == blobs.test_y).double().mean().item()
    assert last.accuracy == pytest.approx(right) and last.test_error == 100 - last.accuracy


def test_training_is_the_paper_s_own_way(mnist):
    """Flatten, DataLoader, CrossEntropyLoss, SGD, float32, as the paper's code has it."""
    data = mnist.head(6400, 1000)
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(3), device="cpu")
    model = nn.Sequential(nn.Flatten(), *nets[2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pictures = TensorDataset(data.train_x.view(-1, 1, 28, 28), data.train_y)
    svdlib.train(nets, data, epochs=3, progress=False)
    for _ in range(3):
        for x, y in DataLoader(pictures, batch_size=64):
            optimizer.zero_grad()
            nn.CrossEntropyLoss()(model(x), y).backward()
            optimizer.step()
    for ours, theirs in zip(nets[2].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_history_is_tidy(blobs):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(5, 6), device="cpu")
    history = svdlib.train(
        nets, blobs, epochs=3, projection=[None, Projection("rsvd", 2, 7)], progress=False
    )
    columns = (
        "network seed method rank every epoch train_loss test_loss test_error accuracy seconds"
    )
    assert list(history) == columns.split()
    assert len(history) == 6
    assert history.seed.tolist() == [5, 6] * 3
    assert history.every.dropna().unique().tolist() == [7]
    assert (history.seconds > 0).all()


@pytest.mark.parametrize("method", ["truncsvd", "rsvd"])
@pytest.mark.parametrize("every", ["epoch", "step", 2])
def test_projected_networks_have_the_rank(blobs, method, every):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=range(3), device="cpu")
    svdlib.train(nets, blobs, epochs=1, projection=Projection(method, 2, every), progress=False)
    for weight in nets.weights:
        assert (torch.linalg.matrix_rank(weight, rtol=1e-5) == 2).all()


def test_mixed_projections_are_those_of_separate_runs(blobs):
    """Contiguous or not, networks with a projection of their own do not disturb each other."""
    choices = [None, Projection("truncsvd", 2, "step"), None, Projection("truncsvd", (3, 2))]
    mixed = svdlib.MLPEnsemble((12, 8, 3), seeds=range(4), device="cpu")
    svdlib.train(mixed, blobs, epochs=2, projection=choices, progress=False)
    for i, choice in enumerate(choices):
        alone = svdlib.MLPEnsemble((12, 8, 3), seeds=(i,), device="cpu")
        svdlib.train(alone, blobs, epochs=2, projection=choice, progress=False)
        torch.testing.assert_close(mixed[i](blobs.test_x), alone[0](blobs.test_x))


def test_shuffling_is_seeded_and_off_by_default(blobs):
    def run(**keywords):
        nets = svdlib.MLPEnsemble((12, 3), seeds=(0,), device="cpu")
        svdlib.train(nets, blobs, epochs=2, progress=False, **keywords)
        return nets.weights[0].detach()

    assert torch.equal(run(), run(seed=1))
    assert torch.equal(run(shuffle=True, seed=1), run(shuffle=True, seed=1))
    assert not torch.equal(run(shuffle=True, seed=1), run(shuffle=True, seed=2))
    assert not torch.equal(run(), run(shuffle=True))


def test_parts_are_trained_as_each_network_alone(mnist):
    """Forty networks are cut into parts; the projections and dropout of one are its own."""
    data = mnist.head(640, 100)
    choices = [None, Projection("truncsvd", 3, "step")] * 20
    nets = svdlib.MLPEnsemble((784, 15, 10), seeds=range(40), device="cpu")
    settings = {"epochs": 2, "shuffle": True, "dropout": 0.2, "progress": False}
    with threads.inside(2):
        svdlib.train(nets, data, projection=choices, **settings)
    for i in (0, 1, 19, 20, 39):
        alone = svdlib.MLPEnsemble((784, 15, 10), seeds=(i,), device="cpu")
        svdlib.train(alone, data, projection=choices[i], **settings)
        for ours, theirs in zip(nets[i].parameters(), alone[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 20])
def test_threads_change_no_result_and_are_restored(mnist, count):
    """Bit for bit: the parts depend on sizes alone, and each is done by one thread."""
    data, found = mnist.head(640, 100), []
    before = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(count), device="cpu")
            projection = Projection("rsvd", 3, "step", oversample=2, power_iters=0)
            svdlib.train(nets, data, epochs=2, projection=projection, progress=False)
            assert torch.get_num_threads() == number
            found.append(nets)
            other = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(count), device="cpu")
            with pytest.raises(FloatingPointError):
                svdlib.train(other, data, lr=1e30, progress=False)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0].parameters(), other.parameters()))


@pytest.mark.parametrize("count", [2, 40])
def test_interrupt_keeps_networks_and_rows(blobs, monkeypatch, count):
    calls = []
    take = Step.take

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) >= 10 * count // 2:  # in the third epoch
            raise KeyboardInterrupt
        take(*arguments)

    monkeypatch.setattr(Step, "take", interrupted)
    monkeypatch.setattr(
        training, "shares", lambda *_: ([slice(i, i + 2) for i in range(0, count, 2)], False)
    )
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=range(count), device="cpu")
    before = nets[0]
    with threads.inside(2), pytest.raises(KeyboardInterrupt) as stop:
        svdlib.train(nets, blobs, epochs=5, progress=False)
    assert stop.value.history.epoch.tolist() == [1] * count + [2] * count
    assert nets(blobs.test_x).isfinite().all()
    assert not torch.equal(nets[0][0].weight, before[0].weight), "the steps so far are kept"


def test_ctrl_c_ends_a_training_within_a_step(tmp_path):
    """A signal to the process: no thread goes on, the weights are those of the last whole step."""
    program = """
import os, signal, threading, torch, svdlib
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
nets = svdlib.MLPEnsemble((784, 15, 10), seeds=range(40), device="cpu")
x, y = torch.rand(6400, 784), torch.arange(6400) % 10
data = svdlib.Data("noise", x, y, x[:10], y[:10])
from svdlib.ensemble.descent import Step
take, taken = Step.take, []
def counted(*arguments):
    taken.append(1)
    if len(taken) == 300:
        os.kill(os.getpid(), signal.SIGINT)
    take(*arguments)
Step.take = counted
try:
    svdlib.train(nets, data, epochs=10_000, progress=False)
except KeyboardInterrupt as stop:
    names = [thread.name for thread in threading.enumerate()]
    assert not any("Pool" in name for name in names), names
    assert nets(x).isfinite().all() and len(stop.history) % 40 == 0
    print("kept")
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ, check=False
    )
    assert done.stdout == "kept\n", done.stderr


def test_divergence_is_named_and_rows_are_kept(blobs):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0, 1), device="cpu")
    with pytest.raises(FloatingPointError, match=r"network \d.* at step \d+ of epoch \d") as stop:
        svdlib.train(nets, blobs, epochs=50, lr=1e20, progress=False)
    assert len(stop.value.history) % 2 == 0


@pytest.mark.parametrize("every", ["epoch", "step", 3])
def test_divergence_under_a_projection_is_named_too(blobs, every):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0, 1), device="cpu")
    projection = Projection("truncsvd", 2, every)
    with pytest.raises(FloatingPointError, match="a smaller learning rate may help"):
        svdlib.train(nets, blobs, epochs=3, lr=1e20, projection=projection, progress=False)


def test_bad_weights_name_network_and_layer(blobs):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=range(3), device="cpu")
    with torch.no_grad():
        nets.weights[1][2, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="network 2, layer 1 has NaN"):
        svdlib.train(nets, blobs, progress=False)


def test_bad_data_and_numbers(blobs):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0, 1), device="cpu")

    def refused(message, data=blobs, nets=nets, **keywords):
        before = [p.clone() for p in nets.parameters()]
        with pytest.raises(ValueError, match=message):
            svdlib.train(nets, data, progress=False, **keywords)
        assert all(map(torch.equal, before, nets.parameters()))

    refused(
        "take 9 features but the train images have 12",
        nets=svdlib.MLPEnsemble((9, 3), device="cpu"),
    )
    refused("labels run from 0 to 2; networks with 2", nets=svdlib.MLPEnsemble((12, 2)))
    low = svdlib.Data("low", blobs.train_x, blobs.train_y - 1, blobs.test_x, blobs.test_y)
    refused("labels run from -1", data=low)
    refused("epochs must be at least 1", epochs=0)
    refused("batch_size", batch_size=-1)
    refused("lr must be positive", lr=0.0)
    refused("lr must be positive", lr=float("nan"))
    refused("2 networks need as many projections, not 3", projection=[None] * 3)
    refused("a projection is a svdlib.Projection", projection=["rsvd", None])
    refused("2 layers need 2 ranks", projection=Projection("rsvd", (1, 2, 3)))
    refused("lr must be positive and finite", lr=float("inf"))
    refused("lr must be a number, not '0.1'", lr="0.1")
    refused("dropout must be a number", dropout=None)
    refused("shuffle must be True or False, not 'no'", shuffle="no")
    refused("shuffle must be True or False, not 1", shuffle=1)
    refused("seed must be a whole number", seed="0")
    refused(r"validation must be images and labels, \(x, y\)", validation=blobs.test_x)
    nan = torch.full((2, 12), torch.nan)
    refused("validation_x has NaN", validation=(nan, torch.tensor([0, 1])))
    holes = torch.where(torch.arange(12) == 3, torch.nan, blobs.test_x)
    lacking = svdlib.Data("lacking", blobs.train_x, blobs.train_y, holes, blobs.test_y)
    refused("test_x has NaN", data=lacking)
    with pytest.raises(TypeError, match=r"train takes svdlib\.Data, as load gives it, not tuple"):
        svdlib.train(nets, (blobs.train_x, blobs.train_y))
    nets.requires_grad_(False)
    refused("the networks are frozen")
    with pytest.raises(TypeError, match="train takes an MLPEnsemble, not Sequential"):
        svdlib.train(nets[0], blobs)


def test_the_paper_on_mnist(mnist):
    """After one epoch, 8 seeds: the accuracy that the paper prints lies in their spread."""
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(8), device="cpu")
    history = svdlib.train(nets, mnist, epochs=1, progress=False)
    assert np.min(history.accuracy) < 70 < np.max(history.accuracy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_cpu(mnist):
    small = mnist.head(6400, 1000)
    gpu = svdlib.Data(*[getattr(small, n) if n == "name" else getattr(small, n).cuda()
                        for n in ("name", "train_x", "train_y", "test_x", "test_y")])  # fmt: skip
    losses = []
    for data in (small, gpu):
        nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(3), device=data.device)
        projection = Projection("truncsvd", 10)
        history = svdlib.train(nets, data, epochs=1, projection=projection, progress=False)
        losses.append(history.test_loss.values)
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_trains_factors_as_the_cpu_does(blobs):
    accuracies = []
    for device in ("cpu", "cuda"):
        tensors = (blobs.train_x, blobs.train_y, blobs.test_x, blobs.test_y)
        data = svdlib.Data("blobs", *(tensor.to(device) for tensor in tensors))
        nets = factorized((12, 10, 10, 3), {"0": 5, "2": 4}, count=2).to(device)
        settings = {"optimizer": "adam", "schedule": "cosine", "lr": 0.01, "tail": 0.1}
        history = svdlib.train(nets, data, epochs=4, progress=False, **settings)
        accuracies.append(history.accuracy.values)
    np.testing.assert_allclose(*accuracies, atol=4)


def factorized(sizes, ranks, count=3):
    nets = svdlib.MLPEnsemble(sizes, seeds=range(count), device="cpu")
    return svdlib.MLPEnsemble.from_modules([svdlib.factorize(net, ranks) for net in nets])


def test_tail_lowers_ranks_while_it_trains_and_networks_stay_usable(blobs):
    nets = factorized((12, 10, 10, 3), {"0": 5, "2": 4})
    settings = {"optimizer": "adam", "lr": 0.01, "shuffle": True}
    history = svdlib.train(nets, blobs, epochs=8, tail=0.4, progress=False, **settings)
    ranks = np.array(history["rank"].tolist(), float)
    first = ranks[history.network == 0][:, 0]
    assert (np.diff(first) <= 0).all() and first[-1] < 5
    assert history.method.unique() == ["factorized"] and history.every.unique() == ["epoch"]
    assert history[history.epoch == 8].accuracy.min() > 80
    assert nets.ranks == history[history.epoch == 8]["rank"].tolist()
    for i, net in enumerate(nets):
        torch.testing.assert_close(net(blobs.test_x), nets(blobs.test_x)[i])
    nets(blobs.test_x).sum().backward()  # no tensor is left in inference mode


def test_a_truncation_starts_adam_anew(blobs):
    """It gives the factors new coordinates: two epochs in one call, or in two, are the same."""
    settings = {"optimizer": "adam", "lr": 0.01, "tail": 0.1, "progress": False}
    once, twice = (factorized((12, 10, 10, 3), {"0": 5, "2": 4}) for _ in range(2))
    svdlib.train(once, blobs, epochs=2, **settings)
    for _ in range(2):
        svdlib.train(twice, blobs, epochs=1, **settings)
    assert once.ranks == twice.ranks
    assert all(map(torch.equal, once.parameters(), twice.parameters()))
    dense = [svdlib.MLPEnsemble((12, 8, 3), device="cpu") for _ in range(2)]
    settings.pop("tail")
    svdlib.train(dense[0], blobs, epochs=2, **settings)
    for _ in range(2):
        svdlib.train(dense[1], blobs, epochs=1, **settings)
    assert not torch.equal(dense[0].weights[0], dense[1].weights[0]), (
        "without a truncation it goes on"
    )


def test_validation_keeps_each_network_s_best_epoch(blobs):
    labels = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    noise = replace(blobs, train_y=labels)  # nothing to learn: the error goes up and down
    rest, x, y = noise.hold_out(60)
    for nets in (
        svdlib.MLPEnsemble((12, 8, 3), seeds=range(3), device="cpu"),
        factorized((12, 10, 10, 3), {"0": 5, "2": 4}),
    ):
        history = svdlib.train(
            nets,
            rest,
            epochs=6,
            lr=0.03,
            optimizer="adam",
            batch_size=10,
            tail=0.3 if nets.factorized else None,
            validation=(x, y),
            progress=False,
        )
        least = history.groupby("network").validation_error.min()
        _, correct = nets.losses(x, y)
        ends = 100 - 100 * correct.double().mean(1)
        np.testing.assert_allclose(ends, least)
        assert (least < history[history.epoch == 6].validation_error.values).any()
        nets(x).sum().backward()


def test_bad_settings_of_factors_and_optimizers(blobs):
    dense = svdlib.MLPEnsemble((12, 8, 3), device="cpu")
    thin = factorized((12, 10, 10, 3), {"0": 5, "2": 4})
    for nets, message, given in (
        (dense, "unknown optimizer 'lion'; known: sgd, adam", {"optimizer": "lion"}),
        (copy.deepcopy(dense).half(), "float32 or float64, not torch.float16", {}),
        (dense, "unknown schedule 'step'; known", {"schedule": "step"}),
        (dense, "dropout must be at least 0 and below 1, not 1", {"dropout": 1}),
        (dense, "a tail cuts factorized networks", {"tail": 0.1}),
        (thin, "tail must be between 0 and 1, not 1", {"tail": 1}),
        (dense, "validation_y must be", {"validation": (torch.rand(3, 12), torch.ones(3))}),
        (dense, "validation: 0 images", {"validation": (torch.rand(0, 12), torch.ones(0).long())}),
        (dense, "validation images have 9", {"validation": (torch.rand(3, 9), torch.arange(3))}),
        (dense, "labels 0 to 2", {"validation": (torch.rand(2, 12), torch.tensor([0, 3]))}),
        (thin, "have low rank already", {"projection": Projection("rsvd", 2)}),
    ):
        with pytest.raises(ValueError, match=message):
            svdlib.train(nets, blobs, progress=False, **given)


@pytest.mark.parametrize("every", ["epoch", "step", 3])
@pytest.mark.parametrize("sizes", [(12, 8, 6, 3), (12, 70, 3)])
def test_blocks_of_seeds_put_together_are_one_run_of_all(blobs, sizes, every):
    """A network's sketches are its own, whatever networks are trained beside it."""

    def trained(seeds):
        nets = svdlib.MLPEnsemble(sizes, seeds=seeds, device="cpu").double()
        choices = [svdlib.Projection("rsvd", 3, every, 1, 1), None] * (len(seeds) // 2)
        svdlib.train(nets, blobs, epochs=2, projection=choices, shuffle=True, progress=False)
        return nets.weights[0].detach()

    total, first, last = (trained(seeds) for seeds in ([0, 0, 1, 1, 2, 2], [0, 0], [2, 2, 1, 1]))
    torch.testing.assert_close(first, total[:2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, total[[4, 5, 2, 3]], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(total[0], total[1]), "no projection took place"


@pytest.mark.parametrize(
    ("projection", "words"),
    [
        (None, "2 networks, 1 epoch:"),
        (Projection("rsvd", 2, "step"), "2 networks, rsvd of rank 2 every step, 1 epoch:"),
        ([None, Projection("rsvd", 2, "step")], "2 networks, 2 ways, 1 epoch:"),
    ],
)
def test_the_bar_says_what_is_trained(blobs, projection, words, capsys):
    nets = svdlib.MLPEnsemble((12, 5, 3), seeds=(0, 1), device="cpu")
    svdlib.train(nets, blobs, epochs=1, projection=projection)
    bar = capsys.readouterr().err.split("\r")[-1]
    assert bar.startswith(words) and "100%" in bar
