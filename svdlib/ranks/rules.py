"""From a loss profile to ranks: pure functions of one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from svdlib import checks
from svdlib.network.kinds import stored
from svdlib.ranks.allocate import Choices, allocate
from svdlib.ranks.joint import optimal, walk

Tolerance = float | Mapping[str, float]


def reveal_ranks(
    profile: pd.DataFrame,
    rule: str = "one-se",
    *,
    tolerance: Tolerance | None = None,
    parameters: int | None = None,
    increase: float | None = None,
) -> dict[str, int]:
    """The rank of each layer, at least 1, by a rule, from a table of losses.

    From what `joint_profile` measured, all layers at once:

    - ``"optimal"``: the smallest loss of a model with at most so many ``parameters``, or the
      fewest parameters with at most so much ``increase`` of the loss.
    - ``"removal"`` with ``parameters``: from the highest ranks down, always in the layer where the
      loss then rises least per parameter saved.
    - ``"gain"`` with ``parameters``: from the lowest ranks up, always in the layer where the loss
      then falls most per parameter spent; the best ranks on that way.

    From `loss_profile` or `predicted_profile`, one layer at a time, by the loss ℓ_j at every rank:

    - ``"printed"`` with ``tolerance`` ε: Algorithm 3 of the paper to the letter, the last j with
      ℓ_j − ℓ_{j+1} ≥ ε, one short of where the gain arrives; full rank if there is none.
    - ``"marginal"`` with ``tolerance`` ε: its sensible reading, the smallest j beyond which no
      further rank gains ε: ℓ_j − min_{i>j} ℓ_i < ε.
    - ``"one-se"``: the smallest rank whose loss increase, paired by image, is within one
      standard error of the full network (Breiman et al. 1984, section 3.4.3).

    From its singular values σ alone:

    - ``"energy"``: the smallest j with Σ_{i>j} σ_i² ≤ ε Σ σ_i², with ``tolerance`` ε = 0.01 by
      default. With √ε for the tail it is the truncation of dynamical low-rank training
      (Schotthöfer et al. 2022, Algorithm 1).
    - ``"effective-rank"``: exp(−Σ p_i ln p_i) with p_i = σ_i / Σ σ, rounded up (Roy and
      Vetterli 2007).
    - ``"stable-rank"``: ‖W‖_F² / σ_1² rounded up (Rudelson and Vershynin 2007).
    - ``"gavish-donoho"``: the σ above ω(β) · median(σ), β = m/n, the optimal hard threshold for
      unknown noise (Gavish and Donoho 2014, section IV and its cubic fit of ω).
    - ``"evbmf"``: the global analytic solution of empirical variational Bayes matrix
      factorization, its noise variance estimated (Nakajima et al. 2013, Theorems 2 and 3).

    From the same, all layers at once, their increases taken to add up. Rank j stores
    min(j (m+n), m n) weights. Layers that share a weight count once and get one rank.

    - ``"budget"``: the smallest total increase with at most so many weights, ``parameters``, or
      the fewest weights with at most so much total ``increase``.
    - ``"level"`` with ``parameters``: in every layer the smallest rank whose increase is at most
      t, for the smallest t that the budget allows (as AIMET's greedy selection of compression
      ratios levels the score of all layers).

    Args:
        profile: what `loss_profile`, `predicted_profile` or `joint_profile` returns.
        rule: one of the names above.
        tolerance: ε, one or {layer: ε}.
        parameters, increase: the budget.

    Raises:
        ValueError: an unknown rule, a profile that lacks columns, layers or ranks, has NaN values
            or several networks; an impossible or unused tolerance; a budget that can't be met.

    >>> profile = pd.DataFrame({
    ...     "layer": "a", "rank": [0, 1, 2, 3], "loss": [9.0, 4.0, 1.1, 1.0],
    ...     "increase": [8.0, 3.0, 0.1, 0.0], "se": [0.2, 0.2, 0.2, 0.0],
    ...     "rows": 3, "columns": 5, "sigma": [float("nan"), 3.0, 2.0, 0.1]})
    >>> reveal_ranks(profile), reveal_ranks(profile, "printed", tolerance=0.5)
    ({'a': 2}, {'a': 1})
    """
    checks.one_of(rule, tuple(RULES), "rule")
    chosen = RULES[rule]
    if chosen.table != "joint":
        _check_profile(profile)
    given = {"tolerance": tolerance, "parameters": parameters, "increase": increase}
    given = {name: value for name, value in given.items() if value is not None}
    takes, optional = chosen.takes, not chosen.takes or chosen.tolerance is not None
    if set(given) - set(takes) or not (len(given) == 1 or (optional and not given)):
        needed = " or ".join(f"{name}=…" for name in takes) or "neither a tolerance nor a budget"
        exactly = ", exactly one of them" if len(takes) > 1 else ""
        got = ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing"
        raise ValueError(f"rule {rule!r} takes {needed}{exactly}, got {got}")
    if chosen.table == "joint":
        return chosen.choose(profile, **given)
    profile = profile.assign(layer=profile.layer.astype(str))
    # Layers that share a weight count once, as the first of them.
    first = profile.layer.groupby(profile.get("shared", profile.layer)).transform("first")
    twins = dict(zip(profile.layer, first, strict=True))
    tables = profile[profile.layer == first].sort_values("rank").groupby("layer", sort=False)
    layers = {name: tables.get_group(name) for name in dict.fromkeys(twins.values())}
    if chosen.table == "layers":
        ranks = chosen.choose(layers, **given)
    else:
        ranks = {name: _rank_of(name, table, rule, tolerance) for name, table in layers.items()}
    return {name: ranks[twin] for name, twin in twins.items()}


def _rank_of(name: str, table: pd.DataFrame, rule: str, tolerance: Tolerance | None) -> int:
    kind, arguments = RULES[rule], []
    if "tolerance" in kind.takes:
        if isinstance(tolerance, Mapping) and name not in tolerance:
            raise ValueError(f"tolerance lacks layer {name!r}; it has {', '.join(tolerance)}")
        epsilon = tolerance[name] if isinstance(tolerance, Mapping) else tolerance
        epsilon = kind.tolerance if epsilon is None else epsilon
        if epsilon is None or not epsilon >= 0 or epsilon >= kind.below < math.inf:
            limits = "at least 0" + (f" and below {kind.below:g}" if kind.below < math.inf else "")
            raise ValueError(f"the tolerance of rule {rule!r} must be {limits}, not {epsilon}")
        arguments = [float(epsilon)]
    full = int(table[["rows", "columns"]].iloc[0].min())
    needed = {full} if kind.ranks == "full" else set(range(1, full + 1))
    if missing := sorted(needed - set(table["rank"]))[:5]:
        ranks = f"a profile of {kind.ranks} ranks of layer {name!r}"
        raise ValueError(f"rule {rule!r} needs {ranks}; missing: {missing}")
    return min(max(int(kind.choose(table, *arguments)), 1), full)


def _printed(table: pd.DataFrame, epsilon: float) -> int:
    loss = table.loss.to_numpy()
    gains = np.flatnonzero(loss[:-1] - loss[1:] >= epsilon)
    return table["rank"].iloc[gains[-1] if len(gains) else -1]


def _marginal(table: pd.DataFrame, epsilon: float) -> int:
    loss = table.loss.to_numpy()
    best_beyond = np.append(np.minimum.accumulate(loss[::-1])[::-1][1:], math.inf)
    return table["rank"].to_numpy()[np.argmax(loss - best_beyond < epsilon)]


def _one_se(table: pd.DataFrame) -> int:
    within = table[(table.increase <= table.se) & (table["rank"] > 0)]["rank"]
    return within.min() if len(within) else table["rank"].max()


def _sigma(table: pd.DataFrame) -> np.ndarray:
    return table.sigma[table["rank"] > 0].to_numpy()


def _energy(table: pd.DataFrame, epsilon: float) -> int:
    energy = np.cumsum(_sigma(table) ** 2)
    return 1 + int(np.argmax(energy >= (1 - epsilon) * energy[-1]))


def _effective_rank(table: pd.DataFrame) -> int:
    sigma = _sigma(table)
    part = sigma[sigma > 0] / sigma.sum()
    return math.ceil(math.exp(-(part * np.log(part)).sum()) - 1e-9) if len(part) else 1


def _stable_rank(table: pd.DataFrame) -> int:
    square = _sigma(table) ** 2
    return math.ceil(square.sum() / square[0] - 1e-9) if square[0] else 1


def _gavish_donoho(table: pd.DataFrame) -> int:
    sides = table[["rows", "columns"]].iloc[0]
    beta = sides.min() / sides.max()
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    sigma = _sigma(table)
    return int((sigma > omega * np.median(sigma)).sum())


def _evbmf(table: pd.DataFrame) -> int:
    sigma = _sigma(table)
    small, large = sorted(map(int, table[["rows", "columns"]].iloc[0]))
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


def _budget(layers: Mapping[str, pd.DataFrame], **budget: float) -> dict[str, int]:
    ((name, limit),) = budget.items()
    return allocate(_options(layers), limit, of="cost" if name == "parameters" else "error")


def _level(layers: Mapping[str, pd.DataFrame], parameters: int) -> dict[str, int]:
    options = _options(layers)
    levels = np.unique(np.concatenate([layer.errors for layer in options.values()]))
    # Below the highest of the layers' smallest increases some layer has no rank.
    reachable = max(layer.errors.min() for layer in options.values())
    for level in levels[levels >= reachable]:
        at = {name: int(np.argmax(layer.errors <= level)) for name, layer in options.items()}
        cost = sum(int(layer.costs[at[name]]) for name, layer in options.items())
        if cost <= parameters:
            return {name: int(layer.ranks[at[name]]) for name, layer in options.items()}
    raise ValueError(f"{parameters} weights are too few; the lowest ranks have {cost}")


def _options(layers: Mapping[str, pd.DataFrame]) -> dict[str, Choices]:
    options = {}
    for name, profile in layers.items():
        table = profile[profile["rank"] > 0]
        if table.empty:
            raise ValueError(f"the profile lacks ranks above 0 of layer {name!r}")
        m, n = table[["rows", "columns"]].iloc[0]
        matrices = int(table.matrices.iloc[0]) if "matrices" in table else 1
        costs = matrices * np.array([stored(rank, m, n) for rank in table["rank"]])
        options[name] = Choices(table["rank"].to_numpy(), costs, table.increase.to_numpy())
    return options


class Rule(NamedTuple):
    """A rule for ranks, as a function of its table and of one argument, and what it needs."""

    choose: Callable[..., Any]
    takes: tuple[str, ...] = ()  # the arguments to choose from
    tolerance: float | None = None  # by default
    below: float = math.inf  # what the tolerance must be
    table: str = "layer"  # one profile; or "layers", {layer: profile}; or "joint"
    ranks: str = "all"  # in a layer's profile; or "full"


RULES = {
    "optimal": Rule(optimal, ("parameters", "increase"), table="joint"),
    "removal": Rule(partial(walk, rising=False), ("parameters",), table="joint"),
    "gain": Rule(partial(walk, rising=True), ("parameters",), table="joint"),
    "printed": Rule(_printed, ("tolerance",)),
    "marginal": Rule(_marginal, ("tolerance",)),
    "one-se": Rule(_one_se, ranks="full"),
    "energy": Rule(_energy, ("tolerance",), tolerance=0.01, below=1),
    "effective-rank": Rule(_effective_rank),
    "stable-rank": Rule(_stable_rank),
    "gavish-donoho": Rule(_gavish_donoho),
    "evbmf": Rule(_evbmf),
    "budget": Rule(_budget, ("parameters", "increase"), table="layers"),
    "level": Rule(_level, ("parameters",), table="layers"),
}


def _check_profile(profile: pd.DataFrame) -> None:
    columns = {"layer", "rank", "loss", "increase", "se", "rows", "columns", "sigma"}
    if missing := sorted(columns - set(profile.columns)):
        raise ValueError(f"the profile lacks {', '.join(missing)}; see loss_profile")
    if profile.empty:
        raise ValueError("the profile has no layer")
    if not np.isfinite(profile[["loss", "increase", "se"]].to_numpy(float)).all():
        raise ValueError("the profile has NaN or infinite losses")
    if not np.isfinite(_sigma(profile).astype(float)).all():
        raise ValueError("the profile has NaN or infinite singular values, sigma")
    for layer, rank in profile.loc[profile.duplicated(["layer", "rank"]), ["layer", "rank"]].values:
        twice = f"rank {rank} of layer {layer!r} more than once"
        raise ValueError(f"the profile has {twice}; give one network's at a time")
