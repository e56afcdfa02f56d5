import errno
import json
import os
import re
import subprocess
import sys
import time
import uuid
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from distributed import Client
from faults import kills
from nbformat.v4 import new_code_cell, new_notebook

import svdlib
from svdlib.study import collect
from svdlib.study.running import runner, sweeps
from svdlib.study.running.execute import Done, cores

PARAMETERS = """
n: int = 1
text: str = "a"
figures: str = ""
progress: bool = True
""".strip()

KEEP = partial(sweeps.save, out=Path("runs"))

TABLE = "open(f'{figures}/table.csv', 'w').write(f'square\\n{n * n}\\n')"


def write(folder: Path, name: str, *sources: str) -> Path:
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += map(new_code_cell, sources)
    nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def places():
    return sorted(
        str(path.parent.relative_to("runs")) for path in Path("runs").glob("*/*/run.json")
    )


def test_a_place_is_named_for_a_person_and_by_all_that_matters(folder):
    path = write(folder, "a", TABLE)

    def name(*given):
        (run,) = sweeps.plan([path], dict(given))
        return run.place.name

    own = name()
    assert own.startswith("own-") and name(("n", "1"), ("progress", "false")) == own
    assert name(("n", "2")).startswith("n=2-") and name(("n", "2")) != name(("n", "3"))
    assert name(("text", "b/c: d")).startswith("text=b_c_d-")
    long = name(("text", "𝒳" * 100))
    assert len(long.encode()) < 150 and re.fullmatch(r"text=𝒳+-[0-9a-f]{16}", long)
    before = name(("n", "2"))
    write(folder, "a", TABLE, "1 + 1")
    assert name(("n", "2")) != before, "other code, another run"


def test_a_sweep_is_saved_resumed_and_collected(folder, scheduler, capsys):
    write(folder, "a", TABLE, "assert n != 3, 'three'")
    command = ["run", "a", "--scheduler", scheduler, "--over", "n"]
    assert runner.main([*command, "1:5"]) == 1
    printed = capsys.readouterr()
    assert "AssertionError: three" in printed.out and "4 runs\ndashboard: http" in printed.err
    assert [place.split("-")[0] for place in places()] == ["a/n=2", "a/n=3", "a/n=4", "a/own"]
    failed = next(Path("runs/a").glob("*.failed"))
    assert failed.name.startswith("n=3-") and (failed / "a.ipynb").is_file()
    about = json.loads(next(Path("runs/a").glob("n=4-*/run.json")).read_text())
    assert about["parameters"] == {"n": 4, "text": "a"} and about["seconds"] > 0
    assert {"torch", "svdlib", "python", "cores", "threads", "processor", "code"} <= about.keys()
    table = collect("runs", "a", "table")
    assert sorted(table.square) == [1, 4, 16] and sorted(table.n) == [1, 2, 4]
    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/*/a.ipynb")}
    assert runner.main([*command, "1:5", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "1 run, 3 there already" in printed.err and printed.out.startswith("a/n=3-")
    assert runner.main([*command, "1,2"]) == 0
    assert "0 runs, 2 there already" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in Path("runs").glob("*/*/a.ipynb")}
    assert runner.main([*command, "1,2", "--fresh"]) == 0
    assert sum(before[path] != path.stat().st_mtime_ns for path in before) == 2
    assert not list(Path("runs").glob("**/.svdlib*")) and not Path("figures/table.csv").exists()
    capsys.readouterr()
    assert runner.main(["collect", "a", "table"]) == 0
    assert pd.read_csv(pd.io.common.StringIO(capsys.readouterr().out)).shape == (3, 3)


VALUES = """
text: str = "a"
pair: tuple = ()
table: dict = {}
figures: str = ""
"""
WRITE = """
from pathlib import Path
import svdlib, sys
Path(figures, "plots").mkdir()
values = repr([text, pair, table, svdlib.__file__, sys.executable])
Path(figures, "plots", "a.txt").write_text(values, "utf-8")
"""


def test_a_notebook_gets_what_run_json_says_and_keeps_what_it_writes(
    folder, scheduler, tmp_path, monkeypatch
):
    """Also with another kernel of the same name on Jupyter's path."""
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "other", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    cells = [new_code_cell(VALUES, metadata={"tags": ["parameters"]}), new_code_cell(WRITE)]
    nbformat.write(new_notebook(cells=cells), folder / "a.ipynb")
    given = {"text": "'\"q\" [µ'", "pair": "(1, 2)", "table": "{1: 'a'}"}
    (done,) = runner.run(["a"], given, scheduler=scheduler, progress=False)
    assert done.error is None
    about = json.loads((done.output / "run.json").read_text("utf-8"))
    found = eval((done.output / "plots" / "a.txt").read_text("utf-8"))
    assert found == ['"q" [µ', (1, 2), {1: "a"}, svdlib.__file__, sys.executable]
    assert about["parameters"]["text"] == found[0]
    (own,) = runner.run(["a"], scheduler=scheduler, progress=False)
    assert Path("figures/plots/a.txt").is_file() and own.error is None


