"""One run of a notebook, wherever it takes place: text and parameters in, files out."""

from __future__ import annotations

import contextlib
import os
import platform
import re
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
from papermill.translators import PythonTranslator, papermill_translators

from svdlib import clock, files

CELL_TIMEOUT = 3600  # seconds; the largest sweep of the study takes less on a slow machine
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass
class Done:
    seconds: float
    about: dict[str, object]  # see `machine`
    files: dict[str, bytes] = field(default_factory=dict)  # the executed notebook and its figures
    error: str | None = None
    final: bool = True  # False if another try may succeed: its kernel was killed, or a disk full


def execute(text: str, name: str, parameters: Mapping[str, object] | None, home: str) -> Done:
    """Execute a notebook, given as JSON, headless in a temporary folder.

    The executed copy is ``name.ipynb``. Its working folder is ``home`` if this machine has it. With
    ``parameters`` None, the notebook stays as it is; else ``figures`` is set too.
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
    """Execute a notebook into ``output``, and put its files and its error into ``done``."""
    source, figures = output.with_name("source.ipynb"), output.with_name("figures")
    figures.mkdir()
    source.write_text(text, encoding="utf-8")
    papermill_translators.register("python", _Literals)
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
    written = {}
    for path in output.parent.rglob("*"):
        if path.is_file() and path not in (source, output):
            place = figures if path.is_relative_to(figures) else output.parent
            written[path.relative_to(place).as_posix()] = path.read_bytes()
    if taken := sorted({"run.json", output.name} & written.keys()):
        done.error = done.error or f"the notebook writes {taken[0]}; give the file another name"
    done.files = written | ({output.name: output.read_bytes()} if output.is_file() else {})


class _Literals(PythonTranslator):
    """Parameters as Python writes them, also tuples, and dictionaries with keys of any kind."""

    @classmethod
    def translate(cls, val: object) -> str:
        return str(super().translate(val)) if isinstance(val, float) else repr(val)


# Waits for the end of its input; then kills all processes with the mark, and removes a folder.
GUARD = """
import contextlib, shutil, sys, time
sys.stdin.buffer.read()
import psutil
mark, place = sys.argv[1:]
found, end = True, time.monotonic() + 60
while found and time.monotonic() < end:
    found = False
    for process in psutil.process_iter(["environ", "status"]):
        marked = (process.info["environ"] or {}).get("SVDLIB_RUN") == mark
        if marked and process.info["status"] != psutil.STATUS_ZOMBIE:
            found = True
            with contextlib.suppress(psutil.Error):
                process.kill()
    time.sleep(0.05 * found)
shutil.rmtree(place, ignore_errors=True)
"""
guards: set[int] = set()  # the guards of this process, by number


@contextlib.contextmanager
def guarded(place: str) -> Iterator[None]:
    """End all processes started inside with the block, or with this process if it is killed.

    Either closes a pipe to another process, the guard. It then kills all processes that inherited
    the block's mark in their environment, and removes the folder ``place``.
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
            # The kernel "python3" is this interpreter's, whatever others are installed elsewhere.
            os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
            os.environ.pop("JUPYTER_PATH", None)
            yield
    finally:
        guard.communicate()
        guards.discard(guard.pid)


@contextlib.contextmanager
def environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*: *(.*\S)", described, re.MULTILINE)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores()),
        "python": platform.python_version(),
        **{package: version(package) for package in ("svdlib", "torch")},
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cleaned(text: str) -> str:
    """An executed notebook to commit, without transient outputs and what papermill adds."""
    content = nbformat.reads(text, as_version=4)
    for cell in content.cells:
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
        if cell.cell_type == "code":
            cell.outputs = lasting(cell.outputs)
    for key in ("widgets", "papermill"):
        content.metadata.pop(key, None)
    content.metadata["language_info"] = {"name": "python"}
    return nbformat.writes(content) + "\n"


def lasting(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs without warnings, progress bars, and widgets; a widget's still picture stays."""
    found = []
    for output in outputs:
        widget = output.get("data", {}).pop(WIDGET, None)
        empty = widget is not None and output.data.keys() <= {"text/plain"}
        transient = output.get("name") == "stderr" or output.get("metadata", {}).get("progress")
        if not (empty or transient):
            found.append(output)
    return found
