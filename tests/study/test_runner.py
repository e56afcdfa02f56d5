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
        (["-p", "seeds", "many"], "parameter 'seeds' must be a int, not 'many'"),
        (["-p", "seeds", "1.5"], "must be a int"),
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


def test_refresh_executes_in_place_or_not_at_all(folder):
    import svdlib.study.runner

    good = write(folder, "good", "print(seeds); import sys; print('bar', file=sys.stderr)")
    svdlib.runner.refresh(good)
    cell = nbformat.read(good, as_version=4).cells[-1]
    assert [output.text for output in cell.outputs] == ["2\n"]
    bad = write(folder, "bad", "1 / 0")
    before = bad.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        svdlib.runner.refresh(bad)
    assert bad.read_bytes() == before
    assert not list(folder.glob("*.part"))


def test_interrupt_stops_the_kernels(folder):
    write(folder, "slow", "open('started', 'w').close(); import time; time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-m", "svdlib", "run"], stderr=subprocess.PIPE)
    for _ in range(600):
        if (folder / "started").exists():
            break
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    assert kernels
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert psutil.wait_procs(kernels, timeout=10)[1] == []
    assert not Path("figures").exists() or not list(Path("figures").iterdir())
