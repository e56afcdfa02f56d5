"""What many runs cost beyond themselves: 10,000 of an empty task on a cluster of this machine.

``python tests/faults/many.py [--runs 10000] [--jobs 2]`` prints milliseconds a run and the memory
of the client and the scheduler, which are one process here.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from functools import partial
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from svdlib import clock
from svdlib.study.running import sweeps
from svdlib.study.running.execute import Done


def empty(*_: object) -> Done:
    """Instead of a notebook: what a small one gives back."""
    return Done(0.0, {}, {"a.ipynb": b"x" * 20_000})


def main(runs: int = 10_000, jobs: int = 2) -> tuple[float, float]:
    """Milliseconds a run, and MiB at the most."""
    sweeps._work = empty
    with tempfile.TemporaryDirectory() as folder, sweeps.local(jobs) as client:
        cell = new_code_cell("n: int = -1", metadata={"tags": ["parameters"]})
        notebook = Path(folder, "a.ipynb")
        nbformat.write(new_notebook(cells=[cell]), notebook)
        planned = sweeps.plan([notebook], {}, [("n", f"0:{runs}")])
        keep = partial(sweeps.save, out=Path(folder, "runs"))
        start = clock.now()
        found = sum(
            isinstance(outcome, sweeps.Outcome) and outcome.error is None
            for outcome in sweeps.complete(client, planned, keep)
        )
        seconds = clock.now() - start
        assert found == len(list(Path(folder, "runs", "a").glob("n=*/a.ipynb"))) == runs
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return 1000 * seconds / runs, memory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=2)
    print("{:.1f} ms a run, {:.0f} MiB".format(*main(**vars(parser.parse_args()))))
