"""``make lab`` opens copies: what JupyterLab saves by itself changes no committed notebook."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from svdlib.study.running import lab, runner


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("notebooks", "figures"):
        (tmp_path / place).mkdir()
    (tmp_path / "figures/a.csv").write_text("1")
    for name in ("a", "b"):
        write(Path("notebooks", f"{name}.ipynb"), "1 + 1")
    return tmp_path / "notebooks"


def write(path, source):
    nbformat.write(new_notebook(cells=[new_code_cell(source, id="one")]), path)


def source(path):
    return nbformat.read(path, as_version=4).cells[0].source


def test_copies_follow_the_notebooks_until_they_are_changed(folder):
    assert lab.copies() == []
    for name in ("a", "b"):
        assert Path(f"lab/{name}.ipynb").read_bytes() == (folder / f"{name}.ipynb").read_bytes()
    write(Path("lab/a.ipynb"), "mine")
    for _ in range(2):
        assert lab.copies() == [], "a copy that was changed stays"
        assert source("lab/a.ipynb") == "mine"
    for name in ("a", "b"):
        write(folder / f"{name}.ipynb", "2 + 2")
    for _ in range(2):
        (message,) = lab.copies()
        assert message.startswith(
            "lab/a.ipynb has changes of yours and stays; notebooks/a.ipynb has"
        )
        assert source("lab/a.ipynb") == "mine" and source("lab/b.ipynb") == "2 + 2"
    Path("lab/a.ipynb").rename("lab/mine.ipynb")
    assert lab.copies() == []
    assert source("lab/a.ipynb") == "2 + 2" and source("lab/mine.ipynb") == "mine"


def test_copies_of_whom_nothing_is_recorded_are_taken_for_the_user_s(folder):
    Path("lab").mkdir()
    write(Path("lab/a.ipynb"), "mine")
    (message,) = lab.copies()
    assert "lab/a.ipynb has changes of yours" in message and source("lab/a.ipynb") == "mine"


def test_runs_and_figures_are_in_reach(folder):
    lab.copies()
    assert Path("lab/figures/a.csv").read_text() == "1"
    Path("runs/new").mkdir()
    assert Path("lab/runs/new").is_dir()
    assert os.readlink("lab/runs") == os.path.join("..", "runs"), "the project may be moved"


def test_what_can_not_be_is_reported_in_a_line(folder, capsys):
    Path("lab").write_text("mine")
    assert runner.main(["lab"]) == 2
    errors = capsys.readouterr().err
    assert "lab is to be the folder of the copies, but is a file" in errors
    assert len(errors.splitlines()) == 1 and Path("lab").read_text() == "mine"


@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_root_is_allowed_where_it_is_root_and_options_are_passed_on(
    folder, monkeypatch, user, allowed
):
    called = []
    monkeypatch.setattr(os, "geteuid", lambda: user)

    def becomes(path, command):
        called.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execv", becomes)
    with pytest.raises(SystemExit):
        runner.main(["lab", "--port", "9999", "-p", "x"])
    (command,) = called
    assert command[1:3] == ["-m", "jupyterlab"] and ("--allow-root" in command) == allowed
    assert command[-4:] == ["--port", "9999", "-p", "x"]
    assert Path.cwd() == folder.parent / "lab"


@pytest.mark.slow
def test_jupyterlab_shows_and_saves_the_copies(folder):
    """A real one, as the command starts it; by the interface that its pages use."""
    pytest.importorskip("jupyterlab")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    options = ["--port", str(port), "--no-browser", "--IdentityProvider.token=secret"]
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(folder.parent / "config")}
    with Path("log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "svdlib", "lab", *options],
            env=environment,
            stdout=log,
            stderr=log,
        )

    def ask(path, method="GET", **content):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/contents/{path}",
            json.dumps(content).encode() if content else None,
            {"Authorization": "token secret", "Content-Type": "application/json"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    try:
        end = time.monotonic() + 300
        while True:
            try:
                there = {entry["name"] for entry in ask("")["content"]}
                break
            except OSError:
                log = Path("log").read_text()
                assert server.poll() is None and time.monotonic() < end, log
                time.sleep(0.2)
        assert there == {"a.ipynb", "b.ipynb", "runs", "figures"}
        assert ask("figures/a.csv")["content"] == "1"
        before = (folder / "a.ipynb").read_bytes()
        notebook = ask("a.ipynb")["content"]
        notebook["cells"][0]["source"] = "mine"
        ask("a.ipynb", "PUT", type="notebook", content=notebook)
        assert (folder / "a.ipynb").read_bytes() == before
        assert source("lab/a.ipynb") == "mine"
    finally:
        server.terminate()
        server.wait(60)
