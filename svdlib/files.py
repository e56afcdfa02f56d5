"""Files and folders that appear complete or not at all, and folders with one writer at a time."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# How the names of unfinished folders begin.
PREFIX = ".svdlib_"


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder: others who ask for the lock wait until this block or its process ends.

    The lock leaves no file, and a killed process loses it. Where there are no locks, nobody waits.
    """
    with ExitStack() as stack:
        if fcntl:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            with suppress(OSError):  # of file systems without locks
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    message = f"svdlib: waiting for another process that writes to {folder}"
                    print(message, file=sys.stderr)
                    fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def unfinished(place: Path) -> Iterator[Path]:
    """A temporary folder in ``place``, locked, so that `tidy` sees whether its process lives."""
    while True:
        with tempfile.TemporaryDirectory(dir=place, prefix=PREFIX) as folder, alone(Path(folder)):
            if os.path.isdir(folder):  # not taken by `tidy` before it was locked
                yield Path(folder)
                return


def tidy(place: Path) -> None:
    """Remove the unfinished folders that killed processes left in ``place``."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # of living processes' folders, which are locked
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Where to write a file that then replaces ``path``; if the block fails, nothing changes."""
    path = path.resolve()  # of a link, the file it points to
    tidy(path.parent)
    with unfinished(path.parent) as stage:
        part, usual = stage / path.name, stage / f"{path.name}.usual"
        yield part
        usual.touch()
        part.chmod(usual.stat().st_mode)  # some writers leave a file to its owner alone
        part.replace(path)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that then replaces ``path``; if the block fails, nothing changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path.parent) as stage:
        new, old = stage / "new", stage / "old"
        new.mkdir()
        yield new
        with suppress(FileNotFoundError):
            path.rename(old)
        try:
            new.rename(path)
        except BaseException as error:
            if isinstance(error, OSError) and path.is_dir():
                return  # another process was faster, and its folder stays
            if old.exists():
                old.rename(path)
            raise


def put(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with complete_file(path) as part:
        part.write_text(text, encoding="utf-8")
