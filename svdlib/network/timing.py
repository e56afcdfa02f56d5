"""How long a model and its layers take."""

from __future__ import annotations

from torch import nn

from svdlib import clock
from svdlib.network.batches import Batch, copied_to, tensors
from svdlib.network.calls import Call, prepared, run
from svdlib.network.modes import evaluating
from svdlib.network.opened import Network

WHOLE_MODEL = "whole model"


def seconds_of(net: Network, model: nn.Module, x: Batch, call: Call | None) -> dict[str, float]:
    """Seconds of one run of the model, and of each layer in another, of the model opened."""
    taken = dict.fromkeys(net.layers, 0.0)
    device = next((part.device for part in tensors(copied_to(model, x))), clock.CPU)

    def start(name: str, inputs: object) -> None:
        taken[name] -= clock.now(device)

    def stop(name: str, inputs: object, output: object) -> None:
        taken[name] += clock.now(device)

    with evaluating(model):
        call_model = prepared(model, copied_to(model, x), call)
        before = clock.now(device)
        call_model()
        total = clock.now(device) - before
    with net.hooked(net.layers, stop, start):
        run(net.model, x, call)
    return {**taken, WHOLE_MODEL: total}
