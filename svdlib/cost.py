"""What a network costs to store and to run, dense against factorized."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pandas as pd
import torch
from torch import Tensor, nn

from svdlib import checks
from svdlib.compression import merge
from svdlib.modules import LowRank, evaluating

WHOLE = "whole model"
Listed = LowRank | nn.Linear | nn.Conv2d


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
        return statistics.median([_call(model, x) for _ in range(1 + repeats)][1:])


def _layers(model: nn.Module) -> dict[str, Listed]:
    """Linear, Conv2d and LowRank layers, the last without their factors."""
    found: dict[str, Listed] = {}
    inner: set[int] = set()
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            inner.update(map(id, layer))
        if isinstance(layer, Listed) and id(layer) not in inner:
            found[name] = layer
    return found


def _measured(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """All that needs no clock, by layer."""
    layers = _layers(model)
    work = dict.fromkeys(layers, 0)

    def note(name: str, layer: Listed, output: Tensor) -> None:
        # As many products with the matrix, or with both factors, as the output has places.
        factors = layer.factors if isinstance(layer, LowRank) else (layer,)
        places = output.numel() // len(factors[-1].weight)
        work[name] += places * sum(factor.weight.numel() for factor in factors)

    with evaluating(model), _hooked(layers, note):
        model(x)
    rows = [
        {
            "layer": name,
            "rank": layer.rank if isinstance(layer, LowRank) else None,
            "parameters": sum(p.numel() for p in layer.parameters()),
            "bytes": sum(p.numel() * p.element_size() for p in layer.parameters()),
            "multiply_adds": work[name],
        }
        for name, layer in layers.items()
    ]
    parameters = list(model.parameters())
    rows.append(
        {
            "layer": WHOLE,
            "rank": None,
            "parameters": sum(p.numel() for p in parameters),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "multiply_adds": sum(work.values()),
        }
    )
    table = pd.DataFrame(rows).set_index("layer")
    return table.astype({"rank": float})


def _seconds(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of one run of the model, and of each layer in another."""
    layers = _layers(model)
    taken = dict.fromkeys(layers, 0.0)
    started: dict[str, float] = {}

    def start(name: str) -> None:
        started[name] = _now(x)

    def stop(name: str, layer: Listed, output: Tensor) -> None:
        taken[name] += _now(x) - started[name]

    with evaluating(model):
        whole = _call(model, x)
        with _hooked(layers, stop, start):
            model(x)
    return {**taken, WHOLE: whole}


def _call(model: nn.Module, x: Tensor) -> float:
    start = _now(x)
    model(x)
    return _now(x) - start


def _now(x: Tensor) -> float:
    """Wall time, once the device has done what it was given."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


@contextmanager
def _hooked(
    layers: Mapping[str, Listed],
    after: Callable[[str, Listed, Tensor], None],
    before: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Call back before and after each layer's forward call."""
    hooks = []
    for name, layer in layers.items():
        hooks.append(
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: after(name, layer, output)
            )
        )
        if before:
            hooks.append(
                layer.register_forward_pre_hook(lambda layer, inputs, name=name: before(name))
            )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
