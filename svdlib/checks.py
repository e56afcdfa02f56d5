"""Checks of what a caller gives: one clear error each."""

from __future__ import annotations

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


def one_of(value: object, known: tuple[str, ...], what: str) -> None:
    """Refuse a name that is not known, listing those that are."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")


def finite(tensor: Tensor, what: str) -> None:
    """Refuse NaN and inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has NaN or infinite entries; it must be finite")
