"""Peak memory of a picture's tiles with and without chunks, and time against the number of tiles.

Tower and projector as `--image_aspect_ratio slice` runs them, forward alone and with backward, with random
weights: a CLIP of 8 layers and 128 channels at 336 px, D = 1024. Writes a CSV
with one row per measurement when all are there, in about six minutes on two cores, and prints it.

    python -m benchmarks.high_resolution [--csv benchmarks/results/high_resolution.csv] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.speed import models
from benchmarks.table import write_rows
from llava_projectors import registry
from llava_projectors.commands.columns import print_columns
from llava_projectors.integration.high_resolution import encode_tiles
from llava_projectors.slicing import Slicing

TYPES = ("saep", "tokenpacker")
TOWER = models.TowerShape(width=128, intermediate=512, layers=8)
HIDDEN_SIZE = 1024
CHUNK = Slicing().chunk_size


def measurements(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """One row for each type, pass, number of tiles and chunk size."""
    chunk, counts, rounds = (4, (1, 8), 2) if quick else (CHUNK, (1, 10, 26, 64), 6)
    vision_model = models.make_vision_model(TOWER, device, torch.float32)
    for projector_type in TYPES:
        tower = models.make_tower(projector_type, vision_model)
        projector = registry.build_projector(projector_type, TOWER.width, HIDDEN_SIZE).to(device)
        for tiles in counts:
            pictures = list(torch.randn(tiles, 3, models.IMAGE_SIZE, models.IMAGE_SIZE, device=device))
            sizes = sorted({chunk, tiles} if tiles > chunk else {tiles})
            functions = {
                (name, size): partial(function, tower, projector, pictures, size)
                for name, function in (("forward", forward), ("forward+backward", forward_backward))
                for size in sizes
            }
            seconds = measure.interleave(functions, device, 0.0, min_rounds=rounds, max_rounds=rounds)
            for (name, size), function in functions.items():
                low, middle, high = measure.quartiles([one / tiles for one in seconds[name, size]])
                yield {
                    "type": projector_type,
                    "measure": name,
                    "tiles": tiles,
                    "chunk_size": size,
                    "s_per_tile_q1": round(low, 4),
                    "s_per_tile": round(middle, 4),
                    "s_per_tile_q3": round(high, 4),
                    "peak_mib": round(measure.peak_bytes(function, device) / 2**20, 1),
                    "rounds": rounds,
                    "layers": TOWER.layers,
                    "channels": TOWER.width,
                    **measure.machine(device),
                }


def forward(tower: Any, projector: Any, pictures: list[torch.Tensor], size: int) -> None:
    """As in inference."""
    with torch.inference_mode():
        encode_tiles(tower, projector, pictures, size)


def forward_backward(tower: Any, projector: Any, pictures: list[torch.Tensor], size: int) -> None:
    """As in training, adding to the projector's gradients."""
    encode_tiles(tower, projector, pictures, size).sum().backward()


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent / "results" / "high_resolution.csv")
    parser.add_argument("--quick", action="store_true", help="few tiles, under a minute")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = list(tqdm(measurements(device, arguments.quick), unit=" row"))
    write_rows(arguments.csv, rows)
    columns = ("type", "measure", "tiles", "chunk_size", "s_per_tile", "peak_mib")
    print_columns([columns, *(tuple(str(row[name]) for name in columns) for row in rows)])


if __name__ == "__main__":
    main()
