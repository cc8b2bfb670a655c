"""What the package says on its own: lines on stderr that begin with its name."""

from __future__ import annotations

import logging
import os
import sys


def log(message: str) -> None:
    """One line on stderr, from the first process of a distributed run only."""
    if os.environ.get("RANK", "0") == "0":
        logger().info(message)


def logger() -> logging.Logger:
    """The package's logger; it writes to stderr unless the program has given it a handler."""
    ours = logging.getLogger("llava_projectors")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("llava_projectors: %(message)s"))
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        ours.propagate = False
    return ours