def test_a_file_named_as_one_of_ours_is_refused(folder, scheduler):
    write(folder, "a", "open(f'{figures}/run.json', 'w').write('{}')")
    (done,) = runner.run(["a"], scheduler=scheduler, progress=False)
    assert "run.json" in done.error


def test_runs_of_an_older_version_are_not_mixed_with_the_latest(folder, scheduler):
    write(folder, "a", TABLE)
    runner.run(["a"], {}, [("n", "2,3")], scheduler=scheduler, progress=False)
    write(folder, "a", TABLE, "1 + 1")
    runner.run(["a"], {}, [("n", "4")], scheduler=scheduler, progress=False)
    with pytest.warns(UserWarning, match=r"2 runs .* a "):
        assert collect("runs", "a", "table").square.tolist() == [16]


KILL = """
import psutil, pathlib, time
first = pathlib.Path(text) / str(n)
if not first.exists():
    first.touch()
    victim = psutil.Process() if n % 2 else psutil.Process().parent()
    victim.kill()
    time.sleep(60)
"""


@pytest.mark.slow
def test_killed_workers_and_kernels_are_tried_again(folder, scheduler, tmp_path):
    """Each run kills its kernel or its worker once, by itself."""
    write(folder, "a", TABLE, KILL)
    given = {"text": str(tmp_path)}
    outcomes = runner.run(["a"], given, [("n", "1:3")], scheduler=scheduler, progress=False)
    assert [outcome.error for outcome in outcomes] == [None] * 2
    assert sorted(collect("runs", "a", "table").square) == [1, 4]


@pytest.mark.slow
def test_what_always_kills_its_kernel_fails_after_three_tries(folder, scheduler, tmp_path):
    count = "import pathlib, uuid; pathlib.Path(text, uuid.uuid4().hex + '.try').touch()"
    write(folder, "a", count, "import psutil; psutil.Process().kill()")
    (outcome,) = runner.run(["a"], {"text": str(tmp_path)}, scheduler=scheduler, progress=False)
    assert "the kernel died" in outcome.error and "(3 tries)" in outcome.error
    assert len(list(tmp_path.glob("*.try"))) == 3


@pytest.mark.slow
def test_under_kills_of_everything_every_run_is_there_once(tmp_path):
    assert kills.main(runs=4, kills=3, folder=tmp_path).startswith("4 runs, 3 kills")


@pytest.mark.slow
def test_a_late_worker_a_lost_scheduler_and_a_second_go(folder, tmp_path):
    write(folder, "a", TABLE, "import time; time.sleep(600 * (n == 2))")
    command = [sys.executable, "-m", "svdlib", "run", "a", "--over", "n", "1:3"]
    started, about, mark = [], tmp_path / "scheduler.json", uuid.uuid4().hex

    def start(*command, **more):
        env = {**os.environ, "SVDLIB_MARK": mark}
        started.append(subprocess.Popen(command, env=env, **more))
        return started[-1]

    def until(condition):
        for _ in range(1800):  # three minutes, for machines with other work
            if condition():
                return
            time.sleep(0.1)
        raise TimeoutError

    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [str(Path(sys.executable).with_name("dask"))]
    where = ["--host", "127.0.0.1", "--scheduler-file", str(about)]
    try:
        scheduler = start(*dask, "scheduler", *where, "--port", "0", "--no-dashboard", **quiet)
        until(about.exists)
        address = json.loads(about.read_text())["address"]
        client = start(*command, "--scheduler", address, stderr=subprocess.PIPE)
        time.sleep(3)
        start(*dask, "worker", *where, "--nthreads", "1", "--no-dashboard", **quiet)
        until(places)
        scheduler.kill()
        assert client.wait(timeout=60) == 2
        printed = client.stderr.read().decode().splitlines()
        assert printed[-1] == (
            "svdlib: the scheduler is lost; the same command completes what is missing"
        )
        assert [place.split("-")[0] for place in places()] == ["a/own"]
    finally:
        for process in kills.marked(mark):
            if "ipykernel" not in " ".join(process.cmdline()):
                process.kill()
        for process in started:
            process.wait()
    assert not kills.left_over(mark), "a kernel outlived its worker"


