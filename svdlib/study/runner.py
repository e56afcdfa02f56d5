"""Executes the notebooks headless with papermill, and puts their figures in place."""

from __future__ import annotations

import argparse
import ast
import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm.auto import tqdm

from svdlib import clock

NOTEBOOKS = Path("notebooks")

# Of a kernel: its own messages, such as that it was interrupted, are not the notebook's.
QUIET = ["--log-level=CRITICAL"]

# One cell may take as long as the largest sweep of the study does on a slow machine.
CELL_TIMEOUT = 3600

# What a parameter may be declared as; anything else takes any literal, or else the text.
TYPES = {"str", "int", "float", "bool", "list", "dict", "tuple", "None"}


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: its executed copy, seconds, and the error if it failed."""

    name: str
    output: Path
    seconds: float
    error: str | None = None


def find(names: Sequence[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks of these names (``01_baseline``, or a path), each once, or all of the folder's.

    Raises:
        ValueError: no notebook of that name (the known ones are listed), or two files of one name.
    """
    known = sorted(folder.glob("*.ipynb"))
    if not known and not names:
        raise ValueError(f"{folder.resolve()} holds no notebooks; run from the project's root")
    found: dict[str, Path] = {}
    for name in names:
        matches = [path for path in known if name in (path.stem, path.name)]
        if not matches and Path(name).suffix == ".ipynb" and Path(name).is_file():
            matches = [Path(name)]
        if not matches:
            listed = ", ".join(path.stem for path in known) or "none"
            raise ValueError(f"no notebook {name!r}; known: {listed}")
        for path in matches:
            other = found.setdefault(path.stem, path)
            if other.resolve() != path.resolve():
                raise ValueError(f"{other} and {path} have one name; run them one after the other")
    return list(found.values()) or known


def declared(notebook: Path) -> dict[str, set[str]]:
    """The types that each parameter may take, from the cell tagged ``parameters``.

    Declared as ``n: int = 3``, ``x: str | None = None`` or ``Optional[str]``; ``n = 3`` takes the
    type of its value. An empty set allows anything.

    Raises:
        ValueError: not a notebook, or a parameters cell that is not Python.
    """
    try:
        content = nbformat.read(notebook, as_version=4)
        cells = [c for c in content.cells if "parameters" in c.metadata.get("tags", [])]
        lines = "".join(cell.source for cell in cells[:1]).splitlines()
        tree = ast.parse("\n".join("" if line[:1] in "%!" else line for line in lines))
    except (
        nbformat.reader.NotJSONError,
        AttributeError,
        KeyError,
        TypeError,
        UnicodeError,
    ) as error:
        raise ValueError(f"{notebook} is not a Jupyter notebook") from error
    except (nbformat.ValidationError, SyntaxError) as error:
        raise ValueError(f"{notebook}: {str(error).splitlines()[0]}") from error
    found: dict[str, set[str]] = {}
    for line in tree.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            found[line.target.id] = _kinds(line.annotation)
        elif isinstance(line, ast.Assign):
            for target in line.targets:
                if isinstance(target, ast.Name):
                    found[target.id] = _kinds_of_value(line.value)
    return found


def _kinds(annotation: ast.expr) -> set[str]:
    """The type names in an annotation; empty where it holds one that no text can be held against."""
    text = ast.unparse(annotation).strip("'\"").replace("typing.", "")
    if text.startswith("Optional["):
        text = f"{text[len('Optional[') : -1]} | None"
    elif text.startswith("Union["):
        text = text[len("Union[") : -1].replace(",", "|")
    kinds = {part.split("[")[0].strip() for part in text.split("|")}
    return kinds if kinds <= TYPES else set()


def _kinds_of_value(value: ast.expr) -> set[str]:
    try:
        kind = type(ast.literal_eval(value)).__name__
    except ValueError:
        return set()
    return {kind} & TYPES


def parse(notebook: Path, given: Mapping[str, str]) -> dict[str, object]:
    """Parameters from text, by the names and types that the notebook declares.

    Raises:
        ValueError: a name the notebook does not have, or a text that is not of its type.
    """
    known = declared(notebook)
    parameters: dict[str, object] = {}
    for name, text in given.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{notebook.stem} has no parameter {name!r}; known: {listed}")
        try:
            parameters[name] = _value(text, known[name])
        except ValueError as error:
            raise ValueError(f"{notebook.stem}: parameter {name!r} {error}") from None
    return parameters


