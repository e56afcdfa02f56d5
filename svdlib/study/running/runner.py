"""The command line: notebooks headless, each at one or many sets of parameters."""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client, KilledWorker
from tqdm.auto import tqdm

from svdlib import clock, files
from svdlib.study.evidence import readme, records
from svdlib.study.running import lab, sweeps
from svdlib.study.running.execute import cores, refreshed
from svdlib.study.running.parameters import NOTEBOOKS, Values, find
from svdlib.study.running.sweeps import Outcome, Run

# The study's own: of the committed notebooks at their own parameters.
FIGURES = Path("figures")

# Where there is no terminal, a line so often (seconds).
LINE = 60

# Workers of this machine that are killed come back in less (seconds); those of others may take long.
PATIENCE = 60

# More outcomes than this are counted, not listed.
LISTED = 20


def run(
    names: Sequence[str] = (),
    given: Mapping[str, str] | None = None,
    over: Sequence[tuple[str, Values]] = (),
    *,
    jobs: int | None = None,
    scheduler: str | None = None,
    out: Path = Path("runs"),
    figures: Path | None = None,
    folder: Path = NOTEBOOKS,
    fresh: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> list[Outcome]:
    """Execute notebooks, each with every combination of parameters; a failure stops no other.

    Each run has a folder of its own under ``out``, with its figures; what is there already is not
    run again. Where ``over`` is empty, the folder's notebooks at their own parameters also put
    their figures into ``figures/``, each notebook all of them or none.

    Args:
        names: notebooks; all of the folder's by default.
        given: parameters for all notebooks that have them, as text.
        over: parameters with several values each, see `combinations`.
        jobs: runs at a time on this machine, which share its cores; one by default.
        scheduler: the address of a Dask scheduler, whose workers do it instead.
        figures: another folder, for the figures of all notebooks, whatever their parameters.
        fresh: run again what is there.
        dry_run: only tell what would run.

    Returns:
        an outcome each, those that were there included, by place, with where its figures are.

    Raises:
        ValueError: an unknown notebook or parameter, a value of another type in any combination,
            jobs below 1, beyond the cores or beside a scheduler, an ``out`` that holds the
            notebooks, the study's figures for other parameters, a folder that can't be written, a
            scheduler that does not answer, workers with other versions.
        ConnectionError: the scheduler is lost on the way, or no worker of this machine can be kept.
        OSError: results can't be written: a full disk, say.
        KeyboardInterrupt: Ctrl-C, after the kernels that were started are stopped.

    Whatever stops it, the runs that were done are kept, and the same call does the rest.
    """
    notebooks = find(names, folder)
    runs = sweeps.plan(notebooks, given or {}, over, here=scheduler is None)
    study = {
        each.place
        for each in runs
        if each.own and each.notebook.parent.resolve() == folder.resolve()
    }
    published = {
        each.place: figures or FIGURES
        for each in runs
        if not over and (figures or each.place in study)
    }
    if jobs is not None and scheduler is not None:
        raise ValueError("--jobs is for this machine, --scheduler for others; give one of them")
    if scheduler == "":
        raise ValueError("--scheduler is empty; give an address such as tcp://10.0.0.1:8786")
    if jobs is not None and not 1 <= jobs <= cores():
        raise ValueError(f"jobs must be at least 1 and at most the {cores()} cores, not {jobs}")
    if any(out.resolve() == notebook.parent.resolve() for notebook in notebooks):
        raise ValueError(f"{out} holds the notebooks themselves; choose another --out")
    if figures and figures.resolve() == FIGURES.resolve():
        for place in published.keys() - study:
            raise ValueError(
                f"{figures} is for the study's notebooks at their own parameters, not for {place}; "
                "give another --figures, or none to have them beside the results"
            )
    left = runs if fresh else sweeps.missing(runs, out)
    if progress or dry_run:
        for name, others in sweeps.lacking(notebooks, (*(given or {}), *dict(over))).items():
            if others:
                print(f"{name} is no parameter of {', '.join(others)}", file=sys.stderr)
        _tell(runs, left, dry_run)
    if dry_run:
        return []
    for place in {out, *published.values()}:
        _check_writable(place)
        files.tidy(place)
    for notebook in notebooks:
        files.tidy(out / notebook.stem)
    todo = {each.place for each in left}
    outcomes = [
        Outcome(each.notebook.stem, out / each.place, 0.0)
        for each in runs
        if each.place not in todo
    ]
    if left:
        with sweeps.connected(scheduler) if scheduler else sweeps.local(jobs or 1) as client:
            if progress:
                _tell_dashboard(client)
            patience = math.inf if scheduler else PATIENCE
            with contextlib.closing(sweeps.complete(client, left, out, patience)) as done:
                outcomes += _shown(done, len(left), progress)
    for number, outcome in enumerate(outcomes):
        if outcome.error is None:
            target = published.get(outcome.output.relative_to(out))
            if target:
                _put_in_place(outcome.output, target)
            outcomes[number] = replace(outcome, figures=target or outcome.output)
    return sorted(outcomes, key=lambda outcome: str(outcome.output))


def sweep(
    names: Sequence[str] = (),
    *,
    jobs: int | None = None,
    scheduler: str | None = None,
    out: Path = Path("runs"),
    results: Path = Path("results"),
    folder: Path = NOTEBOOKS,
    fresh: bool = False,
    dry_run: bool = False,
) -> list[Outcome]:
    """Run the sweeps that the study rests on, and put each one's table into ``results``.

    Args:
        names: of the files ``results/NAME.toml``, see `records.Sweep`; all by default.

    Raises:
        ValueError: an unknown sweep or one that is not as it should be; and as `run` does.
    """
    outcomes = []
    for each in records.sweeps(names, results):
        found = run(
            [each.notebook],
            each.parameters,
            each.over,
            jobs=jobs,
            scheduler=scheduler,
            out=out,
            folder=folder,
            fresh=fresh,
            dry_run=dry_run,
        )
        if found and not any(outcome.error for outcome in found):
            records.write(each, [outcome.output for outcome in found], results)
        outcomes += found
    return outcomes


def _tell(runs: Sequence[Run], left: Sequence[Run], dry_run: bool) -> None:
    """What would run, each in a line where nothing is run; and how many are there already."""
    if dry_run:
        for each in left:
            print(each.place)
    there = len(runs) - len(left)
    told = f"{len(left)} {'run' if len(left) == 1 else 'runs'}"
    print(told + (f", {there} there already" if there else ""), file=sys.stderr)


def _tell_dashboard(client: Client) -> None:
    if "dashboard" in client.scheduler_info().get("services", {}):
        print(f"dashboard: {client.dashboard_link}", file=sys.stderr)


def _shown(
    outcomes: Iterable[Outcome | int], total: int, progress: bool, line: float = LINE
) -> list[Outcome]:
    """All outcomes; meanwhile a bar, or a line a minute where there is no terminal."""
    found: list[Outcome] = []
    running = failed = 0
    start = told = clock.now()
    bars = progress and sys.stderr.isatty()
    with tqdm(total=total, unit="run", disable=not bars) as bar:
        for outcome in outcomes:
            if isinstance(outcome, int):
                running = outcome
            else:
                found.append(outcome)
                failed += outcome.error is not None
                bar.update()
            bar.set_postfix_str(f"{running} running, {failed} failed", refresh=False)
            now = clock.now()
            if progress and not bars and now - told >= line:
                told, done = now, len(found)
                left = (total - done) * (now - start) / done / 60 if done else None
                time = f"some {left:.0f} min left" if left is not None else "time left unknown"
                print(
                    f"{done} of {total} done, {running} running, {failed} failed, {time}",
                    file=sys.stderr,
                    flush=True,
                )
    return found


def _put_in_place(place: Path, figures: Path) -> None:
    """Copy a run's pictures and tables, all of them or none, with the folder to itself."""
    with (
        files.alone(figures),
        tempfile.TemporaryDirectory(dir=figures, prefix=files.unfinished()) as stage,
    ):
        new, old = Path(stage, "new"), Path(stage, "old")
        new.mkdir()
        old.mkdir()
        names = [path.name for path in place.iterdir() if path.suffix not in (".ipynb", ".json")]
        for name in names:
            shutil.copyfile(place / name, new / name)
            if (figures / name).exists():
                shutil.copy2(figures / name, old / name)
        begun = []
        try:
            for name in names:
                begun.append(name)
                (new / name).replace(figures / name)
        except BaseException:
            for name in begun:
                (figures / name).unlink(missing_ok=True)
                if (old / name).exists():
                    (old / name).replace(figures / name)
            raise


def _check_writable(place: Path) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"can't write to the folder {place}: {error.strerror}") from None