def test_a_full_disk_stops_with_what_is_there_whole(folder, scheduler, monkeypatch, capsys):
    write(folder, "a", TABLE)
    (run,) = sweeps.plan([folder / "a.ipynb"], {})
    saved = sweeps.save(run, Done(1.0, {}, {"a.ipynb": b"old"}), Path("runs"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert runner.main(["run", "--fresh", "--scheduler", scheduler]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert (saved.output / "a.ipynb").read_bytes() == b"old"
    assert [path.name for path in Path("runs/a").iterdir()] == [saved.output.name]


def test_only_loopback_listens(scheduler):
    assert "//127.0.0.1:" in scheduler
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in ours
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}


def test_a_cluster_of_unlike_workers_is_refused(folder, scheduler, monkeypatch, capsys):
    write(folder, "a", TABLE)
    monkeypatch.setattr(sweeps, "code", lambda: "another")
    monkeypatch.setattr(
        Client, "run_on_scheduler", lambda *_: "Python 2"
    )  # here it is this process
    assert runner.main(["run", "--scheduler", scheduler]) == 2
    printed = capsys.readouterr().err
    assert (
        "worker (the scheduler) has Python 2" in printed
        and "(code another); install the same" in printed
    )
    assert places() == []


def test_a_worker_that_joins_later_and_does_not_fit_ends_the_sweep(folder, scheduler, monkeypatch):
    runs = sweeps.plan([write(folder, "a", TABLE)], {})
    with sweeps.connected(scheduler) as client:
        monkeypatch.setattr(sweeps, "code", lambda: "another")
        with pytest.raises(ValueError, match="can't run notebooks of this client: worker tcp"):
            list(sweeps.complete(client, runs, KEEP))
    assert places() == []


@pytest.mark.slow
def test_what_ends_a_sweep_ends_its_kernels(folder, scheduler, tmp_path):
    note = tmp_path / "process"
    path = write(
        folder,
        "a",
        "import os, time; open(text + '-', 'w').write(str(os.getpid()))",
        "os.rename(text + '-', text); time.sleep(600)",
    )
    runs = sweeps.plan([path], {"text": str(note)})
    with sweeps.connected(scheduler) as client:
        going = sweeps.complete(client, runs, KEEP)
        while not note.exists():
            next(going)
        kernel = psutil.Process(int(note.read_text()))
        going.close()
    assert kernel.wait(timeout=30) is None or not kernel.is_running()


def test_another_client_s_result_of_the_same_run_stays(folder, monkeypatch):
    (run,) = sweeps.plan([write(folder, "a", TABLE)], {})
    rename = Path.rename

    def beaten(path, target):
        if path.name == "new":
            target.mkdir()
            (target / "theirs").touch()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", beaten)
    saved = sweeps.save(run, Done(1.0, {}, {"a.ipynb": b"ours"}), Path("runs"))
    assert [path.name for path in saved.output.iterdir()] == ["theirs"]
    assert len(list(Path("runs/a").iterdir())) == 1


def test_a_check_is_found_beside_magics_and_left_to_the_kernel_where_it_is_not_here(folder):
    cell = "%time 1\nfrom absent import a as b, c\nb.check(globals())\nc()"
    assert sweeps._check(["1 + 1", cell]) == "from absent import a as b\nb.check(globals())"
    assert len(sweeps.plan([write(folder, "a", cell)], {})) == 1


def test_one_run_is_planned_once(folder):
    path = write(folder, "a", TABLE)
    assert len(sweeps.plan([path], {}, [("progress", "true,True"), ("n", "2,2")])) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "1", "--scheduler", "tcp://127.0.0.1:9"], "give one of them"),
        (["--jobs", str(cores() + 1)], f"at most the {cores()} cores"),
        (["--scheduler", "tcp://127.0.0.1:9"], "no scheduler answers at 'tcp://127.0.0.1:9'"),
        (["--scheduler", "nonsense://x"], "no scheduler answers at 'nonsense://x'"),
        (["--scheduler", ""], "--scheduler is empty"),
        (["--over", "n", "0:99999999999999999999"], "more than 100,000"),
        (["--over", "n", "5:1"], "holds no value"),
        (["--over", "n", "0:400", "--over", "text", ",".join(map(str, range(300)))], "120,000"),
    ],
)
def test_bad_input_runs_nothing(folder, capsys, arguments, message):
    write(folder, "a", TABLE)
    assert runner.main(["run", "a", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("runs").glob("*/*"))


def test_no_table_to_collect(folder):
    with pytest.raises(FileNotFoundError, match=r"no run has a table absent.csv: 0 runs looked at"):
        collect("runs", "a", "absent")
