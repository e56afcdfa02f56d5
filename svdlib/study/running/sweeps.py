"""Many runs: each in a folder of its own, on as many workers as there are, resumed where it stopped."""

from __future__ import annotations

import ast
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
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import dask
import nbformat
import psutil
from distributed import CancelledError, Client, Future, KilledWorker, LocalCluster, get_worker, wait
from distributed.comm import CommClosedError

import svdlib
from svdlib import files
from svdlib.study.running.execute import Done, cores, environment, execute, guards
from svdlib.study.running.figures import timed
from svdlib.study.running.parameters import Values, combinations, declared, defaults, statements

TRIES = 3  # of a run whose worker or kernel is killed
ASIDE = {"figures", "progress"}  # parameters on which no result depends


@dataclass(frozen=True)
class Run:
    notebook: Path
    text: str  # what travels to a worker: the notebook without outputs, as JSON
    parameters: dict[str, object] | None  # the values given; None leaves the notebook as it is
    everything: dict[str, object]  # these and the notebook's own, if results depend on them
    own: bool  # whether ``everything`` is the notebook's own
    place: Path  # the folder of its results, ``NOTEBOOK/NAME=VALUE,…-HASH``
    times: frozenset[str] | None = None  # figures of seconds; None if it measures none


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: where its results are, seconds, what failed, where its figures are."""

    name: str
    output: Path
    seconds: float
    error: str | None = None
    figures: Path | None = None
    copied: Mapping[str, bool] = field(default_factory=dict)  # see `figures.publish`


def plan(
    notebooks: Sequence[Path],
    given: Mapping[str, str],
    over: Sequence[tuple[str, Values]] = (),
    *,
    here: bool = True,
) -> list[Run]:
    """All requested runs: each notebook with each combination of the parameters that it has.

    If they run ``here``, on this machine, the device must be one of its own.
    """
    runs: dict[Path, Run] = {}
    for notebook in notebooks:
        own, known = defaults(notebook), declared(notebook)
        content, sources = nbformat.read(notebook, as_version=4), []
        times = timed(content.cells)
        for cell in content.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
                sources.append(cell.source)
        text = nbformat.writes(content)
        quiet = {"progress": False} if own.get("progress") is True else {}  # nobody watches bars
        check = compile(_check(sources), notebook.stem, "exec")
        fixed = {name: value for name, value in given.items() if name in known}
        varied = [(name, values) for name, values in over if name in known]
        for parameters in combinations(notebook, fixed, varied):
            everything = {k: v for k, v in (own | parameters).items() if k not in ASIDE}
            changed = {
                k: v for k, v in parameters.items() if k in everything and own.get(k, ...) != v
            }
            local_device = {} if here and "device" in changed else {"device": "auto"}
            try:
                exec(check, {**everything, **local_device})  # noqa: S102 - the notebook's own
            except ValueError as error:
                raise ValueError(f"{notebook.stem}: {error}") from None
            except ImportError:  # what is only beside the notebook; there, its kernel checks
                pass
            place = Path(notebook.stem, _name(sources, changed, everything))
            runs[place] = Run(
                notebook, text, quiet | parameters, everything, not changed, place, times
            )
    return list(runs.values())


def _check(sources: Iterable[str]) -> str:
    """A notebook's line ``NAME.check(globals())``, which checks its parameters, and its import."""
    for source in sources:
        if called := re.search(r"^(\w+)\.check\(globals\(\)\)$", source, re.MULTILINE):
            lines = [line for line in statements(source) if isinstance(line, ast.ImportFrom)]
            for line in lines:
                line.names = [part for part in line.names if called[1] in (part.asname, part.name)]
            return "\n".join([*(ast.unparse(line) for line in lines if line.names), called[0]])
    return ""


