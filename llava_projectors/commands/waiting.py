"""Lines on stderr while something runs that cannot be counted; with the standard library, so that `doctor` can."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_SECONDS = 10.0


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what runs in the block, at once, and every ten seconds how long it has been running.

    Args:
        what: in a few words.
    """
    started, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(EVERY_SECONDS):
            print(f"{what}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    print(what, file=sys.stderr, flush=True)
    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        done.set()
        reporter.join()
