import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from svdlib.study.running import figures as publishing
from svdlib.study.running import parameters, runner
from svdlib.study.running.execute import cores
from svdlib.study.running.sweeps import Outcome

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


def test_success_puts_figures_in_place(folder, scheduler):
    write(folder, "good", DRAW)
    given = {"seeds": "7", "dataset": "KMNIST"}
    (outcome,) = runner.run(given=given, scheduler=scheduler, progress=False)
    assert outcome.error is None
    assert sorted(path.name for path in outcome.output.iterdir()) == [
        "KMNIST.csv",
        "good.ipynb",
        "run.json",
    ]
    assert not Path("figures").exists() and outcome.figures == outcome.output
    (outcome,) = runner.run(scheduler=scheduler, progress=False)
    assert Path("figures/MNIST.csv").read_text() == "2" and outcome.figures == Path("figures")
    Path("figures/MNIST.csv").unlink()
    runner.run(progress=False)
    assert Path("figures/MNIST.csv").read_text() == "2", "what is there is put in place again"
    assert [path.name for path in Path("figures").iterdir()] == ["MNIST.csv"]
    runner.run(given=given, figures=Path("mine"), progress=False)
    assert Path("mine/KMNIST.csv").read_text() == "7"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "seeds", "3"],
        ["-p", "dataset", "MNIST", "-p", "rate", "0.25"],
        ["--over", "seeds", "2,3"],
        ["elsewhere/good.ipynb"],
        ["-p", "seeds", "3", "--figures", "figures"],
        ["-p", "seeds", "3", "--figures", "elsewhere/../figures"],
        ["-p", "seeds", "3", "--figures", "link"],
        ["elsewhere/good.ipynb", "--figures", "figures"],
    ],
)
def test_only_a_notebook_s_own_parameters_change_the_study_s_figures(
    folder, scheduler, capsys, arguments
):
    """No other parameters do, nor a copy of the notebook."""
    write(folder, "good", DRAW)
    for place in ("elsewhere", "figures"):
        Path(place).mkdir()
    Path("link").symlink_to("figures")
    write(Path("elsewhere"), "good", DRAW.replace("seeds", "9"))
    Path("figures/MNIST.csv").write_text("the study's")
    status = runner.main(["run", *arguments, "--scheduler", scheduler])
    assert Path("figures/MNIST.csv").read_text() == "the study's"
    assert len(list(Path("figures").iterdir())) == 1
    printed = capsys.readouterr()
    if "--figures" in arguments:
        assert status == 2 and "is for the study's notebooks at their own parameters" in printed.err
    else:
        assert status == 0 and "figures beside the executed notebook: good" in printed.out
        assert list(Path("runs").glob("good/*/MNIST.csv"))


def test_the_same_parameters_given_are_the_notebook_s_own(folder, scheduler, capsys):
    write(folder, "good", DRAW)
    assert runner.main(["run", "-p", "seeds", "2", "--scheduler", scheduler]) == 0
    assert Path("figures/MNIST.csv").read_text() == "2"
    assert "figures in figures: good" in capsys.readouterr().out


THREE = {"a.csv": b"new", "b.png": b"new", "c.csv": b"new", "x.ipynb": b"", "run.json": b"{}"}


@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize("function", ["copyfile", "copy2", "replace"])
def test_figures_are_put_in_place_all_or_none(tmp_path, monkeypatch, function, call):
    """Whichever copy or move fails; on a full disk, say."""
    place, figures = tmp_path / "run", tmp_path / "figures"
    for folder in (place, figures):
        folder.mkdir()
    for name, content in THREE.items():
        (place / name).write_bytes(content)
    for name in ("a.csv", "c.csv"):
        (figures / name).write_bytes(b"old")
    calls = []

    def failing(original):
        def fails(*arguments, **more):
            calls.append(arguments)
            if len(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **more)

        return fails

    target = Path if function == "replace" else publishing.shutil
    monkeypatch.setattr(target, function, failing(getattr(target, function)))
    try:
        publishing.publish(place, figures)
    except OSError:
        wanted = {"a.csv": b"old", "c.csv": b"old"}
    else:
        assert len(calls) < call
        wanted = dict(list(THREE.items())[:3])
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == wanted


