"""Notebooks by name, the parameters that they declare, and every combination of requested values."""

from __future__ import annotations

import ast
import contextlib
import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nbformat

NOTEBOOKS = Path("notebooks")
MAX_COMBINATIONS = 100_000  # more are a typing mistake
# Declared types that a text is checked against; any other declaration takes any value.
TYPES = {"str", "int", "float", "bool", "list", "dict", "tuple", "None"}
QUOTED_OR_ONE = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|."""  # a text in quotes, or a character
Values = str | Sequence[object]  # several values of a parameter: as text, or one by one


def find(names: Sequence[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks of these names (``01_baseline``, or a path), each once, or all of the folder's."""
    known = sorted(folder.glob("*.ipynb"))
    if not known and not names:
        raise ValueError(f"{folder.resolve()} holds no notebooks; run from the project's root")
    found: dict[str, Path] = {}
    for name in names:
        path = next((path for path in known if name in (path.stem, path.name)), Path(name))
        if path.suffix != ".ipynb" or not path.is_file():
            raise ValueError(_unknown(name, [path.stem for path in known], folder))
        other = found.setdefault(path.stem, path)
        if other.resolve() != path.resolve():
            raise ValueError(f"{other} and {path} have one name; run them one after the other")
    return list(found.values()) or known


def _unknown(name: str, known: Sequence[str], folder: Path) -> str:
    """What to say of a name that is no notebook's."""
    if re.fullmatch(r"\w+=.*", name):
        parameter, _, value = name.partition("=")
        return f"no notebook {name!r}; a parameter is given as -p {parameter} {value}"
    if not known:
        return f"{folder.resolve()} holds no notebooks; run from the project's root"
    close = difflib.get_close_matches(name, known, 1)
    return (
        f"no notebook {name!r}; "
        + (f"did you mean {close[0]}? " if close else "")
        + (f"known: {', '.join(known)}")
    )


def declared(notebook: Path) -> dict[str, set[str]]:
    """The types that each parameter may take, from the cell tagged ``parameters``.

    Declared as ``n: int = 3`` or ``x: str | None = None``; ``n = 3`` has the type of its value.
    An empty set allows any value.
    """
    own, found = defaults(notebook), {}
    for name, annotation, _ in _assigned(notebook):
        default = type(own.get(name, ...)).__name__
        text = ast.unparse(annotation).strip("'\"") if annotation else default
        kinds = {part.split("[")[0].strip() for part in text.split("|")}
        found[name] = kinds if kinds <= TYPES else set()
    return found


def defaults(notebook: Path) -> dict[str, object]:
    """The values that the notebook's parameters cell sets, as far as they are literals."""
    found: dict[str, object] = {}
    for name, _, value in _assigned(notebook):
        with contextlib.suppress(ValueError):
            found[name] = ast.literal_eval(value)
    return found


def _assigned(notebook: Path) -> Iterator[tuple[str, ast.expr | None, ast.expr]]:
    try:
        cells = nbformat.read(notebook, as_version=4).cells
        sources = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
        lines = statements("".join(sources[:1]))
    except (nbformat.ValidationError, SyntaxError) as error:
        raise ValueError(f"{notebook}: {str(error).splitlines()[0]}") from None
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{notebook} is not a Jupyter notebook") from None
    for line in lines:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            yield line.target.id, line.annotation, line.value
        elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            yield line.targets[0].id, None, line.value


def statements(source: str) -> list[ast.stmt]:
    """A cell's code, without lines for IPython alone."""
    return ast.parse(re.sub(r"(?m)^[%!].*", "", source)).body


def parse(
    notebook: Path, given: Mapping[str, str], known: Mapping[str, set[str]] | None = None
) -> dict[str, object]:
    """Parameters from text, by the names and types that the notebook declares (``known``)."""
    known, parsed = known or declared(notebook), {}
    for name, text in given.items():
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{notebook.stem} has no parameter {name!r}; known: {listed}")
        try:
            parsed[name] = _value(text, known[name])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{notebook.stem}: parameter {name!r} {error}") from None
    return parsed


def _value(text: str, kinds: set[str]) -> object:
    """The text as one of the types; a string only if no other type fits, without its quotes."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = text
    if isinstance(value, str) and (not kinds or "str" in kinds):
        return value
    kind = "None" if value is None else type(value).__name__
    if kind == "int" and "float" in kinds and "int" not in kinds:
        return float(value)
    if not kinds or kind in kinds - {"str"}:
        return value
    if "str" in kinds:
        return text
    named = [("an " if kind == "int" else "a ") * (kind != "None") + kind for kind in sorted(kinds)]
    raise ValueError(f"must be {' or '.join(named)}, not {text!r}")


def combinations(
    notebook: Path, given: Mapping[str, str], over: Sequence[tuple[str, Values]] = ()
) -> list[dict[str, object]]:
    """Every combination of the values in ``over``, each with the values ``given`` to all.

    ``over`` has names, each with its values, one by one or as text: ``1,2,3``, or a range
    ``0:1000:100`` of whole numbers without its end.
    """
    known, texts = declared(notebook), {}
    fixed = parse(notebook, given, known)
    for name, values in over:
        if name in given or name in texts:
            raise ValueError(f"parameter {name!r} is given twice; once is enough")
        texts[name] = _several(name, values, known.get(name, set()))
    if (number := math.prod(map(len, texts.values()))) > MAX_COMBINATIONS:
        raise ValueError(f"{number:,} combinations are more than {MAX_COMBINATIONS:,}; use fewer")
    parsed = [[parse(notebook, {name: text}, known) for text in texts[name]] for name in texts]
    return [
        {name: value for part in (*parts, fixed) for name, value in part.items()}
        for parts in itertools.product(*parsed)
    ]


def _several(name: str, values: Values, kinds: set[str]) -> list[str]:
    """The values of a list or a range, as text, each once.

    Commas in brackets or quotes separate nothing. Of a parameter that takes text and no numbers,
    ``10:20`` is a text.
    """
    numbers = not kinds or bool(kinds & {"int", "float"})
    if not isinstance(values, str):
        texts = [value if isinstance(value, str) else repr(value) for value in values]
    elif numbers and re.fullmatch(r"-?\d+:-?\d+(:-?\d+)?", values):
        low, high, step = [*map(int, values.split(":")), 1][:3]
        if step == 0:
            raise ValueError(f"--over {name}: the range {values} has step 0; give another")
        if (length := -((low - high) // step)) > MAX_COMBINATIONS:  # len() has a limit
            raise ValueError(
                f"--over {name}: {values} holds {length:,} values, more than {MAX_COMBINATIONS:,}"
            )
        texts = [str(number) for number in range(low, high, step)]
    else:
        texts, depth = [""], 0
        for part in re.findall(QUOTED_OR_ONE, values, re.DOTALL):
            depth += (part in "[({") - (part in "])}")
            if part == "," and depth <= 0:
                texts.append("")
            else:
                texts[-1] += part
        texts = [text.strip() for text in texts]
        if "" in texts and any(texts):
            raise ValueError(f"--over {name}: {values!r} has a gap; give a value between commas")
        texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"--over {name}: {values!r} holds no value; give 1,2,3 or 0:10:2")
    return list(dict.fromkeys(texts))
