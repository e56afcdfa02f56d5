"""The files around the code agree with it."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

import svdlib

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = {"scikit-learn": "sklearn"}
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def test_conda_and_pip_ask_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["study"], *extras["test"]]
    pip = {"python" + project["requires-python"]}
    for line in wanted:
        name = re.split(r"[<>=]", line)[0]
        pip.add(CONDA_NAMES.get(name, name) + line[len(name) :])
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {line for line in conda if isinstance(line, str)} - {"pip"} == pip


def test_everything_asked_for_is_pinned():
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = {re.split(r"[<>=]", line)[0] for lines in lists for line in lines}
    assert wanted <= pinned


def extra(name: str) -> set[str]:
    """The modules that an extra brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=]", line)[0] for line in project["optional-dependencies"][name]}
    return {MODULES.get(name, name) for name in names}


def test_the_library_needs_nothing_of_the_study():
    """In an interpreter where the study's packages can't be imported."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(extra("study"))!r}))
import svdlib
data = svdlib.load("MNIST", device="cpu").head(640, 100)
nets = svdlib.MLPEnsemble((784, 15, 10), device="cpu")
svdlib.train(nets, data, epochs=1, projection=svdlib.Projection("truncsvd", 5), progress=False)
profile = svdlib.loss_profile(nets[0], data.test_x, data.test_y, progress=False)
svdlib.factorize(nets[0], svdlib.reveal_ranks(profile, "evbmf"))
sys.argv[1:] = ["run"]
import runpy
runpy.run_module("svdlib", run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(r"svdlib: .* the notebooks need: pip install 'svdlib.study.'$", run.stderr)


# From the ground up: a wing imports those before it in this list, and what stands beside none.
FLOORS = (
    "bars", "checks", "clock", "files", "threads", "data", "linalg", "network", "layers", "ensemble", "ranks", "compress", "study", "hf",
)  # fmt: skip


def test_imports_go_one_way():
    """No import from a wing into the study, and none upward."""
    seen = set()
    for path in (ROOT / "svdlib").rglob("*.py"):
        place, *_ = path.relative_to(ROOT / "svdlib").with_suffix("").parts
        if place in ("__init__", "__main__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module != "svdlib":
                names = [str(node.module)]
            elif isinstance(node, ast.ImportFrom):
                names = [f"svdlib.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                if name.startswith("svdlib."):
                    other = name.split(".")[1]
                    seen.add((place, other))
                    assert FLOORS.index(other) <= FLOORS.index(place), f"{path}: {name}"
    assert ("layers", "network") in seen and ("ranks", "ensemble") not in seen


def test_only_the_network_wing_asks_for_a_layers_type():
    asked = r"nn\.(Linear|Conv|Embedding|MultiheadAttention)|\bLowRank\b"
    pattern = re.compile(rf"(isinstance\([^()]*|type\([^()]*\)[^\n]*)({asked})")
    for path in (ROOT / "svdlib").rglob("*.py"):
        if path.parent.name != "network":
            assert not pattern.search(path.read_text()), path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_keep_to_the_house(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert [i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", [])] == [0]
    for line in code[0].source.splitlines():
        assert re.fullmatch(r"\w+: (str|int|float|bool|list) = [^=]+", line), line
    assert all(cell.execution_count for cell in code), "committed notebooks are executed"
    for cell in code:
        for node in ast.walk(ast.parse(cell.source)):  # a small function may be the idea
            assert not isinstance(node, ast.ClassDef), cell.source
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 15, cell.source
    outputs = str([cell.get("outputs") for cell in code])
    assert "widget-view" not in outputs and "/.venv/" not in outputs


@pytest.mark.parametrize("path", ["README.md", *sorted(Path("docs").glob("*.md"))], ids=str)
def test_texts_point_at_files_that_are_there(path):
    text = (ROOT / path).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    folder = (ROOT / path).parent
    assert [link for link in links if not (folder / link).exists()] == []


def test_every_figure_is_in_the_gallery():
    shown = set(re.findall(r"figures/(\w+).png", (ROOT / "docs/gallery.md").read_text()))
    assert shown == {path.stem for path in (ROOT / "figures").glob("*.png")}


# A user's own code speaks there, in its own traceback.
SHOWN = {"svdlib/network/calls.py"}


def test_an_error_shows_no_inner_one_above_it():
    """What is raised where another error is handled says all that matters, ``from None``."""
    found = set()
    for path in sorted((ROOT / "svdlib").rglob("*.py")):
        for handler in ast.walk(ast.parse(path.read_text())):
            if isinstance(handler, ast.ExceptHandler):
                for node in ast.walk(handler):
                    if isinstance(node, ast.Raise) and node.exc is not None:
                        none = isinstance(node.cause, ast.Constant) and node.cause.value is None
                        if not none:
                            found.add(path.relative_to(ROOT).as_posix())
    assert found == SHOWN


def test_what_the_package_shows_is_public():
    assert svdlib.__version__ == importlib.metadata.version("svdlib")
    assert set(dir(svdlib)) == {*svdlib.__all__, "__version__"}
