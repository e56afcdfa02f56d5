"""The command line: notebooks headless, each at one or many sets of parameters."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import methodcaller
from pathlib import Path
from typing import Any, TextIO

from tqdm.auto import tqdm

from svdlib import clock, files
from svdlib.study.evidence import readme, records
from svdlib.study.running import lab, results, sweeps
from svdlib.study.running.execute import Done, cleaned, cores
from svdlib.study.running.figures import publish
from svdlib.study.running.parameters import NOTEBOOKS, Values, find
from svdlib.study.running.sweeps import Outcome, Run

FIGURES = Path("figures")  # of the committed notebooks at their own parameters
LINE = 60  # seconds between two lines about progress where there is no terminal
PATIENCE = 300  # looks for killed workers of this machine, which may be busy or stalled
LISTED = 20  # more outcomes are counted, not listed


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
    rewrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> list[Outcome]:
    """Execute notebooks, each with every combination of parameters; an outcome per run.

    See docs/sweeps.md. Whatever stops this call, the same call completes what is missing. On this
    machine two go at a time, and those that time something alone, last; or as many as ``jobs``.
    """
    notebooks, given = find(names, folder), given or {}
    lacking = sweeps.lacking(notebooks, (*given, *dict(over)))
    runs = sweeps.plan(notebooks, given, over, here=scheduler is None)
    _check_options(notebooks, jobs, scheduler, out)
    targets = _targets(() if over else runs, figures, folder)
    complete = {planned.place for planned in runs if not fresh and (out / planned.place).is_dir()}
    missing = [planned for planned in runs if planned.place not in complete]
    if progress or dry_run:
        for name, others in lacking.items():
            _note(f"{name} is no parameter of {', '.join(others)}")
        already = f", {len(complete)} there already" if complete else ""
        _note(f"{len(missing)} {'run' if len(missing) == 1 else 'runs'}{already}")
    if dry_run:
        _say("\n".join(str(planned.place) for planned in missing), sys.stdout)
        return []
    for place in (out, *targets.values(), *(out / notebook.stem for notebook in notebooks)):
        _prepare(place)

    def keep(planned: Run, done: Done | None = None) -> Outcome:
        """Store a run's results, unless they are there, and put its figures where they belong."""
        outcome = Outcome(planned.place.parent.name, out / planned.place, 0.0)
        if done:
            outcome = sweeps.save(planned, done, out=out)
        if outcome.error:
            return outcome
        if (target := targets.get(planned.place)) is None:
            return replace(outcome, figures=outcome.output)
        every = rewrite or target.resolve() != FIGURES.resolve()
        copied = publish(outcome.output, target, planned.times or (), every)
        return replace(outcome, figures=target, copied=copied)

    outcomes = [keep(planned) for planned in runs if planned.place in complete]
    outcomes += _executed(missing, keep, jobs, scheduler, progress)
    return sorted(outcomes, key=lambda outcome: str(outcome.output))


def _executed(
    runs: Sequence[Run],
    keep: Callable[[Run, Done], Outcome],
    jobs: int | None,
    scheduler: str | None,
    progress: bool,
) -> list[Outcome]:
    """Execute runs on a scheduler's workers, or on this machine."""
    patience = math.inf if scheduler else PATIENCE
    outcomes: list[Outcome] = []
    batches = [(jobs or 1, list(runs))]
    if jobs is None and scheduler is None:
        alone = [planned for planned in runs if planned.times is not None]
        others = [planned for planned in runs if planned.times is None]
        batches = [(min(2, cores(), max(1, len(others))), others), (1, alone)]
    for together, batch in batches:
        if batch:
            with sweeps.connected(scheduler) if scheduler else sweeps.local(together) as client:
                if progress and "dashboard" in client.scheduler_info().get("services", {}):
                    _note(f"dashboard: {client.dashboard_link}")
                coming = sweeps.complete(client, batch, keep, patience)
                with contextlib.closing(coming):
                    outcomes += _shown(coming, len(batch), progress)
    return outcomes


def _say(text: str, stream: TextIO) -> None:
    """Print to a stream where that works: finished work outlives a closed pipe and a full disk."""
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):
        _silence(stream)


