"""What a notebook is given is checked in the cell that reads it."""

import re
import warnings
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from notebook_cases import small

import svdlib
from svdlib.ensemble.networks import perceptron
from svdlib.network.low_rank import low_rank_layers
from svdlib.study.rivals.svd import svd_race
from svdlib.study.running import runner, sweeps
from svdlib.study.running.execute import execute
from svdlib.study.running.parameters import defaults, find

FOLDER = Path(__file__).parents[3] / "notebooks"
NOTEBOOKS = find(folder=FOLDER)


def cell_sources(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


CHECKS = {path.stem: sweeps._check(cell_sources(path)) for path in NOTEBOOKS}
SMALL = {path.stem: small(path) for path in NOTEBOOKS}


def refusal(changed, name=None):
    """What a notebook, or the first that has all these parameters, says of them; None if nothing."""
    if name is None:
        name = next(stem for stem, own in SMALL.items() if own.keys() >= changed.keys())
    try:
        exec(CHECKS[name], SMALL[name] | changed)  # noqa: S102
    except ValueError as error:
        assert "\n" not in str(error) and error.__suppress_context__ and error.__cause__ is None
        return str(error)
    return None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_parameter_has_a_rule_and_its_own_value_keeps_it(path):
    own = defaults(path)
    assert refusal(own, path.stem) is None
    for parameter in own:
        assert parameter in refusal({parameter: object()}, path.stem)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"seeds": "4"}, "seeds must be a whole number of at least 1, not '4'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"draws": 1}, "draws must be at least 2"),
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
        ({"first_seed": 10**13}, "first_seed must be at most 1,000,000,000,000"),
        ({"rank": 16, "sizes": [784, 15, 15, 10]}, "rank must be at most 14"),
        ({"rank": 1, "sizes": [784, 1, 10]}, r"sizes = \[784, 1, 10\] is too small: rank"),
        ({"ranks": [5, 16], "sizes": [784, 15, 15, 10]}, "ranks must be at most 15, .* not 16"),
        ({"paper_ranks": [14, 15], "paper_sizes": [784, 15, 15, 10]}, "at most 14, .* not 15"),
        ({"budgets": [500], "wide": [784, 40, 40, 10]}, "budgets must be at least 1,394"),
        ({"budgets": [500], "wide": [784, 40, 10]}, "budgets must be at least 1,274"),
        ({"budgets": [31810], "wide": [784, 40, 10]}, "below its own 31,810, not 31,810"),
        ({"budgets": [5000], "wide": []}, "wide must be the widths"),
        ({"start_rank": 20, "wide": [784, 40, 40, 10]}, "start_rank must be at most 19"),
        ({"start_rank": 1, "wide": [784, 2, 2, 10]}, "too small: start_rank"),
        ({"narrow_rank": 20, "narrow": [784, 20, 20, 10]}, "narrow_rank must be at most 9"),
        ({"shares": [0.9, 0.05], "sizes": [784, 15, 15, 10]}, "shares must be at least 0.074"),
        ({"wide_ranks": [*range(1, 200)], "wide": [784, 300, 300, 300, 10]}, "at most 1,000,000"),
        ({"shapes": [[9, 9], [40, 50]], "ranks": [40, 50]}, "the least of ranks .* at most 39"),
        ({"race_shapes": [[40, 60]], "race_ranks": [5, 31]}, "race_ranks must be at most 30"),
        ({"race_shapes": [[9, 60]], "race_ranks": [5]}, "too small: each of race_ranks"),
        ({"rank": 100, "oversamples": [2], "widths": [784, 100, 10]}, "at ranks 2 to 97, not 100"),
        (
            {"rank": 10, "oversamples": [0, 1], "widths": [784, 100, 10]},
            "oversamples must be at least 2",
        ),
        ({"rank": 10, "oversamples": [20], "widths": [784, 9, 10]}, "oversamples up to 6, not 20"),
    ],
)
def test_what_no_notebook_could_use_is_refused_in_one_sentence(parameters, message):
    assert re.search(message, refusal(parameters))


