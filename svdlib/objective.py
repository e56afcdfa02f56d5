"""What a network is for: the one place where a batch becomes a call of it, and losses."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A tensor, a tuple or a mapping of tensors, or whatever the caller's own function takes.
Batch = Any
# One batch, or an iterable of batches.
Batches = Any
Call = Callable[[nn.Module, Batch], Any]
Objective = Callable[[nn.Module, Batch], Tensor]

# A target that counts for nothing, as in torch's cross-entropy.
IGNORED = -100


def is_whole(data: Batches) -> bool:
    """Whether data are one batch, a tensor, tuple or mapping, rather than an iterable of them.

    >>> is_whole((torch.ones(3), torch.ones(3))), is_whole([torch.ones(3), torch.ones(3)])
    (True, False)
    """
    return isinstance(data, Tensor | tuple | Mapping)


def looked_at(data: Batches) -> Iterator[Batch]:
    """The batches of data, one at a time, none of them kept.

    Raises:
        ValueError: neither a batch nor an iterable of batches, or an empty one.

    >>> [len(batch) for batch in looked_at([torch.ones(3), torch.ones(2)])]
    [3, 2]
    """
    if is_whole(data):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, str) or hasattr(data, "__array__"):
        raise ValueError(
            "data must be a tensor, a tuple or mapping of tensors, or an iterable of such "
            f"batches, not {type(data).__name__}"
        )
    batches = iter(data)
    for first in batches:
        yield from chain([first], batches)
        return
    raise ValueError("the data are empty; one batch at least is needed")


def first_batch(data: Batches) -> Batch:
    """The one batch, or the first of several. Random numbers of a DataLoader are none of ours.

    >>> first_batch(iter([1, 2]))
    1
    """
    with torch.random.fork_rng(devices=[]):
        return next(looked_at(data))


def refuse_once(data: Batches, why: str) -> None:
    """Refuse a generator where data are looked at several times.

    >>> refuse_once(iter([1, 2]), "this search")
    Traceback (most recent call last):
    ValueError: this search looks at the data several times, which this list_iterator can't give; give a list of batches or a DataLoader
    """
    if not is_whole(data) and isinstance(data, Iterator):
        raise ValueError(
            f"{why} looks at the data several times, which this {type(data).__name__} can't "
            "give; give a list of batches or a DataLoader"
        )


def cut(data: Batches, size: int | None = None) -> Iterator[Batch]:
    """Batches: of one that is given whole, tensors (n, …), so many inputs at a time.

    Raises:
        ValueError: as `looked_at`; tensors of several lengths or none.

    >>> x, y = torch.rand(5, 2), torch.arange(5)
    >>> [(len(a), len(b)) for a, b in cut((x, y), 3)]
    [(3, 3), (2, 2)]
    """
    if not is_whole(data) or size is None:
        yield from looked_at(data)
        return
    for start in range(0, inputs_in(data), size):
        yield rebuilt(data, itemgetter(slice(start, start + size)))


def inputs_in(data: Batches) -> int:
    """The number n of inputs in data given whole, tensors (n, …).

    >>> inputs_in({"a": torch.rand(5, 2), "b": torch.rand(5)})
    5
    """
    found = tensors(data)
    lengths = sorted({len(tensor) if tensor.ndim else 0 for tensor in found})
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


def at_home(model: nn.Module, batch: Batch) -> Batch:
    """A copy of the batch on the device of the model's first parameter.

    >>> at_home(nn.Linear(3, 2), (torch.ones(2), "text"))
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


def told(batch: Batch) -> str:
    """A batch in words.

    >>> told({"ids": torch.arange(6).view(2, 3), "more": [torch.ones(1), "text"]})
    '{ids: int64 (2, 3), more: (float32 (1,), str)}'
    """
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(map(told, batch))})"
    if isinstance(batch, Mapping):
        return f"{{{', '.join(f'{key}: {told(part)}' for key, part in batch.items())}}}"
    return type(batch).__name__


def prepared(model: nn.Module, batch: Batch, call: Call | None) -> partial[Any]:
    """A call of the model on a batch, of which only the inputs matter.

    By default a tensor is the model's input, the values of a mapping, but for "labels", its
    keyword arguments, and the parts of a tuple its arguments: all, or all but the targets at the
    end, as ``model.forward`` takes so many and not the others.

    Raises:
        ValueError: a tuple that may be either, or a batch of another kind.

    >>> model = nn.Linear(3, 2)
    >>> prepared(model, (torch.rand(5, 3), torch.arange(5)), None)().shape
    torch.Size([5, 2])
    """
    if call is not None:
        return partial(call, model, batch)
    if isinstance(batch, tuple | list) and len(batch) > 1:
        may = [batch] if isinstance(batch[0], Tensor) else []
        may += [batch[:-1]] if isinstance(batch[-1], Tensor) else []
        fits = [inputs for inputs in may if _takes(model, inputs)]
        if len(fits) != 1:
            number = "both" if fits else "neither"
            raise ValueError(
                f"the model takes {number} all of {told(batch)} and all but the last, a target; "
                "give call=(model, batch)"
            )
        batch = fits[0]
    return _bound(model, batch)


