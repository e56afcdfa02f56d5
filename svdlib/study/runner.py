"""Executes the notebooks headless with papermill, and puts their figures in place."""

from __future__ import annotations

import ast
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import psutil
from nbclient import NotebookClient
from tqdm.auto import tqdm

NOTEBOOKS = Path("notebooks")

# Of a kernel: its own warnings, such as that of a local socket, are not the notebook's.
QUIET = ["--log-level=ERROR"]

# One cell may take as long as the largest sweep of the study does on a slow machine.
CELL_TIMEOUT = 3600


@dataclass(frozen=True)
class Outcome:
    """What became of one notebook: its executed copy, seconds, and the error if it failed."""

    name: str
    output: Path
    seconds: float
    error: str | None = None


def find(names: Sequence[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks of these names (``01_baseline``, or a path), or all of the folder's.

    Raises:
        ValueError: no notebook of that name; the known ones are listed.
    """
    known = sorted(folder.glob("*.ipynb"))
    if not known and not names:
        raise ValueError(f"{folder.resolve()} holds no notebooks; run from the project's root")
    found = []
    for name in names:
        matches = [path for path in known if name in (path.stem, path.name)]
        if not matches and Path(name).suffix == ".ipynb" and Path(name).is_file():
            matches = [Path(name)]
        if not matches:
            listed = ", ".join(path.stem for path in known) or "none"
            raise ValueError(f"no notebook {name!r}; known: {listed}")
        found += matches
    return found or known


def parse(notebook: Path, given: Mapping[str, str]) -> dict[str, object]:
    """Parameters from text, by the names and types that the notebook declares.

    Raises:
        ValueError: a name the notebook does not have, or a text that is not of its type.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        declared = papermill.inspect_notebook(str(notebook))
    parameters: dict[str, object] = {}
    for name, text in given.items():
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise ValueError(f"{notebook.stem} has no parameter {name!r}; known: {known}")
        parameters[name] = _value(text, declared[name]["inferred_type_name"], name, notebook)
    return parameters


def _value(text: str, kind: str, name: str, notebook: Path) -> object:
    if kind == "str":
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError):
        value = None
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value).__name__ != kind.split("[")[0]:
        raise ValueError(f"{notebook.stem}: parameter {name!r} must be a {kind}, not {text!r}")
    return value


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
    ``figures`` only when the whole notebook has succeeded.

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
    logging.getLogger("papermill").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory(dir=out, prefix="figures-") as staging,
        # Processes, since papermill changes the working folder while it executes.
        ProcessPoolExecutor(
            jobs, multiprocessing.get_context("fork"), initializer=_share_cores, initargs=(jobs,)
        ) as pool,
        tqdm(total=len(notebooks), unit="notebook", disable=not progress) as bar,
    ):
        futures = [
            pool.submit(_run_one, path, given, out, figures, Path(staging), position, progress)
            for position, (path, given) in enumerate(
                zip(notebooks, parameters, strict=True), start=1
            )
        ]
        try:
            outcomes = []
            for future in futures:
                outcomes.append(future.result())
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            # Kernels run in sessions of their own, which Ctrl-C does not reach.
            while not all(future.done() for future in futures):
                for child in psutil.Process().children(recursive=True):
                    child.kill()
                time.sleep(0.1)
            raise
    return outcomes


def _share_cores(jobs: int) -> None:
    """Kernels that each start a thread per core would wait for one another's barriers."""
    if jobs > 1:
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
    position: int,
    progress: bool,
) -> Outcome:
    output, staged = out / notebook.name, staging / notebook.stem
    staged.mkdir()
    start, error = time.perf_counter(), None
    bar = {"position": position, "leave": False, "desc": notebook.stem} if progress else False
    try:
        papermill.execute_notebook(
            str(notebook),
            str(output),
            parameters={"figures": str(staged.resolve()), **parameters},
            cwd=str(notebook.parent),
            kernel_name="python3",
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
    return Outcome(notebook.stem, output, time.perf_counter() - start, error)


def refresh(notebook: Path) -> None:
    """Execute a notebook at its own parameters and keep the outputs in it, if it succeeds.

    Progress bars are left out, so that a stored notebook shows results alone.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the notebook is unchanged.
    """
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        store_widget_state=False,
        extra_arguments=QUIET,
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    client.execute()
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
    import argparse

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
    options = parser.parse_args(arguments)
    try:
        if options.command == "refresh":
            for notebook in tqdm(find(options.notebooks), unit="notebook"):
                refresh(notebook)
            return 0
        outcomes = run(
            options.notebooks,
            dict(options.parameter),
            jobs=options.jobs,
            out=options.out,
            figures=options.figures,
        )
    except ValueError as error:
        print(f"svdlib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("svdlib: stopped; the kernels are stopped too", file=sys.stderr)
        return 130
    print(report(outcomes))
    return int(any(outcome.error for outcome in outcomes))
