"""Files that are there whole or not at all, and folders that several processes write to."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
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


# How a folder's name begins that a process of this machine has not finished; then comes which.
UNFINISHED = f".svdlib-{platform.node()}-"


def unfinished() -> str:
    """How the name of this process's own begins."""
    return f"{UNFINISHED}{os.getpid()}-{_birth(os.getpid())}-"


def tidy(place: Path) -> None:
    """Remove the unfinished folders of processes that are no more: what kills left behind."""
    for folder in place.glob(f"{UNFINISHED}*"):
        process, birth, *_ = [*folder.name.removeprefix(UNFINISHED).split("-"), ""]
        if process.isdigit() and _birth(int(process)) != birth:
            shutil.rmtree(folder, ignore_errors=True)


def _birth(process: int) -> str:
    """When it began, in ticks since the machine did; "0" where that isn't told, "" if it is no more.

    A number alone would not do: others get it when its process has ended.
    """
    told = Path(f"/proc/{process}/stat")
    if told.parent.parent.is_dir():
        try:
            state, *rest = told.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if state in "ZX" else rest[18]
    try:
        if os.name == "posix":
            os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "0"


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all; the one that is there stays until then.

    >>> with tempfile.TemporaryDirectory() as folder:
    ...     put(Path(folder, "a"), "whole")
    ...     os.listdir(folder)
    ['a']
    """
    path = path.resolve()
    tidy(path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=unfinished()) as part:
        Path(part, path.name).write_text(text, encoding="utf-8")
        Path(part, path.name).replace(path)
