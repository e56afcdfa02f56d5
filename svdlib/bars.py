"""Progress bars of text, in notebooks too."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

from tqdm import tqdm


def bar(items: Iterable[Any] | None = None, *, progress: bool = True, **settings: Any) -> tqdm:
    """tqdm's bar, if ``progress``; as text in a notebook, where a saved widget would be an error."""
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

        show = self.handle.update if self.handle else partial(display, display_id=True)
        handle = show({"text/plain": text.strip()}, raw=True, metadata={"progress": True})
        self.handle = self.handle or handle

    def flush(self) -> None:
        """Nothing is held back."""
