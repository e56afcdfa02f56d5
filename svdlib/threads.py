"""Threads and modes: what torch has set for the whole process or thread, and how calls leave it.

Two OpenMP threads wait for each other at the end of every operation. A step of a small network is
some twenty operations of a few microseconds, so that two threads cost more than they bring; and
where another process holds one of the cores, each wait lasts until that core comes back. So small
operations run on one thread, and pieces of work that share nothing run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@contextmanager
def inside(number: int) -> Iterator[int]:
    """So many threads inside an operation of torch; yields how many there were, and will be again.

    It is set for the whole process: other threads of the caller's see it too.

    >>> before = torch.get_num_threads()
    >>> with inside(1) as usual:
    ...     torch.get_num_threads(), usual == before
    (1, True)
    >>> torch.get_num_threads() == before
    True
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


@contextmanager
def plain() -> Iterator[None]:
    """Without the caller's autocast, which would change results.

    >>> with torch.autocast("cpu", torch.bfloat16), plain():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def making() -> Iterator[None]:
    """`plain`, and outside inference mode, whose tensors could never be trained.

    >>> with torch.inference_mode(), making():
    ...     torch.ones(1).is_inference()
    False
    """
    gradients = torch.is_grad_enabled()  # leaving inference mode would switch them on
    with plain(), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


def side_by_side(
    pool: Executor,
    work: Callable[[Piece], Result],
    pieces: Sequence[Piece],
    tick: Callable[[], object],
    stop: Event,
) -> list[Result]:
    """``work`` on each of the pieces, by the pool's threads, with none of the caller's modes.

    Operations of torch release the interpreter's lock, so that threads run at once.

    Args:
        tick: called here every tenth of a second, and at the end.
        stop: set where this thread is interrupted, by Ctrl-C for example. The work should heed
            it: it is waited for.

    Raises:
        the exception of the first piece that has one, once all are done.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor(2) as pool:
    ...     side_by_side(pool, abs, [-1, 2, -3], lambda: None, Event())
    [1, 2, 3]
    """
    futures: list[Future[Result]] = []
    try:
        futures += [pool.submit(work, piece) for piece in pieces]
        pending = set(futures)
        while pending:
            _, pending = wait(pending, timeout=0.1)
            tick()
    except BaseException:
        stop.set()
        wait(futures)
        raise
    return [future.result() for future in futures]
