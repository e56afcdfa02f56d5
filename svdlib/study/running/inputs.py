"""Rules for the parameters of a notebook, from which each notebook's ``check`` is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from svdlib import checks, data
from svdlib.ranks.joint import ALL

PIXELS, CLASSES = 784, 10
LARGEST = 10**12  # larger whole numbers are a typing mistake, and too large for a seed
Widths = Sequence[int]  # of a network's layers; a layer from n to m neurons has a matrix m × n
Rule = Callable[[str, Any], object]


def refusing(**kinds: str) -> Callable[[Callable[..., None]], Callable[[Mapping[str, Any]], None]]:
    """Turn a function that checks how parameters fit one another into a notebook's check.

    The check takes the notebook's ``globals()``. It first applies its rule to each parameter, and
    then calls the function with the parameters that it names. Its ValueError is one sentence.

    Args:
        kinds: names of parameters by the kind of rule, see `RULES`.

    >>> @refusing(whole="seeds", widths="sizes")
    ... def check(sizes): ...
    >>> check({"seeds": 4, "sizes": [784, 15, 15, 10], "device": "cpu"})
    >>> check({"seeds": "4"})
    Traceback (most recent call last):
    ...
    ValueError: seeds must be a whole number of at least 1, not '4'
    """
    rules = {name: RULES[kind] for kind in kinds for name in kinds[kind].split()} | COMMON

    def made(function: Callable[..., None]) -> Callable[[Mapping[str, Any]], None]:
        named = signature(function).parameters
        needed = {name for name in named if named[name].default is named[name].empty}

        @wraps(function)
        def check(parameters: Mapping[str, Any]) -> None:
            try:
                for name, rule in rules.items():
                    if name in parameters:
                        rule(name, parameters[name])
                found = {name: parameters[name] for name in named if name in parameters}
                if needed <= found.keys():
                    function(**found)
            except ValueError as error:  # without the frames of inner functions
                raise ValueError(str(error)) from None

        return check

    return made


def _integer(name: str, value: object, smallest: int = 1) -> None:
    if checks.positive_int(value, name, smallest) > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:,}, not {value:,}")


def _entries(rule: Rule) -> Rule:
    """The rule for a list whose entries satisfy this rule."""

    def check(name: str, value: object) -> None:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"{name} must be a list with one entry at least, not {value!r}")
        if len(set(map(str, value))) < len(value):
            raise ValueError(f"{name} has an entry twice: {value!r}; once is enough")
        for entry in value:
            rule(f"each of {name}", entry)

    return check


def _or_none(rule: Rule) -> Rule:
    """The rule for a list that satisfies this rule or is empty."""
    return lambda name, value: None if value == [] else rule(name, value)


def _needed(holds: Callable[[Any], bool], needed: str) -> Rule:
    """The rule that a value must be as ``needed`` says, which ``holds`` decides."""

    def check(name: str, value: object) -> None:
        if not holds(value):
            raise ValueError(f"{name} must be {needed}, not {value!r}")

    return check


def _widths(name: str, value: object) -> None:
    given = list(value) if isinstance(value, list | tuple) else []
    for width in given:
        checks.positive_int(width, f"each of {name}")
    if len(given) < 3 or (given[0], given[-1]) != (PIXELS, CLASSES):
        raise ValueError(
            f"{name} must be the widths [{PIXELS}, …, {CLASSES}] of a network for 28×28 pixels and "
            f"ten classes, with a hidden layer at least, not {value!r}"
        )


def _shape(name: str, value: object) -> None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} must be [rows, columns], not {value!r}")
    for side in value:
        checks.positive_int(side, f"each side in {name}", 2)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_share = _needed(lambda value: _is_positive(value) and value < 1, "a number between 0 and 1")
RULES: dict[str, Rule] = {
    "whole": _integer,
    "from_zero": partial(_integer, smallest=0),
    "from_two": partial(_integer, smallest=2),
    "wholes": _entries(_integer),
    "wholes_or_none": _or_none(_entries(_integer)),
    "wholes_from_two": _entries(partial(_integer, smallest=2)),
    "widths": _widths,
    "widths_or_none": _or_none(_widths),
    "networks": _entries(_widths),
    "names": _entries(_needed(lambda value: isinstance(value, str), "a name")),
    "shares": _entries(_share),
    "shares_or_none": _or_none(_entries(_share)),
    "shapes": _entries(_shape),
    "positive": _needed(_is_positive, "a positive number"),
    "switch": lambda name, value: checks.truth(value, name),
    "every": lambda name, value: checks.one_of(value, ("epoch", "step", "published"), name),
}
# The parameters that many notebooks have.
COMMON: dict[str, Rule] = {
    "dataset": lambda name, value: checks.one_of(value, data.NAMES, name),
    "train_images": partial(_integer, smallest=100),
    "device": lambda name, value: checks.device(str(value)),
    "figures": _needed(
        lambda value: isinstance(value, str | Path) and (not str(value) or Path(value).is_dir()),
        "a folder that is there, or '' to save nothing",
    ),
    "progress": RULES["switch"],
}


def at_most(name: str, value: int, largest: int, why: str, blamed: str) -> None:
    """Refuse a larger value; where even 1 is too large, ``blamed`` is at fault."""
    if largest < 1:
        raise ValueError(f"{blamed} is too small: {name} must be at most {largest}, {why}")
    if value > largest:
        raise ValueError(f"{name} must be at most {largest}, {why}, not {value}")


def below_full(rank: int, sizes: Widths) -> None:
    """Refuse a rank that is not below the full rank of the first layer."""
    why = "below the full rank of the first layer"
    at_most("rank", rank, min(sizes[:2]) - 1, why, f"sizes = {list(sizes)}")


def few_combinations(sizes: Widths) -> None:
    """Refuse networks that are too large to be measured at every combination of ranks."""
    number = math.prod(min(layer) + 1 for layer in pairwise(sizes))
    if number > ALL:
        raise ValueError(
            f"sizes must have at most {ALL:,} combinations of its layers' ranks, all of which are "
            f"measured here, not {number:,} as {list(sizes)} has"
        )


@refusing(
    whole="seeds epochs rank deviation_seeds sweep_seeds",
    from_zero="first_seed oversample power_iters",
    wholes="ranks",
    widths="sizes",
    every="every",
)
def check(sizes: Widths, rank: int | None = None, ranks: Sequence[int] | None = None) -> None:
    """Refuse what the notebooks that train the paper's network, 01 to 04, could not use."""
    if rank is not None:
        below_full(rank, sizes)
    if ranks is not None:
        full = max(map(min, pairwise(sizes)))
        at_most("each of ranks", max(ranks), full, "the full rank of the widest layer", "sizes")
