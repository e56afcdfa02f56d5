import contextlib
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import svdlib
from svdlib.ranks.rules import RULES


def profile(losses, se=0.1, sigma=None, layer="a", shape=(None, 50)):
    """A profile with these losses at ranks 0, 1, …; the last is the full network's."""
    full = len(losses) - 1
    sigma = np.linspace(2, 1, full) if sigma is None else np.asarray(sigma, float)
    return pd.DataFrame(
        {
            "layer": layer,
            "rank": range(full + 1),
            "loss": np.asarray(losses, float),
            "accuracy": 90.0,
            "increase": np.asarray(losses, float) - losses[-1],
            "se": se,
            "rows": shape[0] or full,
            "columns": shape[1],
            "sigma": [np.nan, *sigma],
        }
    )


def spectrum(sigma, shape=None):
    return profile([1.0] * (len(sigma) + 1), sigma=sigma, shape=shape or (len(sigma), 50))


def test_the_two_readings_of_algorithm_3():
    steps = profile([9, 5, 2, 1.9, 1.0, 0.99, 0.98])
    assert svdlib.reveal_ranks(steps, "printed", tolerance=0.5) == {"a": 3}
    assert svdlib.reveal_ranks(steps, "marginal", tolerance=0.5) == {"a": 4}


def test_plateaus_and_bumps_stop_no_rule_early():
    plateau = profile([9, 5, 5, 5, 1, 1.05])
    assert svdlib.reveal_ranks(plateau, "marginal", tolerance=0.5) == {"a": 4}
    bump = profile([9, 5, 6, 7, 1, 1])
    assert svdlib.reveal_ranks(bump, "marginal", tolerance=0.5) == {"a": 4}
    assert svdlib.reveal_ranks(bump, "one-se") == {"a": 4}
    slow = profile([9, 2.0, 1.8, 1.6, 1.4, 1.2])
    assert svdlib.reveal_ranks(slow, "marginal", tolerance=0.5) == {"a": 3}


def test_tolerance_a_layer():
    two = pd.concat([profile([3, 2, 1]), profile([3, 2, 1], layer="b")])
    ranks = svdlib.reveal_ranks(two, "marginal", tolerance={"a": 0.5, "b": 1.5})
    assert ranks == {"a": 2, "b": 1}
    read = two.assign(layer=two.layer.map({"a": 0, "b": 2}))  # as from a CSV file
    ranks = svdlib.reveal_ranks(read, "marginal", tolerance={"0": 0.5, "2": 1.5})
    assert ranks == {"0": 2, "2": 1}


def test_one_se_is_the_smallest_within():
    assert svdlib.reveal_ranks(profile([9, 1.3, 1.05, 1.2, 1.0])) == {"a": 2}
    assert svdlib.reveal_ranks(profile([1.0, 1.0, 1.0])) == {"a": 1}, "never below 1"


def test_rules_of_the_spectrum():
    sigma = [4.0, 3.0, 0.4, 0.3, 0.2]
    assert svdlib.reveal_ranks(spectrum(sigma), "energy", tolerance=0.02) == {"a": 2}
    assert svdlib.reveal_ranks(spectrum(sigma), "energy", tolerance=0.5) == {"a": 1}
    assert svdlib.reveal_ranks(spectrum([2.0] * 5), "effective-rank") == {"a": 5}
    assert svdlib.reveal_ranks(spectrum([2.0, 1e-9, 0.0]), "effective-rank") == {"a": 2}
    entropy = -sum(s / sum(sigma) * np.log(s / sum(sigma)) for s in sigma)
    ranks = svdlib.reveal_ranks(spectrum(sigma), "effective-rank")
    assert ranks == {"a": int(np.ceil(np.exp(entropy)))}
    assert svdlib.reveal_ranks(spectrum([2.0] * 5), "stable-rank") == {"a": 5}
    assert svdlib.reveal_ranks(spectrum(sigma), "stable-rank") == {"a": 2}


