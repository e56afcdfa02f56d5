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
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from svdlib import clock, files

# Of a kernel: its own messages, such as that it was interrupted, are not the notebook's.
QUIET = ["--log-level=CRITICAL"]

# One cell may take as long as the largest sweep of the study does on a slow machine.
CELL_TIMEOUT = 3600


@dataclass
class Done:
    """What came of a run.

    Attributes:
        files: the executed notebook, and what the notebook wrote into its folder of figures.
        error: what failed, in a line; None if nothing did.
        final: whether another try would end alike: the notebook itself is at fault, no kernel
            that was killed.
    """

    seconds: float
    about: dict[str, object]
    files: dict[str, bytes] = field(default_factory=dict)
    error: str | None = None
    final: bool = True


def execute(text: str, name: str, parameters: Mapping[str, object], home: str | None) -> Done:
    """Execute a notebook headless, in a temporary folder of which nothing stays.

    Args:
        text: the notebook, as JSON.
        name: what its executed copy is called, without ``.ipynb``.
        parameters: values for its parameters cell; ``figures`` is a folder in the temporary one.
        home: the working folder, where this machine has it; else the temporary one.
    """
    start, about = clock.now(), {}
    try:
        about = machine()
        left, error, final = _executed(text, name, parameters, home)
    except OSError as failure:  # no room for temporary files, say
        left, error, final = {}, f"{type(failure).__name__}: {failure}", False
    return Done(clock.now() - start, about, left, error, final)


def _executed(
    text: str, name: str, parameters: Mapping[str, object], home: str | None
) -> tuple[dict[str, bytes], str | None, bool]:
    """The files that it leaves, and `Done`'s error and final."""
    files.tidy(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=files.unfinished()) as place, guarded(place):
        source, output = Path(place, "source.ipynb"), Path(place, f"{name}.ipynb")
        figures = Path(place, "figures")
        figures.mkdir()
        source.write_text(text)
        error, final = None, True
        try:
            papermill.execute_notebook(
                str(source),
                str(output),
                parameters={"figures": str(figures), **parameters},
                cwd=home if home and Path(home).is_dir() else place,
                kernel_name="python3",
                language="python",
                execution_timeout=CELL_TIMEOUT,
                progress_bar=False,
                extra_arguments=QUIET,
            )
        except papermill.PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
        except DeadKernelError as failure:
            error, final = f"the kernel died: {failure}", False
        except CellTimeoutError:
            error = f"a cell took more than {CELL_TIMEOUT} s"
        except Exception as failure:  # noqa: BLE001 - a full disk, no kernel: named, others go on
            error, final = f"{type(failure).__name__}: {failure}", False
        written = [*figures.iterdir(), *([output] if output.is_file() else [])]
        left = {path.name: path.read_bytes() for path in written if path.is_file()}
    return left, error, final


# Waits for the end of its input; then kills what has the mark, and removes a folder.
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
if place:
    shutil.rmtree(place, ignore_errors=True)
"""


# Those of this process, by number.
guards: set[int] = set()


@contextlib.contextmanager
def guarded(place: str = "") -> Iterator[None]:
    """What is started inside ends with the block, or with this process, however that ends.

    A process of its own waits for either, by a pipe that then closes. Then it kills all that
    inherited the block's mark in the environment, kernels and what these started, and removes the
    folder ``place``.
    """
    mark = uuid.uuid4().hex
    guard = subprocess.Popen(
        [sys.executable, "-c", GUARD, mark, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )
    guards.add(guard.pid)
    before = os.environ.get("SVDLIB_RUN")
    os.environ["SVDLIB_RUN"] = mark
    try:
        yield
    finally:
        if before is None:
            del os.environ["SVDLIB_RUN"]
        else:
            os.environ["SVDLIB_RUN"] = before
        guard.communicate()
        guards.discard(guard.pid)


def machine() -> dict[str, object]:
    """When and on what: date, processor, cores, threads of a kernel, and versions.

    >>> machine()["cores"] >= 1
    True
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": _processor(),
        "cores": cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores()),
        "python": platform.python_version(),
        "svdlib": version("svdlib"),
        "torch": version("torch"),
    }


def cores() -> int:
    """Those that this process may use.

    >>> cores() >= 1
    True
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Its name, where the system tells it."""
    told = Path("/proc/cpuinfo")
    if told.is_file():
        for line in told.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


WIDGET = "application/vnd.jupyter.widget-view+json"


def _kept(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without warnings, bars and widgets; of a widget that has a still picture, this."""
    kept = []
    for output in outputs:
        data = output.get("data", {})
        widget = data.pop(WIDGET, None)
        if output.get("name") == "stderr" or output.get("metadata", {}).get("progress"):
            continue
        if widget is None or set(data) > {"text/plain"}:
            kept.append(output)
    return kept


def refreshed(text: str, home: str) -> tuple[str, str | None, float]:
    """A notebook with the outputs of a run at its own parameters; the error; seconds.

    Without what changes at every run, and without widgets: of a panel its still picture stays.
    """
    start, error = clock.now(), None
    content = nbformat.reads(text, as_version=4)
    client = NotebookClient(
        content,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        store_widget_state=False,
        extra_arguments=QUIET,
        resources={"metadata": {"path": home}},
    )
    try:
        with guarded():
            client.execute()
    except CellExecutionError as failure:
        number = sum(cell.get("execution_count") is not None for cell in content.cells)
        error = f"cell {number}: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # noqa: BLE001 - a dead kernel, a full disk: named, others go on
        error = f"{type(failure).__name__}: {failure}"
    for cell in content.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _kept(cell.outputs)
    content.metadata.pop("widgets", None)
    content.metadata["language_info"] = {"name": "python"}
    return nbformat.writes(content) + "\n", error, clock.now() - start
