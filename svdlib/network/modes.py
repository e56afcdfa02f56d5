"""How a model is run while it is measured: in evaluation mode, watched, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

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
    """Evaluation mode, and each module's own mode again afterwards."""
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
    """
    with ExitStack() as handles:
        for name, module in modules.items():
            if before:
                note = lambda _, x, more, name=name: before(name, (*x, *more.values()))
                handles.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
            if after:
                change = lambda _, x, more, z, name=name: after(name, (*x, *more.values()), z)
                handles.enter_context(module.register_forward_hook(change, with_kwargs=True))
        yield


# Attributes by which torch marks encoders that it may compute by one fused operation.
FUSED = {"activation_relu_or_gelu", "use_nested_tensor"}


def _marks(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The encoders in a model, with the name and the value of their mark."""
    kinds = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    encoders = [part for part in model.modules() if isinstance(part, kinds)]
    return [
        (part, mark, vars(part)[mark]) for part in encoders for mark in FUSED & vars(part).keys()
    ]


def avoid_fused_(model: nn.Module) -> nn.Module:
    """The model; its encoders with factorized layers, or opened attention, are never fused.

    Torch's fused operation for evaluation needs dense matrices, and would multiply the factors at
    every call.
    """
    for part, mark, value in _marks(model):
        if any(isinstance(inner, LowRank | Attention) for inner in part.modules()):
            setattr(part, mark, type(value)(0))
    return model


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """No encoder is computed by a fused operation, for a while."""
    marks = _marks(model)
    try:
        for part, mark, _ in marks:
            setattr(part, mark, 0)
        yield
    finally:
        for part, mark, value in marks:
            setattr(part, mark, value)
