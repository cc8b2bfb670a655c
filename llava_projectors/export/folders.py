"""Folders of an export: where they come from, and how one is written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_projectors.export.errors import ExportError
from llava_projectors.export.tensors import Output, item_size

# In the names of folders that are being written.
TEMPORARY = ".export-"


def local_folder(name: str, role: str, remedy: str) -> Path:
    """A folder on disk, or the local copy of a repository on the Hugging Face hub, fetched when it is not there yet.

    Args:
        name: of either.
        role: what it is, for messages.
        remedy: likewise.

    Raises:
        ExportError: neither.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, ignore_patterns=["*.h5", "*.msgpack", "*.ot"]))
    except Exception as error:  # offline, no such repository, no such folder: the remedy is one
        raise ExportError(
            f"{role}: there is no folder {name!r}, and the hub gives none ({str(error).splitlines()[0]}). {remedy}"
        ) from error


def check_room(folder: Path, outputs: Sequence[Output], dtype: torch.dtype) -> None:
    """Raise ExportError unless the disk has room for the tensors."""
    needed = sum(torch.Size(output.shape).numel() for output in outputs) * item_size(dtype)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"the export takes {needed / 1e6:.1f} MB and {folder.parent} has {free / 1e6:.1f} MB free: "
            "make room, or name a folder on another disk"
        )


def left_behind(target: Path) -> list[Path]:
    """Folders of exports to `target` that were killed, or that are being written now."""
    return sorted(target.parent.glob(f".{target.name}{TEMPORARY}*"))


@contextlib.contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end, and is removed when something fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}{TEMPORARY}", dir=target.parent))
    except OSError as error:
        raise ExportError(f"cannot write beside {target}: {error}") from error
    try:
        with _ended_by_signal():
            yield folder
            folder.chmod(0o777 & ~_umask())
            folder.rename(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}. Nothing of it is left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM ends the block as Control-C does, so that it can tidy up; in other threads it stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
