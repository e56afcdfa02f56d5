"""Data as batches: a tensor, a tuple, or a mapping of tensors, or an iterable of such."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

# A tensor, a tuple or a mapping of tensors, or whatever the caller's own function takes.
Batch = Any
# One batch, or an iterable of batches.
Batches = Any


def is_single(data: Batches) -> bool:
    """Whether data are one batch, a tensor, tuple or mapping, rather than an iterable of them.

    >>> is_single((torch.ones(3), torch.ones(3))), is_single([torch.ones(3), torch.ones(3)])
    (True, False)
    """
    return isinstance(data, Tensor | tuple | Mapping)


def batches(data: Batches, size: int | None = None) -> Iterator[Batch]:
    """The batches of data, one at a time, none of them kept; a single one in pieces of ``size``.

    Raises:
        ValueError: neither a batch nor an iterable of batches, or an empty one; with ``size``,
            tensors of several lengths or none.

    >>> x, y = torch.rand(5, 2), torch.arange(5)
    >>> [(len(a), len(b)) for a, b in batches((x, y), 3)]
    [(3, 3), (2, 2)]
    """
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
    iterator = iter(data)
    for first in iterator:
        yield from chain([first], iterator)
        return
    raise ValueError("the data are empty; one batch at least is needed")


def first_batch(data: Batches, size: int | None = None) -> Batch:
    """The first batch. The caller's random state stays as it is, whatever a DataLoader draws.

    >>> first_batch(iter([1, 2]))
    1
    """
    with torch.random.fork_rng(devices=[]):
        return next(batches(data, size))


def refuse_generator(data: Batches, why: str) -> None:
    """Refuse a generator where data are read several times.

    >>> refuse_generator(iter([1, 2]), "this search")
    Traceback (most recent call last):
    ValueError: this search looks at the data several times, which this list_iterator can't give; give a list of batches or a DataLoader
    """
    if not is_single(data) and isinstance(data, Iterator):
        raise ValueError(
            f"{why} looks at the data several times, which this {type(data).__name__} can't "
            "give; give a list of batches or a DataLoader"
        )


def count_inputs(data: Batch) -> int:
    """The number n of inputs in a batch of tensors (n, …).

    >>> count_inputs({"a": torch.rand(5, 2), "b": torch.rand(5)})
    5
    """
    lengths = sorted({len(tensor) if tensor.ndim else 0 for tensor in tensors(data)})
    if not lengths or lengths == [0]:
        raise ValueError("the data are empty; one input at least is needed")
    if len(lengths) > 1:
        raise ValueError(
            f"the tensors given together have lengths {', '.join(map(str, lengths))}; give all "
            "as (n, …), or batches in a list"
        )
    return lengths[0]


def tensors(batch: Batch) -> list[Tensor]:
    """All tensors in a batch.

    >>> len(tensors({"a": torch.ones(2), "b": (torch.ones(2), "text")}))
    2
    """
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    rebuilt(batch, note)
    return found


def copied(batch: Batch, device: torch.device | None = None) -> Batch:
    """A batch whose tensors are copies, on a device: what is done to it leaves the caller's alone.

    >>> x = torch.ones(2)
    >>> copied({"a": x})["a"] is x
    False
    """
    return rebuilt(batch, lambda tensor: tensor.to(device or tensor.device, copy=True))


def copied_to(model: nn.Module, batch: Batch) -> Batch:
    """A copy of the batch on the device of the model's first parameter.

    >>> copied_to(nn.Linear(3, 2), (torch.ones(2), "text"))
    (tensor([1., 1.]), 'text')
    """
    parameter = next(model.parameters(), None)
    return copied(batch, None if parameter is None else parameter.device)


def rebuilt(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each of its tensors changed; what is no tensor, tuple, list or mapping stays.

    >>> rebuilt({"a": torch.ones(2), "b": "text"}, torch.sum)
    {'a': tensor(2.), 'b': 'text'}
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, tuple | list):
        made = [rebuilt(part, change) for part in batch]
        named = getattr(type(batch), "_make", None)
        return named(made) if named else type(batch)(made)
    if isinstance(batch, Mapping):
        same = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        for key in batch:
            same[key] = rebuilt(batch[key], change)
        return same
    return batch


def described(batch: Batch) -> str:
    """A batch in words.

    >>> described({"ids": torch.arange(6).view(2, 3), "more": [torch.ones(1), "text"]})
    '{ids: int64 (2, 3), more: (float32 (1,), str)}'
    """
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(map(described, batch))})"
    if isinstance(batch, Mapping):
        return f"{{{', '.join(f'{key}: {described(part)}' for key, part in batch.items())}}}"
    return type(batch).__name__
