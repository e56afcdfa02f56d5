"""Rules for ranks, graded against the optimum in `joint_profile`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor, nn

from svdlib.ranks.front import layers_of
from svdlib.ranks.joint import joint_profile
from svdlib.ranks.predicted import METHODS, predicted_profile
from svdlib.ranks.profile import loss_profile
from svdlib.ranks.reduced import refine_ranks
from svdlib.ranks.rules import RULES, reveal_ranks

Choices = Mapping[str, Mapping[str, int]]  # ranks by layer, by rule
Labeled = tuple[Tensor, Tensor]  # images and labels


def grade(
    model: nn.Module,
    validation: Labeled,
    test: Labeled,
    *,
    tolerance: float,
    shares: Sequence[float],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every rule's ranks for one perceptron, and what they lose against the best ranks.

    Args:
        validation, test: images and labels to choose ranks by, and to measure them by.
        tolerance: the loss that ranks may cost, for rules that need one.
        shares: budgets, as shares of the model's parameters.

    Returns:
        `regrets` of the rules that choose their own size (share NaN) and of those under each
        budget; and the `joint_profile` on the test images.
    """
    x, y = validation
    joint = joint_profile(model, x, y, progress=False)  # type: ignore[arg-type]
    joint = joint[(joint[layers_of(joint)] > 0).all(axis=1)]
    tested = joint_profile(model, *test, progress=False)  # type: ignore[arg-type]
    profile = loss_profile(model, x, y, progress=False)
    choices = {}
    for name, kind in RULES.items():
        if kind.table == "layer":
            needed = "tolerance" in kind.takes and kind.tolerance is None
            choices[name] = reveal_ranks(profile, name, tolerance=tolerance if needed else None)
    choices["budget"] = reveal_ranks(profile, "budget", increase=tolerance)
    choices["refined"] = refine_ranks(model, x, y, choices["one-se"], tolerance=tolerance)
    # Rounding can leave the full network itself a little above.
    possible = max(tolerance, float(joint.increase.min()))
    choices["optimal"] = reveal_ranks(joint, "optimal", increase=possible)
    parts = [regrets(joint, tested, choices).assign(share=math.nan)]
    tables = {"budget": profile} | {by: predicted_profile(model, x, y, by) for by in METHODS}
    total = sum(parameter.numel() for parameter in model.parameters())
    biases = int((joint.parameters - joint.multiply_adds).iloc[0])
    for share in shares:
        budget = int(share * total)
        limit = {"parameters": budget - biases}  # these tables count weights alone
        choices = {by: reveal_ranks(table, "budget", **limit) for by, table in tables.items()}
        choices["level"] = reveal_ranks(profile, "level", **limit)
        for rule in ("removal", "gain", "optimal"):
            choices[rule] = reveal_ranks(joint, rule, parameters=budget)
        parts.append(regrets(joint, tested, choices, budget).assign(share=share))
    return pd.concat(parts, ignore_index=True), tested


def regrets(
    joint: pd.DataFrame, test: pd.DataFrame, choices: Choices, budget: int | None = None
) -> pd.DataFrame:
    """What rules' ranks lose against the best of as many parameters, and how few would be enough.

    The best are chosen on validation images and measured on test images: regrets may be negative.

    Args:
        joint, test: `joint_profile` at the same ranks, on validation and on test images.
        budget: the parameters that the optimum may have; by default as many as each rule's.

    Returns:
        A row per rule: rule, the layers' ranks, parameters; loss and error (percent) on test;
        regret and error_regret, these minus the optimum's; needed, the parameters of the smallest
        combination with no more validation loss.
    """
    layers = layers_of(joint)
    validated, tested = joint.set_index(layers), test.set_index(layers)

    def optimum(**limit: Any) -> tuple[int, ...]:
        best = reveal_ranks(joint, "optimal", **limit)
        return tuple(best[name] for name in layers)

    rows = []
    for rule, ranks in choices.items():
        at = tuple(ranks[name] for name in layers)
        spent = int(validated.parameters[at])
        best = optimum(parameters=spent if budget is None else budget)
        smallest = optimum(increase=float(validated.increase[at]))
        loss, accuracy = tested.loss[at], tested.accuracy[at]
        row = {"rule": rule, **ranks, "parameters": spent, "loss": loss, "error": 100 - accuracy}
        row |= {
            "regret": loss - tested.loss[best],
            "error_regret": tested.accuracy[best] - accuracy,
        }
        rows.append(row | {"needed": int(validated.parameters[smallest])})
    return pd.DataFrame(rows)


def summed_increases(joint: pd.DataFrame) -> pd.Series:
    """The sum of the increases that each layer's rank costs alone, for every combination.

    If layers were independent, it would equal the combination's own increase. The `joint_profile`
    must have every layer's full rank.

    >>> joint = pd.DataFrame({"a": [1, 1, 2, 2], "b": [1, 2, 1, 2], "loss": [5.0, 2.0, 3.0, 1.0],
    ...                       "increase": [4.0, 1.0, 2.0, 0.0], "se": 0.1, "parameters": 9})
    >>> summed_increases(joint).tolist()
    [3.0, 1.0, 2.0, 0.0]
    """
    ranks = joint[layers_of(joint)]
    full, total = ranks.eq(ranks.max()), pd.Series(0.0, joint.index)
    for name in ranks:
        alone = joint[full.drop(columns=name).all(axis=1)].set_index(name).increase
        total += ranks[name].map(alone)
    return total
