"""Rules for ranks, graded against the optimum that `joint_profile` knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor, nn

from svdlib.ranks.front import layers_of
from svdlib.ranks.joint import joint_profile
from svdlib.ranks.predicted import METHODS, predicted_profile
from svdlib.ranks.profile import loss_profile
from svdlib.ranks.reduced import refine_ranks
from svdlib.ranks.rules import ONE_LAYER, TOLERANCES, reveal_ranks

Choices = dict[str, dict[str, int]]


def grade(
    model: nn.Module,
    validation: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    tolerance: float,
    shares: Sequence[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every rule's ranks for one perceptron, and what they lose against the best.

    Args:
        validation: images and labels to choose ranks by.
        test: images and labels to measure what was chosen.
        tolerance: the loss that ranks may cost, for rules that need one.
        shares: budgets, as shares of the model's parameters.

    Returns:
        the table of `regrets`, of the rules that choose their own size (share NaN) and of those
        under each budget; and the `joint_profile` on the test images.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> data = torch.rand(20, 8), torch.arange(20) % 3
    >>> grades, joint = grade(net, data, data, tolerance=0.01, shares=[0.8])
    >>> grades[grades.rule == "optimal"].regret.tolist()
    [0.0, 0.0]
    """
    x, y = validation
    joint = joint_profile(model, x, y, progress=False)  # type: ignore[arg-type]
    joint = joint[(joint[layers_of(joint)] > 0).all(axis=1)]
    tested = joint_profile(model, *test, progress=False)  # type: ignore[arg-type]
    full = sum(parameter.numel() for parameter in model.parameters())
    tables = {"budget": loss_profile(model, x, y, progress=False)}
    tables |= {by: predicted_profile(model, x, y, by) for by in METHODS}
    own = _own(model, x, y, tables["budget"], joint, tolerance)
    parts = [regrets(joint, tested, own).assign(share=math.nan)]
    for share in shares:
        budget = int(share * full)
        parts.append(
            regrets(joint, tested, _under(tables, joint, budget), budget).assign(share=share)
        )
    return pd.concat(parts, ignore_index=True), tested


def _own(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    profile: pd.DataFrame,
    joint: pd.DataFrame,
    tolerance: float,
) -> Choices:
    """What each rule answers that chooses its own number of parameters."""
    needs = [rule for rule, default in TOLERANCES.items() if default is None]
    found = {
        rule: reveal_ranks(profile, rule, tolerance=tolerance if rule in needs else None)
        for rule in ONE_LAYER
    }
    found["budget"] = reveal_ranks(profile, "budget", increase=tolerance)
    found["refined"] = refine_ranks(model, x, y, found["one-se"], tolerance=tolerance)
    # Rounding can leave the full network itself a little above.
    possible = max(tolerance, float(joint.increase.min()))
    found["optimal"] = reveal_ranks(joint, "optimal", increase=possible)
    return found


def _under(tables: Mapping[str, pd.DataFrame], joint: pd.DataFrame, parameters: int) -> Choices:
    """What each rule answers that takes a budget of parameters for the whole model."""
    others = int((joint.parameters - joint.multiply_adds).iloc[0])
    found = {
        name: reveal_ranks(table, "budget", parameters=parameters - others)
        for name, table in tables.items()
    }
    found["level"] = reveal_ranks(tables["budget"], "level", parameters=parameters - others)
    for rule in ("removal", "gain", "optimal"):
        found[rule] = reveal_ranks(joint, rule, parameters=parameters)
    return found


def regrets(
    joint: pd.DataFrame,
    test: pd.DataFrame,
    choices: Mapping[str, Mapping[str, int]],
    budget: int | None = None,
) -> pd.DataFrame:
    """What rules lose against the best ranks of so many parameters, and what these would save.

    The optimum is chosen as the rules choose, on validation images; what is lost is measured on
    test images, so that a regret may be below 0.

    Args:
        joint, test: `joint_profile` at the same ranks, on validation and on test images.
        choices: ranks by rule.
        budget: the parameters that rules and optimum may have; by default, for the optimum, what
            each rule took.

    Returns:
        a row a rule: rule, the layers' ranks, parameters; loss and error (per cent) on test;
        regret and error_regret, these minus the optimum's; and needed, the parameters of the
        smallest combination with no more validation loss than the rule's.
    """
    layers = layers_of(joint)
    here, there = joint.set_index(layers), test.set_index(layers)
    rows = []
    for rule, ranks in choices.items():
        at = tuple(ranks[name] for name in layers)
        spent = int(here.parameters[at])
        optimum = reveal_ranks(joint, "optimal", parameters=spent if budget is None else budget)
        best = tuple(optimum[name] for name in layers)
        smallest = reveal_ranks(joint, "optimal", increase=float(here.increase[at]))
        rows.append(
            {
                "rule": rule,
                **ranks,
                "parameters": spent,
                "loss": there.loss[at],
                "error": 100 - there.accuracy[at],
                "regret": there.loss[at] - there.loss[best],
                "error_regret": there.accuracy[best] - there.accuracy[at],
                "needed": int(here.parameters[tuple(smallest[name] for name in layers)]),
            }
        )
    return pd.DataFrame(rows)


def one_at_a_time(joint: pd.DataFrame) -> pd.Series:
    """The sum of the increases that each layer's rank costs alone, for every combination.

    Were layers independent, it would be the combination's own increase.

    Args:
        joint: `joint_profile` with every layer's full rank among the ranks.

    >>> joint = pd.DataFrame({"a": [1, 1, 2, 2], "b": [1, 2, 1, 2], "loss": [5.0, 2.0, 3.0, 1.0],
    ...                       "increase": [4.0, 1.0, 2.0, 0.0], "se": 0.1, "parameters": 9})
    >>> one_at_a_time(joint).tolist()
    [3.0, 1.0, 2.0, 0.0]
    """
    layers = layers_of(joint)
    whole = joint[layers].eq(joint[layers].max())
    total = pd.Series(0.0, joint.index)
    for name in layers:
        alone = joint[whole.drop(columns=name).all(axis=1)].set_index(name).increase
        total += joint[name].map(alone)
    return total
