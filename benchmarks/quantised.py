"""8- and 4-bit weights by bitsandbytes: what they change in the visual tokens of every type, beside LLaVA-1.5's MLP.

    python -m benchmarks.quantised [--csv benchmarks/results/quantised.csv]

Fresh weights and unit noise, at the widths of CLIP-L and a narrow LLM. On a CPU, with bitsandbytes 0.50 or newer.
"""

from __future__ import annotations

import argparse
import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.speed.candidates import STOCK, Subject
from benchmarks.speed.suites import make_projector
from benchmarks.table import write_rows

RESULTS = Path(__file__).parent / "results"
TYPES = (
    STOCK,
    "saep",
    "tokenpacker",
    "avg_pool",
    "pixel_shuffle",
    "ldpv2",
    "c_abstractor",
    "resampler",
    "stf",
    "delta",
)
BITS = (8, 4)
WIDTHS = (1024, 512)
SIDE = 12


def quantised(module: nn.Module, bits: int) -> nn.Module:
    """A copy with bitsandbytes' layers in the place of every `nn.Linear`, with the settings of LLaVA's loader."""
    bnb: Any = importlib.import_module("bitsandbytes")
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            weight = linear.weight.data
            if bits == 8:
                layer: Any = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
                layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            else:
                layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float16, quant_type="nf4")
                layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                layer.support_avx512bf16_for_cpu = False  # it would take multiples of 32 output channels only
            layer.bias = linear.bias
            parent._modules[name] = layer
    return module.to("cpu").eval()  # which packs the weights


def relative_errors(type_string: str, widths: tuple[int, int] = WIDTHS, side: int = SIDE) -> dict[int, float]:
    """Of the tokens in 8 and in 4 bits, against the same float16 weights computed in float32."""
    torch.manual_seed(0)
    projector = make_projector(Subject(type_string), *widths).half()
    features = torch.randn(2, side * side, getattr(projector, "num_levels", 1) * widths[0]).half()
    with torch.no_grad():
        exact = copy.deepcopy(projector).float()(features.float())
        tokens = {bits: quantised(projector, bits)(features).float() for bits in BITS}
    return {bits: float((value - exact).norm() / exact.norm()) for bits, value in tokens.items()}


def measurements() -> list[dict[str, Any]]:
    """One row for each type."""
    rows = []
    for type_string in TYPES:
        errors = {f"error_{bits}bit": f"{error:.4f}" for bits, error in relative_errors(type_string).items()}
        rows.append({"type": type_string, **errors, "bitsandbytes": measure.version("bitsandbytes")})
    return [{**row, **measure.machine(torch.device("cpu"))} for row in rows]


def main() -> None:
    """Write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=RESULTS / "quantised.csv")
    write_rows(parser.parse_args().csv, measurements())


if __name__ == "__main__":
    main()
