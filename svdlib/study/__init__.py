"""What the notebooks need on top of the library; nothing in the library imports it."""

from svdlib.study.evidence import collect

__all__ = ["collect"]
