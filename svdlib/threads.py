"""Settings that torch keeps per process or thread, and how a call leaves them unchanged.

OpenMP threads wait for each other after every operation, which costs a small network more than a
second thread brings. Its operations use one thread; independent pieces of work run side by side.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from threading import Event
from typing import TypeVar

import numpy as np
import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


@contextmanager
def inside(number: int) -> Iterator[None]:
    """Use ``number`` threads inside torch's operations, in the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def plain() -> Iterator[None]:
    """Switch the caller's autocast off, which would change results."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def making() -> Iterator[None]:
    """Switch off autocast and inference mode, whose tensors could never be trained."""
    gradients = torch.is_grad_enabled()  # leaving inference mode would switch them on
    with plain(), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


@contextmanager
def same_random(devices: Iterable[int] = ()) -> Iterator[None]:
    """Leave the random states of torch, of numpy and of Python as they were.

    A DataLoader draws torch's numbers, and data sets that augment draw from any of the three.
    """
    pythons = random.getstate()
    numpys = np.random.get_state()  # noqa: NPY002  # of the generator that data sets share
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)  # noqa: NPY002


def side_by_side(
    pool: Executor,
    work: Callable[[Piece], Result],
    pieces: Sequence[Piece],
    tick: Callable[[], object],
    stop: Event,
) -> list[Result]:
    """Results of ``work`` on each piece, by the pool's threads, in none of the caller's modes.

    ``tick`` is called every tenth of a second, and at the end. If this thread is interrupted, as by
    Ctrl-C, ``stop`` is set: the work should then end early, as this function waits for it.
    """
    futures: list[Future[Result]] = []
    try:
        futures += [pool.submit(work, piece) for piece in pieces]
        while wait(futures, timeout=0.1).not_done:
            tick()
        tick()
    except BaseException:
        stop.set()
        wait(futures)
        raise
    return [future.result() for future in futures]