def refresh(names: Sequence[str] = (), folder: Path = NOTEBOOKS) -> list[Outcome]:
    """Execute notebooks in place, at their own parameters; one that fails stays as it was.

    Progress bars are left out, so that a stored notebook shows results alone.
    """
    notebooks = find(names, folder)

    def outcomes(client: Client) -> Iterator[Outcome]:
        for path in notebooks:  # one after the other: a killed worker takes one along
            future = client.submit(
                refreshed, path.read_text("utf-8"), str(path.parent.resolve()), pure=False
            )
            try:
                text, error, seconds = future.result()
            except KilledWorker:
                text, error, seconds = "", "its worker was killed", 0.0
            if error is None:
                files.put(path, text)
            yield Outcome(path.stem, path, seconds, error)

    with sweeps.local(1) as client:
        return _shown(outcomes(client), len(notebooks), progress=True)


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of the outcomes, one a line; of many, the failed ones and a count of the others.

    >>> print(report([Outcome("a", Path("runs/a/own-1"), 2.0)]))
    notebook  outcome  seconds  results
    a         ok           2.0  runs/a/own-1
    """
    listed = [each for each in outcomes if each.error or len(outcomes) <= LISTED]
    width = max((len(outcome.name) for outcome in listed), default=8)
    lines = [f"{'notebook':<{width}}  {'outcome':<7}  seconds  results"] if listed else []
    for outcome in listed:
        status = "failed" if outcome.error else "ok"
        lines.append(
            f"{outcome.name:<{width}}  {status:<7}  {outcome.seconds:7.1f}  {outcome.output}"
        )
        if outcome.error:
            lines.append(f"    {outcome.error}")
    if len(listed) < len(outcomes):
        lines.append(f"{len(outcomes) - len(listed)} runs ok")
    elsewhere: dict[Path, list[str]] = {}
    for each in outcomes:
        if each.figures and each.figures != each.output:
            elsewhere.setdefault(each.figures, []).append(each.name)
    lines += [f"figures in {place}: {', '.join(names)}" for place, names in elsewhere.items()]
    beside = dict.fromkeys(each.name for each in outcomes if each.figures == each.output)
    if beside:
        lines.append(f"figures beside the executed notebook: {', '.join(beside)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, ``python -m svdlib``; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["lab"]:  # all else is JupyterLab's
        return lab.main(arguments[1:])
    rest, given, over = _parameters(arguments)
    parser = _parser()
    options = vars(parser.parse_args(rest))
    command = options.pop("command")
    if command != "run" and (given or over):
        parser.error(f"-p and --over belong to run, not to {command}")
    streams = [each for each in (sys.stdout, sys.stderr) if hasattr(each, "reconfigure")]
    errors = [stream.errors for stream in streams]
    for stream in streams:  # a terminal that knows no σ shows \u03c3
        stream.reconfigure(errors="backslashreplace")
    try:
        return _run(command, options, given, over)
    finally:
        for stream, before in zip(streams, errors, strict=True):
            stream.reconfigure(errors=before)


def _run(
    command: str,
    options: dict[str, Any],
    given: Mapping[str, str],
    over: Sequence[tuple[str, Values]],
) -> int:
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        if command == "collect":
            table = records.collect(options["out"], options["notebook"], options["table"])
            with contextlib.suppress(BrokenPipeError):  # a reader that has seen enough, as head
                print(table.to_csv(index=False), end="", flush=True)
            return 0
        if command == "readme":
            readme.write()
            return 0
        if command == "refresh":
            outcomes = refresh(options["names"])
        elif command == "sweep":
            outcomes = sweep(**options)
        else:
            outcomes = run(given=given, over=over, **options)
    except (ValueError, OSError) as error:
        print(f"svdlib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("svdlib: stopped; the kernels are stopped too", file=sys.stderr)
        return 128 + int(stop.args[0] if stop.args else signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, previous)
    if not options.get("dry_run"):
        print(report(outcomes))
    return int(any(outcome.error for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m svdlib", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs (runs)")
    many = argparse.ArgumentParser(add_help=False, parents=[out])
    many.add_argument("--jobs", type=int, help="runs at a time on this machine (1)")
    many.add_argument("--scheduler", help="address of a Dask scheduler, instead of --jobs")
    many.add_argument("--fresh", action="store_true", help="run again what is there")
    many.add_argument("--dry-run", action="store_true", help="only tell what would run")

    runner = commands.add_parser(
        "run", help="execute notebooks, rebuild figures", parents=[many], allow_abbrev=False
    )
    runner.add_argument("names", nargs="*", metavar="NOTEBOOK", help="01_baseline …; all")
    # Both are taken out before, see `_parameters`: one that comes here lacks its value.
    pair = argparse.SUPPRESS
    runner.add_argument("-p", "--parameter", nargs=2, default=pair, metavar=("NAME", "VALUE"))
    runner.add_argument("--over", nargs=2, default=pair, metavar=("NAME", "1,2,3|0:100:10"))
    runner.add_argument(
        "--figures",
        type=Path,
        help="folder for the figures (figures at a notebook's own parameters, else beside it)",
    )
    swept = commands.add_parser("sweep", help="measure what is in results/", parents=[many])
    swept.add_argument("names", nargs="*", metavar="NAME", help="of results/NAME.toml; all")
    again = commands.add_parser("refresh", help="execute notebooks in place, for committing")
    again.add_argument("names", nargs="*", metavar="NOTEBOOK", help="01_baseline …; all")
    commands.add_parser("lab", help="open copies of the notebooks in JupyterLab, with its options")
    commands.add_parser("readme", help="write the README's numbers from results/")
    gather = commands.add_parser(
        "collect", help="one CSV of a table of all runs of a notebook", parents=[out]
    )
    gather.add_argument("notebook", help="such as 04_comparison")
    gather.add_argument("table", help="such as 04_error_by_rank")
    return parser


def _parameters(
    arguments: Sequence[str],
) -> tuple[list[str], dict[str, str], list[tuple[str, Values]]]:
    """The arguments without each complete ``-p NAME VALUE`` and ``--over NAME VALUES``; and these.

    A value may begin with a dash.

    >>> _parameters(["run", "-p", "rate", "-1e-3", "--over", "rank", "-1,2", "--jobs", "2"])
    (['run', '--jobs', '2'], {'rate': '-1e-3'}, [('rank', '-1,2')])
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    over: list[tuple[str, Values]] = []
    left = list(arguments)
    while left:
        if left[0] in ("-p", "--parameter", "--over") and len(left) >= 3:
            option, name, value, *left = left
            if option == "--over":
                over.append((name, value))
            else:
                given[name] = value
        else:
            rest.append(left.pop(0))
    return rest, given, over


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)
