"""A bar on stderr for what takes longer than a moment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

QUIET_SECONDS = 2


def progress(items: Sequence[Any], what: str, unit: str) -> Any:
    """The items, with a bar from the third second on, drawn every ten seconds in a log file.

    Args:
        items: to go through.
        what: stands before the bar.
        unit: what an item is.
    """
    every = 0.5 if sys.stderr.isatty() else 10
    return tqdm(items, desc=what, unit=unit, leave=False, delay=QUIET_SECONDS, mininterval=every, file=sys.stderr)
