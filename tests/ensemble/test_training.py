from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import svdlib
from svdlib.ensemble import descent
from svdlib.ensemble import projection as projecting
from svdlib.ensemble.descent import Step, descend_
from svdlib.ensemble.projection import Projection, project_stacks_

# Tolerances in float64 are some hundred ε for sums of a dozen terms; in float32 ten times the
# worst seen, on kernels with and without AVX.


def autograd_step(net, x, y, lr):
    loss = F.cross_entropy(net(x), y)
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter -= lr * gradient
    return loss.item()


@pytest.mark.parametrize("sizes", [(6, 3), (6, 5, 3), (6, 5, 4, 3), (6, 7, 5, 4, 3)])
def test_a_step_is_that_of_autograd(sizes, generator):
    nets = svdlib.MLPEnsemble(sizes, seeds=range(4), device="cpu").double()
    singles = list(nets)
    x = torch.rand(9, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (9,), generator=generator)
    losses = torch.zeros(4, dtype=torch.float64)
    weights = [w.detach() for w in nets.weights]
    biases = [b.detach().unsqueeze(-1) for b in nets.biases]
    with torch.no_grad():
        descend_(weights, biases, x, F.one_hot(y, 3).T.double().contiguous(), -0.1, losses)
    for i, single in enumerate(singles):
        loss = autograd_step(single, x, y, 0.1)
        assert losses[i].item() / 9 == pytest.approx(loss, rel=1e-13)
        for ours, theirs in zip(nets[i].parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-13)


def test_training_is_that_of_torch(blobs):
    """Losses, errors and weights, the smaller last batch included."""
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0, 1), device="cpu")
    single = nets[1]
    history = svdlib.train(nets, blobs, epochs=2, batch_size=64, lr=0.1, progress=False)
    for epoch in (1, 2):
        total = 0.0
        for x, y in zip(blobs.train_x.split(64), blobs.train_y.split(64), strict=True):
            total += len(x) * autograd_step(single, x, y, 0.1)
        row = history[(history.network == 1) & (history.epoch == epoch)].iloc[0]
        z = single(blobs.test_x)
        assert row.train_loss == pytest.approx(total / 200, rel=1e-5)
        assert row.test_loss == pytest.approx(F.cross_entropy(z, blobs.test_y).item(), rel=1e-5)
        assert row.accuracy == pytest.approx(
            100 * (z.argmax(1) == blobs.test_y).double().mean().item()
        )
        assert row.test_error == pytest.approx(100 - row.accuracy)
    torch.testing.assert_close(nets[1][0].weight, single[0].weight)


def test_history_is_tidy(blobs):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(5, 6), device="cpu")
    history = svdlib.train(
        nets, blobs, epochs=3, projection=[None, Projection("rsvd", 2, 7)], progress=False
    )
    assert list(history) == [
        "network",
        "seed",
        "method",
        "rank",
        "every",
        "epoch",
        "train_loss",
        "test_loss",
        "test_error",
        "accuracy",
        "seconds",
    ]
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


def test_warm_start_gives_the_exact_projection(mnist, monkeypatch):
    """Every step by warm subspace iteration, against eigenvectors every step."""
    data = mnist.head(64 * 100, 200)
    runs = []
    for exact in (False, True):
        if exact:
            monkeypatch.setattr(projecting, "project_stacks_", lambda *a: project_stacks_(*a[:4]))
        nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(3), device="cpu")
        svdlib.train(
            nets, data, epochs=1, projection=Projection("truncsvd", 10, "step"), progress=False
        )
        runs.append(nets(data.test_x))
    torch.testing.assert_close(*runs, atol=2e-4, rtol=0)


def test_shuffling_is_seeded_and_off_by_default(blobs):
    def run(**keywords):
        nets = svdlib.MLPEnsemble((12, 3), seeds=(0,), device="cpu")
        svdlib.train(nets, blobs, epochs=2, progress=False, **keywords)
        return nets.weights[0].detach()

    assert torch.equal(run(), run(seed=1))
    assert torch.equal(run(shuffle=True, seed=1), run(shuffle=True, seed=1))
    assert not torch.equal(run(shuffle=True, seed=1), run(shuffle=True, seed=2))
    assert not torch.equal(run(), run(shuffle=True))


def test_random_state_and_threads_are_left_alone(blobs):
    torch.manual_seed(0)
    expected, threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(0)
    nets = svdlib.MLPEnsemble((12, 8, 3), device="cpu")
    svdlib.train(nets, blobs, epochs=1, projection=Projection("rsvd", 2), progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


def test_interrupt_keeps_networks_and_rows(blobs, monkeypatch):
    calls = []

    def interrupted(*arguments, **named):
        calls.append(1)
        if len(calls) == 10:  # in the third epoch of four steps
            raise KeyboardInterrupt
        descend_(*arguments, **named)

    monkeypatch.setattr(descent, "descend_", interrupted)
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0, 1), device="cpu")
    with pytest.raises(KeyboardInterrupt) as stop:
        svdlib.train(nets, blobs, epochs=5, progress=False)
    assert stop.value.history.epoch.tolist() == [1, 1, 2, 2]
    assert nets(blobs.test_x).isfinite().all()


def test_divergence_is_named_and_rows_are_kept(blobs):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0, 1), device="cpu")
    with pytest.raises(FloatingPointError, match=r"network \d.* at step \d+ of epoch \d") as stop:
        svdlib.train(nets, blobs, epochs=50, lr=1e20, progress=False)
    assert len(stop.value.history) % 2 == 0


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

    refused("take 9 features but blobs has 12", nets=svdlib.MLPEnsemble((9, 3), device="cpu"))
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


