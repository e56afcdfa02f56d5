"""Progress bars of text, in notebooks too."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(items: Iterable[Any] | None = None, *, progress: bool = True, **settings: Any) -> tqdm:
    """tqdm's bar, which a notebook shows as an output of plain text.

    A widget would need the kernel that drew it: a notebook that is saved and opened again shows
    an error in its place. The text stays as it was last.

    Args:
        items: what to count, as tqdm takes it.
        progress: whether to show anything.
        settings: tqdm's.

    >>> list(bar(range(3), progress=False))
    [0, 1, 2]
    """
    file = _Output() if progress and _in_notebook() else None
    return tqdm(items, disable=not progress, file=file, **settings)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    shell = "IPython" in sys.modules and sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


class _Output:
    """A file that shows its last line as an output of the notebook's cell."""

    encoding = "utf-8"  # by which tqdm chooses its blocks
    handle: Any = None

    def write(self, text: str) -> None:
        if text in ("\r", "\n"):  # how tqdm ends
            return
        from IPython.display import display

        shown: dict[str, Any] = {"text/plain": text.strip()}
        marked = {"raw": True, "metadata": {"progress": True}}
        if self.handle:
            self.handle.update(shown, **marked)
        else:
            self.handle = display(shown, display_id=True, **marked)

    def flush(self) -> None:
        """Nothing is held back."""
