"""Notebooks by name, the parameters that they declare, and every combination of values asked for."""

from __future__ import annotations

import ast
import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import nbformat

NOTEBOOKS = Path("notebooks")

# What a parameter may be declared as; anything else takes any literal, or else the text.
TYPES = {"str", "int", "float", "bool", "list", "dict", "tuple", "None"}

# Several values of a parameter: as text, or one by one.
Values = str | Sequence[object]

# More combinations than this are a slip of the keyboard.
MOST = 100_000


def find(names: Sequence[str] = (), folder: Path = NOTEBOOKS) -> list[Path]:
    """The notebooks of these names (``01_baseline``, or a path), each once, or all of the folder's.

    Raises:
        ValueError: no notebook of that name (the known ones are listed), or two files of one name.
    """
    known = sorted(folder.glob("*.ipynb"))
    if not known and not names:
        raise ValueError(f"{folder.resolve()} holds no notebooks; run from the project's root")
    found: dict[str, Path] = {}
    for name in names:
        matches = [path for path in known if name in (path.stem, path.name)]
        if not matches and Path(name).suffix == ".ipynb" and Path(name).is_file():
            matches = [Path(name)]
        if not matches:
            listed = ", ".join(path.stem for path in known) or "none"
            raise ValueError(f"no notebook {name!r}; known: {listed}")
        for path in matches:
            other = found.setdefault(path.stem, path)
            if other.resolve() != path.resolve():
                raise ValueError(f"{other} and {path} have one name; run them one after the other")
    return list(found.values()) or known


def declared(notebook: Path) -> dict[str, set[str]]:
    """The types that each parameter may take, from the cell tagged ``parameters``.

    Declared as ``n: int = 3``, ``x: str | None = None`` or ``Optional[str]``; ``n = 3`` takes the
    type of its value. An empty set allows anything.

    Raises:
        ValueError: not a notebook, or a parameters cell that is not Python.
    """
    found: dict[str, set[str]] = {}
    for name, annotation, value in _assigned(notebook):
        if annotation is not None:
            found[name] = _kinds(annotation)
        elif value is not None:
            found[name] = _kinds_of_value(value)
    return found


def defaults(notebook: Path) -> dict[str, object]:
    """What the notebook's own parameters cell sets, where that is a literal."""
    found: dict[str, object] = {}
    for name, _, value in _assigned(notebook):
        with contextlib.suppress(ValueError):
            found[name] = None if value is None else ast.literal_eval(value)
    return found


