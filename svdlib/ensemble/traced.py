"""Functions of tensors that torch runs without Python between their operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]
Nested = Any  # a tensor, or a tuple of such, named or not

_traces: dict[object, Function] = {}
_tracing = Lock()


def traced(function: Function, tensors: tuple[Nested, ...], *like: Tensor, **settings: Any) -> Any:
    """``function(*tensors, *arguments, **settings)`` for arguments ``like`` these.

    On a processor it becomes TorchScript, which takes Python's lock once a call, not twice an
    operation: parts of an ensemble that run side by side would wait for each other at each of
    some fifty operations a step. TorchScript is deprecated, but nothing else in torch does this
    without a compiler. Where it is missing the function itself does the same, slower. A GPU has no
    use for it.

    The function works in place, returns a tensor, and does the same whatever the tensors' values.
    """
    leaves = [*_leaves(tensors), *like]

    def flat(*values: Tensor) -> Tensor:
        remaining = iter(values)
        return function(*_nested(tensors, remaining), *remaining, **settings)

    if not hasattr(torch.jit, "trace") or any(leaf.device.type != "cpu" for leaf in leaves):
        return partial(function, *tensors, **settings)
    layout = tuple((leaf.dtype, leaf.shape, leaf.stride()) for leaf in leaves)
    key = function, tuple(settings.items()), layout, str(_nested(tensors, iter("." * len(leaves))))
    with _tracing:
        if key not in _traces:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is deprecated
                copies = tuple(map(_copy, leaves))
                _traces[key] = torch.jit.trace(flat, copies, check_trace=False)
        return partial(_traces[key], *leaves[: len(leaves) - len(like)])


def _leaves(tensors: Nested) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    return [leaf for part in tensors for leaf in _leaves(part)]


def _nested(tensors: Nested, leaves: Iterator[Any]) -> Nested:
    """The leaves, nested as the tensors are."""
    if isinstance(tensors, Tensor):
        return next(leaves)
    parts = [_nested(part, leaves) for part in tensors]
    return tensors._make(parts) if hasattr(tensors, "_make") else tuple(parts)


def _copy(leaf: Tensor) -> Tensor:
    """Of the same strides: some operations copy only what they must, and write elsewhere then."""
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype).copy_(leaf)
