"""The loss that a network's layers add: each alone at some of its ranks, and all as they were cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pandas as pd
from torch import nn

from svdlib.bars import bar
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.opened import Network
from svdlib.network.task import Task
from svdlib.ranks.profile import profile_of

# The ranks of a layer at which its loss is measured; between them it is drawn straight.
GRID = 10

# What the output's whole error counts for beside the largest rise of the loss.
LITTLE = 1e-3


def sensitivities(
    task: Task,
    layers: Mapping[str, Layer],
    lost: Mapping[str, np.ndarray],
    seconds: float,
    progress: bool,
) -> dict[str, np.ndarray]:
    """What the loss rises by at each rank of each layer alone, measured at some of them.

    Where a higher rank makes the loss no better, the output's error decides.

    Args:
        lost: the share of its output's variance that each layer loses at ranks 0, 1, …
        seconds: how long it will take, for the progress bar.
    """
    rises: dict[str, np.ndarray] = {}
    description = f"profile, about {seconds:.0f} s"
    with bar(total=len(lost), progress=progress, desc=description, leave=False) as shown:
        for name, layer in layers.items():
            limit, full = max(1, layer.max_factor_rank), layer.full_rank
            grid = np.unique(np.linspace(1, limit, GRID).round().astype(int)).tolist()
            table = profile_of(task, {name: layer}, grid, progress=False)
            ranks, rise = [*table["rank"], full], [*table["increase"], 0.0]
            rises[name] = np.interp(np.arange(full + 1), ranks, rise)
            shown.update()
    falling = {name: np.minimum.accumulate(rise).clip(min=0) for name, rise in rises.items()}
    share = LITTLE * (max(each.max() for each in falling.values()) or 1.0)
    return {name: each + share * lost[name] for name, each in falling.items()}


def added_losses(
    net: Network,
    small: nn.Module,
    ranks: Mapping[str, int],
    task: Task,
    single: bool,
    progress: bool,
) -> pd.DataFrame:
    """The loss that a small copy of the network adds, and its standard error, paired.

    Args:
        ranks: of its factorized layers.
        single: whether to measure also what each of them adds alone.

    Returns:
        columns loss_added and se; a row a layer, and one for the whole model.

    Raises:
        ValueError: NaN or infinite losses.
    """
    thin = low_rank_layers(small)
    groups = {name: group for group in net.ties for name in group}
    names = list(thin) if single else []

    def variants() -> Iterator[AbstractContextManager[nn.Module | None]]:
        for name in names:
            yield net.with_modules({each: thin[each] for each in groups.get(name, [name])})
        yield nullcontext(small)

    with net.measuring(small):
        means = task.means(variants, len(names) + 1, progress)
    losses = pd.DataFrame(
        {"loss_added": means["increase"][1:], "se": means["se"][1:]}, index=[*names, "whole model"]
    )
    for name, loss in losses.loss_added.items():
        if not math.isfinite(loss):
            found = dict(ranks) if name == "whole model" else {name: thin[str(name)].rank}
            raise ValueError(f"ranks {found} give NaN or infinite losses on these data")
    return losses
