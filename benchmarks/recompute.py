"""Ways not to keep a GELU's output for the backward pass: time and peak memory of one training step of a projector.

    python -m benchmarks.recompute [--device cpu] [--csv benchmarks/results/recompute-cpu.csv]

kept         autograd keeps it; TokenPacker's region attention still makes its own tensors again
recomputed   `projectors/recompute.py`: what the package does
checkpoint   `torch.utils.checkpoint`, not reentrant, around the GELU and the layer after it; it stops early,
             by an exception inside that layer
whole        the same without stopping early, so that the hooks of that layer run to their end, as ZeRO-3 needs
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from benchmarks import measure
from benchmarks.speed.suites import forward_backward
from benchmarks.table import write_rows
from llava_projectors.projectors.layers import TwoLayerMLP
from llava_projectors.registry import build_projector

RESULTS = Path(__file__).parent / "results"
TYPES = ("saep", "tokenpacker")
BASELINE = "kept"


def kept(module: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """As `nn.Sequential`."""
    for layer in module:
        x = layer(x)
    return x


def with_checkpoint(module: nn.Sequential, x: torch.Tensor, early_stop: bool) -> torch.Tensor:
    """The GELU and the last layer in `torch.utils.checkpoint`."""
    expand, activate, mix = module
    with set_checkpoint_early_stop(early_stop):
        return checkpoint(lambda hidden: mix(activate(hidden)), expand(x), use_reentrant=False)


FORWARDS = {
    BASELINE: kept,
    "recomputed": TwoLayerMLP.forward,
    "checkpoint": lambda module, x: with_checkpoint(module, x, early_stop=True),
    "whole": lambda module, x: with_checkpoint(module, x, early_stop=False),
}


def steps(name: str, projector: nn.Module, features: torch.Tensor) -> tuple[measure.Function, measure.Function]:
    """`forward_backward` with the MLPs' forward replaced."""
    run, accumulate = forward_backward(projector, features)
    return _replaced(name, run), _replaced(name, accumulate)


def _replaced(name: str, run: measure.Function) -> measure.Function:
    def replaced() -> None:
        with mock.patch.object(TwoLayerMLP, "forward", FORWARDS[name]):
            run()

    return replaced


def measurements(
    projector_type: str, device: torch.device, widths: tuple[int, int] = (1024, 4096), seconds: float = 30.0
) -> Iterator[dict[str, Any]]:
    """One row for each way; `seconds` are for each, about."""
    projector = build_projector(projector_type, *widths).to(device)
    features = torch.randn(8, 576, projector.num_levels * widths[0], device=device)
    functions = {name: steps(name, projector, features) for name in FORWARDS}
    times = measure.interleave({name: run for name, (run, _) in functions.items()}, device, seconds)
    for name, (_, accumulate) in functions.items():
        low, middle, high = measure.quartiles([a / b for a, b in zip(times[name], times[BASELINE])])
        yield {
            "type": projector_type,
            "implementation": name,
            "rounds": len(times[name]),
            "ratio_q1": f"{low:.3f}",
            "ratio": f"{middle:.3f}",
            "ratio_q3": f"{high:.3f}",
            "peak_mib": round(measure.peak_bytes(accumulate, device) / 2**20, 1),
            **measure.machine(device),
        }


def main() -> None:
    """Parse the command line, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/recompute-DEVICE.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows: list[dict[str, Any]] = []
    for projector_type in TYPES:
        for row in measurements(projector_type, device):
            rows.append(row)
            print(*list(row.values())[:7], flush=True)
    write_rows(arguments.csv or RESULTS / f"recompute-{device.type}.csv", rows)


if __name__ == "__main__":
    main()
