"""From a loss profile to ranks: pure functions of one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from svdlib import checks
from svdlib.network.kinds import stored
from svdlib.ranks.front import optimal, walk

Tolerance = float | Mapping[str, float]


def reveal_ranks(
    profile: pd.DataFrame,
    rule: str = "one-se",
    *,
    tolerance: Tolerance | None = None,
    parameters: int | None = None,
    increase: float | None = None,
) -> dict[str, int]:
    """The rank of each layer, by a rule, from a table of losses.

    From what `joint_profile` measured, all layers at once:

    - ``"optimal"`` with ``parameters``: the least loss of a model with so many parameters at
      most; or with ``increase``: the fewest parameters with so much increase of the loss at most.
      No other ranks in the table do better.
    - ``"removal"`` with ``parameters``: from the highest ranks down, always in the layer where the
      loss then rises least for a parameter saved, measured anew after each step.
    - ``"gain"`` with ``parameters``: from the lowest ranks up, always in the layer where the loss
      then falls most for a parameter spent; the best ranks on that way.

    The others take what `loss_profile` measured, or `predicted_profile` foretells.

    One layer at a time, by the loss ℓ_j at rank j (a profile of every rank is needed for the
    first two):

    - ``"printed"``: Algorithm 3 of the paper to the letter, which assigns rank j wherever
      ℓ_j − ℓ_{j+1} ≥ ε: the last such j stands, one short of where the gain arrives; full rank
      if there is none.
    - ``"marginal"``: its sensible reading, the smallest j beyond which no further rank gains ε:
      ℓ_j − min_{i>j} ℓ_i < ε.
    - ``"one-se"``: the smallest rank whose loss increase, paired by image, is within one
      standard error of the full network (Breiman et al. 1984, section 3.4.3). No tolerance.

    From the singular values σ alone:

    - ``"energy"``: the smallest j with Σ_{i>j} σ_i² ≤ ε Σ σ_i²; ε = 0.01 by default. With √ε for
      the tail it is the truncation of dynamical low-rank training (Schotthöfer et al. 2022,
      Algorithm 1).
    - ``"effective-rank"``: exp(−Σ p_i ln p_i) with p_i = σ_i / Σ σ, rounded up (Roy and
      Vetterli 2007).
    - ``"stable-rank"``: ‖W‖_F² / σ_1² rounded up (Rudelson and Vershynin 2007).
    - ``"gavish-donoho"``: the σ above ω(β) · median(σ), β = m/n, the optimal hard threshold for
      unknown noise (Gavish and Donoho 2014, section IV and its cubic fit of ω).
    - ``"evbmf"``: the global analytic solution of empirical variational Bayes matrix
      factorization, its noise variance estimated (Nakajima et al. 2013, Theorems 2 and 3).

    Under a budget, all layers at once, layer effects taken to add (`verify_ranks` tells):

    - ``"budget"`` with ``parameters``: the least total increase with so many weights at most;
      or with ``increase``: the fewest weights with so much total increase at most. A layer of
      rank j stores min(j (m+n), m n) weights. A weight that layers share counts once.

    - ``"level"`` with ``parameters``: in every layer the smallest rank whose increase is at most
      t, for the least t that the budget allows (as AIMET's greedy selection of compression
      ratios levels the score of all layers).

    Every rank is looked at, so that a plateau or bump of the profile ends no search early. The
    smallest rank given is 1.

    Args:
        profile: what `loss_profile`, `predicted_profile` or `joint_profile` returns.
        rule: one of the names above.
        tolerance: ε, one or {layer: ε}; needed by "printed" and "marginal".
        parameters, increase: the budget, exactly one of them.

    Raises:
        ValueError: an unknown rule, a profile that lacks columns, layers or ranks, or has NaN
            losses or singular values, or a rank twice, as several networks' together have; a
            missing, negative or unused tolerance, contradicting or unmeetable budgets.

    >>> profile = pd.DataFrame({
    ...     "layer": "a", "rank": [0, 1, 2, 3], "loss": [9.0, 4.0, 1.1, 1.0],
    ...     "increase": [8.0, 3.0, 0.1, 0.0], "se": [0.2, 0.2, 0.2, 0.0],
    ...     "rows": 3, "columns": 5, "sigma": [float("nan"), 3.0, 2.0, 0.1]})
    >>> reveal_ranks(profile), reveal_ranks(profile, "marginal", tolerance=0.5)
    ({'a': 2}, {'a': 2})
    >>> reveal_ranks(profile, "printed", tolerance=0.5)
    {'a': 1}
    """
    checks.one_of(rule, (*JOINT, *ONE_LAYER, "budget", "level"), "rule")
    if rule in JOINT:
        return _joint(profile, rule, tolerance, parameters, increase)
    _check_profile(profile)
    if "shared" in profile:  # a weight once, and its rank for all that share it
        group = profile.drop_duplicates("layer").set_index("layer")["shared"]
        first = group.drop_duplicates()
        once = profile[profile.layer.isin(first.index)].drop(columns="shared")
        found = reveal_ranks(
            once, rule, tolerance=tolerance, parameters=parameters, increase=increase
        )
        known = {weight: found[str(name)] for name, weight in first.items()}
        return {str(name): known[weight] for name, weight in group.items()}
    layers = {str(name): table for name, table in profile.groupby("layer", sort=False)}
    if rule in ("budget", "level") and tolerance is not None:
        raise ValueError(f"rule {rule!r} takes a budget, parameters=…, not a tolerance")
    if rule == "budget":
        return _budget(layers, parameters, increase)
    if rule == "level":
        if parameters is None or increase is not None:
            raise ValueError("rule 'level' takes a budget of parameters=…")
        return _level(layers, parameters)
    if parameters is not None or increase is not None:
        raise ValueError(f"parameters and increase belong to rules of a budget, not {rule!r}")
    choose, needs = ONE_LAYER[rule]
    found = {}
    for name, table in layers.items():
        epsilon = _epsilon(rule, name, tolerance)
        full = int(table[["rows", "columns"]].iloc[0].min())
        ranks = set(table["rank"])
        needed = set(range(1, full + 1)) if needs == "all" else {full}
        if not needed <= ranks:
            raise ValueError(
                f"rule {rule!r} needs a profile of {needs} ranks of layer {name!r}; "
                f"missing: {sorted(needed - ranks)[:5]}"
            )
        rank = choose(table.sort_values("rank"), epsilon)
        found[name] = min(max(int(rank), 1), full)
    return found


def _printed(table: pd.DataFrame, epsilon: float) -> int:
    loss = table.loss.to_numpy()
    gains = np.flatnonzero(loss[:-1] - loss[1:] >= epsilon)
    ranks = table["rank"].to_numpy()
    return ranks[gains[-1]] if len(gains) else ranks[-1]


def _marginal(table: pd.DataFrame, epsilon: float) -> int:
    loss = table.loss.to_numpy()
    best_beyond = np.append(np.minimum.accumulate(loss[::-1])[::-1][1:], math.inf)
    return table["rank"].to_numpy()[np.argmax(loss - best_beyond < epsilon)]


def _one_se(table: pd.DataFrame, epsilon: float) -> int:
    within = table[(table.increase <= table.se) & (table["rank"] > 0)]["rank"]
    return within.min() if len(within) else table["rank"].max()


def _sigma(table: pd.DataFrame) -> np.ndarray:
    return table.sigma[table["rank"] > 0].to_numpy()


def _energy(table: pd.DataFrame, epsilon: float) -> int:
    energy = np.cumsum(_sigma(table) ** 2)
    return 1 + int(np.argmax(energy >= (1 - epsilon) * energy[-1]))


def _effective_rank(table: pd.DataFrame, epsilon: float) -> int:
    sigma = _sigma(table)
    part = sigma[sigma > 0] / sigma.sum()
    return math.ceil(math.exp(-(part * np.log(part)).sum()) - 1e-9) if len(part) else 1


def _stable_rank(table: pd.DataFrame, epsilon: float) -> int:
    square = _sigma(table) ** 2
    return math.ceil(square.sum() / square[0] - 1e-9) if square[0] else 1


def _gavish_donoho(table: pd.DataFrame, epsilon: float) -> int:
    sides = table[["rows", "columns"]].iloc[0]
    beta = sides.min() / sides.max()
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    sigma = _sigma(table)
    return int((sigma > omega * np.median(sigma)).sum())


def _evbmf(table: pd.DataFrame, epsilon: float) -> int:
    sigma = _sigma(table)
    sides = table[["rows", "columns"]].iloc[0]
    small, large = int(sides.min()), int(sides.max())
    alpha = small / large
    tau_bound = 2.5129 * math.sqrt(alpha)
    x_bound = (1 + tau_bound) * (1 + alpha / tau_bound)

    def free_energy(variance: float) -> float:
        x = sigma**2 / (large * variance)
        noise, signal = x[x <= x_bound], x[x > x_bound]
        shifted = signal - (1 + alpha)
        tau = (shifted + np.sqrt(shifted**2 - 4 * alpha)) / 2
        terms = np.sum(noise - np.log(np.maximum(noise, 1e-300)))
        terms += np.sum(signal - tau) + np.sum(np.log((tau + 1) / signal))
        return float(terms + alpha * np.sum(np.log(tau / alpha + 1)))

    first_noise = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    rest = sigma[first_noise:] ** 2
    low = max(rest[0] / (large * x_bound), rest.mean() / large)
    high = (sigma**2).sum() / (small * large)
    if not 0 < low < high:
        return int((sigma > 0).sum())
    variance = minimize_scalar(free_energy, bounds=(low, high), method="bounded").x
    return int((sigma > math.sqrt(large * variance * x_bound)).sum())


# name: the rule for one layer, and the ranks that it needs in the profile
ONE_LAYER: dict[str, tuple[Callable[[pd.DataFrame, float], int], str]] = {
    "printed": (_printed, "all"),
    "marginal": (_marginal, "all"),
    "one-se": (_one_se, "full"),
    "energy": (_energy, "all"),
    "effective-rank": (_effective_rank, "all"),
    "stable-rank": (_stable_rank, "all"),
    "gavish-donoho": (_gavish_donoho, "all"),
    "evbmf": (_evbmf, "all"),
}

# The rules that take a tolerance, and the one they have if none is given.
TOLERANCES: dict[str, float | None] = {"printed": None, "marginal": None, "energy": 0.01}

# The rules of a joint table.
JOINT = ("optimal", "removal", "gain")


def _epsilon(rule: str, layer: str, tolerance: Tolerance | None) -> float:
    if rule not in TOLERANCES:
        if tolerance is not None:
            raise ValueError(f"rule {rule!r} takes no tolerance")
        return 0.0
    default = TOLERANCES[rule]
    if isinstance(tolerance, Mapping):
        if layer not in tolerance:
            raise ValueError(f"tolerance lacks layer {layer!r}; it has {', '.join(tolerance)}")
        value: float | None = tolerance[layer]
    else:
        value = default if tolerance is None else tolerance
    if value is None:
        raise ValueError(f"rule {rule!r} needs a tolerance, a loss difference such as 0.01")
    if not value >= 0 or (rule == "energy" and value >= 1):
        limits = "at least 0 and below 1" if rule == "energy" else "at least 0"
        raise ValueError(f"the tolerance of rule {rule!r} must be {limits}, not {value}")
    return float(value)


def _check_profile(profile: pd.DataFrame) -> None:
    columns = {"layer", "rank", "loss", "increase", "se", "rows", "columns", "sigma"}
    missing = columns - set(profile.columns)
    if missing:
        raise ValueError(f"the profile lacks {', '.join(sorted(missing))}; see loss_profile")
    if profile.empty:
        raise ValueError("the profile has no layer")
    if not np.isfinite(profile[["loss", "increase", "se"]].to_numpy(float)).all():
        raise ValueError("the profile has NaN or infinite losses")
    if not np.isfinite(profile.sigma[profile["rank"] > 0].to_numpy(float)).all():
        raise ValueError("the profile has NaN or infinite singular values, sigma")
    twice = profile[profile.duplicated(["layer", "rank"])]
    if len(twice):
        layer, rank = twice[["layer", "rank"]].iloc[0]
        raise ValueError(
            f"the profile has rank {rank} of layer {layer!r} more than once; give one network's "
            "profile at a time"
        )


def _budget(
    layers: Mapping[str, pd.DataFrame], parameters: int | None, increase: float | None
) -> dict[str, int]:
    if (parameters is None) == (increase is None):
        raise ValueError("a budget is either parameters=… or increase=…, exactly one of them")
    # The Pareto front of (weights, total increase), a layer at a time: exact for additive effects.
    weights, losses = np.zeros(1, int), np.zeros(1)
    choices: list[tuple[np.ndarray, np.ndarray]] = []
    for table in layers.values():
        able = table[table["rank"] > 0].sort_values("rank")
        if not len(able):
            raise ValueError(f"the profile lacks ranks above 0 of layer {table.layer.iloc[0]!r}")
        m, n = table[["rows", "columns"]].iloc[0]
        cost = _matrices(table) * np.array([stored(rank, m, n) for rank in able["rank"]])
        total = np.add.outer(weights, cost).ravel()
        loss = np.add.outer(losses, able.increase.to_numpy()).ravel()
        order = np.lexsort((loss, total))
        front = order[_falls(loss[order])]
        choices.append((front // len(able), able["rank"].to_numpy()[front % len(able)]))
        weights, losses = total[front], loss[front]
    if parameters is not None:
        meets = np.flatnonzero(weights <= parameters)
        if not len(meets):
            raise ValueError(
                f"{parameters} weights are too few; rank 1 everywhere has {weights[0]}"
            )
        at = meets[-1]
    else:
        assert increase is not None
        meets = np.flatnonzero(losses <= increase)
        if not len(meets):
            raise ValueError(
                f"no ranks keep the increase to {increase}; {losses.min():.3g} is least"
            )
        at = meets[0]
    ranks: list[int] = []
    for parent, rank in reversed(choices):
        ranks.append(int(rank[at]))
        at = parent[at]
    return dict(zip(layers, reversed(ranks), strict=True))


def _level(layers: Mapping[str, pd.DataFrame], parameters: int) -> dict[str, int]:
    able = {
        name: table[table["rank"] > 0].sort_values("rank").reset_index()
        for name, table in layers.items()
    }
    # The highest of the layers' least increases: below it some layer has no rank.
    levels = np.unique(np.concatenate([table.increase for table in able.values()]))
    for level in levels[levels >= max(table.increase.min() for table in able.values())]:
        rows = {name: table[table.increase <= level].iloc[0] for name, table in able.items()}
        spent = sum(
            _matrices(able[name]) * stored(row["rank"], row.rows, row["columns"])
            for name, row in rows.items()
        )
        if spent <= parameters:
            return {name: int(row["rank"]) for name, row in rows.items()}
    raise ValueError(f"{parameters} weights are too few; the lowest ranks have {int(spent)}")


def _matrices(table: pd.DataFrame) -> int:
    """How many matrices a layer has: one a group."""
    return int(table["matrices"].iloc[0]) if "matrices" in table else 1


def _falls(values: np.ndarray) -> np.ndarray:
    """Where a value is below all before it."""
    before = np.append(math.inf, np.minimum.accumulate(values)[:-1])
    return np.flatnonzero(values < before)


def _joint(
    joint: pd.DataFrame,
    rule: str,
    tolerance: Tolerance | None,
    parameters: int | None,
    increase: float | None,
) -> dict[str, int]:
    if tolerance is not None:
        raise ValueError(f"rule {rule!r} takes parameters=…, not a tolerance")
    if rule == "optimal":
        if (parameters is None) == (increase is None):
            raise ValueError("a budget is either parameters=… or increase=…, exactly one of them")
        return optimal(joint, parameters, increase)
    if parameters is None or increase is not None:
        raise ValueError(f"rule {rule!r} takes a budget of parameters=…")
    return walk(joint, parameters, rising=rule == "gain")
