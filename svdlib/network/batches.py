"""Data as batches: a tensor, a tuple, or a mapping of tensors, or an iterable of such."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

# A tensor, a tuple or a mapping of tensors, or whatever the caller's own function takes.
Batch = Any
# One batch, or an iterable of batches.
Batches = Any


def is_single(data: Batches) -> bool:
    """Whether data are one batch, a tensor, tuple or mapping, rather than an iterable of them."""
    return isinstance(data, Tensor | tuple | Mapping)


def batches(data: Batches, size: int | None = None) -> Iterator[Batch]:
    """The batches of data, one at a time, none of them kept; a single one in pieces of ``size``."""
    if is_single(data):
        if size is None:
            yield data
            return
        for start in range(0, count_inputs(data), size):
            yield rebuilt(data, itemgetter(slice(start, start + size)))
        return
    if not isinstance(data, Iterable) or isinstance(data, str) or hasattr(data, "__array__"):
        raise ValueError(
            "data must be a tensor, a tuple or mapping of tensors, or an iterable of such "
            f"batches, not {type(data).__name__}"
        )
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise ValueError("the data are empty; one batch at least is needed")


def first_batch(data: Batches, size: int | None = None) -> Batch:
    """The first batch; the caller's random state stays as it is, whatever a DataLoader draws."""
    with torch.random.fork_rng(devices=[]):
        return next(batches(data, size))


def refuse_generator(data: Batches, why: str) -> None:
    if not is_single(data) and isinstance(data, Iterator):
        raise ValueError(
            f"{why} looks at the data several times, not possible with this {type(data).__name__}; "
            "give a list of batches or a DataLoader"
        )


def count_inputs(data: Batch) -> int:
    lengths = sorted({len(tensor) if tensor.ndim else 0 for tensor in tensors(data)})
    if not lengths or lengths == [0]:
        raise ValueError("the data are empty; one input at least is needed")
    if len(lengths) > 1:
        given = ", ".join(map(str, lengths))
        raise ValueError(f"tensors of lengths {given}; give all as (n, …), or batches in a list")
    return lengths[0]


def tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        return [tensor for part in batch for tensor in tensors(part)]
    return [batch] if isinstance(batch, Tensor) else []


def copied(batch: Batch, device: torch.device | None = None) -> Batch:
    """A batch whose tensors are copies, on that device or their own."""
    return rebuilt(batch, lambda tensor: tensor.to(device or tensor.device, copy=True))


def copied_to(model: nn.Module, batch: Batch) -> Batch:
    """A copy of the batch on the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    return copied(batch, None if parameter is None else parameter.device)


def rebuilt(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each of its tensors changed; other entries stay."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, tuple | list):
        made = [rebuilt(part, change) for part in batch]
        named = getattr(type(batch), "_make", None)
        return named(made) if named else type(batch)(made)
    if isinstance(batch, Mapping):
        changed = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        for key in batch:
            changed[key] = rebuilt(batch[key], change)
        return changed
    return batch


def described(batch: Batch) -> str:
    """A batch in words, such as "{ids: int64 (2, 3), more: (float32 (1,), str)}"."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(map(described, batch))})"
    if isinstance(batch, Mapping):
        return f"{{{', '.join(f'{key}: {described(part)}' for key, part in batch.items())}}}"
    return type(batch).__name__
