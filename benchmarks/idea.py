"""The README's picture: patches become visual tokens, over a photograph, beside the LLM's input.

python -m benchmarks.idea
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

from llava_projectors.commands.writing import whole_file
from llava_projectors.registry import resolve

ROOT = Path(__file__).parents[1]
PATCHES_PER_SIDE = 24
TEXT = 100  # tokens of a question with its answer, for the picture
SHOWN = ("saep", "saep:stride=3", "saep:stride=4")
CREDIT = "Photograph: vultilion, flickr.com/photos/vultilion/6056698931, CC BY 2.0; cropped, grid added"


def draw_grid(axis: Any, picture: Image.Image, side: int, title: str) -> None:
    """The picture with the outlines of side x side squares."""
    axis.imshow(picture)
    axis.set_axis_off()
    for line in range(side + 1):
        at = line * picture.width / side - 0.5
        axis.axhline(at, color="white", linewidth=0.7)
        axis.axvline(at, color="white", linewidth=0.7)
    axis.set_title(title, fontsize=10)


def draw_inputs(axis: Any) -> None:
    """What the LLM reads of one picture and its text, a bar for each type."""
    rows = {"LLaVA (mlp2x_gelu)": PATCHES_PER_SIDE**2}
    rows |= {name: resolve(name).output_side(PATCHES_PER_SIDE) ** 2 for name in SHOWN}
    names, counts = list(rows), list(rows.values())
    axis.barh(names, counts, color="#d1642e", label="visual tokens")
    axis.barh(names, [TEXT] * len(rows), left=counts, color="#9aa5b1", label=f"text tokens ({TEXT})")
    for row, count in enumerate(counts):
        axis.text(count / 2, row, str(count), ha="center", va="center", color="white", fontsize=9)
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_xticks([])
    axis.set_title("what the LLM reads for one picture", fontsize=10)
    axis.legend(fontsize=8, loc="lower right", frameon=False)


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures" / "idea.png", help="(%(default)s)")
    arguments = parser.parse_args()
    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    left = (photograph.width - photograph.height) // 2
    square = photograph.crop((left, 0, left + photograph.height, photograph.height)).resize((336, 336))
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.5), width_ratios=(1, 1, 1.5), layout="constrained")
    draw_grid(axes[0], square, PATCHES_PER_SIDE, "vision tower: 24x24 = 576 patches")
    draw_grid(axes[1], square, PATCHES_PER_SIDE // 2, "saep: 12x12 = 144 visual tokens")
    draw_inputs(axes[2])
    figure.supxlabel(CREDIT, fontsize=7, x=0.005, ha="left")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(arguments.output) as file:
        figure.savefig(file, dpi=100)
    print(f"Drawn to {arguments.output}")


if __name__ == "__main__":
    main()
