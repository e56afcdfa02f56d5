"""Many runs: each in a folder of its own, on as many workers as there are, resumed where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import dask
import nbformat
import psutil
from distributed import (
    CancelledError,
    Client,
    Future,
    KilledWorker,
    LocalCluster,
    get_worker,
    wait,
)
from distributed.comm import CommClosedError

import svdlib
from svdlib import clock, files
from svdlib.study.running import inputs
from svdlib.study.running.execute import Done, cores, execute, guards
from svdlib.study.running.parameters import Values, combinations, declared, defaults

VERSION = version("svdlib")

# A run that took its worker or its kernel along has this many tries in all.
TRIES = 3

# Kernels of a worker that is stopped take less (seconds).
PATIENCE = 20

# No result depends on these.
ASIDE = {"figures", "progress"}


@dataclass(frozen=True)
class Run:
    """A notebook with a set of parameters.

    Attributes:
        notebook: the file.
        text: its code and prose without outputs, as JSON: what travels to a worker.
        parameters: those given.
        everything: these and the notebook's own, as far as results depend on them.
        own: whether these are the notebook's own alone.
        place: the folder of its results, ``NOTEBOOK/NAME=VALUE,…-HASH``.
    """

    notebook: Path
    text: str
    parameters: dict[str, object]
    everything: dict[str, object]
    own: bool
    place: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a run: where its results are, seconds, the error if it failed, and where its
    figures were put, if anywhere else."""

    name: str
    output: Path
    seconds: float
    error: str | None = None
    figures: Path | None = None


class Misfit(Exception):
    """A worker whose Python or svdlib is not the client's: its address, and what it has."""

    def __str__(self) -> str:
        return "worker {} has {}, this client {}; install the same on both".format(*self.args)


def plan(
    notebooks: Sequence[Path],
    given: Mapping[str, str],
    over: Sequence[tuple[str, Values]] = (),
    *,
    here: bool = True,
) -> list[Run]:
    """Every run asked for: each notebook with each combination of the parameters that it has.

    Args:
        here: whether they are run on this machine, so that the device must be one of its own.

    Raises:
        ValueError: as `combinations`, for any of them; a parameter that no notebook has; what a
            notebook with `inputs.check` would refuse; ``figures``, which is set here.
    """
    if "figures" in {*given, *dict(over)}:
        raise ValueError("each run has a folder for its figures; give --figures for the last step")
    lacking(notebooks, (*given, *dict(over)))
    runs: dict[Path, Run] = {}
    for notebook in notebooks:
        own, known = defaults(notebook), declared(notebook)
        text = _bare(notebook)
        sources = _sources(text)
        quiet = {"progress": False} if own.get("progress") is True else {}  # nobody watches bars
        checks = "inputs.check(" in text
        for parameters in combinations(
            notebook,
            {name: value for name, value in given.items() if name in known},
            [(name, values) for name, values in over if name in known],
        ):
            everything = {**own, **parameters}
            for name in ASIDE & everything.keys():
                del everything[name]
            changed = {
                name: value
                for name, value in parameters.items()
                if name in everything and (name not in own or own[name] != value)
            }
            if checks:
                _check(notebook.stem, everything, device=here and "device" in changed)
            place = Path(notebook.stem, _name(sources, changed, everything))
            given_to = {**quiet, **parameters}
            runs[place] = Run(notebook, text, given_to, everything, not changed, place)
    return list(runs.values())


def lacking(notebooks: Sequence[Path], names: Sequence[str]) -> dict[str, list[str]]:
    """For each of these parameters, the notebooks that don't have it.

    Raises:
        ValueError: one that none of them has.
    """
    known = {notebook.stem: declared(notebook) for notebook in notebooks}
    found = {}
    for name in names:
        found[name] = [notebook for notebook, has in known.items() if name not in has]
        if len(found[name]) == len(known):
            which = f"{found[name][0]} has no" if len(known) == 1 else "no notebook has a"
            listed = ", ".join(dict.fromkeys(itertools.chain(*known.values()))) or "none"
            raise ValueError(f"{which} parameter {name!r}; known: {listed}")
    return found


def _check(notebook: str, everything: Mapping[str, object], device: bool) -> None:
    try:
        inputs.check(
            {name: value for name, value in everything.items() if device or name != "device"}
        )
    except ValueError as error:
        raise ValueError(f"{notebook}: {error}") from None


def _bare(notebook: Path) -> str:
    """The notebook without outputs and counts."""
    content = nbformat.read(notebook, as_version=4)
    for cell in content.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(content)


