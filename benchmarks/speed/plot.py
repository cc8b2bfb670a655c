"""One picture of the CSV that `python -m benchmarks.speed` wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.speed.candidates import EAGER, STOCK
from benchmarks.speed.report import group_name
from benchmarks.table import Row, read_rows

COLOURS = {
    "naive": "tab:gray",
    "published": "tab:gray",
    "triton": "tab:green",
    "saep": "tab:blue",
    "tokenpacker": "tab:orange",
    STOCK: "black",
}
SHADES = {"144": 1.0, "64": 0.75, "36": 0.5}  # of a type's colour, by visual tokens


def plot(source: Path, target: Path) -> None:
    """Draw every suite that the CSV holds, one below the other.

    Raises:
        ValueError: the file is not one of `bench`.
    """
    rows = [row for row in read_rows(source, "measured_to_bound") if row["median_s"]]  # of what could be run
    panels: dict[str, Callable[[Any, list[Row]], None]] = {
        "projector": _ratios,
        "tower": _ratios,
        "model": _speed_ups,
        "generate": _speed_ups,
        "scaling": _lines,
    }
    found = [(name, draw, [row for row in rows if row["suite"] == name]) for name, draw in panels.items()]
    found = [panel for panel in found if panel[2]]
    figure = pyplot.figure(figsize=(11, 4.2 * len(found)), layout="constrained")
    for part, (name, draw, panel) in zip(figure.subfigures(len(found), squeeze=False)[:, 0], found):
        axis = part.subplots()
        draw(axis, panel)
        axis.set_title(name, loc="left", fontweight="bold")
        if axis.get_legend_handles_labels()[0]:  # a group whose baseline did not fit has no ratios
            part.legend(loc="outside lower center", ncols=3, fontsize=8, handlelength=3)
    first = rows[0]
    figure.suptitle(f"{first['machine']}; torch {first['torch']}, Python {first['python']}", fontsize=9)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _colour(row: Row) -> str:
    words = (row["implementation"], row["type"])
    return next(colour for prefix, colour in COLOURS.items() if any(word.startswith(prefix) for word in words))


def _label(row: Row, text: str) -> str:
    shown = text.format(**row)
    return shown if row["implementation"] == EAGER else f"{shown}, {row['implementation']}"


def _groups(rows: list[Row]) -> list[list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(group_name(row), []).append(row)
    return list(groups.values())


def _bars(axis: Any, rows: list[Row], height: Callable[[float], float], label: str) -> list[list[Row]]:
    """Bars of height(ratio) with quartiles as whiskers, red lines at height(FLOP ratio); returns the groups."""
    groups = _groups([row for row in rows if row["ratio"]])
    for place, group in enumerate(groups):
        others = [row for row in group if row["type"] != STOCK]
        width = min(0.3, 0.85 / len(others))
        for number, row in enumerate(others):
            x = place + (number - (len(others) - 1) / 2) * width
            low, middle, high = sorted(height(float(row[column])) for column in ("ratio_q1", "ratio", "ratio_q3"))
            axis.bar(
                x,
                middle,
                width,
                color=_colour(row),
                alpha=SHADES[row["visual_tokens"]],
                yerr=[[middle - low], [high - middle]],
                ecolor="0.3",
                label=_label(row, label) if place == 0 else None,
            )
            axis.hlines(height(float(row["flops_ratio"])), x - width / 2, x + width / 2, color="red", linewidth=1.2)
    axis.axhline(1, color="black", linewidth=0.8)
    return groups


def _ratios(axis: Any, rows: list[Row]) -> None:
    """Time against the baseline."""
    groups = _bars(axis, rows, lambda ratio: ratio, "{type}")
    labels = [
        "{}\n{}\nbatch {}".format(g[0]["measure"].replace("+", "+\n"), g[0]["dtype"], g[0]["batch"]) for g in groups
    ]
    axis.set_xticks(range(len(groups)), labels, fontsize=7)
    axis.set_ylabel(f"time / {STOCK}\n(red: FLOP ratio)")


def _speed_ups(axis: Any, rows: list[Row]) -> None:
    """Speed-up over 576 tokens, beside the bound."""
    groups = _bars(axis, rows, lambda ratio: 1 / ratio, "{type}, {visual_tokens} tokens")
    labels = ["{measure}\nbatch {batch}, images {images}".format(**group[0]) for group in groups]
    axis.set_xticks(range(len(groups)), labels, fontsize=8)
    axis.set_ylabel("speed-up over 576 tokens\n(red: FLOP bound)")


def _lines(axis: Any, rows: list[Row]) -> None:
    """Prefill time over images per prompt (solid) and over prompts per batch (dashed)."""
    for column, other, style, label in (
        ("images", "batch", "-", "images per prompt"),
        ("batch", "images", "--", "batch"),
    ):
        for name in dict.fromkeys(row["type"] for row in rows):
            mine = sorted(
                (row for row in rows if row["type"] == name and row[other] == "1"), key=lambda row: int(row[column])
            )
            xs, ys = [int(row[column]) for row in mine], [float(row["median_s"]) for row in mine]
            axis.plot(xs, ys, style, marker="o", color=_colour(mine[0]), label=f"{name}, over {label}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("images per prompt, or prompts per batch")
    axis.set_ylabel("prefill, s")