def test_two_runs_at_once_do_not_mix_their_figures(tmp_path, monkeypatch):
    """The second waits until the first has put all of its figures in place."""
    figures = tmp_path / "figures"
    figures.mkdir()
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        for name in ("a.csv", "b.csv"):
            (tmp_path / run / name).write_text(run)
    original, seen = Path.replace, []
    other = threading.Thread(target=publishing.publish, args=(tmp_path / "two", figures))

    def slow(path, target):
        if threading.current_thread() is not other:
            if not seen:
                other.start()
            other.join(0.3)
            seen.append(other.is_alive())
        return original(path, target)

    monkeypatch.setattr(Path, "replace", slow)
    publishing.publish(tmp_path / "one", figures)
    other.join()
    assert seen == [True, True]
    assert [path.read_text() for path in figures.iterdir()] == ["two", "two"]


def test_a_failure_is_named_and_the_others_go_on(folder, scheduler, capsys):
    write(folder, "bad", DRAW, "1 / 0")
    write(folder, "good", "dataset = 'good'", DRAW)
    Path("figures").mkdir()
    Path("figures/MNIST.csv").write_text("old")
    before = (folder / "bad.ipynb").read_bytes()
    assert runner.main(["run", "--scheduler", scheduler]) == 1
    table = capsys.readouterr().out
    assert "failed" in table and "ZeroDivisionError: division by zero" in table
    assert Path("figures/MNIST.csv").read_text() == "old", "a failed notebook changes no figure"
    assert Path("figures/good.csv").read_text() == "2", table
    assert (folder / "bad.ipynb").read_bytes() == before


