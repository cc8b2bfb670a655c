"""What a type of the study would cost in LLaVA-1.5 7B: operations of a forward pass of the projector."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.spatial import sizes, vision
from benchmarks.spatial.scenes import NUM_PATCHES_PER_SIDE
from benchmarks.speed.flops import mlp2x_gelu
from benchmarks.speed.models import STOCK
from llava_projectors import registry

SIDE, WIDTH, HIDDEN_SIZE = 24, 1024, 4096  # of CLIP ViT-L/14 at 336 px and Vicuna-7B
# Options that are sizes of the study's own models: by how much they grow.
GROWTH = {
    "num_queries": (SIDE / NUM_PATCHES_PER_SIDE) ** 2,
    "inner_size": WIDTH / vision.WIDTH,
    "readout_size": HIDDEN_SIZE / sizes.SIZES.llm_width,
}


@cache
def part_of_stock(type_string: str) -> float:
    """Operations of the type as a part of `mlp2x_gelu`'s, as torch counts them."""
    if type_string == STOCK:
        return 1.0
    spec = registry.parse_spec(type_string)
    grown = {name: round(value * GROWTH[name]) for name, value in spec.options.items() if name in GROWTH}
    large = replace(spec, options={**spec.options, **grown})
    with torch.device("meta"):
        projector = registry.build_projector(str(large), WIDTH, HIDDEN_SIZE)
        features = torch.empty(1, SIDE**2, projector.num_levels * WIDTH)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        projector(features)
    return counter.get_total_flops() / mlp2x_gelu(SIDE, WIDTH, HIDDEN_SIZE).forward