def test_the_paper_on_mnist(mnist):
    """After one epoch, 8 seeds: the accuracy that the paper prints lies in their spread."""
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(8), device="cpu")
    history = svdlib.train(nets, mnist, epochs=1, progress=False)
    assert np.min(history.accuracy) < 70 < np.max(history.accuracy)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [None, "truncsvd", "rsvd"])
def test_no_synchronisation_inside_a_step(method):
    device = torch.device("cuda")
    nets = svdlib.MLPEnsemble((784, 15, 15, 10), seeds=range(4), device=device)
    weights = [w.detach() for w in nets.weights]
    biases = [b.detach().unsqueeze(-1) for b in nets.biases]
    x, y = torch.rand(64, 784, device=device), torch.zeros(10, 64, device=device)
    y[0] = 1
    g, losses = torch.Generator(device).manual_seed(0), torch.zeros(4, device=device)
    projection = Projection(method, 10, "step", oversample=2) if method else None
    bases = None
    with torch.no_grad():
        if projection:  # the first projection is cold: it solves an eigenvalue problem
            bases = project_stacks_(weights, [10] * 3, projection, g)
        torch.cuda.set_sync_debug_mode("error")
        try:
            descend_(weights, biases, x, y, -0.01, losses)
            if projection:
                project_stacks_(weights, [10] * 3, projection, g, bases)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert losses.isfinite().all()


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


def test_a_step_of_factors_is_that_of_autograd(generator):
    nets = factorized((12, 10, 9, 3), {"0": 4, "2": 2}).double()
    singles = list(nets)
    x = torch.rand(9, 12, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (9,), generator=generator)
    losses = torch.zeros(3, dtype=torch.float64)
    step = Step(nets, "sgd", dropout=0.0)
    with torch.no_grad():
        descend_(
            step.weights, step.biases, x, F.one_hot(y, 3).T.double().contiguous(), -0.1, losses
        )
    for i, single in enumerate(singles):
        assert losses[i].item() / 9 == pytest.approx(autograd_step(single, x, y, 0.1), rel=1e-13)
        for ours, theirs in zip(nets[i].parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-12)


def test_adam_and_cosine_are_torch_s(blobs):
    nets = svdlib.MLPEnsemble((12, 8, 3), seeds=(0, 1), device="cpu")
    single = nets[1]
    optimizer = torch.optim.Adam(single.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    settings = {"lr": 0.01, "optimizer": "adam", "schedule": "cosine", "batch_size": 50}
    svdlib.train(nets, blobs, epochs=2, progress=False, **settings)
    for _ in range(2):
        for x, y in zip(blobs.train_x.split(50), blobs.train_y.split(50), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(single(x), y).backward()
            optimizer.step()
            schedule.step()
    for ours, theirs in zip(nets[1].parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_dropout_has_the_gradient_of_the_network_it_left(monkeypatch, generator):
    """Against autograd through the same masks; inputs are dropped too."""
    masks = []

    def noted(x, dropout, generator):
        masks.append(x.new_empty(x.shape[-2:]).bernoulli_(1 - dropout, generator=generator))
        return x.mul_(masks[-1]).div_(1 - dropout)

    monkeypatch.setattr(descent, "_drop_", noted)
    nets = svdlib.MLPEnsemble((6, 8, 3), device="cpu").double()
    single = nets[0]
    x = torch.rand(40, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (40,), generator=generator)
    weights = [w.detach() for w in nets.weights]
    biases = [b.detach().unsqueeze(-1) for b in nets.biases]
    one_hot = F.one_hot(y, 3).T.double().contiguous()
    loss = torch.zeros(1, dtype=torch.float64)
    with torch.no_grad():
        descend_(weights, biases, x, one_hot, -0.1, loss, dropout=0.5, generator=generator)
    assert 0.3 < masks[0].mean() < 0.7
    hidden = single[0](x * masks[0] * 2).relu() * masks[1].T * 2
    expected = F.cross_entropy(single[2](hidden), y)
    assert loss.item() / 40 == pytest.approx(expected.item(), rel=1e-12)
    parameters = list(single.parameters())
    for ours, old, gradient in zip(
        nets[0].parameters(), parameters, torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, old - 0.1 * gradient, atol=1e-14, rtol=1e-12)


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


def test_a_cut_starts_adam_anew(blobs):
    """The cut gives the factors new coordinates: two epochs in one call, or in two, are the same."""
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
    assert not torch.equal(dense[0].weights[0], dense[1].weights[0]), "without a cut it goes on"


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
        (dense, "unknown schedule 'step'; known", {"schedule": "step"}),
        (dense, "dropout must be at least 0 and below 1, not 1", {"dropout": 1}),
        (dense, "a tail cuts factorized networks", {"tail": 0.1}),
        (thin, "tail must be between 0 and 1, not 1", {"tail": 1}),
        (dense, "validation must be images", {"validation": (torch.rand(3, 9), torch.ones(3))}),
        (dense, "validation must be images", {"validation": (torch.rand(0, 12), torch.ones(0))}),
        (dense, "from 0 to 2", {"validation": (torch.rand(2, 12), torch.tensor([0, 3]))}),
        (thin, "have low rank already", {"projection": Projection("rsvd", 2)}),
    ):
        with pytest.raises(ValueError, match=message):
            svdlib.train(nets, blobs, progress=False, **given)
