"""The explorer: panels to move by hand, and what answers them in milliseconds."""

from svdlib.study.pictures.explorer.cuts import Cuts, check, sketch
from svdlib.study.pictures.explorer.panels import (
    digits_panel,
    matrix_panel,
    ranks_panel,
    runs_panel,
)
from svdlib.study.pictures.explorer.pictures import save, show
from svdlib.study.pictures.explorer.runs import Session

__all__ = [
    "Cuts", "Session", "check", "digits_panel", "matrix_panel", "ranks_panel", "runs_panel",
    "save", "show", "sketch",
]  # fmt: skip
