"""The README's picture: patches become visual tokens, over a photograph, beside the measured speed-up.

python -m benchmarks.idea [--csv benchmarks/results/cpu.csv]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.table import Row, read_rows
from llava_projectors.commands.writing import whole_file

ROOT = Path(__file__).parents[1]
SHOWN = {"mlp2x_gelu": "mlp2x_gelu", "saep:stride=2": "saep", "saep:stride=3": "saep:stride=3"}
MEASURES = ("prefill", "training step, stage 1", "training step, stage 2")


def speed_ups(rows: list[Row]) -> dict[str, list[str]]:
    """Type -> visual tokens, and the speed-up over `mlp2x_gelu` of every measure of the model suite."""
    table: dict[str, list[str]] = {}
    for type_string, shown in SHOWN.items():
        mine = {r["measure"]: r for r in rows if r["suite"] == "model" and r["type"] == type_string}
        tokens = mine[MEASURES[0]]["visual_tokens"]
        table[shown] = [tokens, *(f"{1 / float(mine[measure]['ratio']):.1f} x" for measure in MEASURES)]
    return table


def draw_grid(axis: Any, picture: Image.Image, side: int, title: str) -> None:
    """The picture with the outlines of side x side squares."""
    axis.imshow(picture)
    axis.set_axis_off()
    for line in range(side + 1):
        at = line * picture.width / side - 0.5
        axis.axhline(at, color="white", linewidth=0.7)
        axis.axvline(at, color="white", linewidth=0.7)
    axis.set_title(title, fontsize=9)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.csv", help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "idea.png", help="(%(default)s)")
    arguments = parser.parse_args()
    rows = read_rows(arguments.csv, "measured_to_bound")
    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    left = (photograph.width - photograph.height) // 2
    square = photograph.crop((left, 0, left + photograph.height, photograph.height)).resize((336, 336))
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.3), width_ratios=(1, 1, 1.5), layout="constrained")
    draw_grid(axes[0], square, 24, "24x24 = 576 patches of the vision tower")
    draw_grid(axes[1], square, 12, "12x12 = 144 visual tokens for the LLM")
    axes[2].set_axis_off()
    table = speed_ups(rows)
    header = ["visual\ntokens", "prefill", "training,\nstage 1", "training,\nstage 2"]
    cells = axes[2].table(list(table.values()), rowLabels=list(table), colLabels=header, loc="center", cellLoc="center")
    cells.auto_set_font_size(False)
    cells.set_fontsize(9)
    cells.scale(1, 2)
    axes[2].set_title(f"speed, LLM of 0.27 B on a CPU ({rows[0]['machine']})", fontsize=9, y=0.85)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(arguments.output) as file:
        figure.savefig(file, dpi=100)
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    main()
