"""LDPv2, the projector of MobileVLM V2: MLP, average pooling, and a convolution for positions."""

from __future__ import annotations

from typing import Literal, Optional

import torch

from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.grid import average_regions
from llava_projectors.projectors.layers import DepthwiseConv2d, TwoLayerMLP
from llava_projectors.projectors.registration import register_projector


@register_projector("ldpv2")
class LDPv2(Projector):
    """MobileVLM V2's lightweight downsample projector (arXiv 2402.03766, section 3.3).

    As there: two pointwise layers with a GELU on the full grid, average pooling, then a 3x3
    depthwise convolution beside a shortcut, which encodes positions. Ours: any stride, the
    pointwise convolutions written as the linear layers they are, border regions that average
    the patches they have.

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
        self.position = DepthwiseConv2d(hidden_size, 3, stride=1, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / stride)**2, D], in the dtype of the weights."""
        grid = average_regions(self.mlp(self.to_grid(features)), self.stride)
        position = self.position(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return (grid + position).flatten(1, 2)
