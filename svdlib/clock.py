"""Wall times, also of work that a GPU has not finished."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CPU = torch.device("cpu")


def now(device: torch.device = CPU) -> float:
    """Wall time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def median(
    run: Callable[[], object], repeats: int, *, warmup: int = 1, device: torch.device = CPU
) -> float:
    """The median seconds of ``run``, after ``warmup`` runs that are not counted."""
    times = []
    for _ in range(warmup + repeats):
        start = now(device)
        run()
        times.append(now(device) - start)
    return statistics.median(times[warmup:])