def lacking(notebooks: Sequence[Path], names: Sequence[str]) -> dict[str, list[str]]:
    """For each of these parameters, the notebooks that lack it; a ValueError if all do."""
    if "figures" in names:
        raise ValueError("each run has a folder for its figures; give --figures for the last step")
    known = {notebook.stem: declared(notebook) for notebook in notebooks}
    found = {name: [stem for stem, has in known.items() if name not in has] for name in names}
    for name, without in found.items():
        if len(without) == len(known):
            which = f"{without[0]} has no" if len(known) == 1 else "no notebook has a"
            listed = ", ".join(dict.fromkeys(itertools.chain(*known.values()))) or "none"
            raise ValueError(f"{which} parameter {name!r}; known: {listed}")
    return {name: without for name, without in found.items() if without}


def _name(
    sources: Sequence[str], changed: Mapping[str, object], everything: Mapping[str, object]
) -> str:
    """What differs from the notebook's own parameters, for a person, and a hash of everything."""
    content = json.dumps([sources, everything, code()], sort_keys=True, default=repr)
    summary = ",".join(f"{name}={value}" for name, value in changed.items())
    # Folders' names hold 255 bytes; of 100,000 runs, 8 digits would make two the same.
    named = sys.getfilesystemencoding()
    short = re.sub(r"[^\w.,=+-]+", "_", summary).encode(named, "ignore")[:80]
    summary = short.decode(named, "ignore") or "own"
    return f"{summary}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


