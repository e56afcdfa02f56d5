"""Rules for ranks, graded against the optimum that `joint_profile` knows."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from torch import Tensor, nn

from svdlib.ranks.joint import layers_of
from svdlib.ranks.predicted import METHODS, predicted_profile
from svdlib.ranks.profile import loss_profile
from svdlib.ranks.reduced import refine_ranks
from svdlib.ranks.rules import ONE_LAYER, reveal_ranks

Choices = dict[str, dict[str, int]]


def answers(model: nn.Module, x: Tensor, y: Tensor, tolerance: float) -> Choices:
    """What each rule answers that chooses its own number of parameters.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> answers(net, torch.rand(20, 8), torch.arange(20) % 3, tolerance=0.01)["stable-rank"]
    {'0': 3, '2': 3}
    """
    profile = loss_profile(model, x, y, progress=False)
    needs = {"printed", "marginal"}
    found = {
        rule: reveal_ranks(profile, rule, tolerance=tolerance if rule in needs else None)
        for rule in ONE_LAYER
    }
    found["budget"] = reveal_ranks(profile, "budget", increase=tolerance)
    found["refined"] = refine_ranks(model, x, y, found["one-se"], tolerance=tolerance)
    return found


def under(model: nn.Module, x: Tensor, y: Tensor, joint: pd.DataFrame, parameters: int) -> Choices:
    """What each rule answers that takes a budget of parameters for the whole model."""
    others = joint.parameters.min() - joint.multiply_adds.min()
    weights = parameters - int(others)
    tables = {"single increases": loss_profile(model, x, y, progress=False)}
    tables |= {by: predicted_profile(model, x, y, by) for by in METHODS}
    found = {
        name: reveal_ranks(table, "budget", parameters=weights) for name, table in tables.items()
    }
    for rule in ("removal", "gain"):
        found[rule] = reveal_ranks(
            joint[(joint[layers_of(joint)] > 0).all(axis=1)], rule, parameters=parameters
        )
    return found


def regrets(
    joint: pd.DataFrame, test: pd.DataFrame, choices: Mapping[str, Mapping[str, int]]
) -> pd.DataFrame:
    """What rules lose against the best ranks of so many parameters, and what these would save.

    The optimum is chosen as the rules choose, on validation images; what is lost is measured on
    test images.

    Args:
        joint, test: `joint_profile` at the same ranks, on validation and on test images.
        choices: ranks by rule.

    Returns:
        a row a rule: rule, the layers' ranks, parameters; loss and error (per cent) on test;
        regret and error_regret, these minus the optimum's with no more parameters; and needed,
        the parameters of the smallest combination with no more validation loss.
    """
    layers = layers_of(joint)
    here, there = joint.set_index(layers), test.set_index(layers)
    rows = []
    for rule, ranks in choices.items():
        at = tuple(ranks[name] for name in layers)
        spent = int(here.parameters[at])
        optimum = reveal_ranks(joint, "optimal", parameters=spent)
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
