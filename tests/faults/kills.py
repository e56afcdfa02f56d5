"""Kill workers, kernels and clients of a sweep at random moments, and look at what is left.

``python tests/faults/kills.py [--runs 24] [--kills 20] [--seed 0]``, some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import nbformat
import pandas as pd
import psutil
from nbformat.v4 import new_code_cell, new_notebook

PARAMETERS = 'n: int = 1\nfigures: str = ""'
WORK = """
import time
time.sleep(2)
open(f"{figures}/table.csv", "w").write(f"square\\n{n * n}\\n")
"""


def main(runs: int = 24, kills: int = 20, seed: int = 0, folder: Path | None = None) -> str:
    """Run a sweep under fire; what happened, in a line. An `AssertionError` if anything is amiss."""
    with tempfile.TemporaryDirectory() as own:
        place = folder or Path(own)
        (place / "notebooks").mkdir()
        cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}), new_code_cell(WORK)]
        nbformat.write(new_notebook(cells=cells), place / "notebooks/a.ipynb")
        mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "svdlib", "run", "a", "--over", "n", f"0:{runs}"]
        command += ["--jobs", str(min(2, os.cpu_count() or 1))]
        kinds = [("client", "worker", "kernel")[number % 3] for number in range(kills)]
        random.Random(seed).shuffle(kinds)
        killed, clients = _under_fire(place, command, mark, kinds, random.Random(seed))
        assert killed == kills, f"only {killed} of {kills} kills found their victim"
        left = left_over(mark)
        assert not left, f"processes left over: {left}"
        _check_whole(place / "runs", runs)
    return f"{runs} runs, {killed} kills, {clients} clients: every run there once, every file whole"


def _under_fire(
    place: Path, command: list[str], mark: str, kinds: list[str], chance: random.Random
) -> tuple[int, int]:
    """Kill until all of these are killed, with the client started again as often as it takes."""
    killed = clients = 0
    there: dict[Path, float] = {}
    while True:
        clients += 1
        with (place / "log").open("a") as log:
            client = subprocess.Popen(
                command, cwd=place, env={**os.environ, "SVDLIB_MARK": mark}, stdout=log, stderr=log
            )
        while client.poll() is None:
            time.sleep(chance.uniform(0, 3))
            victims = marked(mark, kinds[killed]) if killed < len(kinds) else []
            # A client that is killed before it has a worker would only be started again.
            if victims and (kinds[killed] != "client" or marked(mark, "kernel")):
                chance.choice(victims).kill()
                killed += 1
        now = {path: path.stat().st_mtime for path in place.glob("runs/a/*[!d]/run.json")}
        again = [path for path in there if now.get(path) != there[path]]
        assert not again, f"written twice: {again}"
        there = now
        if client.returncode == 0:
            return killed, clients
        assert clients <= len(kinds) + 10, (place / "log").read_text()


def marked(mark: str, kind: str = "") -> list[psutil.Process]:
    """The sweep's processes, all of them or those of a kind."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SVDLIB_MARK") != mark or process.status() == "zombie":
                continue
            line = " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        is_a = "kernel" if "ipykernel" in line else "worker" if "spawn_main" in line else "client"
        if not kind or (is_a == kind and "resource_tracker" not in line):
            found.append(process)
    return found


def left_over(mark: str) -> list[str]:
    """What is left of the sweep's processes after some seconds."""
    for _ in range(100):
        left = marked(mark)
        if not left:
            break
        time.sleep(0.2)
    return [str(process) for process in left]


def _check_whole(out: Path, runs: int) -> None:
    places = sorted(out.glob("a/*"))
    numbers = []
    for place in places:
        n = json.loads((place / "run.json").read_text())["parameters"]["n"]
        assert pd.read_csv(place / "table.csv").square.tolist() == [n * n]
        nbformat.validate(nbformat.read(place / "a.ipynb", as_version=4))
        numbers.append(n)
    assert sorted(numbers) == list(range(runs)), f"runs that are there: {places}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    print(main(**vars(parser.parse_args())))
