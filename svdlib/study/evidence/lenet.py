"""LeNet-5 of a given size: narrower, cut, or in factors while it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from svdlib import checks, threads
from svdlib.bars import bar
from svdlib.data import Data
from svdlib.layers.adapt import LowRankTraining, truncate_
from svdlib.layers.factorize import factorize
from svdlib.layers.project import project_
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.low_rank import ranks_of as ranks
from svdlib.study.evidence.statistics import prediction, welch, with_interval
from svdlib.study.running import inputs

BATCH, WARMUP = 128, 0.2  # images per step, and the share of steps in which the rate rises
CLIP = 1.0  # the largest norm of a gradient, without which some factors diverge
SMALLEST, LARGEST = 5_000, 148_790  # weights that all ways can have
THIN = {"0": 10, "3": 25, "7": 100, "9": 9}  # the first ranks
METHODS = (
    "dense",
    "narrow",
    "adaptive factors",
    "fixed factors",
    "cut",
    "cut, trained on",
    "projected",
)


def lenet(seed: int, widths: Sequence[int] = (20, 50, 500)) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) of Caffe's widths, with a ReLU after every hidden layer.

    >>> weights(lenet(0)), weights(lenet(0, (4, 10, 100)))
    (430500, 18100)
    """
    a, b, c = widths
    with threads.same_random():
        torch.manual_seed(seed)
        model = nn.Sequential(
            *(nn.Conv2d(1, a, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(a, b, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(16 * b, c), nn.ReLU(), nn.Linear(c, 10)),
        )
    return model


def weights(model: nn.Module) -> int:
    """The numbers in a model's matrices and kernels; biases are not counted."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)


def biases(model: nn.Module) -> int:
    """The numbers in a model's other parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)


def narrow(budget: int) -> tuple[int, int, int]:
    """Widths of a `lenet` with at most this many weights.

    The first two are the same share of the full ones, and the third is as large as then fits.

    >>> narrow(17_871), weights(lenet(0, narrow(17_871)))
    ((4, 10, 98), 17760)
    """
    widths = (1, 2, 1)
    for step in range(20, 501):
        a, b = round(step / 25), round(step / 10)
        c = (budget - 25 * a - 25 * a * b) // (16 * b + 10)
        if c < step:  # the third width would be less than the same share
            break
        widths = a, b, min(c, 500)
    return widths


def cut(model: nn.Module, budget: int) -> nn.Module:
    """A factorized copy with at most this many weights, see `truncate_`."""
    thin = factorize(model, THIN)
    truncate_(thin, parameters=budget + biases(thin))
    return thin


@torch.no_grad()
def factors(seed: int, ranks: Mapping[str, int]) -> nn.Module:
    """An untrained `lenet` in factors, spectrally initialized, of the dense weights' norms.

    Truncation takes most of a random matrix's norm, and with it the signal and the gradients.
    """
    dense = lenet(seed)
    thin, full = factorize(dense, ranks), dict(dense.named_parameters())
    for name, layer in low_rank_layers(thin).items():
        lost = full[f"{name}.weight"].norm() / layer.weight.norm()
        for factor in layer.factors:
            factor.weight.mul_(lost.sqrt())
    return thin


def images(x: Tensor) -> Tensor:
    """Images (n, 784) as (n, 1, 28, 28), in the memory layout in which convolutions are fast."""
    return x.reshape(-1, 1, 28, 28).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The percentage of images that a model classifies correctly."""
    right = [model(images(part)).argmax(1) for part in x.split(1000)]
    return 100 * (torch.cat(right) == y).double().mean().item()


def fit(
    model: nn.Module,
    data: Data,
    epochs: range,
    total: int,
    lr: float,
    seed: int,
    plan: LowRankTraining | None = None,
    each_epoch: Callable[[nn.Module], object] | None = None,
) -> nn.Module:
    """Train a model in place for some epochs of a schedule of ``total`` epochs.

    SGD with Nesterov momentum 0.9. The learning rate rises to ``lr`` in the first fifth of all
    steps and falls to zero, both linearly. Gradients are cut to norm `CLIP`. A seed gives the order
    of the images in each epoch.
    """
    model.to(data.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)
    if plan is not None:
        plan.attach(model, optimizer)
    x, y = images(data.train_x), data.train_y
    steps = total * -(-len(x) // BATCH)
    for epoch in epochs:
        generator = torch.Generator().manual_seed(1000 * seed + epoch)
        order = torch.randperm(len(x), generator=generator).to(x.device).split(BATCH)
        for step, chosen in enumerate(order, epoch * len(order)):
            rising, falling = (step + 1) / (WARMUP * steps), (1 - step / steps) / (1 - WARMUP)
            optimizer.param_groups[0]["lr"] = lr * min(rising, falling)
            optimizer.zero_grad()
            cross_entropy(model(x[chosen]), y[chosen]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
        if each_epoch is not None:
            each_epoch(model)
    return model


def ways(data: Data, seed: int, epochs: int, lr: float) -> dict[str, Callable[[int], nn.Module]]:
    """Functions of a budget of weights, which train a network from one seed in these ways.

    All train for equally many epochs, with the same images in each step.

    - "dense": of any size.
    - "narrow": dense, with fewer channels and neurons.
    - "adaptive factors": `factors` of `THIN` ranks from the start, cut after every epoch by
      `LowRankTraining`, whose budget falls to its value in the first half of the epochs.
    - "fixed factors": `factors` from the start, of the ranks that "adaptive factors" end with.
    - "cut": the dense network, cut after training.
    - "cut, trained on": cut after half of the epochs, then trained as factors.
    - "projected": dense weights, projected to the ranks of a cut after every epoch.
    """
    half, every = epochs // 2, -(-len(data.train_x) // BATCH)

    def learn(model: nn.Module, first: int = 0, last: int = epochs, **changes: Any) -> nn.Module:
        return fit(model, data, range(first, last), epochs, lr, seed, **changes)

    @cache
    def early() -> nn.Module:
        return learn(lenet(seed), last=half)

    @cache
    def dense() -> nn.Module:
        return learn(copy.deepcopy(early()), first=half)

    @cache
    def adaptive(budget: int) -> nn.Module:
        thin = factors(seed, THIN)
        limit = budget + biases(thin)
        plan = LowRankTraining(parameters=limit, every=every, within=every * half)
        return learn(thin, plan=plan)

    def projected(budget: int) -> nn.Module:
        project = lambda model: project_(model, ranks(cut(model, budget)))
        return cut(learn(lenet(seed), each_epoch=project), budget)

    return {
        "dense": lambda _: dense(),
        "narrow": lambda budget: learn(lenet(seed, narrow(budget))),
        "adaptive factors": adaptive,
        "fixed factors": lambda budget: learn(factors(seed, ranks(adaptive(budget)))),
        "cut": lambda budget: cut(dense(), budget),
        "cut, trained on": lambda budget: learn(cut(early(), budget), first=half),
        "projected": projected,
    }


def table(
    data: Data,
    seeds: Sequence[int],
    methods: Sequence[str],
    budgets: Sequence[int],
    epochs: int,
    lr: float,
    validation: int,
    *,
    progress: bool = True,
) -> pd.DataFrame:
    """A row per network of `ways`: method, budget, seed, weights, ranks, validation, accuracy.

    Accuracies are in percent: on held-out training images, and on the test images.
    """
    data, x, y = data.hold_out(validation)
    plan = [
        (method, budget)
        for method in methods
        for budget in (budgets if method != "dense" else [weights(lenet(0))])
    ]
    found = (
        (method, budget, seed, way[method](budget))
        for seed in seeds
        for way in [ways(data, seed, epochs, lr)]
        for method, budget in plan
    )
    rows, total = [], len(seeds) * len(plan)
    for method, budget, seed, model in bar(found, progress=progress, desc="networks", total=total):
        row = {"method": method, "budget": budget, "seed": seed, "weights": weights(model)}
        row["ranks"] = "-".join(map(str, ranks(model).values()))
        row["validation"] = accuracy(model, x, y)
        rows.append(row | {"accuracy": accuracy(model, data.test_x, data.test_y)})
    return pd.DataFrame(rows)


def against(own: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Beside each published row, our networks of the largest budget with no more weights.

    A published mean of several runs is compared by `welch`, and a single run by the `prediction`
    interval of one more run of ours. ``above``: the 95% interval lies above zero.
    """
    rows = []
    for row in published.to_dict("records"):
        budgets = own.budget[own.budget <= row["weights"]]
        ours = own[own.budget == budgets.max()]
        if len(ours) < 2:
            continue
        if row["n"] > 1:
            more = welch(ours.accuracy, row["accuracy"], row["sd"], row["n"])
        else:
            more = prediction(ours.accuracy)
            more[["mean", "low", "high"]] -= row["accuracy"]
        columns = {name: row[name] for name in ("method", "choice", "n", "accuracy", "weights")}
        rows.append(
            {
                **columns,
                "our weights": int(ours.weights.max()),
                "our accuracy": ours.accuracy.mean(),
                "our n": len(ours),
                "difference (points)": with_interval(more),
                "above": more["low"] > 0,
            }
        )
    return pd.DataFrame(rows)


@inputs.refusing(
    whole="validation seeds epochs",
    from_zero="first_seed",
    positive="lr",
    wholes="budgets",
    names="methods",
)
def check(
    methods: Sequence[str], budgets: Sequence[int], epochs: int, train_images: int, validation: int
) -> None:
    """Refuse what notebook 12 could not use."""
    for method in methods:
        checks.one_of(method, METHODS, "each of methods")
    for budget in budgets:
        if not SMALLEST <= budget <= LARGEST:
            raise ValueError(
                f"each of budgets must be from {SMALLEST:,} to {LARGEST:,} weights, got {budget:,}"
            )
    if epochs < 2:
        raise ValueError(f"epochs must be at least 2, half of them before a cut, got {epochs}")
    inputs.at_most(
        "validation",
        validation,
        train_images - BATCH,
        "so that images are left to train on",
        "train_images",
    )