def _value(text: str, kinds: set[str]) -> object:
    """The text as one of the types, a string only where nothing else fits or it is the only one.

    >>> _value("1", {"float"}), _value("7", {"str"}), _value("None", {"str", "None"})
    (1.0, '7', None)
    """
    if kinds == {"str"}:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError):
        value = text
    kind = "None" if value is None else type(value).__name__
    if kind == "int" and "float" in kinds - {"int"} and "int" not in kinds:
        return float(value)
    if not kinds or kind in kinds - {"str"}:
        return value
    if "str" in kinds:
        return text
    raise ValueError(f"must be {_a(sorted(kinds))}, not {text!r}")


def _a(kinds: Sequence[str]) -> str:
    """What a parameter must be, in words: ``an int or None``."""
    named = [
        kind if kind == "None" else f"{'an' if kind == 'int' else 'a'} {kind}" for kind in kinds
    ]
    return " or ".join(named)


def run(
    names: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
    *,
    jobs: int = 1,
    out: Path = Path("runs"),
    figures: Path = Path("figures"),
    folder: Path = NOTEBOOKS,
    progress: bool = True,
) -> list[Outcome]:
    """Execute notebooks, ``jobs`` at a time; a failure does not stop the others.

    Executed copies go to ``out``. A notebook's figures are staged there and moved to
    ``figures`` only when the whole notebook has succeeded. In a terminal, bars show how far each
    notebook is; elsewhere it has a line when it ends.

    Raises:
        ValueError: an unknown notebook or parameter, a value of another type, jobs below 1,
            an ``out`` that would overwrite the notebooks, or a folder that can't be written.
        KeyboardInterrupt: Ctrl-C, after the kernels that were started are stopped.
    """
    notebooks = find(names, folder)
    parameters = [parse(notebook, given or {}) for notebook in notebooks]
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    if any(out.resolve() == notebook.parent.resolve() for notebook in notebooks):
        raise ValueError(f"{out} holds the notebooks themselves; choose another --out")
    for place in (out, figures):
        _check_writable(place)
    bars = progress and sys.stderr.isatty()
    with tempfile.TemporaryDirectory(dir=out, prefix="figures-") as staging:
        calls = [
            (path, values, out, figures, Path(staging), position if bars else None)
            for position, (path, values) in enumerate(
                zip(notebooks, parameters, strict=True), start=1
            )
        ]
        outcomes = _shown(_in_processes(_run_one, calls, jobs), len(calls), progress)
    return sorted(outcomes, key=lambda outcome: outcome.name)


def _shown(outcomes: Iterator[Outcome], total: int, progress: bool) -> list[Outcome]:
    """All outcomes; a bar of how many there are, or a line each where there is no terminal."""
    bars, found = sys.stderr.isatty(), []
    with tqdm(total=total, unit="notebook", disable=not (progress and bars)) as bar:
        for outcome in outcomes:
            found.append(outcome)
            bar.update()
            if progress and not bars:
                end = outcome.error or "ok"
                print(f"{outcome.name}: {end}, {outcome.seconds:.0f} s", file=sys.stderr)
    return found


