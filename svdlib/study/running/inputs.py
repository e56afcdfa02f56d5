"""What the parameters of a notebook may be, by their names: said in the cell that reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from svdlib import checks, data
from svdlib.linalg.svd import OVERSAMPLE
from svdlib.network.kinds import stored
from svdlib.ranks.joint import ALL, MOST
from svdlib.study.evidence import theory

PIXELS, CLASSES = 784, 10

# Larger whole numbers are a slip of the keyboard, and too large for a seed.
LARGEST = 10**12

# The least that may be left of the encoder of 10_your_network.
LEAST = 0.02

# Whole numbers from 0 on; all others begin at 1, or where less than two say nothing.
FROM_ZERO = ("first_seed", "oversample", "power_iters")
FROM_TWO = ("draws", "oversamples")
WHOLE = (
    *("seeds", "paper_seeds", "deviation_seeds", "sweep_seeds", "graded", "projected"),
    *("epochs", "paper_epochs", "paper_more", "finetune", "wide_epochs"),
    *("rank", "start_rank", "narrow_rank", "validation", "wide_images", "bench_images"),
    *("draws", "repeats", "texts", "pairs"),
)
LISTS = ("ranks", "paper_ranks", "wide_ranks", "race_ranks", "counts", "budgets", "oversamples")
WIDTHS = ("sizes", "paper_sizes", "narrow", "widths")
SHARES = ("shares", "tails")
SHAPES = ("shapes", "race_shapes")
SWITCHES = ("progress", "everything")


def check(namespace: dict[str, object], every_rank: bool = False) -> None:
    """Refuse parameters that no notebook could use, with one sentence, before anything is done.

    Which names are parameters is noted at the first call, as ``_parameters``: when all cells are
    run again, the later ones have used names that are parameters of other notebooks.

    Args:
        namespace: a notebook's ``globals()``; names that are no parameters are left alone.
        every_rank: whether the notebook measures its networks at every combination of ranks.

    Raises:
        ValueError: what was wrong, what was given, what would do.

    >>> check({"seeds": 4, "rank": 10, "sizes": [784, 15, 15, 10], "device": "cpu"})
    >>> check({"seeds": "4"})
    Traceback (most recent call last):
    ...
    ValueError: seeds must be a whole number of at least 1, not '4'
    """
    __tracebackhide__ = True  # Jupyter then shows the cell and the sentence
    try:
        own = namespace.setdefault("_parameters", [name for name in RULES if name in namespace])
        given = {name: namespace[name] for name in own}  # type: ignore[attr-defined]
        for name, value in given.items():
            RULES[name](name, value)
        for names, fit in FITS.items():
            if given.keys() >= set(names):
                fit(*(given[name] for name in names))
        if every_rank:
            _combinations(namespace["sizes"])  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(str(error)) from None


def _least(name: str) -> int:
    return 0 if name in FROM_ZERO else 2 if name in FROM_TWO else 1


def _whole(name: str, value: object) -> None:
    number = checks.positive_int(value, name, _least(name))
    if number > LARGEST:
        raise ValueError(f"{name} must be at most {LARGEST:,}, not {number:,}")


def _images(name: str, value: object) -> None:
    checks.positive_int(value, name, least=100)


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name} must be a list with one entry at least, not {value!r}")
    if len(set(map(str, value))) < len(value):
        raise ValueError(f"{name} has an entry twice: {value!r}; once is enough")
    return list(value)


def _whole_list(name: str, value: object) -> None:
    for entry in _list(name, value):
        checks.positive_int(entry, f"each of {name}", _least(name))


def _widths(name: str, value: object) -> None:
    given = list(value) if isinstance(value, list | tuple) else []
    for width in given:
        checks.positive_int(width, f"each of {name}")
    if len(given) < 3 or (given[0], given[-1]) != (PIXELS, CLASSES):
        raise ValueError(
            f"{name} must be the widths [{PIXELS}, …, {CLASSES}] of a network for 28×28 pixels and "
            f"ten classes, with a hidden layer at least, not {value!r}"
        )


def _wide(name: str, value: object) -> None:
    if value != []:
        _widths(name, value)


def _shares(name: str, value: object) -> None:
    for share in _list(name, value):
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"each of {name} must be a number between 0 and 1, not {share!r}")


def _shapes(name: str, value: object) -> None:
    for shape in _list(name, value):
        if not isinstance(shape, list | tuple) or len(shape) != 2:
            raise ValueError(f"each of {name} must be [rows, columns], not {shape!r}")
        for side in shape:
            checks.positive_int(side, f"each side in {name}", least=2)


def _networks(name: str, value: object) -> None:
    for widths in _list(name, value):
        _widths(f"each of {name}", widths)


def _switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")  # noqa: TRY004


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} must be a positive number, not {value!r}")


def _folder(name: str, value: object) -> None:
    if not isinstance(value, str | Path) or (str(value) and not Path(value).is_dir()):
        raise ValueError(
            f"{name} must be a folder that is there, or '' to save nothing, not {value!r}"
        )


RULES: dict[str, Callable[[str, object], object]] = {
    "dataset": lambda name, value: checks.one_of(value, data.NAMES, name),
    "device": lambda name, value: checks.device(value),  # type: ignore[arg-type]
    "every": lambda name, value: checks.one_of(value, ("epoch", "step", "published"), name),
    "figures": _folder,
    "train_images": _images,
    "tolerance": _positive,
    "bench": _networks,
    **dict.fromkeys((*WHOLE, *FROM_ZERO), _whole),
    **dict.fromkeys(LISTS, _whole_list),
    **dict.fromkeys(WIDTHS, _widths),
    "wide": _wide,
    **dict.fromkeys(SHARES, _shares),
    **dict.fromkeys(SHAPES, _shapes),
    **dict.fromkeys(SWITCHES, _switch),
}


# Below, what must fit one another. A layer from n to m neurons has a matrix m × n.
Widths = Sequence[int]


def _at_most(name: str, value: int, most: int, why: str, blamed: str) -> None:
    """Refuse a larger value; where 1 is too large already, what it is held against is to blame."""
    if most < 1:
        raise ValueError(f"{blamed} is too small: {name} must be at most {most}, {why}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, {why}, not {value}")


def _below(rank: int, sizes: Widths) -> None:
    most, why = min(sizes[:2]) - 1, "below the full rank of the first layer"
    _at_most("rank", rank, most, why, f"sizes = {list(sizes)}")


def _up_to_full(ranks: Sequence[int], sizes: Widths) -> None:
    most = max(map(min, pairwise(sizes)))
    _at_most("each of ranks", max(ranks), most, "the full rank of the widest layer", "sizes")


def _paying(name: str, ranks: Sequence[int], widths: Widths, of: str) -> None:
    """Refuse ranks at which two factors store no less than each of the layers' matrices."""
    n, m = min(pairwise(widths), key=_most)
    why = f"where two factors of the {m} × {n} matrix store less than it does"
    _at_most(name, max(ranks), _most((n, m)), why, f"{of} = {list(widths)}")


