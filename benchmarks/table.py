"""The CSV files of all benchmarks: written whole or row by row, and never shortened by a run that was cut off."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_projectors.commands.writing import whole_file

Row = dict[str, Any]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """One CSV with the columns of the first row; an earlier file stays until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        _write(unfinished, rows, list(rows[0]), "w")


def append_rows(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Add rows to a CSV, which is begun if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, rows, columns, "a")


def _write(path: Path, rows: Iterable[Row], columns: Sequence[str], mode: str) -> None:
    with path.open(mode, newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path, column: str) -> list[Row]:
    """Every row of a CSV.

    Args:
        path: the file.
        column: one that only the right kind of file has.

    Raises:
        ValueError: the file has no such column, or no rows.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[Row] = list(csv.DictReader(file))
    if not rows or column not in rows[0]:
        raise ValueError(f"{path} has no column {column!r}: it is a file of another kind")
    return rows
