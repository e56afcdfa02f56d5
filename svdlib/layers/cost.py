"""What a network costs to store and to run, dense against factorized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from svdlib import checks, clock, threads
from svdlib.layers.factorize import merge
from svdlib.network.batches import Batch, Batches, first_batch, tensors
from svdlib.network.calls import Call, run
from svdlib.network.kinds import Layer
from svdlib.network.modes import evaluating
from svdlib.network.opened import Network
from svdlib.network.timing import WHOLE_MODEL, seconds_of


@threads.plain()
@torch.no_grad()
def cost(
    model: nn.Module, x: Batches, *, call: Call | None = None, repeats: int = 20
) -> pd.DataFrame:
    """Parameters, bytes, multiply-adds and measured seconds, by layer and in all.

    The model runs in evaluation mode on the inputs ``x``, turn by turn with its dense twin
    (`merge`), so that whatever disturbs the machine disturbs both. Seconds are medians after a
    run that is not counted; a layer's are those of its own forward call, and the whole model's
    are measured in runs of their own, without the clock between layers.

    Args:
        model: any module; its layers that hold a matrix, dense or `LowRank`, have a row each.
        x: inputs of the size whose latency matters, on the model's device: a tensor, or a tuple
            or mapping of several, or an iterable of batches, such as a DataLoader, of which the
            first is taken. Targets are left out as in `factorize`.
        call: ``call(model, batch)`` calls the model on them in another way.
        repeats: timed runs.

    Returns:
        a row a layer, and at last ``"whole model"``: layer, rank (of a factorized layer, else
        NaN), parameters, bytes, multiply_adds (for all of ``x``), seconds, and for the dense
        twin dense_parameters, dense_bytes, dense_multiply_adds, dense_seconds. Parameters of
        other layers are in the whole model's row; multiply-adds are all products with the weights
        of the layers listed, also where the model reads a weight without calling its layer.

    Raises:
        ValueError: empty inputs, or such as the model does not take; repeats below 1.

    >>> from svdlib import factorize
    >>> small = factorize(nn.Sequential(nn.Linear(100, 80)), 10)
    >>> table = cost(small, torch.rand(3, 100), repeats=1).set_index("layer")
    >>> table.loc["0", ["parameters", "multiply_adds", "dense_multiply_adds"]].tolist()
    [1880, 5400, 24000]
    """
    repeats = checks.positive_int(repeats, "repeats")
    x = first_batch(x)
    if any(tensor.ndim and len(tensor) == 0 for tensor in tensors(x)):
        raise ValueError("the inputs are empty; give as many as matter, at least one")
    given = {"": model, "dense_": merge(model)}
    nets = {prefix: Network.to_measure(twin, merge=False) for prefix, twin in given.items()}
    tables = {prefix: counted(net, x, call) for prefix, net in nets.items()}
    runs: dict[str, list[dict[str, float]]] = {prefix: [] for prefix in nets}
    for _ in range(1 + repeats):
        for prefix, twin in given.items():
            runs[prefix].append(seconds_of(nets[prefix], twin, x, call))
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
        return clock.median(partial(model, x.clone()), repeats, device=x.device)


def counted(net: Network, x: Batch, call: Call | None) -> pd.DataFrame:
    """What of `cost` needs no clock, by layer.

    >>> counted(Network(nn.Linear(3, 2)), torch.rand(5, 3), None).multiply_adds.tolist()
    [30, 30]
    """
    products = _Products(net.layers)
    # Hooks also keep torch from fused operations, in which no product is seen.
    with net.hooked(net.layers, products.leave, products.enter), products:
        run(net.model, x, call)
    work = products.work
    rows = []
    for name, layer in {**net.layers, WHOLE_MODEL: None}.items():
        parameters = list((layer.module if layer else net.model).parameters())
        rows.append(
            {
                "layer": name,
                "rank": float(layer.max_rank) if layer and layer.is_factorized else math.nan,
                "parameters": sum(p.numel() for p in parameters),
                "bytes": sum(p.numel() * p.element_size() for p in parameters),
                "multiply_adds": work[name] if layer else sum(work.values()),
            }
        )
    return pd.DataFrame(rows).set_index("layer")


class _Products(TorchDispatchMode):
    """Multiply-adds with the weights of these layers, whoever multiplies by them.

    A module may read a layer's weight without calling the layer, as ``nn.MultiheadAttention``
    does; of a factorized layer, that multiplies the factors at each reading. So tensors are told
    by their storage, which views share, and a product of two factors counts as their layer's.
    """

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__()
        self.work = dict.fromkeys(layers, 0)
        self.owners: dict[int, list[str]] = {}
        for name, layer in layers.items():
            for weight in layer.weights or (layer.weight,):
                place = weight.untyped_storage().data_ptr()
                self.owners.setdefault(place, []).append(name)
        self.kept: list[Tensor] = []
        self.called: list[str] = []

    def enter(self, name: str, inputs: object) -> None:
        """A layer is called."""
        self.called.append(name)

    def leave(self, name: str, inputs: object, output: object) -> None:
        """Its call is over."""
        self.called.pop()

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
        names = [self.owner(t) for t in (left, right)]
        name = names[0] if names[1] is None else names[1]
        if name is None:
            return result
        if operation == "convolution":
            places = left if args[6] else result  # transposed: each input goes into a window
            self.work[name] += places.numel() * right[0].numel()
        elif operation == "_native_multi_head_attention":
            self.work[name] += left.numel() * len(right)
        else:
            self.work[name] += result.numel() * left.shape[-1]
        if names[0] == names[1]:
            self.kept.append(result)
            self.owners[result.untyped_storage().data_ptr()] = [name]
        return result


# Operations that multiply matrices, and the places of the two factors among their arguments. Of
# torch's fused attention, the last product: tokens with the matrix of the output.
PRODUCTS = {
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "addmv": (1, 2),
    "convolution": (0, 1),
    "_native_multi_head_attention": (0, 7),
}
