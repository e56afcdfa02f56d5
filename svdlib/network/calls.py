"""Data as batches, what they mean to a model, and its losses on them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from operator import itemgetter, length_hint
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdlib import threads

# A tensor, a tuple or a mapping of tensors, or whatever the caller's own function takes.
Batch = Any
# One batch, or an iterable of batches.
Batches = Any
Call = Callable[[nn.Module, Batch], Any]
Objective = Callable[[nn.Module, Batch], Tensor]
# A target that counts for nothing, as in torch's cross-entropy.
IGNORED = -100
ADVICE = "give objective=(model, batch) -> losses (n,)"


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
    """The first batch; whatever a DataLoader draws leaves the caller's random states."""
    with threads.same_random():
        return next(batches(data, size))


def refuse_generator(data: Batches, why: str) -> None:
    if not is_single(data) and isinstance(data, Iterator):
        raise ValueError(
            f"{why} looks at the data several times, not possible with this {type(data).__name__}; "
            "give a list of batches or a DataLoader"
        )


def count_batches(data: Batches, size: int | None = None) -> int | None:
    """How many batches `batches` gives, None where that shows only at their end."""
    if is_single(data):
        return 1 if size is None else -(-count_inputs(data) // size)
    return length_hint(data) or None


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


def prepared(model: nn.Module, batch: Batch, call: Call | None) -> partial[Any]:
    """A call of the model on a batch, of which only the inputs matter.

    By default a tensor is the model's input, the values of a mapping, but for "labels", its
    keyword arguments, and the parts of a tuple its arguments: all, or all but the targets at the
    end, as ``model.forward`` takes so many and not the others.
    """
    if call is not None:
        return partial(call, model, batch)
    if isinstance(batch, tuple | list) and len(batch) > 1:
        candidates = [batch] if isinstance(batch[0], Tensor) else []
        candidates += [batch[:-1]] if isinstance(batch[-1], Tensor) else []
        accepted = [inputs for inputs in candidates if _accepts(model, inputs)]
        if len(accepted) != 1:
            raise ValueError(
                f"the model takes {'both' if accepted else 'neither'} all of {described(batch)} "
                "and all but the last, a target; give call=(model, batch)"
            )
        (batch,) = accepted
    return _bound(model, batch)


def run(model: nn.Module, batch: Batch, call: Call | None) -> Any:
    """The output of such a call, on a copy of the batch on the model's device."""
    return prepared(model, copied_to(model, batch), call)()


def _accepts(model: nn.Module, inputs: Batch) -> bool:
    bound = _bound(model, inputs)
    try:
        inspect.signature(model.forward).bind(*bound.args[1:], **bound.keywords)
    except TypeError:
        return False
    return True


def _bound(model: nn.Module, inputs: Batch) -> partial[Any]:
    if isinstance(inputs, tuple | list) and len(inputs) == 1:
        (inputs,) = inputs
    if isinstance(inputs, tuple | list):
        return partial(called, model, *inputs)
    if isinstance(inputs, Mapping):
        named = {str(key): part for key, part in inputs.items() if key != "labels"}
        return partial(called, model, **named)
    if not torch.is_tensor(inputs):
        raise ValueError(
            f"a batch must be a tensor, tuple or mapping, not {type(inputs).__name__}; for others "
            "give a function of your own, objective=(model, batch) or call=(model, batch)"
        )
    return partial(called, model, inputs)


def called(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The model's output, or a ValueError that says which inputs it does not take, and why."""
    try:
        return model(*inputs, **named)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, IndexError) as error:
        given = described((inputs[0] if len(inputs) == 1 else inputs) if inputs else named)
        reason, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise ValueError(f"the model does not take {given}: {reason}") from error


def class_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy and the share of right answers of each input: the default objective.

    The batch is (inputs …, targets), or a mapping whose "labels" are the targets. The model's
    output, its ``logits`` or its entry of that name, holds class scores (n, classes, …) for
    targets (n, …), or, as for tokens, (n, …, classes). The result is the mean over the places of
    each input, (n,), without places whose target is −100 and without inputs that have no target.
    """
    inputs, y = _parted(batch)
    return cross_entropy(_class_second(_logits(_bound(model, inputs)()), y), y)


def next_token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """An objective for language models: mean cross-entropy of the next token, per text (n,).

    Args:
        batch: tokens (n, T), or a mapping with "input_ids" (n, T), whose other values are the
            model's keyword arguments. "labels", where present, replace the tokens as targets,
            and padding by "attention_mask" counts for nothing.

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
            "next tokens are of texts (n, T), T at least 2, or a mapping with such input_ids; not "
            f"of {described(batch)}"
        )
    named = batch if isinstance(batch, Mapping) else {}
    y, mask = named.get("labels", ids), named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == y.shape:
        y = y.masked_fill(mask == 0, IGNORED)
    z = _logits(_bound(model, batch)())
    if z.ndim != 3 or z.shape[:2] != ids.shape:
        expected = (*ids.shape, "tokens")
        raise ValueError(f"scores of next tokens must be {expected}, not {tuple(z.shape)}")
    return cross_entropy(z[:, :-1].movedim(-1, 1), y[:, 1:])[0]