def _in_processes(
    function: Callable[..., Outcome], calls: Sequence[Sequence[object]], jobs: int
) -> Iterator[Outcome]:
    """The outcomes of calls as they end, each in a process: papermill changes the working folder.

    Whatever stops the wait, no process and no kernel is left.
    """
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("fork"), initializer=_prepare, initargs=(jobs,)
    )
    with pool:
        futures = [pool.submit(function, *call) for call in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # Kernels run in sessions of their own, which no signal reaches.
            while not all(future.done() for future in futures):
                for child in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                time.sleep(0.1)
            raise


def _prepare(jobs: int) -> None:
    """Of a process that executes notebooks: the parent alone takes the signals that stop it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.getLogger("papermill").setLevel(logging.ERROR)
    if jobs > 1:
        # Kernels that each start a thread per core would wait for one another's barriers.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


def _check_writable(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"can't write to the folder {place}: {error.strerror}") from error


def _run_one(
    notebook: Path,
    parameters: Mapping[str, object],
    out: Path,
    figures: Path,
    staging: Path,
    position: int | None,
) -> Outcome:
    """Execute one notebook, with a progress bar at that position of the terminal, if any."""
    output, staged = out / notebook.name, staging / notebook.stem
    staged.mkdir()
    start, error = clock.now(), None
    bar: object = False
    if position is not None:
        bar = {"position": position, "leave": False, "desc": notebook.stem}
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters={"figures": str(staged.resolve()), **parameters},
            cwd=str(notebook.parent),
            kernel_name="python3",
            language="python",
            execution_timeout=CELL_TIMEOUT,
            progress_bar=bar,
            extra_arguments=QUIET,
        )
        for figure in sorted(staged.iterdir()):
            shutil.copyfile(figure, figures / f".{figure.name}")
            os.replace(figures / f".{figure.name}", figures / figure.name)
    except papermill.PapermillExecutionError as failure:
        error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # noqa: BLE001 - a dead kernel, a full disk: named, others go on
        error = f"{type(failure).__name__}: {failure}"
    return Outcome(notebook.stem, output, clock.now() - start, error)


def refresh(notebook: Path) -> Outcome:
    """Execute a notebook at its own parameters and keep the outputs in it, if it succeeds.

    Progress bars are left out, so that a stored notebook shows results alone.
    """
    start, error = clock.now(), None
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        store_widget_state=False,
        extra_arguments=QUIET,
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    try:
        client.execute()
        _keep(content, notebook)
    except CellExecutionError as failure:
        number = sum(cell.get("execution_count") is not None for cell in content.cells)
        error = f"cell {number}: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # noqa: BLE001 - a dead kernel, a full disk: named, others go on
        error = f"{type(failure).__name__}: {failure}"
    return Outcome(notebook.stem, notebook, clock.now() - start, error)


def _keep(content: nbformat.NotebookNode, notebook: Path) -> None:
    """Put an executed notebook in the place of the old one, without what changes at every run."""
    for cell in content.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if output.get("name") != "stderr"
                and "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            ]
    content.metadata.pop("widgets", None)
    content.metadata["language_info"] = {"name": "python"}
    part = notebook.with_suffix(".part")
    nbformat.write(content, part)
    os.replace(part, notebook)


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of the outcomes, one a line."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{'notebook':<{width}}  {'outcome':<7}  seconds  executed copy"]
    for outcome in outcomes:
        status = "failed" if outcome.error else "ok"
        lines.append(
            f"{outcome.name:<{width}}  {status:<7}  {outcome.seconds:7.1f}  {outcome.output}"
        )
        if outcome.error:
            lines.append(f"    {outcome.error}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, ``python -m svdlib``; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows no σ shows \u03c3
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="python -m svdlib")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="execute notebooks and rebuild their figures")
    runner.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="01_baseline …; all")
    runner.add_argument(
        "-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    runner.add_argument("--jobs", type=int, default=1, help="notebooks at a time (default 1)")
    runner.add_argument("--out", type=Path, default=Path("runs"), help="executed copies (runs)")
    runner.add_argument("--figures", type=Path, default=Path("figures"), help="figures (figures)")
    fresh = commands.add_parser("refresh", help="execute notebooks in place, for committing")
    fresh.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="01_baseline …; all")
    rest, given = _parameters(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(rest)
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        if options.command == "refresh":
            calls = [[notebook] for notebook in find(options.notebooks)]
            outcomes = _shown(_in_processes(refresh, calls, 1), len(calls), progress=True)
        else:
            outcomes = run(
                options.notebooks,
                given,
                jobs=options.jobs,
                out=options.out,
                figures=options.figures,
            )
    except ValueError as error:
        print(f"svdlib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("svdlib: stopped; the kernels are stopped too", file=sys.stderr)
        return 128 + int(stop.args[0] if stop.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(report(outcomes))
    return int(any(outcome.error for outcome in outcomes))


def _parameters(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without each complete ``-p NAME VALUE``, and these: a value may be ``-1e-3``.

    >>> _parameters(["run", "-p", "rate", "-1e-3", "--jobs", "2"])
    (['run', '--jobs', '2'], {'rate': '-1e-3'})
    """
    rest, given = [], {}
    left = list(arguments)
    while left:
        if left[0] in ("-p", "--parameter") and len(left) >= 3:
            _, name, value, *left = left
            given[name] = value
        else:
            rest.append(left.pop(0))
    return rest, given


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)