def _silence(stream: TextIO) -> None:
    """Send a stream that can't be written to nowhere, so that Python's last flush succeeds."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def _note(line: str) -> None:
    _say(line, sys.stderr)


def _check_options(
    notebooks: Sequence[Path], jobs: int | None, scheduler: str | None, out: Path
) -> None:
    if jobs is not None and scheduler is not None:
        raise ValueError("--jobs is for this machine, --scheduler for others; give one of them")
    if scheduler == "":
        raise ValueError("--scheduler is empty; give an address such as tcp://10.0.0.1:8786")
    if jobs is not None and not 1 <= jobs <= cores():
        raise ValueError(f"jobs must be at least 1 and at most the {cores()} cores, not {jobs}")
    if any(out.resolve() == notebook.parent.resolve() for notebook in notebooks):
        raise ValueError(f"{out} holds the notebooks themselves; choose another --out")


def _targets(runs: Sequence[Run], figures: Path | None, folder: Path) -> dict[Path, Path]:
    """Where to copy figures, by the place of the run; those of other runs stay beside it."""
    targets = {}
    for planned in runs:
        of_the_study = planned.own and planned.notebook.parent.resolve() == folder.resolve()
        if figures and figures.resolve() == FIGURES.resolve() and not of_the_study:
            raise ValueError(
                f"{figures} is for the study's notebooks at their own parameters, not for "
                f"{planned.place}; give another --figures, or none to have them beside the results"
            )
        if figures or of_the_study:
            targets[planned.place] = figures or FIGURES
    return targets


def _prepare(place: Path) -> None:
    """Make a folder, check that it can be written to, and remove what killed processes left."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(f"can't write to the folder {place}: {error.strerror}") from None
    files.tidy(place)


def sweep(
    names: Sequence[str] = (), *, target: Path = Path("results"), **options: Any
) -> list[Outcome]:
    """Run the sweeps of these names, or all, and put their tables into ``target``; see `run`."""
    outcomes, chosen = [], results.sweeps(names, target)
    here = options.get("scheduler") is None
    for wanted in chosen:  # a mistake in the last one is an error before the first one starts
        over = list(wanted.over.items())
        sweeps.plan(find([wanted.notebook]), wanted.parameters, over, here=here)
    for wanted in chosen:
        found = run([wanted.notebook], wanted.parameters, list(wanted.over.items()), **options)
        if found and not any(outcome.error for outcome in found):
            results.write(wanted, [outcome.output for outcome in found], target)
        outcomes += found
    return outcomes


def refresh(names: Sequence[str] = (), folder: Path = NOTEBOOKS) -> list[Outcome]:
    """Execute notebooks in place, at their own parameters; one that fails stays as it was."""

    def put(planned: Run, done: Done) -> Outcome:
        path = planned.notebook
        if done.error is None:
            files.put(path, cleaned(done.files[path.name].decode()))
        return Outcome(path.stem, path, done.seconds, done.error)

    paths = find(names, folder)
    runs = [Run(path, path.read_text("utf-8"), None, {}, True, Path(path.stem)) for path in paths]
    with sweeps.local(1) as client:
        return _shown(sweeps.complete(client, runs, put, PATIENCE), len(runs), progress=True)


def _shown(
    outcomes: Iterable[Outcome | int], total: int, progress: bool, line: float = LINE
) -> list[Outcome]:
    """All outcomes; meanwhile a bar, or a line per minute where there is no terminal."""
    found: list[Outcome] = []
    running = failed = 0
    start = noted = clock.now()
    bars = progress and sys.stderr.isatty()
    with tqdm(total=total, unit="run", disable=not bars) as bar:
        for outcome in outcomes:
            if isinstance(outcome, int):
                running = outcome
            else:
                found.append(outcome)
                failed += outcome.error is not None
                bar.update()
                if progress and total <= LISTED:
                    with bar.external_write_mode(sys.stderr):
                        _note(_line(outcome))
            bar.set_postfix_str(f"{running} running, {failed} failed", refresh=False)
            now = clock.now()
            if progress and not bars and now - noted >= line:
                noted, done = now, len(found)
                left = f"some {(total - done) * (now - start) / done / 60:.0f} min" if done else ""
                time = f"{left} left" if left else "time left unknown"
                _note(f"{done} of {total} done, {running} running, {failed} failed, {time}")
    return found


def _line(outcome: Outcome) -> str:
    """A finished run in a line, with a figure to open."""
    if outcome.error:
        return f"{outcome.name} failed: {outcome.error}"
    pictures = sorted((outcome.figures or outcome.output).glob(f"{outcome.name[:3]}*.png"))
    look = f"; see {pictures[0]}" if pictures else ""
    return f"{outcome.name} done in {outcome.seconds:.0f} s{look}"


