"""What a network costs to store and to run, dense against factorized."""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks, clock, threads
from svdlib.layers.factorize import merge
from svdlib.layers.kinds import LowRank, evaluating, hooked, whole_layers

WHOLE = "whole model"


@threads.plain()
@torch.no_grad()
def cost(model: nn.Module, x: Tensor, *, repeats: int = 20) -> pd.DataFrame:
    """Parameters, bytes, multiply-adds and measured seconds, by layer and in all.

    The model runs in evaluation mode on the inputs ``x``, turn by turn with its dense twin
    (`merge`), so that whatever disturbs the machine disturbs both. Seconds are medians after a
    run that is not counted; a layer's are those of its own forward call, and the whole model's
    are measured in runs of their own, without the clock between layers.

    Args:
        model: any module; its Linear, Conv2d and `LowRank` layers have a row each.
        x: inputs of the size whose latency matters, on the model's device.
        repeats: timed runs.

    Returns:
        a row a layer, and at last ``"whole model"``: layer, rank (of a factorized layer, else
        NaN), parameters, bytes, multiply_adds (for all of ``x``), seconds, and for the dense
        twin dense_parameters, dense_bytes, dense_multiply_adds, dense_seconds. Parameters of
        other layers are in the whole model's row; multiply-adds are those of the layers listed.

    Raises:
        ValueError: empty inputs, repeats below 1.

    >>> from svdlib import factorize
    >>> small = factorize(nn.Sequential(nn.Linear(100, 80)), 10)
    >>> table = cost(small, torch.rand(3, 100), repeats=1).set_index("layer")
    >>> table.loc["0", ["parameters", "multiply_adds", "dense_multiply_adds"]].tolist()
    [1880, 5400, 24000]
    """
    repeats = checks.positive_int(repeats, "repeats")
    if len(x) == 0:
        raise ValueError("the inputs are empty; give as many as matter, at least one")
    twins = {"": model, "dense_": merge(model)}
    tables = {prefix: _measured(twin, x) for prefix, twin in twins.items()}
    runs: dict[str, list[dict[str, float]]] = {prefix: [] for prefix in twins}
    for _ in range(1 + repeats):
        for prefix, twin in twins.items():
            runs[prefix].append(_seconds(twin, x))
    for prefix, table in tables.items():
        timed = pd.DataFrame(runs[prefix][1:]).median()
        table["seconds"] = timed.reindex(table.index)
    table = tables[""].join(tables["dense_"].drop(columns="rank").add_prefix("dense_"))
    return table.rename_axis("layer").reset_index()


def latency(model: nn.Module, x: Tensor, repeats: int = 50) -> float:
    """The median seconds of a forward call in evaluation mode, after one that is not counted.

    >>> latency(nn.Linear(3, 2), torch.rand(1, 3), repeats=3) < 1
    True
    """
    with torch.no_grad(), evaluating(model):
        return clock.median(partial(model, x), repeats, device=x.device)


def _measured(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """All that needs no clock, by layer."""
    layers = whole_layers(model)
    work = dict.fromkeys(layers, 0)

    def note(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # As many products with the matrix, or with both factors, as the output has places.
        layer = layers[name]
        factors = layer.factors if isinstance(layer, LowRank) else (layer,)
        places = output.numel() // len(factors[-1].weight)
        work[name] += places * sum(factor.weight.numel() for factor in factors)

    with evaluating(model), hooked(layers, after=note):
        model(x)
    rows = []
    for name, part in {**layers, WHOLE: model}.items():
        parameters = list(part.parameters())
        rows.append(
            {
                "layer": name,
                "rank": float(part.rank) if isinstance(part, LowRank) else float("nan"),
                "parameters": sum(p.numel() for p in parameters),
                "bytes": sum(p.numel() * p.element_size() for p in parameters),
                "multiply_adds": work.get(name, sum(work.values())),
            }
        )
    return pd.DataFrame(rows).set_index("layer")


def _seconds(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of one run of the model, and of each layer in another."""
    layers = whole_layers(model)
    taken = dict.fromkeys(layers, 0.0)
    started: dict[str, float] = {}

    def start(name: str, inputs: tuple[Tensor, ...]) -> None:
        started[name] = clock.now(x.device)

    def stop(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        taken[name] += clock.now(x.device) - started[name]

    with evaluating(model):
        whole = clock.median(partial(model, x), 1, warmup=0, device=x.device)
        with hooked(layers, stop, start):
            model(x)
    return {**taken, WHOLE: whole}
