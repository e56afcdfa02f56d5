"""What a notebook is given is checked in the cell that reads it."""

from pathlib import Path

import nbformat
import pytest

from svdlib.study import runner
from svdlib.study.inputs import RULES, check
from svdlib.study.parameters import defaults, find

FOLDER = Path(__file__).parents[2] / "notebooks"


@pytest.mark.parametrize("path", find(folder=FOLDER), ids=lambda path: path.stem)
def test_every_parameter_has_a_rule_and_its_own_value_keeps_it(path):
    own = defaults(path)
    assert not set(own) - set(RULES)
    check(own)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"seeds": "4"}, "seeds must be a whole number of at least 1, not '4'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"epochs": 2.0}, "epochs must be a whole number"),
        ({"first_seed": -1}, "first_seed must be at least 0"),
        ({"train_images": 0}, "train_images must be at least 100, not 0"),
        ({"train_images": -5}, "train_images must be at least 100, not -5"),
        ({"sizes": [784, 10]}, "sizes must be the widths"),
        ({"sizes": [28, 15, 10]}, "sizes must be the widths"),
        ({"sizes": [784, 0, 10]}, "each of sizes must be at least 1"),
        ({"sizes": "784"}, "sizes must be the widths"),
        ({"dataset": "X"}, "unknown dataset 'X'; known: MNIST, FashionMNIST, KMNIST"),
        ({"every": "hour"}, "unknown every 'hour'"),
        ({"device": "cude"}, "device 'cude' is not there"),
        ({"figures": "/no/such/folder"}, "figures must be a folder that is there"),
        ({"figures": None}, "figures must be a folder"),
        ({"ranks": []}, "ranks must be a list with one entry at least"),
        ({"ranks": [9, 9, 9]}, "ranks has an entry twice"),
        ({"ranks": [0, 3]}, "each of ranks must be at least 1"),
        ({"counts": []}, "counts must be a list"),
        ({"bench": []}, "bench must be a list"),
        ({"bench": [[784, 10]]}, "each of bench must be the widths"),
        ({"shapes": [[3]]}, r"each of shapes must be \[rows, columns\]"),
        ({"shares": [0.5, 1.5]}, "each of shares must be a number between 0 and 1, not 1.5"),
        ({"tails": ["a"]}, "each of tails must be a number"),
        ({"tolerance": 0}, "tolerance must be a positive number"),
        ({"progress": "yes"}, "progress must be True or False"),
        ({"rank": 16, "sizes": [784, 15, 15, 10]}, "rank must be at most 14"),
        ({"paper_ranks": [14, 15], "paper_sizes": [784, 15, 15, 10]}, "at most 14, .* not 15"),
        ({"budgets": [500], "wide": [784, 40, 40, 10]}, "budgets must be at least 1,394"),
        ({"budgets": [5000], "wide": [784, 40, 10]}, "wide must be the widths of three layers"),
        ({"narrow_rank": 20, "narrow": [784, 20, 20, 10]}, "narrow_rank must be at most 19"),
    ],
)
def test_what_no_notebook_could_use_is_refused_in_one_sentence(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        check(given)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None


def test_the_notebook_stops_at_the_cell_that_reads_its_parameters(tmp_path):
    (outcome,) = runner.run(
        ["03_truncsvd"], {"rank": "20"}, out=tmp_path, folder=FOLDER, figures=tmp_path,
        progress=False,
    )  # fmt: skip
    assert outcome.error == (
        "cell 3: ValueError: rank must be at most 14, below the full rank of the first layer, not 20"
    )


@pytest.mark.parametrize("path", find(folder=FOLDER), ids=lambda path: path.stem)
def test_every_notebook_checks_before_it_loads_anything(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    source = cells[1].source
    assert source.index("inputs.check(globals()") < source.index("svdlib.load(")
