"""The files around the code agree with it."""

import ast
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def test_conda_and_pip_ask_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["peers"], *extras["test"]]
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
        tree = ast.parse(cell.source)
        kinds = (ast.FunctionDef, ast.ClassDef)
        assert not any(isinstance(node, kinds) for node in ast.walk(tree)), cell.source
    outputs = str([cell.get("outputs") for cell in code])
    assert "widget-view" not in outputs and "/.venv/" not in outputs


def test_readme_points_at_files_that_are_there():
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
