"""Notebooks as a person uses them: run in JupyterLab, and the explorer as Voilà's app."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = {"train_images": 640, "seeds": 2, "epochs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Copies of two notebooks with small parameters, so that running them takes seconds."""
    place = tmp_path_factory.mktemp("notebooks")
    for name in ("01_baseline", "09_explorer"):
        book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        (cell,) = (c for c in book.cells if "parameters" in c.metadata.get("tags", []))
        for key, value in SMALL.items():
            cell.source, found = re.subn(
                rf"^({key}: int) = \d+", rf"\1 = {value}", cell.source, flags=re.MULTILINE
            )
            assert found == 1
        for cell in book.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(book, place / f"{name}.ipynb")
    for table in (ROOT / "notebooks").glob("*.csv"):
        shutil.copy(table, place)
    return place


@contextmanager
def served(command, folder, ready):
    """A server in a process of its own, at a free port; yields its address."""
    pytest.importorskip(command[0], reason=f"no {command[0]} here: pip install '.[study]'")
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    home = folder / f".{command[0]}"
    env = os.environ | {
        "JUPYTER_CONFIG_DIR": str(home),
        "JUPYTERLAB_SETTINGS_DIR": str(home),
        "JUPYTERLAB_WORKSPACES_DIR": str(home),
        "JUPYTER_PATH": str(ROOT / "svdlib/study/pictures/explorer/jupyter"),
        "OMP_NUM_THREADS": "1",
    }
    with (folder / f"{command[0]}.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, f"--port={port}", "--no-browser"],
            cwd=folder, env=env, stdout=log, stderr=log,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}{ready}", timeout=5).close()
                break
            except OSError:
                log = (folder / f"{command[0]}.log").read_text()
                assert server.poll() is None and time.monotonic() < end, log
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def lab(browser, folder):
    options = [
        "--allow-root",
        "--expose-app-in-browser",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
    ]
    options.append("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")
    with served(["jupyterlab", *options], folder, "/api") as address:
        yield address


@pytest.fixture(scope="module")
def app(browser, folder):
    with served(
        ["voila", "09_explorer.ipynb", "--template=svdlib", "--token=secret"],
        folder,
        "/?token=secret",
    ) as address:
        yield f"{address}/?token=secret"


def run_all(page, address, name):
    """Open a notebook in JupyterLab, run all its cells, and return its code cells' outputs."""
    page.goto(f"{address}/lab/tree/{name}.ipynb?reset")
    page.wait_for_function(
        "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
        timeout=60_000,
    )
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
    return page.evaluate(
        """[...window.jupyterapp.shell.currentWidget.content.model.cells]
           .filter(cell => cell.type === 'code').map(cell => cell.toJSON())"""
    )


def press(page, slider, key):
    """Move the slider of that name by the keyboard."""
    page.locator(".widget-slider", has_text=slider).locator(".noUi-handle").press(key)


def numbers(page):
    """What the table says of these ranks: ranks, parameters, error, loss."""
    cells = page.locator("table.ranks tr", has_text="these ranks").locator("td").all_text_contents()
    return [text.replace(",", "") if place else text for place, text in enumerate(cells)]


def moved(page, before):
    """Wait until the table says something else."""
    page.wait_for_function(
        """before => [...document.querySelectorAll('table.ranks tr')].some(
            row => row.textContent.includes('these ranks') && !row.textContent.includes(before))""",
        arg=before[0],
    )


@pytest.mark.parametrize("name", ["01_baseline", "09_explorer"])
def test_every_cell_runs_and_shows_what_is_meant(lab, page, name):
    cells = run_all(page, lab, name)
    assert len(cells) > 5
    for cell in cells:
        assert cell["execution_count"]
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output
            assert output.get("name") != "stderr", output
    if name == "09_explorer":
        before = numbers(page)
        press(page, "layer 0", "ArrowLeft")  # once: a second press could come between two looks
        moved(page, before)
        shown = numbers(page)
        assert shown[1:] == page_row(page, shown[0])


def test_a_bar_is_there_when_the_notebook_is_opened_again(lab, page):
    run_all(page, lab, "01_baseline")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save').then(() => 1)")
    page.goto(f"{lab}/lab/tree/01_baseline.ipynb?reset")
    page.get_by_text("2 networks, 2 epochs: 100%").wait_for(timeout=60_000)
    assert page.get_by_text("Error displaying widget").count() == 0


def page_row(page, ranks):
    """The library's own row for the ranks on the page, from the page's kernel."""
    code = f"row = cuts.at({list(ast.literal_eval(ranks))}); print('%d|%.2f %%|%.4f' % (row.parameters, 100 - row.accuracy, row.loss))"
    text = page.evaluate(
        """async code => {
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            let text = '';
            const future = kernel.requestExecute({code, store_history: false});
            future.onIOPub = message => { text += message.content.text || ''; };
            await future.done;
            return text;
        }""",
        code,
    )
    return text.strip().split("|")


def test_the_app_shows_no_code_moves_trains_and_stops(app, page):
    page.goto(app, wait_until="commit")  # the page is whole when the notebook has run
    page.locator("table.ranks").wait_for(timeout=90_000)
    assert page.locator("pre", has_text="import svdlib").count() == 0
    before = numbers(page)
    press(page, "layer 2", "ArrowLeft")
    moved(page, before)
    press(page, "columns", "Home")
    press(page, "p", "End")
    page.get_by_text("nothing is random any more").wait_for()
    rank = page.get_by_label("rank", exact=True)
    rank.fill("")
    page.get_by_text("rank must be from 1 to 15, not nothing").wait_for()
    rank.fill("3")
    page.get_by_role("button", name="Train").click()
    page.get_by_text("truncSVD, rank 3, every epoch").first.wait_for(timeout=30_000)
    page.get_by_label("seeds", exact=True).fill("96")
    page.get_by_role("button", name="Train").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text(re.compile("stopped after epoch|done")).wait_for(timeout=30_000)


def test_the_app_is_closed_to_those_without_the_token(app):
    with urllib.request.urlopen(app.split("?")[0]) as answer:
        assert "/login" in answer.url and "layer 0" not in answer.read().decode()
