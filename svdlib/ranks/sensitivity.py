"""The loss that layers add: each alone at some of its ranks, and all as they were cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pandas as pd
from torch import nn

from svdlib.bars import bar
from svdlib.layers.cost import WHOLE_MODEL
from svdlib.network.kinds import Layer
from svdlib.network.low_rank import low_rank_layers
from svdlib.network.task import Task
from svdlib.ranks.profile import profile_of

# Ranks per layer at which the loss is measured; between them it is interpolated.
GRID = 10
# Weight of the output's whole error beside the largest rise of the loss.
LITTLE = 1e-3


def sensitivities(
    task: Task,
    layers: Mapping[str, Layer],
    lost: Mapping[str, np.ndarray],
    description: str,
    progress: bool,
) -> dict[str, np.ndarray]:
    """The rise of the loss at ranks 0, 1, … of each layer alone, measured at some of them.

    Where a higher rank makes the loss no better, the share ``lost`` of the layer's output decides.
    """
    rises: dict[str, np.ndarray] = {}
    with bar(progress=progress, desc=description, leave=False) as shown:
        for name, layer in layers.items():
            limit, full = max(1, layer.max_factor_rank), layer.full_rank
            grid = np.unique(np.linspace(1, limit, GRID).round().astype(int)).tolist()
            table = profile_of(task, {name: layer}, grid, progress=False)
            ranks, increases = [*table["rank"], full], [*table["increase"], 0.0]
            rise = np.interp(np.arange(full + 1), ranks, increases)
            rises[name] = np.minimum.accumulate(rise).clip(min=0)
            shown.update()
    share = LITTLE * (max(rise.max() for rise in rises.values()) or 1.0)
    return {name: rise + share * lost[name] for name, rise in rises.items()}


def added_losses(task: Task, small: nn.Module, single: bool, progress: bool) -> pd.DataFrame:
    """loss_added and se of each layer of a small copy (if ``single``) and of the whole model."""
    net, thin = task.net, low_rank_layers(small)
    ties = {name: group for group in net.ties for name in group}
    names = list(thin) if single else []

    def variants() -> Iterator[AbstractContextManager[nn.Module | None]]:
        for name in names:
            yield net.with_modules({tied: thin[tied] for tied in ties.get(name, [name])})
        yield nullcontext(small)

    with net.measuring(small):
        means = task.means(variants, len(names) + 1, progress)
    losses = pd.DataFrame(
        {"loss_added": means["increase"][1:], "se": means["se"][1:]}, index=[*names, WHOLE_MODEL]
    )
    for name, loss in losses.loss_added.items():
        if not math.isfinite(loss):
            found = {key: layer.rank for key, layer in thin.items() if name in (key, WHOLE_MODEL)}
            raise ValueError(f"ranks {found} give NaN or infinite losses on these data")
    return losses
