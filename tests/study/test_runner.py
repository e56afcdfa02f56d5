import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from svdlib.study import runner

PARAMETERS = """
seeds: int = 2  # how many
rate: float = 0.5
dataset: str = "MNIST"
flag: bool = True
sizes: list = [1, 2]
figures: str = ""
""".strip()


def write(folder: Path, name: str, *sources: str) -> Path:
    parameters = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# A title"), parameters, *map(new_code_cell, sources)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


DRAW = "open(f'{figures}/{dataset}.csv', 'w').write(str(seeds))"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


def test_success_puts_figures_in_place(folder):
    write(folder, "good", DRAW)
    given = {"seeds": "7", "dataset": "KMNIST"}
    (outcome,) = runner.run(given=given, progress=False)
    assert outcome.error is None and outcome.output.is_file()
    assert Path("figures/KMNIST.csv").read_text() == "7"
    assert sorted(path.name for path in Path("runs").iterdir()) == ["good.ipynb"]


def test_a_failure_is_named_and_the_others_go_on(folder, capsys):
    write(folder, "bad", DRAW, "1 / 0")
    write(folder, "good", "dataset = 'good'", DRAW)
    Path("figures").mkdir()
    Path("figures/MNIST.csv").write_text("old")
    before = (folder / "bad.ipynb").read_bytes()
    assert runner.main(["run", "--jobs", "2"]) == 1
    table = capsys.readouterr().out
    assert "failed" in table and "ZeroDivisionError: division by zero" in table
    assert Path("figures/MNIST.csv").read_text() == "old", "a failed notebook changes no figure"
    assert Path("figures/good.csv").read_text() == "2", table
    assert (folder / "bad.ipynb").read_bytes() == before


def test_kernels_at_a_time_share_the_cores(folder, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = (
        "open(f'{figures}/threads', 'w').write(str(__import__('os').getenv('OMP_NUM_THREADS')))"
    )
    write(folder, "one", threads)
    runner.run(progress=False)
    assert Path("figures/threads").read_text() == "None"
    runner.run(jobs=2, progress=False)
    assert Path("figures/threads").read_text() == str(max(1, os.cpu_count() // 2))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seeds", "3", 3),
        ("rate", "1", 1.0),
        ("rate", "1e-2", 0.01),
        ("dataset", "7", "7"),
        ("flag", "false", False),
        ("sizes", "[784, 10]", [784, 10]),
    ],
)
def test_values_take_the_declared_type(folder, name, text, value):
    parsed = runner.parse(write(folder, "good"), {name: text})[name]
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "no notebook 'absent'; known: good"),
        (["-p", "seed", "3"], "good has no parameter 'seed'; known: seeds, rate"),
        (["-p", "seeds", "many"], "parameter 'seeds' must be an int, not 'many'"),
        (["-p", "seeds", "1.5"], "must be an int"),
        (["-p", "flag", "1"], "must be a bool"),
        (["-p", "sizes", "(1"], "must be a list"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--out", "notebooks"], "holds the notebooks themselves"),
        (["--figures", "file/figures"], "can't write to the folder"),
    ],
)
def test_bad_input_runs_nothing(folder, capsys, arguments, message):
    write(folder, "good", DRAW)
    Path("file").write_text("")
    assert runner.main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("runs/*.ipynb"))


def test_no_notebooks(folder):
    with pytest.raises(ValueError, match="no notebooks; run from the project's root"):
        runner.find()


