"""Pixel shuffle: the patches of a region side by side on the channel axis."""

from __future__ import annotations

from typing import Literal, Optional

import torch
from torch import nn

from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.grid import pad_grid, to_regions
from llava_projectors.projectors.layers import TwoLayerMLP
from llava_projectors.projectors.registration import register_projector


@register_projector("pixel_shuffle")
class PixelShuffle(Projector):
    """Space to depth, LayerNorm, MLP, as in InternVL 1.5 (arXiv 2404.16821, section 3.1).

    Nothing is thrown away: the first linear layer reads all s*s patches of a region. As there, the
    norm covers all s*s*C channels. Ours: strides 3 and 4 too, and zeros for the patches that a
    border region lacks.

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
        channels = stride * stride * self.num_levels * mm_hidden_size
        self.norm = nn.LayerNorm(channels)
        self.mlp = TwoLayerMLP(channels, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / stride)**2, D], in the dtype of the weights."""
        regions = to_regions(pad_grid(self.to_grid(features), self.stride), self.stride)
        tokens = regions.transpose(2, 3).flatten(3).flatten(1, 2)
        # Autocast would cast for a linear layer, not for a norm.
        return self.mlp(self.norm(tokens.to(self.norm.weight.dtype)))
