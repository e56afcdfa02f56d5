"""Checks of what a caller gives: one clear error each."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; ``"auto"`` is CUDA where there is one, else the CPU.

    >>> device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device {str(name)!r} is not there; use 'auto', 'cpu' or 'cuda' on a machine with a GPU"
        ) from None
    return chosen


def positive_int(value: object, what: str, least: int = 1) -> int:
    """``value`` if it is a whole number of at least ``least``.

    >>> positive_int(10, "rank")
    10
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{what} must be a whole number of at least {least}, not {value!r}")
    number: int = value.__index__()
    if number < least:
        raise ValueError(f"{what} must be at least {least}, not {number}")
    return number


def several(values: object, what: str, example: str) -> tuple[Any, ...]:
    """``values`` as a tuple, if they are several things and no text.

    >>> several(range(3), "seeds", "range(4)")
    (0, 1, 2)
    """
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise ValueError(  # noqa: TRY004 - as all that is refused here
            f"{what} must be several, such as {example}, not {values!r}"
        )
    return tuple(values)


def number(value: object, what: str) -> float:
    """``value`` if it is a real number.

    >>> number(0.5, "lr")
    0.5
    """
    if isinstance(value, bool | str | bytes | complex) or not hasattr(value, "__float__"):
        raise ValueError(f"{what} must be a number, not {value!r}")
    return float(value)


def truth(value: object, what: str) -> bool:
    """``value`` if it is True or False."""
    if type(value) is not bool:
        raise ValueError(f"{what} must be True or False, not {value!r}")
    return value


def generator(value: object, device: torch.device) -> None:
    """Refuse what is no source of random numbers on that device; None is torch's own."""
    if value is None:
        return
    place: torch.device | None = getattr(value, "device", None)
    if type(place) is not torch.device:
        raise ValueError(f"generator must be a torch.Generator or None, not {value!r}")
    if place.type != device.type:
        raise ValueError(f"the generator is on {place} but the matrix on {device}")


def one_of(value: object, known: tuple[str, ...], what: str) -> None:
    """Refuse a name that is not known, listing those that are."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has NaN or infinite entries; it must be finite")


# Frames of the library and of what wraps its functions are not where a caller reads a warning.
OWN = (str(Path(__file__).parent), contextlib.__file__, str(Path(torch.utils.__file__).parent))


def warn(message: str) -> None:
    """Warn at the line that called the library, however deep this is in it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