def _parted(batch: Batch) -> tuple[Batch, Tensor]:
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
        "without an objective a batch is (inputs …, targets) or a mapping with 'labels', not "
        f"{described(batch)}; {ADVICE}"
    )


def _logits(output: Any) -> Tensor:
    found = output.get("logits", output) if isinstance(output, Mapping) else output
    found = getattr(found, "logits", found)
    if not torch.is_tensor(found):
        raise ValueError(
            "the model must give class scores, or an output with logits, not "
            f"{type(found).__name__}; {ADVICE}"
        )
    return found


def _class_second(z: Tensor, y: Tensor) -> Tensor:
    """Class scores (n, classes, …) for targets (n, …)."""
    second, last = z.shape[:1] + z.shape[2:] == y.shape, z.shape[:-1] == y.shape
    shapes = f"{tuple(z.shape)} for {tuple(y.shape)}"
    if z.ndim < 2 or not (second or last):
        raise ValueError(
            "the model must give class scores (n, classes, …), or (n, …, classes), for targets "
            f"(n, …); here {shapes}; else {ADVICE}"
        )
    if second and last and z.ndim > 2:
        raise ValueError(f"in class scores {shapes} the classes may be second or last; {ADVICE}")
    return z if second else z.movedim(-1, 1)


def cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores (n, classes, …) and targets (n, …): losses and shares of right answers, (n,)."""
    check_labels(y, z.shape[1])
    z = z if z.element_size() >= 4 else z.float()
    losses = F.cross_entropy(z, y, reduction="none", ignore_index=IGNORED)
    parts = (losses, z.argmax(1) == y, y != IGNORED)
    losses, right, places = (part.reshape(len(y), -1).sum(1) for part in parts)
    return (losses / places)[places > 0], (right / places)[places > 0]


def check_labels(y: Tensor, classes: int | None = None) -> None:
    """Refuse labels that are no class numbers; with ``classes``, `IGNORED` is allowed."""
    if y.dtype != torch.int64:
        message = f"labels must be class numbers of type torch.int64, not {y.dtype}"
        raise ValueError(f"{message}; for other targets {ADVICE}")
    negative, exception = y < 0, ""
    if classes is not None:
        negative, exception = negative & (y != IGNORED), f" (or {IGNORED})"
    if bool(negative.any()):
        raise ValueError(f"labels must be at least 0{exception}, not {int(y.min())}")
    if classes is not None and y.numel() and int(y.max()) >= classes:
        raise ValueError(f"labels run to {int(y.max())} but the model has {classes} outputs")


def judged(
    model: nn.Module, batch: Batch, objective: Objective | None, accuracy: Objective | None
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of a batch, and whether each answer is right, NaN where nothing tells it.

    By default both of `class_losses`; an objective alone has no accuracy.
    """
    if objective is None:
        losses, right = class_losses(model, copied_to(model, batch))
    else:
        losses = _checked(objective(model, copied_to(model, batch)), "objective", "losses")
        right = torch.full_like(losses, torch.nan)
    if accuracy is not None:
        right = _checked(accuracy(model, copied_to(model, batch)), "accuracy", "right answers")
        if len(right) != len(losses):
            raise ValueError(
                f"accuracy gives {len(right)} numbers where the objective gives {len(losses)}; "
                "both must give one per input"
            )
    return losses, right


def _checked(found: Any, what: str, of: str) -> Tensor:
    """What a caller's function gives, if that is one number per input."""
    if not torch.is_tensor(found):
        raise ValueError(f"{what} must give {of}, a tensor (n,), not {type(found).__name__}")
    if found.ndim != 1:
        hint = (
            "" if found.ndim else "gives one number, a mean perhaps; use reduction='none', as it "
        )
        rule = f"must give {of} of shape (n,), one per input, not {tuple(found.shape)}"
        raise ValueError(f"{what} {hint}{rule}")
    return found
