"""Checks of a caller's arguments. Each raises one ValueError that says what is wrong."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; ``"auto"`` is CUDA if available, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        use = "'auto', 'cpu' or 'cuda' on a machine with a GPU"
        raise ValueError(f"device {str(name)!r} is not there; use {use}") from None
    return chosen


def positive_int(value: object, what: str, least: int = 1) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{what} must be a whole number of at least {least}, not {value!r}")
    number: int = value.__index__()
    if number < least:
        raise ValueError(f"{what} must be at least {least}, not {number}")
    return number


def rank(value: object, shape: Sequence[int]) -> int:
    if (number := positive_int(value, "rank")) > (largest := min(shape[-2:])):
        limit = f"min(m, n) = {largest} for shape {tuple(shape)}"
        raise ValueError(f"rank must be at most {limit}, not {number}")
    return number


def several(values: object, what: str, example: str) -> tuple[Any, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise ValueError(f"{what} must be several, such as {example}, not {values!r}")  # noqa: TRY004
    return tuple(values)


def number(value: object, what: str) -> float:
    if isinstance(value, bool | str | bytes | complex) or not hasattr(value, "__float__"):
        raise ValueError(f"{what} must be a number, not {value!r}")
    return float(value)


def truth(value: object, what: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{what} must be True or False, not {value!r}")
    return value


def generator(value: object, device: torch.device) -> None:
    if value is None:
        return
    place = getattr(value, "device", None)
    if type(place) is not torch.device:
        raise ValueError(f"generator must be a torch.Generator or None, not {value!r}")
    if place.type != device.type:
        raise ValueError(f"the generator is on {place} but the matrix on {device}")


def one_of(value: object, known: tuple[str, ...], what: str) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def finite(tensor: Tensor, what: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{what} has NaN or infinite entries; it must be finite")


def labeled_images(part: str, x: object, y: object) -> None:
    """Refuse ``{part}_x`` and ``{part}_y`` unless they are n ≥ 1 images and their n labels."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        needed = "a floating-point tensor (n, features), one image per row"
        raise ValueError(f"{part}_x must be {needed}, not {_described(x)}")
    integer = isinstance(y, Tensor) and torch.can_cast(y.dtype, torch.int64)
    if not isinstance(y, Tensor) or y.ndim != 1 or not integer or y.dtype == torch.bool:
        needed = "a tensor (n,) of whole class numbers"
        raise ValueError(f"{part}_y must be {needed}, not {_described(y)}")
    if len(x) != len(y) or not len(x):
        counts = f"{part}: {len(x)} images and {len(y)} labels"
        raise ValueError(f"{counts}; give one label per image, and at least one image")


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


# Frames of the library and of what wraps its functions are not where a caller reads a warning.
OWN = (str(Path(__file__).parent), contextlib.__file__, str(Path(torch.utils.__file__).parent))


def warn(message: str) -> None:
    """Warn at the line that called the library, however deep this is in it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(OWN):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