def _most(layer: tuple[int, int]) -> int:
    """The highest rank at which two factors of the layer's matrix store less than it does."""
    n, m = layer
    return (m * n - 1) // (m + n)


def _budgets(budgets: Sequence[int], wide: Widths) -> None:
    _widths("wide", wide)
    layers = list(pairwise(wide))
    full = sum(n * m + m for n, m in layers)
    least = full - sum(n * m - (m + n) for n, m in layers[:-1])
    for budget in budgets:
        if not least <= budget < full:
            raise ValueError(
                f"each of budgets must be at least {least:,}, what {list(wide)} has at rank 1, and "
                f"below its own {full:,}, not {budget:,}"
            )


def _affordable(shares: Sequence[float], sizes: Widths) -> None:
    layers = list(pairwise(sizes))
    full = sum(n * m + m for n, m in layers)
    least = sum(stored(1, m, n) + m for n, m in layers)
    for share in shares:
        if int(share * full) < least:
            raise ValueError(
                f"each of shares must be at least {math.ceil(1000 * least / full) / 1000}, what "
                f"{list(sizes)} keeps of its parameters at rank 1, not {share}"
            )


def _combinations(sizes: Widths) -> None:
    number = math.prod(min(layer) + 1 for layer in pairwise(sizes))
    if number > ALL:
        raise ValueError(
            f"sizes must have at most {ALL:,} combinations of its layers' ranks, all of which are "
            f"measured here, not {number:,} as {list(sizes)} has"
        )


def _grid(wide_ranks: Sequence[int], wide: Widths) -> None:
    layers = pairwise(wide)
    number = math.prod(len({min(rank, *layer) for rank in wide_ranks}) for layer in layers)
    if number > MOST:
        raise ValueError(
            f"wide_ranks must have at most {MOST:,} combinations over the layers of {list(wide)}, "
            f"not {number:,}"
        )


def _map(shapes: Sequence[Widths], ranks: Sequence[int]) -> None:
    largest = max(shapes, key=math.prod)
    why = f"below the shorter side of {list(largest)}, the largest of shapes"
    _at_most("the least of ranks", min(ranks), min(largest) - 1, why, "shapes")


def _race(race_shapes: Sequence[Widths], race_ranks: Sequence[int]) -> None:
    most = min(map(min, race_shapes)) - OVERSAMPLE
    why = f"{OVERSAMPLE} below the shortest side of race_shapes"
    _at_most("each of race_ranks", max(race_ranks), most, why, f"race_shapes = {race_shapes}")


def _of_an_encoder(shares: Sequence[float], texts: int) -> None:
    if min(shares) < LEAST:
        raise ValueError(
            f"each of shares must be at least {LEAST} of the encoder's weights, where each layer "
            f"still has a rank, not {min(shares)}"
        )


FITS: dict[tuple[str, ...], Callable[..., object]] = {
    ("rank", "sizes"): _below,
    ("ranks", "sizes"): _up_to_full,
    ("paper_ranks", "paper_sizes"): lambda ranks, sizes: _paying(
        "each of paper_ranks", ranks, sizes[:2], "paper_sizes"
    ),
    ("budgets", "wide"): _budgets,
    ("start_rank", "wide"): lambda rank, wide: _paying("start_rank", [rank], wide[:-1], "wide"),
    ("narrow_rank", "narrow"): lambda rank, narrow: _paying(
        "narrow_rank", [rank], narrow[:-1], "narrow"
    ),
    ("shares", "sizes"): _affordable,
    ("shares", "texts"): _of_an_encoder,
    ("wide_ranks", "wide"): _grid,
    ("shapes", "ranks"): _map,
    ("race_shapes", "race_ranks"): _race,
    ("rank", "oversamples", "widths"): lambda rank, oversamples, widths: theory.check_sketches(
        rank, oversamples, side=min(100, *widths[:2])
    ),
}