@settings(max_examples=15, deadline=None)
@given(
    rank=st.integers(1, 8), m=st.integers(60, 120), n=st.integers(60, 160), seed=st.integers(0, 99)
)
def test_noise_rules_find_a_planted_rank(rank, m, n, seed):
    """Strong signal in white noise: both estimators find its rank, whatever the noise level."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.normal(size=(m, rank)))[0]
    V = np.linalg.qr(rng.normal(size=(n, rank)))[0]
    noise = rng.normal(size=(m, n))
    A = 10 * (m + n) ** 0.5 * U @ V.T + noise
    table = spectrum(np.linalg.svd(A * 0.37, compute_uv=False), shape=(m, n))
    assert svdlib.reveal_ranks(table, "gavish-donoho") == {"a": rank}
    assert svdlib.reveal_ranks(table, "evbmf") == {"a": rank}


def budget_by_trying(tables, parameters=None, increase=None):
    best = None
    for ranks in itertools.product(*(range(1, len(table)) for table in tables)):
        rows = [table.iloc[rank] for table, rank in zip(tables, ranks, strict=True)]
        weights = sum(min(r["rank"] * (r.rows + r["columns"]), r.rows * r["columns"]) for r in rows)
        loss = sum(r.increase for r in rows)
        if parameters is not None and weights <= parameters:
            best = min(best or (np.inf,), (loss,))
        if increase is not None and loss <= increase:
            best = min(best or (np.inf,), (weights,))
    return best[0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), share=st.floats(0.2, 1))
def test_budgets_are_met_at_the_optimum(seed, share):
    rng = np.random.default_rng(seed)
    tables = [
        profile([*rng.random(k), 0.0], layer=str(k), shape=(k, int(rng.integers(k, 9))))
        for k in (2, 4, 3)
    ]
    table = pd.concat(tables)
    full = sum(int(t.rows[0] * t["columns"][0]) for t in tables)
    floor = sum(min(int(t.rows[0] + t["columns"][0]), int(t.rows[0] * t["columns"][0]))
                for t in tables)  # fmt: skip
    parameters = int(floor + share * (full - floor))

    def totals(ranks):
        rows = [t.iloc[ranks[t.layer[0]]] for t in tables]
        weights = sum(min(r["rank"] * (r.rows + r["columns"]), r.rows * r["columns"]) for r in rows)
        return weights, sum(r.increase for r in rows)

    weights, loss = totals(svdlib.reveal_ranks(table, "budget", parameters=parameters))
    assert weights <= parameters
    assert loss == pytest.approx(budget_by_trying(tables, parameters=parameters))
    weights, loss = totals(svdlib.reveal_ranks(table, "budget", increase=share))
    assert loss <= share
    assert weights == budget_by_trying(tables, increase=share)


def test_a_level_allows_every_layer_the_same_increase():
    two = pd.concat(
        [
            profile([9, 3.0, 1.2, 1.25, 1.0], shape=(4, 50)),
            profile([4, 1.4, 1.1, 1.0], layer="b", shape=(3, 50)),
        ]
    )
    # At most 0.2 everywhere: ranks 2 (108 weights) and 2 (106).
    assert svdlib.reveal_ranks(two, "level", parameters=214) == {"a": 2, "b": 2}
    assert svdlib.reveal_ranks(two, "level", parameters=213) == {"a": 2, "b": 1}
    assert svdlib.reveal_ranks(two, "level", parameters=350) == {"a": 4, "b": 3}
    assert svdlib.reveal_ranks(two, "level", parameters=107) == {"a": 1, "b": 1}


def test_bad_input():
    good = profile([3, 2, 1])

    def refused(message, table=good, rule="one-se", **keywords):
        with pytest.raises(ValueError, match=message):
            svdlib.reveal_ranks(table, rule, **keywords)

    refused(
        "unknown rule 'best'; known: optimal, removal, gain, printed, marginal, one-se", rule="best"
    )
    refused("lacks se, sigma", table=good.drop(columns=["se", "sigma"]))
    refused("has no layer", table=good[:0])
    refused("NaN or infinite losses", table=profile([3, np.nan, 1]))
    for rule in ("one-se", "stable-rank", "gavish-donoho"):
        for sigma in (np.nan, np.inf):
            refused("NaN or infinite singular values", profile([3, 2, 1], sigma=[sigma, 1]), rule)
    refused("'marginal' takes tolerance=…, got nothing", rule="marginal")
    refused("must be at least 0, not -1", rule="marginal", tolerance=-1)
    refused("at least 0 and below 1", rule="energy", tolerance=1.0)
    refused(
        "takes neither a tolerance nor a budget, got tolerance=0.1", rule="one-se", tolerance=0.1
    )
    refused("tolerance lacks layer 'a'; it has b", rule="marginal", tolerance={"b": 1})
    refused(r"needs a profile of all ranks of layer 'a'; missing: \[1\]",
            table=good.drop(index=1), rule="energy")  # fmt: skip
    refused("takes neither a tolerance nor a budget, got parameters=5", rule="one-se", parameters=5)
    refused("exactly one of them", rule="budget")
    refused("exactly one of them", rule="budget", parameters=5, increase=0.1)
    refused(
        "'budget' takes parameters=… or increase=…, .* got tolerance", rule="budget", tolerance=1
    )
    refused("'level' takes parameters=…, got tolerance=0.1", rule="level", tolerance=0.1)
    refused("'level' takes parameters=…, got increase=0.1", rule="level", increase=0.1)
    refused("3 weights are too few; the lowest ranks have 52", rule="level", parameters=3)
    refused(
        "a budget of 3 is too small; the smallest reachable cost is 52", rule="budget", parameters=3
    )
    refused(
        "a budget of -5 is too small; the smallest reachable error is 0",
        rule="budget",
        increase=-5.0,
    )


ASKED = [
    ("budget", {"parameters": 250}),
    ("budget", {"increase": 0.5}),
    ("level", {"parameters": 250}),
    ("one-se", {}),
    ("energy", {}),
]


@pytest.mark.parametrize(("rule", "more"), ASKED)
def test_layers_of_one_weight_are_counted_once_and_get_one_rank(rule, more):
    """As if the others of them were not there, in whatever order."""
    alone = pd.concat(
        pd.DataFrame(
            {
                "layer": name,
                "rank": range(9),
                "loss": 1 + height * 0.5 ** np.arange(9),
                "increase": height * 0.5 ** np.arange(9),
                "se": 0.05,
                "rows": 8,
                "columns": 12,
                "sigma": [np.nan, *(2.0 ** -np.arange(8))],
            }
        )
        for name, height in (("a", 1.0), ("b", 3.0))
    )
    expected = svdlib.reveal_ranks(alone, rule, **more)
    twin = alone[alone.layer == "a"].assign(layer="c")
    tables = [[alone, twin], [twin, alone]]
    for both in tables:
        profile = pd.concat(both, ignore_index=True)
        profile["shared"] = profile.layer.replace({"c": "a"})
        found = svdlib.reveal_ranks(profile, rule, **more)
        assert found == {**expected, "c": expected["a"]}
    only = twin.assign(shared="a")
    assert svdlib.reveal_ranks(only, "one-se") == {"c": svdlib.reveal_ranks(alone, "one-se")["a"]}


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.table != "joint"])
def test_profiles_of_several_networks_are_refused_together(rule):
    """By every rule: of four profiles it would choose a rank that none of them has."""
    networks = [profile([3, 2, 1.5 + seed, 1]).assign(seed=seed) for seed in range(4)]
    with pytest.raises(ValueError, match="rank 0 of layer 'a' more than once; give one network's"):
        svdlib.reveal_ranks(pd.concat(networks, ignore_index=True), rule)
    for network in networks:  # a rule may ask for more, but finds no fault with the table
        with contextlib.suppress(ValueError):
            assert svdlib.reveal_ranks(network, rule)
