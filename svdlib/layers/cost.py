"""What a network costs to store and to run, dense against factorized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdlib import checks, clock, threads
from svdlib.layers.factorize import merge
from svdlib.network.calls import Batch, Batches, Call, first_batch, run, tensors
from svdlib.network.kinds import Layer
from svdlib.network.modes import evaluating
from svdlib.network.opened import Network

WHOLE_MODEL = "whole model"


@threads.plain()
@torch.no_grad()
def cost(
    model: nn.Module, x: Batches, *, call: Call | None = None, repeats: int = 20
) -> pd.DataFrame:
    """Parameters, bytes, multiply-adds and measured seconds, per layer and of the whole model.

    The model runs in evaluation mode, in turns with its dense twin (`merge`). Seconds are medians
    after a run that is not counted; the whole model's are from runs without clocks between layers.

    Args:
        x, call: inputs of the size whose latency matters, as ``calibration`` and ``call`` in
            `factorize`; of an iterable of batches the first is taken.
        repeats: timed runs; with 0 there are no seconds in the table.

    Returns:
        one row per layer with a matrix, and last ``"whole model"``: layer, rank (NaN of a dense
        layer), parameters, bytes, multiply_adds (with the weights of the layers, for all of ``x``),
        seconds, and for the dense twin dense_parameters and so on.

    Raises:
        ValueError: inputs that are empty or that the model does not take; repeats below 0.

    >>> from svdlib import factorize
    >>> small = factorize(nn.Sequential(nn.Linear(100, 80)), 10)
    >>> table = cost(small, torch.rand(3, 100), repeats=1).set_index("layer")
    >>> table.loc["0", ["parameters", "multiply_adds", "dense_multiply_adds"]].tolist()
    [1880, 5400, 24000]
    """
    repeats = checks.positive_int(repeats, "repeats", 0)
    x = first_batch(x)
    if any(tensor.ndim and len(tensor) == 0 for tensor in tensors(x)):
        raise ValueError("the inputs are empty; give as many as matter, at least one")
    twins = [model, merge(model)]
    nets = [Network.to_measure(twin, merge=False) for twin in twins]
    own, dense = (counted(net, x, call) for net in nets)
    runs = [
        [net.seconds(twin, x, call) for net, twin in zip(nets, twins, strict=True)]
        for _ in range(1 + repeats if repeats else 0)
    ]
    for table, seconds in zip((own, dense), zip(*runs[1:], strict=True), strict=bool(repeats)):
        table["seconds"] = np.median(seconds, axis=0)
    dense = dense.drop(columns="rank").add_prefix("dense_")
    return own.join(dense).rename_axis("layer").reset_index()


def latency(model: nn.Module, x: Tensor, repeats: int = 50) -> float:
    """The median seconds of a forward call in evaluation mode, after one that is not counted."""
    with torch.no_grad(), evaluating(model):
        return clock.median(partial(model, x.clone()), repeats, device=x.device)


@torch.no_grad()
def counted(net: Network, x: Batch, call: Call | None) -> pd.DataFrame:
    """The columns of `cost` that need no clock, by layer."""
    if WHOLE_MODEL in net.layers:
        raise ValueError(f"a layer is named {WHOLE_MODEL!r}, as the row of totals; rename it")
    products = _Products(net.layers)
    # Hooks also keep torch from fused operations, in which no product is seen.
    enter = lambda name, _: products.called.append(name)
    leave = lambda name, *_: products.called.remove(name)
    with net.hooked(net.layers, leave, enter), products:
        run(net.model, x, call)
    work, layers = products.work.values(), net.layers.values()
    parts = [list(part.parameters()) for part in (*(layer.module for layer in layers), net.model)]
    ranks = [layer.max_rank if layer.is_factorized else math.nan for layer in layers]
    columns = {
        "rank": [*ranks, math.nan],
        "parameters": [sum(p.numel() for p in part) for part in parts],
        "bytes": [sum(p.nbytes for p in part) for part in parts],
        "multiply_adds": [*work, sum(work)],
    }
    return pd.DataFrame(columns, [*net.layers, WHOLE_MODEL])


class _Products(TorchDispatchMode):
    """Counts multiply-adds with the weights of these layers, whoever multiplies by them.

    Modules also read weights of layers they don't call, factors multiplied. So a weight is known by
    its storage, which views share, and a product of two factors counts as their layer's.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.work = dict.fromkeys(layers, 0)
        self.owners: dict[int, list[str]] = {}
        for name, layer in layers.items():
            for weight in layer.weights or (layer.weight,):
                place = weight.untyped_storage().data_ptr()
                self.owners.setdefault(place, []).append(name)
        self.kept: list[Tensor] = []  # so that their storage is not used again
        self.called: list[str] = []  # layers, from the outermost on

    def owner(self, tensor: Tensor) -> str | None:
        """The layer whose weight a tensor is; of several, the one that is being called."""
        names = self.owners.get(tensor.untyped_storage().data_ptr(), [None])
        return self.called[-1] if self.called and self.called[-1] in names else names[-1]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operation = function.overloadpacket.__name__
        if operation not in PRODUCTS:
            with self:  # inference mode shows operations that are made of others
                result = function.decompose(*args, **(kwargs or {}))
            return function(*args, **(kwargs or {})) if result is NotImplemented else result
        result = function(*args, **(kwargs or {}))
        left, right = (args[place] for place in PRODUCTS[operation])
        first, second = self.owner(left), self.owner(right)
        name = first if second is None else second
        if name is None:
            return result
        if operation == "convolution":
            places = left if args[6] else result  # transposed: each input goes into a window
            self.work[name] += places.numel() * right[0].numel()
        elif operation == "_native_multi_head_attention":
            self.work[name] += left.numel() * len(right)
        else:
            self.work[name] += result.numel() * left.shape[-1]
        if first == second:
            self.kept.append(result)
            self.owners[result.untyped_storage().data_ptr()] = [name]
        return result


# Operations that multiply matrices, and the places of both factors among their arguments; of
# torch's fused attention, those of its last product, tokens with the matrix of the output.
PRODUCTS = {
    **dict.fromkeys(("mm", "bmm", "mv", "convolution"), (0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), (1, 2)),
    "_native_multi_head_attention": (0, 7),
}