def _assigned(notebook: Path) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Each name that the parameters cell assigns to, with its annotation and its value."""
    for line in _cell(notebook).body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, line.annotation, line.value
        elif isinstance(line, ast.Assign):
            for target in line.targets:
                if isinstance(target, ast.Name):
                    yield target.id, None, line.value


def _cell(notebook: Path) -> ast.Module:
    """The first cell tagged ``parameters``, parsed."""
    try:
        content = nbformat.read(notebook, as_version=4)
        cells = [c for c in content.cells if "parameters" in c.metadata.get("tags", [])]
        lines = "".join(cell.source for cell in cells[:1]).splitlines()
        return ast.parse("\n".join("" if line[:1] in "%!" else line for line in lines))
    except (
        nbformat.reader.NotJSONError,
        AttributeError,
        KeyError,
        TypeError,
        UnicodeError,
        RecursionError,
    ):
        raise ValueError(f"{notebook} is not a Jupyter notebook") from None
    except (nbformat.ValidationError, SyntaxError) as error:
        raise ValueError(f"{notebook}: {str(error).splitlines()[0]}") from None


def _kinds(annotation: ast.expr) -> set[str]:
    """The type names in an annotation; empty where it holds one that no text can be held against."""
    text = ast.unparse(annotation).strip("'\"").replace("typing.", "")
    if text.startswith("Optional["):
        text = f"{text[len('Optional[') : -1]} | None"
    elif text.startswith("Union["):
        text = text[len("Union[") : -1].replace(",", "|")
    kinds = {part.split("[")[0].strip() for part in text.split("|")}
    return kinds if kinds <= TYPES else set()


def _kinds_of_value(value: ast.expr) -> set[str]:
    try:
        kind = type(ast.literal_eval(value)).__name__
    except ValueError:
        return set()
    return {kind} & TYPES


def parse(notebook: Path, given: Mapping[str, str]) -> dict[str, object]:
    """Parameters from text, by the names and types that the notebook declares.

    Raises:
        ValueError: a name the notebook does not have, or a text that is not of its type.
    """
    known = declared(notebook)
    return {name: _typed(notebook.stem, known, name, text) for name, text in given.items()}


def _typed(notebook: str, known: Mapping[str, set[str]], name: str, text: str) -> object:
    if name not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"{notebook} has no parameter {name!r}; known: {listed}")
    try:
        return _value(text, known[name])
    except ValueError as error:
        raise ValueError(f"{notebook}: parameter {name!r} {error}") from None


def _value(text: str, kinds: set[str]) -> object:
    """The text as one of the types, a string only where nothing else fits or it is the only one.

    >>> _value("1", {"float"}), _value("7", {"str"}), _value("None", {"str", "None"})
    (1.0, '7', None)
    """
    if kinds == {"str"}:
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        value = text
    kind = "None" if value is None else type(value).__name__
    if kind == "int" and "float" in kinds - {"int"} and "int" not in kinds:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"is too large: {text}") from None
    if not kinds or kind in kinds - {"str"}:
        return value
    if "str" in kinds:
        return text
    raise ValueError(f"must be {_a(sorted(kinds))}, not {text!r}")


def _a(kinds: Sequence[str]) -> str:
    """What a parameter must be, in words: ``an int or None``."""
    named = [
        kind if kind == "None" else f"{'an' if kind == 'int' else 'a'} {kind}" for kind in kinds
    ]
    return " or ".join(named)


def combinations(
    notebook: Path, given: Mapping[str, str], over: Sequence[tuple[str, Values]] = ()
) -> list[dict[str, object]]:
    """Every combination of the values asked for, each with the values given to all.

    Args:
        given: text by name, as `parse` takes it.
        over: names, each with its values, one by one or as text: ``1,2,3``, or a range
            ``0:1000:100`` of whole numbers without its end. Commas within brackets do not part
            values.

    Raises:
        ValueError: as `parse`, for any combination; a parameter given twice, an empty range, a
            step of 0, more than 100,000 combinations.

    >>> import tempfile
    >>> from nbformat.v4 import new_code_cell, new_notebook
    >>> cell = new_code_cell("seeds: int = 2", metadata={"tags": ["parameters"]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     nbformat.write(new_notebook(cells=[cell]), f"{folder}/a.ipynb")
    ...     combinations(Path(f"{folder}/a.ipynb"), {}, [("seeds", "1:4")])
    [{'seeds': 1}, {'seeds': 2}, {'seeds': 3}]
    """
    known = declared(notebook)
    fixed = parse(notebook, given)
    lists = {}
    for name, text in over:
        if name in given or name in lists:
            raise ValueError(f"parameter {name!r} is given twice; once is enough")
        lists[name] = _several(name, text)
    number = math.prod(map(len, lists.values()))
    if number > MOST:
        raise ValueError(f"{number:,} combinations are more than {MOST:,}; ask for fewer at a time")
    parsed = {
        name: [_typed(notebook.stem, known, name, text) for text in texts]
        for name, texts in lists.items()
    }
    return [
        {**dict(zip(parsed, values, strict=True)), **fixed}
        for values in itertools.product(*parsed.values())
    ]


def _several(name: str, text: Values) -> list[str]:
    """The values of a list or a range, as text, each once.

    >>> _several("rank", "2,5"), _several("sizes", "[1, 2],[3]"), _several("seed", "0:5:2")
    (['2', '5'], ['[1, 2]', '[3]'], ['0', '2', '4'])
    """
    if not isinstance(text, str):
        values = [str(value) for value in text]
    elif re.fullmatch(r"-?\d+:-?\d+(:-?\d+)?", text):
        ends = [int(number) for number in text.split(":")]
        if ends[2:] == [0]:
            raise ValueError(f"--over {name}: the range {text} has step 0; give another")
        low, high, step = *ends[:2], *(ends[2:] or [1])
        if (length := -((low - high) // step)) > MOST:
            raise ValueError(f"--over {name}: {text} holds {length:,} values, more than {MOST:,}")
        values = [str(number) for number in range(low, high, step)]
    else:
        parts, depth = [""], 0
        for character in text:
            depth += (character in "[({") - (character in "])}")
            if character == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += character
        values = [part.strip() for part in parts if part.strip()]
    if not values:
        raise ValueError(f"--over {name}: {text!r} holds no value; give 1,2,3 or 0:10:2")
    return list(dict.fromkeys(values))
