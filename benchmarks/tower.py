"""The vision tower with eager attention and with what `LLAVA_PROJECTORS_TOWER` offers: time of a forward, interleaved.

    python -m benchmarks.tower [--device cpu] [--layers 4] [--csv benchmarks/results/tower-cpu.csv]

Random weights at the widths of CLIP ViT-L/14-336 and SigLIP so400m/14-384; all layers are alike, so a few will do.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.speed.suites import without_grad
from benchmarks.table import write_rows
from llava_projectors.integration.fast_tower import CHOICES, speed_up

RESULTS = Path(__file__).parent / "results"
BATCH = 4
IMAGE_SIZES = {"clip": 336, "siglip": 384}


def make_vision_model(name: str, layers: int) -> nn.Module:
    """CLIP-L or SigLIP so400m with so many layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    sizes: dict[str, Any] = {"image_size": IMAGE_SIZES[name], "patch_size": 14, "num_hidden_layers": layers}
    if name == "clip":
        return CLIPVisionModel(
            CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, **sizes)
        )
    return SiglipVisionModel(
        SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, num_attention_heads=16, **sizes)
    )


def measurements(
    name: str, device: torch.device, dtype: torch.dtype, layers: int, seconds: float = 60.0
) -> Iterator[dict[str, Any]]:
    """One row for each choice; ratios are to `stock` of the same round."""
    stock = make_vision_model(name, layers).to(device, dtype).eval()
    images = torch.randn(BATCH, 3, IMAGE_SIZES[name], IMAGE_SIZES[name], device=device, dtype=dtype)
    functions: dict[str, measure.Function] = {}
    counts: set[int] = set()
    for choice in CHOICES:
        model = copy.deepcopy(stock)
        count = speed_up(model, choice)
        if count not in counts:  # SigLIP has no QuickGELU
            functions[choice] = without_grad(model, images)
        counts.add(count)
    times = measure.interleave(functions, device, seconds)
    for choice, seconds_each in times.items():
        low, middle, high = measure.quartiles([one / base for one, base in zip(seconds_each, times[CHOICES[0]])])
        yield {
            "model": name,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": BATCH,
            "layers": layers,
            "choice": choice,
            "rounds": len(seconds_each),
            "median_s": f"{statistics.median(seconds_each):.4f}",
            "ratio_q1": f"{low:.3f}",
            "ratio": f"{middle:.3f}",
            "ratio_q3": f"{high:.3f}",
            **measure.machine(device),
        }


def main() -> None:
    """Parse the command line, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of the vision model (%(default)s)")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/tower-DEVICE.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtypes, lines = measure.without_slow_dtypes((torch.float32, torch.bfloat16), device)
    print(*lines, sep="\n")
    rows: list[dict[str, Any]] = []
    for name in IMAGE_SIZES:
        for dtype in dtypes:
            for row in measurements(name, device, dtype, arguments.layers):
                rows.append(row)
                print(*list(row.values())[:10], flush=True)
    write_rows(arguments.csv or RESULTS / f"tower-{device.type}.csv", rows)


if __name__ == "__main__":
    main()
