"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a path beside `target` to write to; it becomes `target` when the block ends without an error.

    After an error, such as a full disk, `target` is as it was before.

    Args:
        target: the file, or a link to one. Its ending is kept, by which some writers choose the format.

    Raises:
        OSError: the folder cannot be written to.
    """
    target = target.resolve()
    unfinished = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