def test_refresh_executes_in_place_or_not_at_all(folder, capsys):
    good = write(folder, "good", "print(seeds); import sys; print('bar', file=sys.stderr)")
    assert runner.main(["refresh", "good"]) == 0
    cell = nbformat.read(good, as_version=4).cells[-1]
    assert [output.text for output in cell.outputs] == ["2\n"]
    bad = write(folder, "bad", "1 / 0")
    before = bad.read_bytes()
    capsys.readouterr()
    assert runner.main(["refresh", "bad"]) == 1
    assert "bad: cell 2: ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert bad.read_bytes() == before
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("command", ["run", "refresh"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_kernels(folder, command, number, status):
    slow = write(folder, "slow", "open('started', 'w').close(); import time; time.sleep(600)")
    before = slow.read_bytes()
    # A shell that puts make into the background has its children ignore Ctrl-C.
    heed = "import signal as s, runpy; s.signal(s.SIGINT, s.default_int_handler); "
    code = heed + "runpy.run_module('svdlib', run_name='__main__')"
    process = subprocess.Popen(
        [sys.executable, "-c", code, command, "slow"], stderr=subprocess.PIPE
    )
    for _ in range(600):
        if (folder / "started").exists():
            break
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert kernels
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == status
    assert process.stderr.read().decode() == "svdlib: stopped; the kernels are stopped too\n"
    assert psutil.wait_procs(kernels, timeout=10)[1] == []
    assert slow.read_bytes() == before
    assert not list(Path().glob("figures/*")) and not list(Path().glob("runs/figures-*"))


def test_a_notebook_is_run_once_and_one_name_means_one_file(folder, tmp_path):
    good = write(folder, "good", DRAW)
    assert runner.find(["good", str(good), "good.ipynb"]) == [Path("notebooks/good.ipynb")]
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", "good", DRAW)
    with pytest.raises(ValueError, match="have one name; run them one after the other"):
        runner.find(["good", str(other)])


def test_values_may_begin_with_a_dash(folder):
    write(folder, "good", "open(f'{figures}/out', 'w').write(f'{rate} {dataset}')")
    assert runner.main(["run", "-p", "rate", "-1e-3", "--parameter", "dataset", "-x"]) == 0
    assert Path("figures/out").read_text() == "-0.001 -x"


OWN = """
n = 3
s: str = "a=b"  # with a sign
x: str | None = None
y: Optional[int] = None
z: "float" = 1.0
thing: Path = Path("here")
""".strip()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n", "7", 7),
        ("s", "c=d", "c=d"),
        ("x", "here", "here"),
        ("x", "None", None),
        ("y", "4", 4),
        ("z", "2", 2.0),
        ("thing", "there", "there"),
    ],
)
def test_a_notebook_of_one_s_own(folder, name, text, value):
    cells = [new_code_cell(OWN, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=cells), folder / "own.ipynb")
    assert runner.parse(folder / "own.ipynb", {name: text}) == {name: value}
    with pytest.raises(ValueError, match="parameter 'y' must be None or an int, not 'many'"):
        runner.parse(folder / "own.ipynb", {"y": "many"})


def test_a_notebook_without_a_kernelspec_runs(folder):
    cells = [
        new_code_cell("n = 3\nfigures = ''", metadata={"tags": ["parameters"]}),
        new_code_cell("open(f'{figures}/out', 'w').write(str(n))"),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "bare.ipynb")
    (outcome,) = runner.run(given={"n": "4"}, progress=False)
    assert outcome.error is None and Path("figures/out").read_text() == "4"


@pytest.mark.parametrize("content", ["{}", "", "[1]", '{"cells": 3}', "\x00\xff"])
def test_what_is_no_notebook_is_said_to_be_none(folder, capsys, content):
    (folder / "bad.ipynb").write_bytes(content.encode("latin1"))
    assert runner.main(["run"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("svdlib: notebooks/bad.ipynb") and len(told.splitlines()) == 1


def test_elsewhere_than_in_a_terminal_a_notebook_has_a_line(folder):
    write(folder, "one", "print(1)")
    write(folder, "two", "raise ValueError('σ is not positive')")
    run = subprocess.run(
        [sys.executable, "-m", "svdlib", "run"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert run.returncode == 1
    lines = run.stderr.decode("ascii").splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "one: ok",
        "two: cell 3: ValueError: \\u03c3 is not positive",
    ]