def report(outcomes: Sequence[Outcome]) -> str:
    """A table of the outcomes; of many, only the failed ones and the number of the others."""
    listed = [outcome for outcome in outcomes if outcome.error or len(outcomes) <= LISTED]
    width = max((len(outcome.name) for outcome in listed), default=8)
    lines = [f"{'notebook':<{width}}  outcome  seconds  results"] if listed else []
    for outcome in listed:
        name, status = f"{outcome.name:<{width}}", "failed" if outcome.error else "ok"
        seconds = f"{outcome.seconds:7.1f}" if outcome.seconds else "earlier"
        lines.append(f"{name}  {status:<7}  {seconds}  {outcome.output}")
        if outcome.error:
            lines.append(f"    {outcome.error}")
    if len(listed) < len(outcomes):
        lines.append(f"{len(outcomes) - len(listed)} runs ok")
    figures: dict[str, dict[str, None]] = {}
    for outcome in outcomes:
        if outcome.figures:
            beside = outcome.figures == outcome.output
            place = "beside the executed notebook" if beside else f"in {outcome.figures}"
            figures.setdefault(place, {})[outcome.name] = None
    for place, names in sorted(figures.items(), reverse=True):  # "in FOLDER" first
        lines.append(f"figures {place}: {', '.join(names)}")
    copied = [new for outcome in outcomes for new in outcome.copied.values()]
    if stayed := copied.count(False):
        lines.append(
            f"{copied.count(True)} of {len(copied)} were written; {stayed} stayed, as they agree "
            "with this run or are timings (all of this run's are beside the executed notebooks; "
            "--rewrite puts them in place)"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, ``python -m svdlib``; returns the exit status."""
    arguments = list(map(_text, sys.argv[1:]) if arguments is None else arguments)
    if named := os.environ.get("SVDLIB_DATA"):  # kernels work in other folders
        os.environ["SVDLIB_DATA"] = str(Path(named).expanduser().absolute())
    try:
        if arguments[:1] == ["lab"]:  # all other arguments are JupyterLab's
            return lab.main(arguments[1:])
        for index in range(len(arguments) - 2):
            if arguments[index] in ("-p", "--parameter", "--over"):
                # With a blank first, argparse takes a value that begins with a dash for no option.
                arguments[index + 2] = " " + arguments[index + 2]
        options = vars(_parser().parse_args(arguments))
        outcomes = COMMANDS[options.pop("command")](**options)
    except (ValueError, OSError) as error:
        _note(f"svdlib: {str(error) or type(error).__name__}")
        return 2
    except KeyboardInterrupt as stop:
        _note("svdlib: stopped; the kernels are stopped too")
        return 128 + int(stop.args[0] if stop.args else signal.SIGINT)
    if outcomes is None or options.get("dry_run"):
        return 0
    _say(report(outcomes), sys.stdout)
    return int(any(outcome.error for outcome in outcomes))


def _text(argument: str) -> str:
    """An argument as text, also where the locale knows ASCII alone."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode(errors="replace")
    return argument


def _collect(out: Path, notebook: str, table: str) -> None:
    collected = records.collect(out, notebook, table)
    try:
        print(collected.to_csv(index=False), end="", flush=True)
    except BrokenPipeError:  # a reader that has seen enough, as head
        _silence(sys.stdout)


COMMANDS: dict[str, Callable[..., list[Outcome] | None]] = {
    "run": lambda given, **options: run(given=dict(given), **options),
    "sweep": sweep,
    "refresh": refresh,
    "readme": readme.write,
    "collect": _collect,
}


def _folder(text: str) -> Path:
    """A folder by its name, in which ~ is the user's own."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m svdlib", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=_folder, default=Path("runs"), help="folder of the runs (runs)")
    many = argparse.ArgumentParser(add_help=False, parents=[out])
    jobs = "runs at a time on this machine (2; those that time something alone, last)"
    many.add_argument("--jobs", type=int, help=jobs)
    many.add_argument("--scheduler", help="address of a Dask scheduler, instead of --jobs")
    many.add_argument("--fresh", action="store_true", help="repeat completed runs too")
    many.add_argument("--dry-run", action="store_true", help="only list what would run")
    notebooks = argparse.ArgumentParser(add_help=False)
    notebooks.add_argument("names", nargs="*", metavar="NOTEBOOK", help="01_baseline …; all")

    add, both = commands.add_parser, [many, notebooks]
    runner = add("run", help="execute notebooks, rebuild figures", parents=both, allow_abbrev=False)
    unguarded = methodcaller("removeprefix", " ")  # see `main`
    pair: dict[str, Any] = {"nargs": 2, "action": "append", "default": [], "type": unguarded}
    once = "a notebook's parameter, such as -p epochs 3; repeat it for others"
    several = "run every one of these values, such as --over rank 4,6,8 or --over seeds 0:100:10"
    shown: dict[str, Any] = {"dest": "given", "metavar": ("NAME", "VALUE"), "help": once}
    runner.add_argument("-p", "--parameter", **shown, **pair)
    runner.add_argument("--over", metavar=("NAME", "VALUES"), help=several, **pair)
    where = "folder for the figures (figures at a notebook's own parameters, else beside it)"
    runner.add_argument("--figures", type=_folder, help=where)
    runner.add_argument("--rewrite", action="store_true", help="replace figures that agree, too")
    swept = add("sweep", help="measure what is in results/", parents=[many])
    swept.add_argument("names", nargs="*", metavar="NAME", help="of results/NAME.toml; all")
    add("refresh", help="execute notebooks in place, for committing", parents=[notebooks])
    add("lab", help="open copies of the notebooks in JupyterLab, with its options")
    add("readme", help="write the README's numbers from results/")
    gather = add("collect", help="one CSV of a table of all runs of a notebook", parents=[out])
    gather.add_argument("notebook", help="such as 04_comparison")
    gather.add_argument("table", help="such as 04_error_by_rank")
    return parser
