"""What the parameters of a notebook may be, by their names: said in the cell that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from svdlib import checks, data

PIXELS, CLASSES = 784, 10

# Whole numbers from 0 on; all others begin at 1.
FROM_ZERO = ("first_seed", "oversample", "power_iters")
WHOLE = (
    *("seeds", "paper_seeds", "deviation_seeds", "sweep_seeds", "graded", "projected"),
    *("epochs", "paper_epochs", "paper_more", "finetune", "wide_epochs"),
    *("rank", "start_rank", "narrow_rank", "validation", "wide_images", "bench_images"),
    *("draws", "repeats", "texts", "pairs"),
)
LISTS = ("ranks", "paper_ranks", "wide_ranks", "race_ranks", "counts", "budgets", "oversamples")
WIDTHS = ("sizes", "paper_sizes", "wide", "narrow", "widths")
SHARES = ("shares", "tails")
SHAPES = ("shapes", "race_shapes")
SWITCHES = ("progress", "everything")


def check(namespace: Mapping[str, object]) -> None:
    """Refuse parameters that no notebook could use, with one sentence, before anything is done.

    Args:
        namespace: a notebook's ``globals()``; names that are no parameters are left alone.

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
        for name, rule in RULES.items():
            if name in namespace:
                rule(name, namespace[name])
        _fit(namespace)
    except ValueError as error:
        raise ValueError(str(error)) from None


def _whole(name: str, value: object) -> None:
    checks.positive_int(value, name, least=0 if name in FROM_ZERO else 1)


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
        checks.positive_int(entry, f"each of {name}")


def _widths(name: str, value: object) -> None:
    if name == "wide" and value == []:
        return
    given = list(value) if isinstance(value, list | tuple) else []
    for width in given:
        checks.positive_int(width, f"each of {name}")
    if len(given) < 3 or (given[0], given[-1]) != (PIXELS, CLASSES):
        raise ValueError(
            f"{name} must be the widths [{PIXELS}, …, {CLASSES}] of a network for 28×28 pixels and "
            f"ten classes, with a hidden layer at least, not {value!r}"
        )


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
    **dict.fromkeys(SHARES, _shares),
    **dict.fromkeys(SHAPES, _shapes),
    **dict.fromkeys(SWITCHES, _switch),
}


def _fit(given: Mapping[str, object]) -> None:
    """Refuse parameters that don't fit one another."""
    if "rank" in given and "sizes" in given:
        _below(given, "rank", min(given["sizes"][:2]) - 1)  # type: ignore[index]
    if "paper_ranks" in given and "paper_sizes" in given:
        n, m = given["paper_sizes"][:2]  # type: ignore[index]
        for rank in given["paper_ranks"]:  # type: ignore[attr-defined]
            if rank * (m + n) >= m * n:
                raise ValueError(
                    f"each of paper_ranks must be at most {(m * n - 1) // (m + n)}, where two factors "
                    f"of the {m} × {n} matrix store less than it does, not {rank}"
                )
    if "budgets" in given and "wide" in given:
        wide = list(given["wide"])  # type: ignore[call-overload]
        if len(wide) != 4:
            raise ValueError(f"wide must be the widths of three layers here, not {wide}")
        n, m, *_ = wide
        least = sum(wide[1:]) + wide[2] * wide[3] + (n + m) + (m + wide[2])
        for budget in given["budgets"]:  # type: ignore[attr-defined]
            if budget < least:
                raise ValueError(
                    f"each of budgets must be at least {least:,}, what {wide} has at rank 1, "
                    f"not {budget:,}"
                )
    if "narrow_rank" in given and "narrow" in given:
        _below(given, "narrow_rank", min(given["narrow"][:2]) - 1)  # type: ignore[index]


def _below(given: Mapping[str, object], name: str, most: int) -> None:
    if given[name] > most:  # type: ignore[operator]
        raise ValueError(
            f"{name} must be at most {most}, below the full rank of the first layer, "
            f"not {given[name]}"
        )
