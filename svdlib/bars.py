"""Progress bars of text, in notebooks too."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(items: Iterable[Any] | None = None, *, progress: bool = True, **settings: Any) -> tqdm:
    """tqdm's bar, if ``progress``; as text in a notebook, as a saved widget shows an error."""
    shell = "IPython" in sys.modules and sys.modules["IPython"].get_ipython()
    in_notebook = getattr(shell, "kernel", None) is not None
    file = _Output() if progress and in_notebook else None
    return tqdm(items, disable=not progress, file=file, **settings)


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
