"""Other ways to the loss at every rank of every layer, to measure `loss_profile` against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from svdlib import clock
from svdlib.ensemble.networks import perceptron
from svdlib.network.kinds import stored
from svdlib.network.opened import find_layers
from svdlib.ranks.joint import MOST
from svdlib.ranks.profile import loss_profile, search_ranks
from svdlib.study.rivals.timing import product_rate
from svdlib.study.running import inputs


def profile_race(sizes: Sequence[int], x: Tensor, y: Tensor, sample: int = 6) -> dict[str, float]:
    """Seconds of the loss profile of a perceptron, at every rank of every layer.

    The paper takes an SVD per rank, "one SVD" one per layer; both are timed at ``sample`` ranks per
    layer and scaled to all. The bound is the products behind each layer alone.
    """
    torch.manual_seed(0)
    model = perceptron(sizes).to(x.device)
    times = {"paper": 0.0, "one SVD": 0.0}
    for name, layer in find_layers(model).items():
        weight = layer.weight.detach()
        count = min(weight.shape) + 1
        svd = clock.median(partial(torch.linalg.svd, weight, full_matrices=False), 1)
        ranks = torch.linspace(0, count - 1, sample).long().tolist()
        passes = partial(_forward_passes, model, name, ranks, x, y)
        factors = torch.linalg.svd(weight, full_matrices=False)
        forward = clock.median(partial(passes, *factors), 1) / sample
        times["paper"] += count * (svd + forward)
        times["one SVD"] += svd + count * forward
    loss_profile(model, x, y, ranks=(1,), progress=False)  # the warm-up
    search = partial(search_ranks, model, x, y, lambda rows: rows.increase <= rows.se)
    times["nested"] = clock.median(partial(loss_profile, model, x, y, progress=False), 1, warmup=0)
    times["search"] = clock.median(search, 1, warmup=0)
    work = behind = 0  # operations per image, of the layers behind the current one and by rank
    for m, n in reversed(list(pairwise(sizes))):
        work += (min(m, n) + 1) * behind
        behind += 2 * m * n
    times["bound"] = work * len(x) / product_rate(x.device)
    return times


@torch.no_grad()
def _forward_passes(
    model: nn.Module, name: str, ranks: Sequence[int], x: Tensor, y: Tensor, *factors: Tensor
) -> None:
    U, S, Vh = factors
    for rank in ranks:
        weight = {f"{name}.weight": U[:, :rank] * S[:rank] @ Vh[:rank]}
        z = torch.func.functional_call(model, weight, (x,))
        nn.functional.cross_entropy(z, y).item()


@inputs.refusing(
    whole="seeds graded epochs validation wide_epochs wide_images bench_images",
    wholes="wide_ranks",
    widths="sizes",
    widths_or_none="wide",
    networks="bench",
    shares="shares",
    positive="tolerance",
)
def check(
    sizes: Sequence[int], shares: Sequence[float], wide: Sequence[int], wide_ranks: Sequence[int]
) -> None:
    """Refuse what 06_rank_revealer could not use."""
    layers = list(pairwise(sizes))
    full = sum(n * m + m for n, m in layers)
    smallest = sum(stored(1, m, n) + m for n, m in layers)
    for share in shares:
        if int(share * full) < smallest:
            least = math.ceil(1000 * smallest / full) / 1000
            why = f"what {list(sizes)} keeps of its parameters at rank 1"
            raise ValueError(f"each of shares must be at least {least}, {why}, not {share}")
    inputs.few_combinations(sizes)
    number = math.prod(len({min(rank, *layer) for rank in wide_ranks}) for layer in pairwise(wide))
    if number > MOST:
        most = f"{MOST:,} combinations over the layers of {list(wide)}"
        raise ValueError(f"wide_ranks must have at most {most}, not {number:,}")
