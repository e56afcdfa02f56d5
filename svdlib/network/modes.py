"""How a model is run while it is measured: in evaluation mode, watched, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from svdlib.network.attention import Attention
from svdlib.network.low_rank import LowRank

After = Callable[[str, tuple[Any, ...], Any], Any]
Before = Callable[[str, tuple[Any, ...]], None]


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made this module, or its own ``compile`` was called."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards, whatever happens.

    >>> model = nn.Dropout()
    >>> with evaluating(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], after: After | None = None, before: Before | None = None
) -> Iterator[None]:
    """``before(name, inputs)`` and ``after(name, inputs, output)`` at every call of these modules.

    Keyword arguments follow the others. What ``after`` returns, if anything, replaces the output.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> with hooked({"0": model[0]}, after=lambda name, inputs, output: output.new_zeros(1, 2)):
    ...     model(torch.rand(1, 3)).tolist()
    [[0.0, 0.0]]
    """
    handles = []
    try:
        for name, module in modules.items():
            if before:
                note = lambda _, x, more, name=name: before(name, (*x, *more.values()))
                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
            if after:
                change = lambda _, x, more, z, name=name: after(name, (*x, *more.values()), z)
                handles.append(module.register_forward_hook(change, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled parts run as they are written: compiled code ignores hooks."""
    if not any(map(is_compiled, model.modules())):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# How torch marks an encoder that it may compute by one fused operation.
FUSED = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def avoid_fused_(model: nn.Module) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from reading the weights of its factorized layers.

    Its fused operation for evaluation needs dense matrices, and would multiply the factors at
    every call; without it, the layers are called. The same where its attention's projections are
    layers.
    """
    for part in model.modules():
        if any(isinstance(inner, LowRank | Attention) for inner in part.modules()):
            for kind, mark in FUSED.items():
                if isinstance(part, kind):
                    setattr(part, mark, type(getattr(part, mark))(0))


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """No encoder is computed by a fused operation, for a while."""
    parts = [
        (part, mark)
        for part in model.modules()
        for kind, mark in FUSED.items()
        if isinstance(part, kind)
    ]
    before = [getattr(part, mark) for part, mark in parts]
    try:
        for part, mark in parts:
            setattr(part, mark, 0)
        yield
    finally:
        for (part, mark), value in zip(parts, before, strict=True):
            setattr(part, mark, value)
