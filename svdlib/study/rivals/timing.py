"""What this machine can do at best, to measure everything against."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from svdlib import clock

QUIET = 0.15  # of a core, which an idle JupyterLab and its browser take


def product_rate(device: torch.device, repeats: int = 5) -> float:
    """Operations per second of a 1024³ matrix product in float32."""
    n, generator = 1024, torch.Generator(device).manual_seed(0)
    A = torch.rand(n, n, device=device, generator=generator)
    return 4 * 2 * n**3 / clock.median(lambda: A @ A @ A @ A @ A, repeats, device=device)


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with another process, which ends with this one at the latest."""
    work = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
    with subprocess.Popen([sys.executable, "-c", work, str(os.getpid())]) as other:
        try:
            yield
        finally:
            other.kill()


@contextmanager
def watched() -> Iterator[None]:
    """Print at the end whether other processes were at work: then times are no results."""
    before = _spent()
    yield
    wall, everyone, own = (after - start for after, start in zip(_spent(), before, strict=True))
    cores, others = psutil.cpu_count() or 1, max(everyone - own, 0.0) / wall
    if everyone < own / 2:  # as in some sandboxes
        print("This system doesn't tell what other processes do: were these times measured alone?")
    elif others > QUIET:
        print(
            f"Not alone: other processes took {others:.1f} of {cores} cores while this was timed. "
            "These times are no results; measure again on a quiet machine."
        )
    else:
        print(f"Timed alone: other processes took under {QUIET} of {cores} cores.")


def _spent() -> tuple[float, float, float]:
    """Seconds: of the clock, of all processors at work, and of this process and its children."""
    busy, times = ("user", "nice", "system", "irq", "softirq", "steal"), psutil.cpu_times()
    everyone = sum(getattr(times, name, 0.0) for name in busy)
    return clock.now(), everyone, sum(os.times()[:4])


class _Stopwatch(TorchDispatchMode):
    """Times every operation that torch dispatches, without what leads up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds[operation.overloadpacket.__name__].append(time.perf_counter() - start)
        return result


def operations(run: Callable[[], object], steps: int) -> pd.DataFrame:
    """Torch's operations in ``run``, with calls and microseconds per step of ``steps``."""
    run()
    with _Stopwatch() as watch:
        run()
    seconds = watch.seconds.items()
    rows = [(name, len(times) / steps, 1e6 * sum(times) / steps) for name, times in seconds]
    table = pd.DataFrame(rows, columns=["operation", "calls", "microseconds"])
    return table.sort_values("microseconds", ascending=False, ignore_index=True)