def _sources(text: str) -> str:
    """A hash of a notebook's code."""
    cells = json.loads(text)["cells"]
    sources = [cell["source"] for cell in cells if cell.get("cell_type") == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def _name(sources: str, changed: Mapping[str, object], everything: Mapping[str, object]) -> str:
    """What differs from the notebook's own parameters, for a person, and a hash of everything.

    >>> _name("", {"rank": 5}, {"rank": 5, "every": "epoch"})[:7]
    'rank=5-'
    """
    whole = json.dumps([sources, everything, code()], sort_keys=True, default=repr)
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    told = ",".join(f"{name}={value}" for name, value in changed.items())
    told = re.sub(r"[^\w.,=+-]+", "_", told)[:80] or "own"
    return f"{told}-{digest}"


@cache
def code() -> str:
    """A hash of the library's code."""
    folder = Path(svdlib.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def missing(runs: Sequence[Run], out: Path) -> list[Run]:
    """The runs whose results are not there yet."""
    return [run for run in runs if not (out / run.place).is_dir()]


@contextlib.contextmanager
def local(jobs: int) -> Iterator[Client]:
    """A cluster of this machine's own, on loopback alone: so many workers share the cores.

    Raises:
        ChildProcessError: a worker can't be started.
    """
    share = max(1, cores() // jobs)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = str(min(share, int(wanted)) if wanted.isdigit() and int(wanted) else share)
    settings = {
        # A killed worker's run comes back to the client, which counts its tries.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.profile.enabled": False,  # would cost some hundredths of a core
    }
    with (
        _environment(),
        dask.config.set(settings),
        _cluster(jobs, {"OMP_NUM_THREADS": threads}) as cluster,
        Client(cluster) as client,
    ):
        try:
            yield client
        except BaseException:
            _kill(cluster)
            raise


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """This process's environment as it was: Dask sets some of it for the workers it starts."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _cluster(jobs: int, environment: Mapping[str, str]) -> LocalCluster:
    try:
        return LocalCluster(
            n_workers=jobs,
            threads_per_worker=1,
            memory_limit=0,  # the kernels have the memory, not the workers
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            env=environment,
        )
    except RuntimeError:
        raise ChildProcessError(
            "a worker ended while it started; the same command completes what is missing"
        ) from None


def _kill(cluster: LocalCluster) -> None:
    """End its workers; their kernels then end by `svdlib.study.running.execute.guarded`, and are waited for."""
    for nanny in list(cluster.workers.values()):
        nanny.close_gracefully()  # so that it starts no other
        if nanny.process and nanny.process.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker = psutil.Process(nanny.process.pid)
                below = worker.children(recursive=True)
                worker.kill()
                _end(*psutil.wait_procs(below, timeout=PATIENCE)[1])


def _end(*processes: psutil.Process) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _stop(client: Client, futures: Iterable[Future]) -> None:
    """End the kernels of these runs, wherever they are."""
    keys = {future.key for future in futures}
    busy = [worker for worker, running in client.processing().items() if keys & {*running}]
    if busy:
        client.run(_end_children, workers=busy)


def _end_children() -> None:
    _end(*(each for each in psutil.Process().children(recursive=True) if each.pid not in guards))


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    """A scheduler's client, once it and its workers are seen to be fit.

    Certificates for a ``tls://`` address are those of Dask's own configuration.

    Raises:
        ValueError: nobody answers within ten seconds; a scheduler or workers with another Python
            or svdlib, or workers with more than one thread.
    """
    try:
        client = Client(address, timeout=10)
    except Exception as error:  # noqa: BLE001 - a bad address, another protocol, no certificate
        raise ValueError(
            f"no scheduler answers at {address!r} within 10 s ({type(error).__name__}: {error})"
        ) from None
    with client:
        try:
            theirs = client.run_on_scheduler(fit)
        except Exception as error:  # noqa: BLE001 - it has no svdlib, or one of old
            raise ValueError(f"the scheduler can't import this svdlib: {error}") from None
        found = {"(the scheduler)": theirs, **client.run(fit, on_error="return")}
        for worker, theirs in found.items():
            if theirs != fit():
                raise ValueError(str(Misfit(worker, theirs, fit())))
        yield client


def fit() -> str:
    """What a worker and its client must have in common."""
    return f"Python {platform.python_version()}, svdlib {VERSION} (code {code()})"


def _workers(client: Client) -> int:
    """How many there are, each with one thread, since a process can run one notebook at a time."""
    found = client.nthreads()
    for worker, threads in found.items():
        if threads != 1:
            raise ValueError(
                f"worker {worker} has {threads} threads; start workers with --nthreads 1, "
                "and as many as runs shall go at a time"
            )
    return len(found)


def _work(wanted: str, text: str, name: str, parameters: dict[str, object], home: str) -> Done:
    """On a worker: see `execute`."""
    if fit() != wanted:
        raise Misfit(get_worker().address, fit(), wanted)
    threads = os.environ.get("OMP_NUM_THREADS", str(cores()))
    # Where these are not set, Dask's own default is one thread.
    os.environ.update(dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads))
    done = execute(text, name, parameters, home)
    if code.__wrapped__() != code():
        return Done(done.seconds, done.about, error="svdlib's code was changed while it ran")
    return done


def complete(
    client: Client, runs: Sequence[Run], out: Path, patience: float = math.inf
) -> Generator[Outcome | int]:
    """Execute runs on a client's workers and keep each one's results as they come.

    As many are under way as there are workers, those included that join later: neither the client
    nor the scheduler holds more. What took its worker or kernel along is tried again, `TRIES`
    times in all. Where it ends early, the kernels that are under way end too.

    Args:
        patience: seconds to wait for a worker while there is none.

    Yields:
        the outcome of each; and once a second, if none came, how many are under way.

    Raises:
        ConnectionError: the scheduler is lost, or all workers.
        ValueError: a worker that joined later does not fit.
        OSError: results can't be written.
    """
    left = [(run, 1) for run in reversed(runs)]
    under_way: dict[Future, tuple[Run, int]] = {}
    wanted, workers = fit(), 0
    seen = looked = clock.now()
    try:
        while left or under_way:
            if clock.now() - looked > 1 or not workers:
                looked, workers = clock.now(), _workers(client)
            while left and len(under_way) < workers:
                run, number = left.pop()
                future = client.submit(
                    _work,
                    wanted,
                    run.text,
                    run.notebook.stem,
                    run.parameters,
                    str(run.notebook.parent.resolve()),
                    key=f"{run.place}-{number}-{os.urandom(4).hex()}",
                    pure=False,
                )
                under_way[future] = run, number
            seen = clock.now() if workers else seen
            if clock.now() - seen > patience:
                raise ConnectionError("no worker is left; the same command does what is missing")
            for future in _first(under_way):
                run, number = under_way.pop(future)
                done = _result(future)
                if done.error and not done.final and number < TRIES:
                    left.append((run, number + 1))
                else:
                    if done.error and number > 1:
                        done.error += f" ({number} tries)"
                    yield keep(run, done, out)
            yield len(under_way)
    except (CancelledError, CommClosedError):
        raise ConnectionError(
            "the scheduler is lost; the same command completes what is missing"
        ) from None
    except BaseException:
        with contextlib.suppress(Exception):
            _stop(client, under_way)
        raise


def _first(under_way: Mapping[Future, object]) -> set[Future]:
    """Those that are done, within a second."""
    if not under_way:
        time.sleep(1)
        return set()
    try:
        return set(wait(list(under_way), timeout=1, return_when="FIRST_COMPLETED").done)
    except TimeoutError:
        return set()


def _result(future: Future) -> Done:
    try:
        done: Done = future.result()
    except KilledWorker:
        return Done(0.0, {}, error="its worker was killed", final=False)
    except CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - a run's own errors come back as its result
        raise ValueError(f"a worker can't run notebooks of this client: {error}") from None
    finally:
        future.release()
    return done


def keep(run: Run, done: Done, out: Path) -> Outcome:
    """Put a run's results into its folder, whole or not at all; a failed one's beside it.

    ``run.json`` has the parameters, seconds, machine, versions and error, if any.

    Raises:
        OSError: the disk is full, say.
    """
    place = out / run.place
    failed = place.with_name(f"{place.name}.failed")
    target = failed if done.error else place
    about = {
        "notebook": run.notebook.stem,
        "parameters": run.everything,
        "seconds": round(done.seconds, 3),
        "code": code(),
        **done.about,
        **({"error": done.error} if done.error else {}),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{files.unfinished()}{uuid.uuid4().hex}")
    part.mkdir()
    old = part.with_name(f"{part.name}-old")
    try:
        for name, content in done.files.items():
            (part / name).write_bytes(content)
        (part / "run.json").write_text(json.dumps(about, indent=1, default=repr) + "\n")
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():  # else another client's, of the same run
                raise
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for rest in (part, old):
            shutil.rmtree(rest, ignore_errors=True)
    if not done.error:
        shutil.rmtree(failed, ignore_errors=True)
    return Outcome(run.notebook.stem, target, done.seconds, done.error)
