"""Rules for ranks, graded against the optimum in `joint_profile`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from torch import Tensor, nn

from svdlib.ranks.joint import joint_profile, layers_of
from svdlib.ranks.predicted import METHODS, predicted_profile
from svdlib.ranks.profile import loss_profile
from svdlib.ranks.reduced import refine_ranks
from svdlib.ranks.rules import RULES, reveal_ranks

Choices = Mapping[str, Mapping[str, int]]  # ranks by layer, by rule
Labeled = tuple[Tensor, Tensor]  # images and labels


def grade(
    model: nn.Module, validation: Labeled, test: Labeled, tolerance: float, shares: Sequence[float]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Every rule's ranks for a perceptron and their `regrets`, and the test's `joint_profile`.

    Rules that choose their own size may cost the ``tolerance`` of loss and have the share NaN; the
    others take ``shares`` of the model's parameters. The best ranks are chosen on the validation
    images, so that regrets, measured on the test images, may be negative.
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
    choices["optimal"] = best_ranks(joint, tolerance)
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
            table = storable(joint) if rule == "optimal" else joint
            choices[rule] = reveal_ranks(table, rule, parameters=budget)
        parts.append(regrets(joint, tested, choices, budget).assign(share=share))
    return pd.concat(parts, ignore_index=True), tested


def regrets(
    joint: pd.DataFrame, test: pd.DataFrame, choices: Choices, budget: int | None = None
) -> pd.DataFrame:
    """Test loss and error of each rule's ranks, and what they lose against the best ranks.

    What is graded is what would be stored: a layer that factors don't make smaller keeps its full
    rank. The best have the ``budget``, or as many parameters as the rule's ranks; ``needed`` are
    those of the smallest combination with no more validation loss.
    """
    layers = layers_of(joint)
    candidates, full = storable(joint), joint[layers].max()
    validated, tested = joint.set_index(layers), test.set_index(layers)
    rows = []
    for rule, ranks in choices.items():
        smaller = {name: ranks[name] in set(candidates[name]) for name in layers}
        ranks = {name: int(ranks[name] if smaller[name] else full[name]) for name in layers}
        at = tuple(ranks[name] for name in layers)
        spent = int(validated.parameters[at])
        caps = {"parameters": budget or spent}, {"increase": float(validated.increase[at])}
        found = [reveal_ranks(candidates, "optimal", **cap) for cap in caps]  # type: ignore[arg-type]
        best, smallest = (tuple(chosen[name] for name in layers) for chosen in found)
        loss, accuracy = tested.loss[at], tested.accuracy[at]
        row = {"rule": rule, **ranks, "parameters": spent, "loss": loss, "error": 100 - accuracy}
        row["regret"] = loss - tested.loss[best]
        row["error_regret"] = tested.accuracy[best] - accuracy
        rows.append(row | {"needed": int(validated.parameters[smallest])})
    return pd.DataFrame(rows)


def best_ranks(joint: pd.DataFrame, tolerance: float) -> dict[str, int]:
    """The ranks of the fewest parameters within the tolerance, of all that would be stored."""
    candidates = storable(joint)
    # Rounding can leave the full network itself a little above.
    possible = max(tolerance, float(candidates.increase.min()))
    return reveal_ranks(candidates, "optimal", increase=possible)


def storable(joint: pd.DataFrame) -> pd.DataFrame:
    """The combinations in which every layer is smaller as factors, or at its full rank."""
    layers = layers_of(joint)
    full, kept = joint[layers].max(), pd.Series(True, joint.index)
    for name in layers:
        others = [other for other in layers if other != name]
        alone = joint[joint[others].eq(full[others]).all(axis=1)].set_index(name).parameters
        smaller = alone.index[alone < alone[full[name]]]
        kept &= joint[name].isin(smaller) | (joint[name] == full[name])
    return joint[kept]


def summed_increases(joint: pd.DataFrame) -> pd.Series:
    """The sum of what each layer's rank costs alone: exact if layers were independent."""
    ranks = joint[layers_of(joint)]
    full, total = ranks.eq(ranks.max()), pd.Series(0.0, joint.index)
    for name in ranks:
        alone = joint[full.drop(columns=name).all(axis=1)].set_index(name).increase
        total += ranks[name].map(alone)
    return total
