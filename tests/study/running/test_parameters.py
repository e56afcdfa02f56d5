import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from svdlib.study.running import parameters

CELL = """
seeds: int = 2  # how many
rate: float = 0.5
dataset: str = "MNIST"
flag: bool = True
sizes: list = [1, 2]
n = 3
s: str = "a=b"  # with a sign
x: str | None = None
y: Optional[int] = None
z: "float" = 1.0
thing: Path = Path("here")
""".strip()


@pytest.fixture
def notebook(tmp_path):
    cells = [new_code_cell(CELL, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=cells), tmp_path / "own.ipynb")
    return tmp_path / "own.ipynb"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seeds", "3", 3),
        ("rate", "1", 1.0),
        ("rate", "1e-2", 0.01),
        ("dataset", "7", "7"),
        ("flag", "false", False),
        ("sizes", "[784, 10]", [784, 10]),
        ("n", "7", 7),
        ("s", "c=d", "c=d"),
        ("x", "here", "here"),
        ("x", "None", None),
        ("y", "4", 4),
        ("z", "2", 2.0),
        ("thing", "there", "there"),
        ("dataset", "'7'", "7"),
        ("s", "'a \"b\"'", 'a "b"'),
        ("x", "'None'", "None"),
    ],
)
def test_values_take_the_declared_type(notebook, name, text, value):
    parsed = parameters.parse(notebook, {name: text})[name]
    assert parsed == value and type(parsed) is type(value)


def test_every_combination(notebook):
    over = [("seeds", "0:6:3"), ("sizes", "[1, 2],[3]"), ("dataset", "MNIST, KMNIST")]
    found = parameters.combinations(notebook, {"rate": "1"}, over)
    assert len(found) == 8 and all(values["rate"] == 1.0 for values in found)
    assert found[0] == {"rate": 1.0, "seeds": 0, "sizes": [1, 2], "dataset": "MNIST"}
    assert found[-1] == {"rate": 1.0, "seeds": 3, "sizes": [3], "dataset": "KMNIST"}
    assert parameters.combinations(notebook, {}) == [{}]
    assert len(parameters.combinations(notebook, {}, [("seeds", "1,1,2")])) == 2
    down = parameters.combinations(notebook, {}, [("seeds", "2:-1:-1")])
    assert [values["seeds"] for values in down] == [2, 1, 0]
    texts = parameters.combinations(notebook, {}, [("s", "'a,b','[',10:20")])
    assert [values["s"] for values in texts] == ["a,b", "[", "10:20"]
    (text,) = parameters.combinations(notebook, {}, [("s", "10:20")])
    assert text == {"s": "10:20"}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([("seed", "1,2")], "own has no parameter 'seed'; known: seeds, rate"),
        ([("sizes", "{[1]}")], "parameter 'sizes' must be a list"),
        ([("seeds", "0:300000")], "300,000 values, more than 100,000"),
        ([("seeds", "1,many")], "parameter 'seeds' must be an int, not 'many'"),
        ([("seeds", "5:5")], "--over seeds: '5:5' holds no value"),
        ([("seeds", "4,,6")], "--over seeds: '4,,6' has a gap"),
        ([("seeds", "4,")], "--over seeds: '4,' has a gap"),
        ([("seeds", " , ")], "holds no value; give 1,2,3 or 0:10:2"),
        ([("seeds", "0:9:0")], "the range 0:9:0 has step 0"),
        ([("seeds", "1,2"), ("seeds", "3")], "parameter 'seeds' is given twice"),
        ([("rate", "1,2")], "parameter 'rate' is given twice"),
        ([("seeds", "0:400"), ("n", "0:400")], "160,000 combinations are more than 100,000"),
    ],
)
def test_bad_combinations(notebook, over, message):
    with pytest.raises(ValueError, match=message):
        parameters.combinations(notebook, {"rate": "1"}, over)


def test_the_notebook_s_own_values(notebook):
    own = parameters.defaults(notebook)
    assert own["sizes"] == [1, 2] and own["x"] is None and "thing" not in own
