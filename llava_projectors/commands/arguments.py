"""Readers for argparse, which say what a value has to be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

LARGEST = 1e15


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    return read


def positive(text: str) -> float:
    """A reader of numbers above zero."""
    number = float(text)
    if not 0 < number < LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and below {LARGEST:.0e}")
    return number


def not_empty(text: str) -> str:
    """The text; an empty one, as an unset variable of a shell gives, would count as not given."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: leave the option out, or give a value")
    return text


def file_path(text: str) -> Path:
    """A path; an empty one would be the current folder."""
    return Path(not_empty(text))
