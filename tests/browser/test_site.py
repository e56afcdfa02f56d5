"""The built site: whole, readable on a phone, and nothing fetched from anywhere else."""

import ast
import csv
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import svdlib

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = (
    "index.html",
    "notebooks/06_rank_revealer.html",
    "docs/gallery.html",
    "docs/reference.html",
    "docs/explorer.html",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's folder, built as `make site` does, with warnings as errors."""
    for name in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(name, reason=f"no {name} here: pip install '.[site]'")
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-q", "-j", "2", "-c", "docs", ".", str(folder)]
    command = [sys.executable, "-m", "sphinx", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_whole_and_as_wide_as_the_screen(site, page, name):
    page.goto((site / name).as_uri())
    assert page.locator("h1").count() == 1
    for width in (1280, 375):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    page.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => 0)))")
    assert page.evaluate(broken) == []
    nameless = "[...document.images].filter(i => !i.alt).map(i => i.src)"
    assert page.evaluate(nameless) == []


def test_the_explorer_shows_the_row_of_its_ranks(site, page):
    with open(ROOT / "figures/06_joint.csv") as file:
        rows = {tuple(int(row[layer]) for layer in "024"): row for row in csv.DictReader(file)}
    page.goto((site / "docs/explorer.html").as_uri())

    def shown(line: str) -> dict[str, str]:
        cells = page.locator(f"#{line} td")
        return dict(cells.evaluate_all("cells => cells.map(c => [c.dataset.is, c.textContent])"))

    def told(row: dict[str, str]) -> dict[str, str]:
        return {
            "ranks": ", ".join(row[layer] for layer in "024"),
            "parameters": f"{int(row['parameters']):,}",
            "loss": f"{float(row['loss']):.4f}",
            "error": f"{100 - float(row['accuracy']):.2f}",
        }

    assert shown("yours") == told(rows[10, 10, 10])
    place = page.locator("#at-yours").get_attribute("transform")
    page.locator("#rank0").fill("8")
    page.get_by_label("second layer").focus()
    page.keyboard.press("ArrowLeft")
    page.locator("#rank2").fill("7")
    assert shown("yours") == told(rows[8, 9, 7])
    assert page.locator("#at-yours").get_attribute("transform") != place
    assert page.get_by_label("second layer").get_attribute("aria-valuetext") == "rank 9 of 15"

    able = [r for r in rows.values() if int(r["parameters"]) <= int(rows[8, 9, 7]["parameters"])]
    assert shown("best") == told(min(able, key=lambda row: float(row["loss"])))
    page.get_by_label("test error").check()
    most = max(float(row["accuracy"]) for row in able)
    assert shown("best")["error"] == f"{100 - most:.2f}"


def test_no_page_asks_for_anything_from_elsewhere(site):
    """Scripts, styles, pictures: links that a reader may follow are not meant."""
    texts = {path: path.read_text() for path in site.rglob("*.html")}
    assert len(texts) > 20
    asked = (
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*href=\"(?:https?:)?//"
    )
    assert [str(path) for path, text in texts.items() if re.search(asked, text)] == []
    styles = list(site.rglob("*.css"))
    loaded = r"url\([\"']?(?:https?:)?//|@import[^;]*//"
    assert [str(path) for path in styles if re.search(loaded, path.read_text())] == []


def test_the_reference_has_every_public_name_with_its_source(site):
    text = (site / "docs/reference.html").read_text()
    entries = re.findall(r'<dt class="sig[^>]*id="svdlib\.(\w+)">(.*?)</dt>', text, re.DOTALL)
    assert {name for name, _ in entries} == set(svdlib.__all__)
    assert [name for name, entry in entries if "[source]" not in entry] == []


def test_the_reference_has_what_notebooks_call_of_the_study(site):
    text = (site / "docs/reference_study.html").read_text()
    called = set().union(*map(study_functions, (ROOT / "notebooks").glob("*.ipynb")))
    assert "svdlib.study.evidence.statistics.interval" in called
    assert {name for name in called if f'id="{name}"' not in text} == set()


def study_functions(path: Path) -> set[str]:
    """The functions of `svdlib.study` that a notebook calls, by their whole names."""
    cells = nbformat.read(path, as_version=4).cells
    tree = ast.parse("\n".join(cell.source for cell in cells if cell.cell_type == "code"))
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("svdlib.study"):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    found = set(names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in names:
            found.add(f"{names[node.value.id]}.{node.attr}")
    called = filter(inspect.isfunction, map(pkgutil.resolve_name, found))
    whole = {f"{function.__module__}.{function.__qualname__}" for function in called}
    return {name for name in whole if name.startswith("svdlib.study.")}
