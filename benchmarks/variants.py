"""TokenPacker in the ways that were tried, beside one another: what was kept, what was dropped, and by how much.

    python -m benchmarks.variants [--device cpu] [--csv benchmarks/results/variants-cpu.csv]

patches   keys and values projected patch by patch, then torch's fused attention over the regions
regions   keys and values projected once per region, around the softmax: what was kept
products  keys and values projected patch by patch, elementwise products of views, no copy of a region
shared    as patches, and the first layers of keys and values as one matrix product
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F

from benchmarks import measure
from benchmarks.speed.models import NUM_PATCHES_PER_SIDE
from benchmarks.speed.suites import LLAVA_7B_WIDTHS, forward_backward, without_grad
from benchmarks.table import Row, write_rows
from llava_projectors.projectors.grid import to_regions
from llava_projectors.projectors.tokenpacker import RegionAttention, TokenPacker, downsample_bilinear

ROOT = Path(__file__).parents[1]
VARIANTS = ("patches", "regions", "products", "shared")


class Sizes(NamedTuple):
    """Of one kind of run: dtypes, batches, seconds for each variant, C and D."""

    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...]
    seconds: float
    widths: tuple[int, int]


SIZES = {
    "quick": Sizes((torch.float32,), (1,), 0.0, (128, 128)),
    "cpu": Sizes((torch.float32, torch.bfloat16), (1, 8), 1.5, LLAVA_7B_WIDTHS),
    "cuda": Sizes((torch.bfloat16,), (32, 8), 0.4, LLAVA_7B_WIDTHS),
}


class Patches(RegionAttention):
    """Every key and value is projected; torch's fused attention over copies of the regions."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stride: int) -> torch.Tensor:
        """For grids that the stride divides."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        heads = (self.num_heads, -1)
        q = F.linear(query, weights[0], biases[0]).unflatten(-1, heads)  # [B, h, w, n, d]
        k, v = (
            to_regions(F.linear(x, weight, bias), stride).unflatten(-1, heads)  # [B, h, s, w, s, n, d]
            for x, weight, bias in zip((key, value), weights[1:], biases[1:])
        )
        return self.out_proj(self.attend(q, k, v).reshape(query.shape))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[B*h*w, n, 1, d]"""
        k, v = (x.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q.flatten(0, 2).unsqueeze(2), k, v)


class Products(Patches):
    """Scores and sums as products of views."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[B, h, w, n, d]"""
        stride = k.shape[2]
        scaled = q[:, :, None, :, None] * q.shape[-1] ** -0.5
        scores = (k * scaled).sum(-1).transpose(2, 3).flatten(3, 4).softmax(3)
        weight = scores.unflatten(3, (stride, stride)).transpose(2, 3).unsqueeze(-1)
        return (v * weight).sum((2, 4))


class Shared(TokenPacker):
    """One matrix product for both first layers; it reads their weights, which a quantised model has not got."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """As TokenPacker."""
        grid = self.to_grid(features)
        query = self.ln_q_1(self.q_proj_1(downsample_bilinear(grid[..., -self.mm_hidden_size :], self.stride)))
        (k_in, activate, k_out), (v_in, _, v_out) = self.k_proj_1, self.v_proj_1
        weight, bias = (torch.cat([getattr(k_in, name), getattr(v_in, name)]) for name in ("weight", "bias"))
        k, v = activate(F.linear(grid, weight, bias)).chunk(2, -1)
        out = self.clip_attn(query, self.ln_k_1(k_out(k)), self.ln_v_1(v_out(v)), self.stride)
        return self.mlp(out.flatten(1, 2))


def make(variant: str, scale_factor: Any, widths: tuple[int, int]) -> TokenPacker:
    """A TokenPacker of C and D channels."""
    model = (Shared if variant == "shared" else TokenPacker)(*widths, scale_factor=scale_factor)
    attention: Any = model.clip_attn
    attention.__class__ = {"regions": RegionAttention, "products": Products}.get(variant, Patches)
    return model


def compare(models: dict[str, TokenPacker], features: torch.Tensor, name: str, seconds: float) -> list[Row]:
    """One row for each variant, from one interleaved run; on CUDA, of replays of their graphs."""
    functions = {
        variant: without_grad(model, features) if name == "forward" else forward_backward(model, features)[0]
        for variant, model in models.items()
    }
    device = features.device
    graphs = {variant: measure.as_graph(function, device) for variant, function in functions.items()}
    times = measure.interleave(graphs, device, seconds)
    rows = []
    for variant in VARIANTS:
        low, middle, high = measure.quartiles([a / b for a, b in zip(times[variant], times["patches"])])
        rows.append(
            {
                "measure": name,
                "variant": variant,
                "rounds": len(times[variant]),
                "median_s": f"{statistics.median(times[variant]):.5g}",
                "ratio_to_patches": f"{middle:.3f}",
                "ratio_q1": f"{low:.3f}",
                "ratio_q3": f"{high:.3f}",
            }
        )
    return rows


def groups(sizes: Sizes, device: torch.device) -> Iterator[list[Row]]:
    """The rows of every comparison: by dtype, scale factor, batch, with and without backward pass."""
    dtypes, left_out = measure.without_slow_dtypes(sizes.dtypes, device)
    for line in left_out:
        print(f"LEFT OUT, {line}")
    for dtype, scale_factor in itertools.product(dtypes, (2, 3, 4)):
        models = {variant: make(variant, scale_factor, sizes.widths).to(device, dtype) for variant in VARIANTS}
        for batch in sizes.batches:
            features = torch.randn(batch, NUM_PATCHES_PER_SIDE**2, 4 * sizes.widths[0], device=device).to(dtype)
            facts = {"scale_factor": scale_factor, "dtype": str(dtype).removeprefix("torch."), "batch": batch}
            for name in ("forward", "forward+backward"):
                found = compare(models, features, name, sizes.seconds)
                ratios = (f"{row['variant']} {row['ratio_to_patches']}" for row in found)
                print(*facts.values(), name, *ratios, flush=True)
                yield [{**facts, **row, **measure.machine(device)} for row in found]


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Parse the command line, measure, write after every group, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute on 2 cores")
    parser.add_argument("--csv", type=Path, help="default: benchmarks/results/variants-DEVICE.csv")
    parsed = parser.parse_args(arguments)
    path = parsed.csv or ROOT / "benchmarks" / "results" / f"variants-{parsed.device}.csv"
    rows: list[Row] = []
    for found in groups(SIZES["quick" if parsed.quick else parsed.device], torch.device(parsed.device)):
        rows += found
        write_rows(path, rows)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
