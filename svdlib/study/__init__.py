"""What the notebooks need on top of the library; nothing in the library imports it."""

from svdlib.study.evidence.records import collect

__all__ = ["collect"]
