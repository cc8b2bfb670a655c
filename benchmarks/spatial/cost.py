"""What a type of the study would cost in LLaVA-1.5 7B: operations and time of the projector alone.

`python -m benchmarks.spatial.cost` measures the time of every type that the study compares and its CSV lacks, a few at
a time, interleaved with `mlp2x_gelu`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import measure
from benchmarks.spatial import sizes, vision
from benchmarks.spatial.scenes import NUM_PATCHES_PER_SIDE
from benchmarks.spatial.study import STUDIES
from benchmarks.speed.candidates import Subject
from benchmarks.speed.flops import mlp2x_gelu
from benchmarks.speed.models import STOCK
from benchmarks.speed.run import choose_device
from benchmarks.speed.suites import forward_backward, make_projector, without_grad
from benchmarks.table import Row, append_rows, read_rows
from llava_projectors import registry

SIDE, WIDTH, HIDDEN_SIZE = 24, 1024, 4096  # of CLIP ViT-L/14 at 336 px and Vicuna-7B
SELECTED = 23  # the hidden state of CLIP ViT-L that LLaVA's --mm_vision_select_layer -2 names
# Options that are sizes of the study's own models: by how much they grow.
GROWTH = {
    "num_queries": (SIDE / NUM_PATCHES_PER_SIDE) ** 2,
    "inner_size": WIDTH / vision.WIDTH,
    "readout_size": HIDDEN_SIZE / sizes.SIZES.llm_width,
}
TIMES = Path(__file__).parents[1] / "results" / "projector-time.csv"
TIMED = ("comparison", "finalists", "options")  # the studies whose types are timed
MEASURES = (("forward", 1), ("forward+backward", 2))  # and the images in a batch
GROUP = 6  # types that are interleaved; with more, a slow minute of the machine falls between two of a round

Times = dict[tuple[str, str, int], tuple[float, float, float]]


@cache
def in_7b(type_string: str) -> str:
    """The type with the sizes and layers that it would have there, without options that say what is so anyway."""
    if type_string == STOCK:
        return STOCK
    spec = registry.parse_spec(type_string)
    defaults = registry.resolve(spec.name).options
    options = {name: value for name, value in spec.options.items() if value != defaults[name]}
    grown = {name: round(value * GROWTH[name]) for name, value in options.items() if name in GROWTH}
    if "layers" in options:
        grown["layers"] = tuple(layer * SELECTED // vision.SELECTED for layer in options["layers"])
    return str(replace(spec, options={**options, **grown}))


@cache
def part_of_stock(type_string: str) -> float:
    """Operations of a forward pass of the type as a part of `mlp2x_gelu`'s, as torch counts them."""
    if type_string == STOCK:
        return 1.0
    with torch.device("meta"):
        projector = registry.build_projector(in_7b(type_string), WIDTH, HIDDEN_SIZE)
        features = torch.empty(1, SIDE**2, projector.num_levels * WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projector(features)
    return counter.get_total_flops() / mlp2x_gelu(SIDE, WIDTH, HIDDEN_SIZE).forward


def compared() -> list[str]:
    """Every type that is compared with others or is an option of SAEP, with the sizes of 7B, but for `mlp2x_gelu`."""
    names = [one.type_string for study in TIMED for one in STUDIES[study].configurations]
    return [name for name in dict.fromkeys(map(in_7b, names)) if name != STOCK]


def rows(names: Sequence[str], device: torch.device, seconds: float) -> Iterator[list[Row]]:
    """The times of these types for each of `MEASURES`, `GROUP` at a time, interleaved with `mlp2x_gelu`, in float32."""
    groups = [names[start : start + GROUP] for start in range(0, len(names), GROUP)]
    for group in tqdm(groups, unit=" group"):
        yield [row for what, batch in MEASURES for row in _rows_of(group, what, batch, device, seconds)]


def _rows_of(names: list[str], what: str, batch: int, device: torch.device, seconds: float) -> Iterator[Row]:
    with device:
        projectors = {name: make_projector(Subject(name), WIDTH, HIDDEN_SIZE) for name in (STOCK, *names)}
    levels = {name: getattr(projector, "num_levels", 1) for name, projector in projectors.items()}
    # Types that read equally many layers read the same tensor.
    features = {count: torch.randn(batch, SIDE**2, count * WIDTH, device=device) for count in set(levels.values())}
    functions = {
        name: without_grad(projector, features[levels[name]])
        if what == "forward"
        else forward_backward(projector, features[levels[name]])[0]
        for name, projector in projectors.items()
    }
    measured = measure.interleave(functions, device, seconds)
    for name in names:
        low, middle, high = measure.quartiles([a / b for a, b in zip(measured[name], measured[STOCK])])
        yield {
            "type": name,
            "measure": what,
            "batch": batch,
            "rounds": len(measured[name]),
            "median_s": f"{statistics.median(measured[name]):.5g}",
            "stock_median_s": f"{statistics.median(measured[STOCK]):.5g}",
            **{key: f"{value:.4g}" for key, value in (("ratio_q1", low), ("ratio", middle), ("ratio_q3", high))},
            **measure.machine(device),
        }


def times(path: Path = TIMES) -> Times:
    """What was measured: type in 7B, measure and batch -> median and quartiles of the time against `mlp2x_gelu`'s."""
    found = {
        (row["type"], row["measure"], int(row["batch"])): (
            float(row["ratio"]),
            float(row["ratio_q1"]),
            float(row["ratio_q3"]),
        )
        for row in read_rows(path, "ratio")
    }
    return {**{(STOCK, what, batch): (1.0, 1.0, 1.0) for _, what, batch in found}, **found}


def machine(path: Path = TIMES) -> str:
    """What the times were measured on."""
    return str(read_rows(path, "ratio")[0]["machine"])


def main() -> None:
    """Parse the command line, measure, write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spatial.cost", description=__doc__)
    parser.add_argument("--csv", type=Path, default=TIMES, help="what it has is not measured again (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each type and measure, about (%(default)s)")
    arguments = parser.parse_args()
    try:
        device = choose_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    earlier = read_rows(arguments.csv, "ratio") if arguments.csv.exists() else []
    here = measure.machine(device)["machine"]
    if any(row["machine"] != here for row in earlier):
        parser.error(f"{arguments.csv} has times of {machine(arguments.csv)}, this is {here}: pass another --csv")
    known = {row["type"] for row in earlier}
    for group in rows([name for name in compared() if name not in known], device, arguments.seconds):
        append_rows(arguments.csv, group, list(group[0]))
    print(f"Written: {arguments.csv}")


if __name__ == "__main__":
    main()