def _takes(model: nn.Module, inputs: Batch) -> bool:
    """Whether the model's forward takes these arguments, as far as its signature tells."""
    bound = _bound(model, inputs)
    try:
        inspect.signature(model.forward).bind(*bound.args[1:], **bound.keywords)
    except TypeError:
        return False
    return True


def _bound(model: nn.Module, inputs: Batch) -> partial[Any]:
    """The model, its errors told in one sentence, on a tensor, a mapping, or several of them."""
    if isinstance(inputs, tuple | list) and len(inputs) == 1:
        (inputs,) = inputs
    if isinstance(inputs, tuple | list):
        return partial(asked, model, *inputs)
    if isinstance(inputs, Mapping):
        named = {str(key): part for key, part in inputs.items() if key != "labels"}
        return partial(asked, model, **named)
    if not torch.is_tensor(inputs):
        raise ValueError(
            f"a batch must be a tensor, tuple or mapping, not {type(inputs).__name__}; for others "
            "give a function of your own, objective=(model, batch) or call=(model, batch)"
        )
    return partial(asked, model, inputs)


def asked(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The model's output.

    Raises:
        ValueError: the model does not take such inputs.

    >>> asked(nn.Tanh(), torch.rand(5, 4), torch.rand(5))
    Traceback (most recent call last):
    ValueError: the model does not take (float32 (5, 4), float32 (5,)): Tanh.forward() takes 2 positional arguments but 3 were given
    """
    try:
        return model(*inputs, **named)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, IndexError) as error:
        given = told(inputs[0] if len(inputs) == 1 else inputs) if inputs else told(named)
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"the model does not take {given}: {reason[0] if reason else type(error).__name__}"
        ) from error


def class_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy and the share of right answers of each input: what is done by default.

    The batch is (inputs …, targets), or a mapping whose "labels" are the targets. The model's
    output, its ``logits`` or its entry of that name, holds class scores (n, classes, …) for
    targets (n, …), or, as for tokens, (n, …, classes). Places whose target is −100 count for
    nothing. The result is the mean over the places of each input, (n,), without inputs that have
    no target.

    Raises:
        ValueError: a batch without targets, outputs that do not fit them, a target that is no
            class.

    >>> model = nn.Linear(3, 4)  # at every token
    >>> losses, right = class_losses(model, (torch.rand(2, 5, 3), torch.zeros(2, 5).long()))
    >>> losses.shape, right.shape
    (torch.Size([2]), torch.Size([2]))
    """
    inputs, y = _parted(batch)
    return _cross_entropy(_class_second(_logits(_bound(model, inputs)()), y), y)


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """An objective for language models: cross-entropy of each next token, a mean a text, (n,).

    Args:
        batch: tokens (n, T), or a mapping with "input_ids" (n, T), whose other values are the
            model's keyword arguments. "labels", where they are there, take the place of the tokens as
            targets, and padding by "attention_mask" counts for nothing.

    Raises:
        ValueError: a batch of another kind; the model's output, or its ``logits``, is not
            (n, T, tokens).

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    >>> next_token_losses(model, torch.arange(6).view(2, 3)).shape
    torch.Size([2])
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(
            f"next tokens are of texts (n, T), T at least 2, or a mapping with such input_ids; "
            f"not of {told(batch)}"
        )
    y = ids
    if isinstance(batch, Mapping):
        y = batch.get("labels", ids)
        if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.shape == y.shape:
            y = y.masked_fill(mask == 0, IGNORED)
    z = _logits(_bound(model, batch)())
    if z.ndim != 3 or z.shape[:2] != ids.shape:
        raise ValueError(
            f"scores of next tokens are {(*ids.shape, 'tokens')}, not {tuple(z.shape)}"
        )
    return _cross_entropy(z[:, :-1].movedim(-1, 1), y[:, 1:])[0]


def _parted(batch: Batch) -> tuple[Batch, Tensor]:
    """Inputs and targets."""
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        y, ids = batch["labels"], batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.shape == y.shape and ids.ndim == 2:
            counted = y != IGNORED
            if 2 * int(counted.sum()) > y.numel() and bool((y == ids)[counted].all()):
                raise ValueError(
                    "the labels are the input_ids themselves, as language models shift them; "
                    "give objective=svdlib.next_token_losses"
                )
        return batch, y
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        return batch[:-1], batch[-1]
    raise ValueError(
        f"without an objective a batch is (inputs …, targets) or a mapping with 'labels', not "
        f"{told(batch)}; give objective=(model, batch) -> losses (n,)"
    )


def _logits(output: Any) -> Tensor:
    """Class scores in what a model puts out."""
    found = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    found = getattr(found, "logits", found)
    if not torch.is_tensor(found):
        raise ValueError(
            f"the model must give class scores, or an output with logits, not "
            f"{type(found).__name__}; give objective=(model, batch) -> losses (n,)"
        )
    return found if found.element_size() >= 4 else found.float()


def _class_second(z: Tensor, y: Tensor) -> Tensor:
    """Class scores (n, classes, …) for targets (n, …)."""
    second, last = z.shape[:1] + z.shape[2:] == y.shape, z.shape[:-1] == y.shape
    if z.ndim < 2 or not (second or last):
        raise ValueError(
            f"the model must give class scores (n, classes, …), or (n, …, classes), for targets "
            f"(n, …); here {tuple(z.shape)} for {tuple(y.shape)}; else give objective=(model, "
            "batch) -> losses (n,)"
        )
    if second and last and z.ndim > 2:
        raise ValueError(
            f"in scores of shape {tuple(z.shape)} for targets {tuple(y.shape)} the classes may "
            "be second or last; give objective=(model, batch) -> losses (n,)"
        )
    return z if second else z.movedim(-1, 1)


def _cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores (n, classes, …) and targets (n, …): losses and shares of right answers, (n,)."""
    if y.dtype != torch.int64:
        raise ValueError(
            f"labels must be class numbers of type torch.int64, not {y.dtype}; for other targets "
            "give objective=(model, batch) -> losses (n,)"
        )
    counted = y != IGNORED
    if bool(((y < 0) & counted).any()):
        raise ValueError(f"labels must be at least 0 (or {IGNORED}), not {int(y.min())}")
    if y.numel() and int(y.max()) >= z.shape[1]:
        raise ValueError(f"labels run to {int(y.max())} but the model has {z.shape[1]} outputs")
    each = F.cross_entropy(z, y, reduction="none", ignore_index=IGNORED).reshape(len(y), -1)
    right = ((z.argmax(1) == y) & counted).reshape(len(y), -1)
    places = counted.reshape(len(y), -1).sum(1)
    some = places > 0
    return (each.sum(1) / places)[some], (right.sum(1) / places)[some]


def judged(
    model: nn.Module, batch: Batch, objective: Objective | None, accuracy: Objective | None
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of a batch, and whether each answer is right, NaN where nothing tells it.

    Args:
        objective, accuracy: by default both of `class_losses`; an objective alone has no accuracy.

    Raises:
        ValueError: an objective or accuracy that does not give a tensor of shape (n,).

    >>> model, x, y = nn.Linear(3, 1), torch.rand(5, 3), torch.rand(5, 1)
    >>> judged(model, (x, y), lambda model, batch: (model(batch[0]) - batch[1]).square(), None)
    Traceback (most recent call last):
    ValueError: objective must give losses of shape (n,), one an input, not (5, 1)
    """
    if objective is None:
        losses, right = class_losses(model, at_home(model, batch))
    else:
        losses = _checked(objective(model, at_home(model, batch)), "objective", "losses")
        right = torch.full_like(losses, torch.nan)
    if accuracy is not None:
        right = _checked(accuracy(model, at_home(model, batch)), "accuracy", "right answers")
        if len(right) != len(losses):
            raise ValueError(
                f"accuracy gives {len(right)} numbers where the objective gives {len(losses)}; "
                "both must give one an input"
            )
    return losses.detach(), right.detach()


def _checked(found: Any, what: str, of: str) -> Tensor:
    if not torch.is_tensor(found):
        raise ValueError(f"{what} must give {of}, a tensor (n,), not {type(found).__name__}")
    if found.ndim == 0:
        raise ValueError(
            f"{what} gives one number, a mean perhaps; it must give {of} of shape (n,), one an "
            "input, as with reduction='none'"
        )
    if found.ndim != 1:
        raise ValueError(
            f"{what} must give {of} of shape (n,), one an input, not {tuple(found.shape)}"
        )
    return found
