"""What a model holds besides its own parts, where a layer that is replaced would not be seen."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from svdlib.network import modes

# Where a module keeps its parts: what it holds elsewhere, it does not know as its own.
REGISTERED = ("_modules", "_parameters", "_buffers")
# Values that hold no module: a vocabulary has many.
ATOMS = (str, bytes, int, float, complex, type(None), type)


def fixed(model: nn.Module) -> dict[str, str]:
    """Why modules can't be replaced, by name: they are compiled, or attributes of others."""
    found: dict[int, str] = {}
    for name, part in model.named_modules():
        if modes.is_compiled(part):
            place = name or "the model"
            reason = f"{place!r} is compiled with it; factorize first, then compile"
            found |= dict.fromkeys(map(id, part.modules()), reason)
    for name, part in model.named_modules():
        for attribute, value in vars(part).items():
            place = f"{name}.{attribute}".lstrip(".")
            reason = f"{place!r} holds it besides, where a factorized one would not be seen"
            for inner in held([value]) if attribute not in REGISTERED else ():
                if inner is not part:
                    found.setdefault(id(inner), reason)
        if isinstance(forward := vars(part).get("forward"), FunctionType):
            reason = f"{name or 'the model'!r} has a forward that calls it, which is not copied"
            called = (inner for inner in held([forward]) if isinstance(inner, nn.Module))
            ids = (id(each) for inner in called for each in inner.modules())
            found = dict.fromkeys(ids, reason) | found
    return {name: found[id(part)] for name, part in model.named_modules() if id(part) in found}


def held(values: Iterable[object]) -> Iterator[nn.Module | Tensor]:
    """The modules and tensors in values: in containers, functions, and objects that are plain data."""
    left, seen = list(values), set[int]()
    while left:
        value = left.pop()
        if isinstance(value, nn.Module | Tensor):
            yield value
        elif not isinstance(value, ATOMS) and id(value) not in seen:
            seen.add(id(value))
            left += _parts(value)


def _parts(value: Any) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset | deque):
        return value
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        found = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a name that is not bound yet
                found.append(cell.cell_contents)
        return found
    if is_dataclass(value):
        return [getattr(value, field.name, None) for field in fields(value)]
    return vars(value).values() if isinstance(value, SimpleNamespace) else ()
