"""Folders that several processes write to: one at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Have a folder to oneself: others who ask for it wait, until the block or its process ends.

    This is the system's lock on the folder itself. It leaves no file, and a process that is
    killed holds it no longer.

    Yields:
        whether it is held: False where the system has no such lock, as on some network disks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, alone(Path(folder)) as held:
    ...     os.listdir(folder)
    []
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            print(f"svdlib: waiting for another process that writes to {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(handle)
