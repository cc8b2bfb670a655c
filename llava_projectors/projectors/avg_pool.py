"""Average pooling: the plainest way to fewer visual tokens."""

from __future__ import annotations

from typing import Literal, Optional

import torch

from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.grid import average_regions
from llava_projectors.projectors.layers import TwoLayerMLP
from llava_projectors.projectors.registration import register_projector


@register_projector("avg_pool")
class AvgPool(Projector):
    """Mean of each region, then LLaVA-1.5's MLP; the "average pooling" of TokenPacker's table (arXiv 2407.02392).

    Our choice: pooling before the MLP, so that the MLP sees the reduced grid only. Where the
    stride does not divide the grid, a border region is the mean of the patches it has.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        stride: s, side of the region of patches that becomes one token.
        layers: hidden states to read, ascending; default the one that LLaVA selects.
    """

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        stride: Literal[2, 3, 4] = 2,
        layers: Optional[tuple[int, ...]] = None,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, stride)
        self.mlp = TwoLayerMLP(self.num_levels * mm_hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / stride)**2, D], in the dtype of the weights."""
        return self.mlp(average_regions(self.to_grid(features), self.stride).flatten(1, 2))