@pytest.mark.parametrize("name", ["06_rank_revealer", "09_explorer"])
def test_every_combination_of_ranks_is_measured_only_of_small_networks(name):
    assert refusal({"sizes": [784, 60, 60, 10]}, "01_baseline") is None
    assert re.search(
        r"at most 20,000 combinations .* not 40,931", refusal({"sizes": [784, 60, 60, 10]}, name)
    )


hidden = st.lists(st.integers(1, 30), min_size=1, max_size=3)
few = settings(max_examples=15, deadline=None)


@few
@given(hidden, st.integers(1, 20))
def test_a_rank_passes_exactly_where_each_layer_becomes_two_factors(between, rank):
    """Else one network of an ensemble would stay dense, or a tail have nothing to cut."""
    widths = [784, *between, 10]
    inner = {str(2 * number): rank for number in range(len(widths) - 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thin = low_rank_layers(svdlib.factorize(perceptron(widths), inner))
    full = sum((n + 1) * m for n, m in pairwise(widths))
    changed = {"start_rank": rank, "wide": widths, "budgets": [full - 1]}
    assert (refusal(changed, "08_compression") is None) == (set(thin) == set(inner))


@few
@given(hidden, st.floats(0.01, 0.99))
def test_a_share_passes_exactly_where_rank_one_is_within_it(between, share):
    net = perceptron([784, *between, 10])
    ones = svdlib.verify_ranks(net, dict.fromkeys(map(str, range(0, 2 * len(between) + 1, 2)), 1),
                               torch.rand(2, 784), torch.tensor([0, 1]))  # fmt: skip
    full = sum(parameter.numel() for parameter in net.parameters())
    within = ones["parameters"] <= int(share * full)
    message = refusal({"shares": [share], "sizes": [784, *between, 10]}, "06_rank_revealer")
    assert ("each of shares" not in str(message)) == within


@few
@given(hidden, st.integers(1000, 40_000), st.integers(0, 99))
def test_a_budget_that_passes_can_be_met_by_factors_everywhere(between, budget, seed):
    wide = [784, *between, 10]
    rows = [
        {"layer": str(2 * number), "rank": rank, "rows": m, "columns": n}
        for number, (n, m) in enumerate(pairwise(wide[:-1]))
        for rank in range(1, min(n, m) + 1)
        if rank * (m + n) < m * n
    ]
    profile = pd.DataFrame(rows, columns=["layer", "rank", "rows", "columns"])
    profile["loss"] = profile["increase"] = np.random.default_rng(seed).random(len(rows))
    wanted = {"budgets": [budget], "wide": wide, "start_rank": 1}
    if refusal(wanted, "08_compression") is None:
        others = sum(wide[1:]) + wide[-2] * wide[-1]
        profile = profile.assign(se=0.0, sigma=1.0)
        ranks = svdlib.reveal_ranks(profile, "budget", parameters=budget - others)
        assert len(ranks) == len(between)


@few
@given(st.integers(8, 40), st.integers(8, 40), st.integers(1, 30))
def test_a_race_that_passes_is_run_by_all(m, n, rank):
    if refusal({"race_shapes": [[m, n]], "race_ranks": [rank]}, "07_randomized_svd") is None:
        table = svd_race([(m, n)], [rank], repeats=1, progress=False)
        assert table.way.nunique() == 7


def test_the_notebook_stops_at_the_cell_that_reads_its_parameters_and_the_command_before(tmp_path):
    message = "rank must be at most 14, below the full rank of the first layer, not 20"
    text = (FOLDER / "03_truncsvd.ipynb").read_text()
    assert execute(text, "a", {"rank": 20}, str(tmp_path)).error == f"cell 3: ValueError: {message}"
    with pytest.raises(ValueError, match=f"^03_truncsvd: {message}$"):
        runner.run(["03_truncsvd"], {"rank": "20"}, out=tmp_path, folder=FOLDER)
    assert not list(tmp_path.iterdir()), "nothing is begun"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_checks_before_it_loads_anything(path):
    assert ".check(globals())" in cell_sources(path)[1].split("svdlib.load(")[0]
