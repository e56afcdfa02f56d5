"""What follows the steps of an optimizer, whoever wraps or copies it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Attached:
    """What `Projection.attach` returns: ``remove()`` ends it, ``project()`` projects once more.

    A last projection matters where the number of steps is no multiple of ``every``.
    """

    project: Callable[[], None]
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """End the projections."""
        for handle in self.handles:
            handle.remove()


def after_steps(
    parameters: Iterable[nn.Parameter], then: Callable[[], None]
) -> tuple[RemovableHandle, ...]:
    """Call ``then`` after each step of any optimizer that has one of the parameters.

    A step inside another one, as wrappers such as SAM take, is a part of it. A step that a gradient
    scaler skips, before it or inside a fused one, is none. The parameters are not kept alive.
    """
    watched = WeakIdKeyDictionary(dict.fromkeys(parameters))
    under_way: list[int] = []  # optimizers, the outermost first

    def ended(optimizer: Optimizer) -> bool:
        """Whether a step was under way, which is so no longer, as after an error in it."""
        found = id(optimizer) in under_way
        if found:
            del under_way[under_way.index(id(optimizer)) :]
        return found

    def enter(optimizer: Optimizer, *_: Any) -> None:
        ended(optimizer)
        if any(p in watched for group in optimizer.param_groups for p in group["params"]):
            under_way.append(id(optimizer))

    def leave(optimizer: Optimizer, *_: Any) -> None:
        skipped = bool(getattr(optimizer, "found_inf", False))
        if ended(optimizer) and not under_way and not skipped:
            then()

    return register_optimizer_step_pre_hook(enter), register_optimizer_step_post_hook(leave)
