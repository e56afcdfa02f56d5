"""One run of a notebook, wherever it takes place: text and parameters in, files out."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError

from svdlib import clock, files

# Seconds for one cell: the largest sweep of the study on a slow machine.
CELL_TIMEOUT = 3600


@dataclass
class Done:
    """The result of a run.

    Attributes:
        about: date, machine and versions, see `machine`.
        files: the executed notebook, and what the notebook wrote into its folder of figures.
        error: what failed, in a line; None if nothing did.
        final: whether another try would end alike: the notebook itself fails, and nobody killed
            its kernel.
    """

    seconds: float
    about: dict[str, object]
    files: dict[str, bytes] = field(default_factory=dict)
    error: str | None = None
    final: bool = True


def execute(text: str, name: str, parameters: Mapping[str, object] | None, home: str) -> Done:
    """Execute a notebook headless, in a temporary folder that is removed afterwards.

    Args:
        text: the notebook, as JSON.
        name: what its executed copy is called, without ``.ipynb``.
        parameters: values for its parameters cell, with the temporary folder's as ``figures``;
            None leaves the notebook as it is.
        home: the working folder, where this machine has it; else the temporary one.
    """
    start = clock.now()
    done = Done(0.0, {})
    try:
        done.about = machine()
        temporary = Path(tempfile.gettempdir())
        files.tidy(temporary)
        with files.unfinished(temporary) as place, guarded(str(place)):
            _execute(text, place / f"{name}.ipynb", parameters, home, done)
    except OSError as failure:  # such as no room for temporary files
        done.error, done.final = f"{type(failure).__name__}: {failure}", False
    done.seconds = clock.now() - start
    return done


def _execute(
    text: str, output: Path, parameters: Mapping[str, object] | None, home: str, done: Done
) -> None:
    """Execute a notebook into ``output``, and put its files and error into ``done``."""
    source, figures = output.with_name("source.ipynb"), output.with_name("figures")
    figures.mkdir()
    source.write_text(text, encoding="utf-8")
    try:
        papermill.execute_notebook(
            str(source),
            str(output),
            parameters=None if parameters is None else {"figures": str(figures), **parameters},
            cwd=home if Path(home).is_dir() else str(output.parent),
            kernel_name="python3",
            language="python",
            execution_timeout=CELL_TIMEOUT,
            progress_bar=False,
            # A kernel's own messages, such as that it was interrupted, are not the notebook's.
            extra_arguments=["--log-level=CRITICAL"],
        )
    except papermill.PapermillExecutionError as failure:
        done.error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
    except CellTimeoutError:
        done.error = f"a cell took more than {CELL_TIMEOUT} s"
    except DeadKernelError as failure:
        done.error, done.final = f"the kernel died: {failure}", False
    except Exception as failure:  # noqa: BLE001 - such as a full disk: named, and others go on
        done.error, done.final = f"{type(failure).__name__}: {failure}", False
    written = [path for path in (*figures.iterdir(), output) if path.is_file()]
    done.files = {path.name: path.read_bytes() for path in written}


# Waits for the end of its input; then kills all processes with the mark, and removes a folder.
GUARD = """
import shutil, sys, time
sys.stdin.buffer.read()
import psutil
mark, place = sys.argv[1:]
found, end = True, time.monotonic() + 60
while found and time.monotonic() < end:
    found = False
    for process in psutil.process_iter(["environ", "status"]):
        if (process.info["environ"] or {}).get("SVDLIB_RUN") == mark:
            if process.info["status"] != psutil.STATUS_ZOMBIE:
                found = True
                try:
                    process.kill()
                except psutil.Error:
                    pass
    time.sleep(0.05 * found)
shutil.rmtree(place, ignore_errors=True)
"""

# The guards of this process, by number.
guards: set[int] = set()


@contextlib.contextmanager
def guarded(place: str) -> Iterator[None]:
    """End all that is started inside with the block, or with this process if it is killed.

    A process of its own, the guard, waits for either, by a pipe that then closes. It kills all
    that inherited the block's mark in the environment, and removes the folder ``place``.
    """
    mark = uuid.uuid4().hex
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, mark, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C does not reach it
    )
    guards.add(guard.pid)
    try:
        with environment():
            os.environ["SVDLIB_RUN"] = mark
            yield
    finally:
        guard.communicate()
        guards.discard(guard.pid)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Leave this process's environment as it was."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def machine() -> dict[str, object]:
    """Date, processor, cores, threads of a kernel, and versions.

    >>> machine()["cores"] >= 1
    True
    """
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = (models or [processor])[0]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores()),
        "python": platform.python_version(),
        **{package: version(package) for package in ("svdlib", "torch")},
    }


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


WIDGET = "application/vnd.jupyter.widget-view+json"


def cleaned(text: str) -> str:
    """An executed notebook to commit: without warnings, bars, widgets, and what papermill adds.

    Of a widget that has a still picture, the picture stays.
    """
    content = nbformat.reads(text, as_version=4)
    for cell in content.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
        if cell.cell_type == "code":
            cell.outputs = kept(cell.outputs)
    for key in ("widgets", "papermill"):
        content.metadata.pop(key, None)
    content.metadata["language_info"] = {"name": "python"}
    return nbformat.writes(content) + "\n"


def kept(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without warnings, progress bars and widgets."""
    found = []
    for output in outputs:
        data = output.get("data", {})
        widget = data.pop(WIDGET, None)
        if output.get("name") == "stderr" or output.get("metadata", {}).get("progress"):
            continue
        if widget is None or set(data) > {"text/plain"}:
            found.append(output)
    return found
