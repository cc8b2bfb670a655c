"""Resampler: learned queries that attend to the whole picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.layers import by_rows, head_count, sine_positions
from llava_projectors.projectors.registration import register_projector


@register_projector("resampler")
class Resampler(Projector):
    """One layer of cross-attention from learned queries to all patches, as in Qwen-VL (arXiv 2308.12966, section 2.1).

    As there: two-dimensional sine and cosine positions on queries and keys, a LayerNorm before the
    attention and one behind it. Ours: positions are computed, not kept as a buffer, so that any
    grid will do; 144 queries by default, where Qwen-VL has 256; the queries are D wide, as there.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        num_queries: number of visual tokens, a square number: LLaVA lays tiles out in squares.
        layers: hidden states to read, ascending; default the one that LLaVA selects.

    Raises:
        ValueError: `num_queries` is not the square of a positive number.
    """

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        num_queries: int = 144,
        layers: Optional[tuple[int, ...]] = None,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, stride=1)
        self.query_side = _side(num_queries)
        self.num_heads = head_count(hidden_size)
        self.queries = nn.Parameter(torch.randn(num_queries, hidden_size) * 0.02)
        self.embed = nn.Linear(self.num_levels * mm_hidden_size, hidden_size, bias=False)
        self.norm_queries = nn.LayerNorm(hidden_size, eps=1e-6)
        self.norm_patches = nn.LayerNorm(hidden_size, eps=1e-6)
        self.to_query = nn.Linear(hidden_size, hidden_size)
        self.to_key = nn.Linear(hidden_size, hidden_size)
        self.to_value = nn.Linear(hidden_size, hidden_size)
        self.merge = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.readout = nn.Linear(hidden_size, hidden_size)

    @classmethod
    def output_side(cls, side: int, options: Mapping[str, Any]) -> int:
        """Side of the square of queries, whatever the grid.

        Raises:
            ValueError: `num_queries` is not a square.
        """
        return _side(options["num_queries"])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, num_queries, D], in the dtype of the weights."""
        side = self.to_grid(features).shape[1]
        patches = self.norm_patches(by_rows(self.embed, features))
        query = self.to_query(self.norm_queries(self.queries) + sine_positions(self.query_side, self.queries))
        key = by_rows(self.to_key, patches + sine_positions(side, patches))
        batch = features.shape[0]
        q, k, v = (
            t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (query.expand(batch, -1, -1), key, by_rows(self.to_value, patches))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return by_rows(self.readout, self.norm(by_rows(self.merge, out)))


def _side(num_queries: int) -> int:
    side = math.isqrt(max(0, num_queries))
    if side < 1 or side * side != num_queries:
        raise ValueError(f"num_queries={num_queries} must be a square number, such as 64 or 144")
    return side
