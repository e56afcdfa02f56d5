"""What this machine can do at best, to measure everything against."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from svdlib import clock


def product_rate(device: torch.device, repeats: int = 5) -> float:
    """Operations a second of a 1024³ matrix product in float32.

    >>> product_rate(torch.device("cpu"), repeats=1) > 1e6
    True
    """
    n = 1024
    A = torch.rand(n, n, device=device, generator=torch.Generator(device).manual_seed(0))

    def products() -> None:
        for _ in range(4):
            A @ A

    return 4 * 2 * n**3 / clock.median(products, repeats, device=device)


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that takes all it can get of one core, as long as this one lives."""
    work = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): pass"
    other = subprocess.Popen([sys.executable, "-c", work, str(os.getpid())])
    try:
        yield
    finally:
        other.kill()
        other.wait()


# What others may take of a core without being noticed: an idle JupyterLab and its browser do.
QUIET = 0.15


@contextmanager
def watched() -> Iterator[None]:
    """Say afterwards, in a printed sentence, whether what was timed inside was alone.

    Times measured beside other work are no results. What others took is the processor time of
    all processes less this one's and its children's, over the seconds that went by: in cores.
    """
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
    busy, told = ("user", "nice", "system", "irq", "softirq", "steal"), psutil.cpu_times()
    everyone = sum(getattr(told, name, 0.0) for name in busy)
    return clock.now(), everyone, sum(os.times()[:4])


class _Stopwatch(TorchDispatchMode):
    """Counts and times every operation that torch dispatches, without what leads up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        self.seconds[name] += time.perf_counter() - start
        self.calls[name] += 1
        return result


def operations(run: Callable[[], object], steps: int) -> pd.DataFrame:
    """The operations of torch in ``run``, which takes so many steps, and what each takes.

    Returns:
        one row an operation, the dearest first: operation, calls and microseconds (both a step).

    >>> A = torch.ones(9, 9)
    >>> operations(lambda: A @ A, steps=1)[["operation", "calls"]].values.tolist()
    [['mm', 1.0]]
    """
    run()
    with _Stopwatch() as watch:
        run()
    table = pd.DataFrame({"calls": watch.calls, "seconds": watch.seconds}).rename_axis("operation")
    table = table.sort_values("seconds", ascending=False).reset_index()
    return table.assign(calls=table.calls / steps, microseconds=1e6 * table.seconds / steps).drop(
        columns="seconds"
    )