@cache
def code() -> str:
    folder = Path(svdlib.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def versions() -> str:
    """What a worker and its client must have in common."""
    return f"Python {platform.python_version()}, svdlib {version('svdlib')} (code {code()})"


@contextlib.contextmanager
def local(jobs: int) -> Iterator[Client]:
    """A cluster on this machine's loopback alone, whose workers share the cores."""
    share = max(1, cores() // jobs)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(share, int(wanted)) if wanted.isdigit() and int(wanted) else share
    settings = {
        # A killed worker's run comes back to the client, which counts its tries.
        "distributed.scheduler.allowed-failures": 0,
        "distributed.worker.profile.enabled": False,  # would cost some hundredths of a core
    }
    with environment(), dask.config.set(settings):  # which Dask changes for its workers
        try:
            cluster = LocalCluster(
                n_workers=jobs,
                threads_per_worker=1,
                memory_limit=0,  # the kernels have the memory, not the workers
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
                env={"OMP_NUM_THREADS": str(threads)},
            )
        except RuntimeError:
            raise ChildProcessError("a worker ended while it started; try again") from None
        with cluster, Client(cluster) as client:
            try:
                yield client
            except BaseException:
                _kill(cluster)
                raise


def _kill(cluster: LocalCluster) -> None:
    """Kill its workers; their kernels then end by `guarded`, and are waited for."""
    for nanny in list(cluster.workers.values()):
        nanny.close_gracefully()  # so that it starts no other
        if nanny.process and nanny.process.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker = psutil.Process(nanny.process.pid)
                children = worker.children(recursive=True)
                worker.kill()
                _end(psutil.wait_procs(children, timeout=20)[1])


def _end(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _end_children() -> None:
    _end(child for child in psutil.Process().children(recursive=True) if child.pid not in guards)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Client]:
    """A client of the scheduler, if that answers, and it and its workers have these versions."""
    try:
        client = Client(address, timeout=10)
    except Exception as error:  # noqa: BLE001 - a bad address, another protocol, no certificate
        raise ValueError(
            f"no scheduler answers at {address!r} within 10 s ({type(error).__name__}: {error})"
        ) from None
    with client:
        try:
            scheduler = client.run_on_scheduler(versions)
        except Exception as error:  # noqa: BLE001 - it has no svdlib, or an old one
            raise ValueError(f"the scheduler can't import this svdlib: {error}") from None
        _check_versions("(the scheduler)", scheduler, versions())
        for worker, found in client.run(versions, on_error="return").items():
            _check_versions(worker, found, versions())
        yield client


def _check_versions(worker: str, found: object, client: str) -> None:
    if found != client:
        raise ValueError(f"worker {worker} has {found}, this client {client}; install the same")


def _workers(client: Client) -> int:
    """The number of workers, each with one thread: a process can run one notebook at a time."""
    workers = client.nthreads()
    for worker, threads in workers.items():
        if threads != 1:
            raise ValueError(
                f"worker {worker} has {threads} threads; start workers with --nthreads 1, "
                "and as many as runs shall go at a time"
            )
    return len(workers)


def _work(client: str, run: Run, home: str) -> Done:
    _check_versions(get_worker().address, versions(), client)
    threads = os.environ.get("OMP_NUM_THREADS", str(cores()))
    # Where these are not set, Dask's own default is one thread.
    os.environ.update(dict.fromkeys(("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads))
    done = execute(run.text, run.notebook.stem, run.parameters, home)
    if code.__wrapped__() != code():
        return Done(done.seconds, done.about, error="svdlib's code was changed while it ran")
    return done


def complete(
    client: Client,
    runs: Sequence[Run],
    keep: Callable[[Run, Done], Outcome],
    patience: float = math.inf,
) -> Generator[Outcome | int]:
    """Execute runs on a client's workers; yield outcomes, and each second the runs under way.

    ``keep`` stores the results of a run. As many runs are under way as there are workers, also
    those that join later, so that neither the client nor the scheduler holds more. If no worker
    is seen ``patience`` times in a row, once a second, or the scheduler is lost, a ConnectionError
    is raised. If this ends early, the kernels under way end too.

    Dask's own retries would not do: a worker's death also counts against the runs that wait for
    it, each scheduler sets its own limit, and a kernel ended at Ctrl-C would be tried again.
    """
    left = [(run, 1) for run in reversed(runs)]
    under_way: dict[Future, tuple[Run, int]] = {}
    alone = 0  # seconds without a worker, counted, as a stalled machine's clock jumps
    try:
        while left or under_way:
            workers = _workers(client)
            while left and len(under_way) < workers:
                run, number = left.pop()
                key = f"{run.place}-{number}-{os.urandom(4).hex()}"
                home = str(run.notebook.parent.resolve())
                future = client.submit(_work, versions(), run, home, key=key, pure=False)
                under_way[future] = run, number
            alone = 0 if workers else alone + 1
            if alone > patience:
                raise ConnectionError("no worker is left; the same command does what is missing")
            for future in _first(under_way):
                run, number = under_way.pop(future)
                done = _result(future)
                if done.error and not done.final and number < TRIES:
                    left.append((run, number + 1))
                else:
                    if done.error and number > 1:
                        done.error += f" ({number} tries)"
                    yield keep(run, done)
            yield len(under_way)
    except (CancelledError, CommClosedError):
        raise ConnectionError(
            "the scheduler is lost; the same command completes what is missing"
        ) from None
    except BaseException:
        with contextlib.suppress(Exception):
            keys = {future.key for future in under_way}
            busy = [worker for worker, going in client.processing().items() if keys & {*going}]
            if busy:
                client.run(_end_children, workers=busy)
        raise


def _first(under_way: Mapping[Future, object]) -> set[Future]:
    if not under_way:
        time.sleep(1)
        return set()
    with contextlib.suppress(TimeoutError):
        return set(wait(list(under_way), timeout=1, return_when="FIRST_COMPLETED").done)
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


def save(run: Run, done: Done, out: Path) -> Outcome:
    """Put a run's results into its folder, complete or not at all; a failed run's beside it."""
    place = out / run.place
    failed = place.with_name(f"{place.name}.failed")
    target = failed if done.error else place
    about = {
        "notebook": run.notebook.stem,
        "parameters": run.everything,
        "seconds": round(done.seconds, 3),
        "code": code(),
        "source": hashlib.sha256(run.text.encode()).hexdigest()[:12],
        **done.about,
        **({"error": done.error} if done.error else {}),
    }
    with files.complete_folder(target) as part:
        for name, content in done.files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_bytes(content)
        (part / "run.json").write_text(json.dumps(about, indent=1, default=repr) + "\n", "utf-8")
    if not done.error:
        shutil.rmtree(failed, ignore_errors=True)
    return Outcome(run.notebook.stem, target, done.seconds, done.error)
