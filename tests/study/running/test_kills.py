"""What is killed leaves no process and no half-written file behind."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import nbformat
import psutil
import pytest
from faults import kills
from nbformat.v4 import new_code_cell, new_notebook

from svdlib import files
from svdlib.study.running import runner

pytestmark = pytest.mark.slow


def write(folder, name, *sources):
    cells = [new_code_cell("figures: str = ''", metadata={"tags": ["parameters"]})]
    cells += map(new_code_cell, sources)
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def until(condition, seconds=300):
    """Wait for it, for longer than any loaded machine needs."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


# A notebook that starts a process of its own, and then is long at work.
LONG = """
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3000)"], start_new_session=True)
pathlib.Path("started").touch()
while True:
    sum(range(10**6))
"""


@pytest.mark.parametrize(
    ("command", "number"),
    [("run", signal.SIGKILL), ("refresh", signal.SIGKILL), ("run", signal.SIGTERM)],
)
def test_nothing_outlives_a_killed_runner(folder, tmp_path, command, number):
    paths = [write(folder, name, LONG) for name in ("a", "b")]
    before = [path.read_bytes() for path in paths]
    for place in ("tmp", "figures", "runs/a"):
        Path(place).mkdir(parents=True)
    Path("figures/a.csv").write_text("old")
    mark = uuid.uuid4().hex
    environment = {**os.environ, "SVDLIB_MARK": mark, "TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(
        [sys.executable, "-m", "svdlib", command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    until((folder / "started").exists)
    assert len(kills.marked(mark)) >= 4  # the runner, a worker, a kernel and what that started
    process.send_signal(number)
    process.communicate(timeout=300)  # nobody holds its output open
    until(lambda: not kills.marked(mark))
    until(lambda: not list(Path("tmp").glob(".svdlib*")))
    assert [path.read_bytes() for path in paths] == before
    assert Path("figures/a.csv").read_text() == "old"
    assert [path.name for path in Path("figures").iterdir()] == ["a.csv"]
    assert not list(Path("runs").glob("*/*")) and len(list(folder.iterdir())) == 3


def test_the_next_run_sweeps_what_a_killed_one_left(folder, scheduler):
    write(folder, "a", "open(f'{figures}/a.csv', 'w').close()")
    for place in ("runs", "runs/a", "figures"):
        Path(place, f"{files.PREFIX}x").mkdir(parents=True)
    runner.run(scheduler=scheduler, progress=False)
    assert not [path for place in ("runs", "figures") for path in Path(place).rglob(".*")]
    assert Path("figures/a.csv").exists()


# As the system does when memory runs out.
KILLED = "import psutil, time; psutil.Process().parent().kill(); time.sleep(3000)"


def test_of_a_worker_killed_for_memory_the_notebook_is_named_and_the_others_go_on(
    folder, scheduler, capsys
):
    write(folder, "a", KILLED)
    write(folder, "b", "open(f'{figures}/b.csv', 'w').close()")
    assert runner.main(["run", "--scheduler", scheduler]) == 1
    printed = capsys.readouterr().out
    assert "its worker was killed (3 tries)" in printed and "\na " in printed
    assert [path.name for path in Path("figures").iterdir()] == ["b.csv"]


def test_refresh_too_goes_on_after_a_killed_worker(folder, capsys):
    killed = write(folder, "a", KILLED)
    good = write(folder, "b", "print(2 + 3)")
    before = killed.read_bytes()
    assert runner.main(["refresh"]) == 1
    printed = capsys.readouterr().out
    assert "its worker was killed" in printed and "\na " in printed
    assert killed.read_bytes() == before
    assert nbformat.read(good, as_version=4).cells[-1].outputs[0].text == "5\n"


BUSY = """
from svdlib.study.rivals import timing
with timing.busy_core():
    import psutil, time
    print(psutil.Process().children()[0].pid, flush=True)
    time.sleep(3000)
"""


def test_the_busy_core_ends_with_who_wanted_it():
    wanted = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True)
    busy = psutil.Process(int(wanted.stdout.readline()))
    wanted.kill()
    wanted.communicate()
    until(lambda: not busy.is_running() or busy.status() == psutil.STATUS_ZOMBIE)