@pytest.mark.slow
def test_kernels_at_a_time_share_the_cores(folder, monkeypatch):
    """And use as many threads as requested, if there are as many."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    threads = (
        "open(f'{figures}/threads', 'w').write(str(__import__('os').getenv('OMP_NUM_THREADS')))"
    )
    write(folder, "one", threads)
    jobs = min(2, cores())
    runner.run(jobs=jobs, progress=False)
    assert Path("figures/threads").read_text() == str(cores() // jobs)
    assert dict(os.environ) == before
    assert os.cpu_count() and jobs * (cores() // jobs) <= cores()


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
        (["-p", "figures", "x"], "give --figures"),
        (["--out", "notebooks"], "holds the notebooks themselves"),
        (["--figures", "file/figures"], "can't write to the folder"),
    ],
)
def test_bad_input_runs_nothing(folder, capsys, arguments, message):
    write(folder, "good", DRAW)
    Path("file").write_text("")
    assert runner.main(["run", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(Path().glob("runs/*/*"))


@pytest.mark.parametrize(
    "arguments",
    [["refresh", "-p", "n", "1"], ["sweep", "--over", "n", "1"], ["run", "--ov", "n", "1"]],
)
def test_options_of_another_command(folder, capsys, arguments):
    with pytest.raises(SystemExit):
        runner.main(arguments)
    assert "usage: python -m svdlib" in capsys.readouterr().err


def test_a_parameter_goes_to_the_notebooks_that_have_it(folder, scheduler, capsys):
    write(folder, "one", DRAW)
    write(folder, "two", DRAW)
    cells = [
        new_code_cell("figures = ''", metadata={"tags": ["parameters"]}),
        new_code_cell("open(f'{figures}/none', 'w').close()"),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "without.ipynb")
    command = ["run", "-p", "seeds", "3", "--scheduler", scheduler]
    assert runner.main([*command, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "seeds is no parameter of without" in printed.err
    runs = [line.split("-")[0] for line in printed.out.splitlines()]
    assert runs == ["one/seeds=3", "two/seeds=3", "without/own"]
    assert runner.main(command) == 0
    assert "seeds is no parameter of without" in capsys.readouterr().err
    assert [path.name for path in Path("figures").iterdir()] == ["none"]
    assert [path.read_text() for path in Path("runs").glob("*/*/MNIST.csv")] == ["3", "3"]
    assert runner.main(["run", "--over", "seeds", "3,4", "--dry-run"]) == 0
    assert "2 runs, 3 there already" in capsys.readouterr().err
    for names in (["without"], ["without", "one"], []):
        assert runner.main(["run", *names, "-p", "sedes", "3"]) == 2
        assert "parameter 'sedes'; known: " in capsys.readouterr().err
    assert runner.main(["run", "without", "-p", "seeds", "3"]) == 2
    assert "without has no parameter 'seeds'; known: figures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "dataset", "mnist"], "unknown dataset 'mnist'; known: MNIST, FashionMNIST, KMNIST"),
        (["-p", "seeds", "0"], "seeds must be at least 1, not 0"),
        (["-p", "device", "quantum"], "device 'quantum' is not there"),
        (["--over", "dataset", "MNIST,mnist"], "unknown dataset 'mnist'"),
        (["-p", "figures", "newdir"], "give --figures"),
    ],
)
def test_what_a_notebook_would_refuse_is_refused_before_a_kernel_starts(
    folder, capsys, monkeypatch, arguments, message
):
    write(folder, "good", "from svdlib.study.running import inputs\ninputs.check(globals())")
    text = (folder / "good.ipynb").read_text().replace("[1, 2]", "[784, 15, 10]")
    text = text.replace("flag: bool", "device: str = 'auto'\\nflag: bool")
    (folder / "good.ipynb").write_text(text)
    monkeypatch.setattr(runner.sweeps, "local", None)
    assert runner.main(["run", *arguments]) == 2
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) == 1 and not Path("figures").exists()
    if "device" in arguments:  # a worker elsewhere may have it
        (run,) = runner.sweeps.plan([folder / "good.ipynb"], {"device": "quantum"}, here=False)
        assert run.parameters["device"] == "quantum"


def test_no_notebooks(folder):
    with pytest.raises(ValueError, match="no notebooks; run from the project's root"):
        parameters.find()


def test_refresh_executes_in_place_or_not_at_all(folder, capsys):
    good = write(folder, "good", "print(seeds); import sys; print('bar', file=sys.stderr)")
    assert runner.main(["refresh", "good"]) == 0
    cell = nbformat.read(good, as_version=4).cells[-1]
    assert [output.text for output in cell.outputs] == ["2\n"]
    bad = write(folder, "bad", "1 / 0")
    before = bad.read_bytes()
    capsys.readouterr()
    assert sorted(path.name for path in folder.iterdir()) == ["bad.ipynb", "good.ipynb"]
    assert runner.main(["refresh", "bad"]) == 1
    assert "cell 2: ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert bad.read_bytes() == before
    assert len(list(folder.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "status"),
    [("run", signal.SIGINT, 130), ("refresh", signal.SIGTERM, 143)],
)
def test_a_signal_stops_the_kernels(folder, command, number, status):
    slow = write(folder, "slow", "open('started', 'w').close(); import time; time.sleep(600)")
    before = slow.read_bytes()
    # A shell that puts make into the background has its children ignore Ctrl-C.
    enable = "import signal as s, runpy; s.signal(s.SIGINT, s.default_int_handler); "
    code = enable + "runpy.run_module('svdlib', run_name='__main__')"
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
    printed = process.stderr.read().decode().splitlines()
    assert "svdlib: stopped; the kernels are stopped too" in printed
    assert len(printed) <= 3, "no traceback"
    assert psutil.wait_procs(kernels, timeout=10)[1] == []
    assert slow.read_bytes() == before
    assert not list(Path().glob("figures/*")) and not list(Path().glob("runs/*/*"))


def test_a_notebook_is_run_once_and_one_name_means_one_file(folder, tmp_path):
    good = write(folder, "good", DRAW)
    assert parameters.find(["good", str(good), "good.ipynb"]) == [Path("notebooks/good.ipynb")]
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other", "good", DRAW)
    with pytest.raises(ValueError, match="have one name; run them one after the other"):
        parameters.find(["good", str(other)])


def test_values_may_begin_with_a_dash(folder, scheduler, capsys):
    write(folder, "good", "open(f'{figures}/out', 'w').write(f'{rate} {dataset}')")
    given = ["-p", "rate", "-1e-3", "--parameter", "dataset", "-x", "--figures", "mine"]
    assert runner.main(["run", *given, "--scheduler", scheduler]) == 0
    assert Path("mine/out").read_text() == "-0.001 -x"
    over = ["--over", "rate", "-1,-2.5", "--over", "dataset", "-p"]
    capsys.readouterr()
    assert runner.main(["run", *over, "--dry-run"]) == 0
    places = capsys.readouterr().out.splitlines()
    assert [place[:-17] for place in places] == [
        "good/rate=-1.0,dataset=-p",
        "good/rate=-2.5,dataset=-p",
    ]


def test_a_notebook_without_a_kernelspec_runs(folder, scheduler):
    cells = [
        new_code_cell("n = 3\nfigures = ''", metadata={"tags": ["parameters"]}),
        new_code_cell("open(f'{figures}/out', 'w').write(str(n))"),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "bare.ipynb")
    (outcome,) = runner.run(given={"n": "4"}, scheduler=scheduler, progress=False)
    assert outcome.error is None and (outcome.output / "out").read_text() == "4"


@pytest.mark.parametrize("content", ["{}", "", "[1]", '{"cells": 3}', "\x00\xff"])
def test_what_is_no_notebook_is_said_to_be_none(folder, capsys, content):
    (folder / "bad.ipynb").write_bytes(content.encode("latin1"))
    assert runner.main(["run"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("svdlib: notebooks/bad.ipynb") and len(printed.splitlines()) == 1


def test_elsewhere_than_in_a_terminal_a_line_a_minute(capsys):
    done, failed = Outcome("a", Path("a"), 1.0), Outcome("a", Path("a"), 1.0, "1 / 0")
    assert runner._shown([2, done, 2, failed], 4, progress=True, line=0) == [done, failed]
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "0 of 4 done, 2 running, 0 failed, time left unknown"
    assert printed[-1].startswith("2 of 4 done, 2 running, 1 failed, some 0 min left")
    runner._shown([2, done], 2, progress=True)
    assert capsys.readouterr().err == "a done in 1 s\n"
    runner._shown([2, done], 2, progress=False, line=0)
    assert capsys.readouterr().err == ""


def test_of_many_outcomes_the_failed_ones_are_listed():
    many = [Outcome("a", Path(str(i)), 1.0, "1 / 0" if i == 7 else None) for i in range(100)]
    table = runner.report(many).splitlines()
    assert "failed" in table[1] and table[2:] == ["    1 / 0", "99 runs ok"]


@pytest.mark.slow
def test_an_error_of_another_alphabet_is_printed_in_ascii(folder):
    write(folder, "one", "raise ValueError('σ is not positive')")
    run = subprocess.run(
        [sys.executable, "-m", "svdlib", "run"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert run.returncode == 1
    assert "cell 3: ValueError: \\u03c3 is not positive" in run.stdout.decode("ascii")


SHELL = """
cd {folder}
{python} -m svdlib run >&- 2>/dev/null; echo $?
{python} -m svdlib run -p seeds 3 2>&- >/dev/null; echo $?
{python} -m svdlib run -p seeds 4 >/dev/full; echo $?
{python} -m svdlib run --over seeds 0:3000 --dry-run | head -1 >/dev/null; echo ${{PIPESTATUS[0]}}
{python} -m svdlib collect one MNIST >/dev/full; echo $?
DASK_CONFIG=broken.yaml {python} -m svdlib run; echo $?
LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 {python} -m svdlib run -p dataset µ; echo $?
HOME={folder} SVDLIB_DATA=here {python} -m svdlib run -p seeds 5 --out "~/elsewhere"; echo $?
"""


@pytest.mark.slow
def test_finished_work_outlives_closed_streams_and_odd_surroundings(folder, tmp_path):
    where = "import os; open(f'{figures}/where.csv', 'w').write(os.environ.get('SVDLIB_DATA', ''))"
    write(folder, "one", "open(f'{figures}/MNIST.csv', 'w').write(str(seeds))", where)
    (tmp_path / "broken.yaml").write_text("{{{:")
    script = SHELL.format(folder=tmp_path, python=sys.executable)
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    codes = [line for line in found.stdout.splitlines() if line.isdigit()]
    assert codes == ["0", "0", "0", "0", "2", "2", "0", "0"], found
    assert "Traceback" not in found.stderr and "BrokenPipe" not in found.stderr
    assert not any(line.strip() == "svdlib:" for line in found.stderr.splitlines())
    assert len(list((tmp_path / "runs" / "one").glob("*/run.json"))) == 4
    (where,) = (tmp_path / "elsewhere" / "one").glob("*/where.csv")
    assert where.read_text() == str(tmp_path / "here")
