"""What SAEP is built from beside the strided convolution: residual separable blocks, and a norm for each layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.layers import DepthwiseConv2d, by_rows


class SeparableBlock(nn.Module):
    """x + pointwise(GELU(depthwise(LN(x)))): [B, H, W, C] -> the same.

    A depthwise separable convolution (arXiv 1610.02357) in a residual branch, with norm and GELU
    as in ConvNeXt (arXiv 2201.03545), which has a wider pointwise half.

    Example:
        >>> SeparableBlock(8)(torch.zeros(1, 6, 6, 8)).shape
        torch.Size([1, 6, 6, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        # A list of one: checkpoints name its weights `depthwise.0`.
        self.depthwise = nn.Sequential(DepthwiseConv2d(channels, 3, stride=1, padding=1))
        self.pointwise = nn.Linear(channels, channels)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Shapes as above."""
        convolved = self.depthwise(self.norm(grid).permute(0, 3, 1, 2))
        return grid + by_rows(self.pointwise, F.gelu(convolved.permute(0, 2, 3, 1)))


class LevelNorm(nn.Module):
    """Normalises each layer of the tower by itself, at each patch: [B, H, W, L*C] -> the same.

    A tower's residual stream grows with depth, so side by side the last layers outweigh those in
    the middle. COMM (arXiv 2310.08825) has a linear layer and then a norm for each. Ours is a
    LayerNorm without weights, before the one linear layer that reads all of them.
    """

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.num_levels = num_levels

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Shapes as above."""
        levels = grid.unflatten(-1, (self.num_levels, -1))
        return F.layer_norm(levels, levels.shape[-1:], eps=1e-6).flatten(-2)
