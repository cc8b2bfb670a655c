"""What SAEP's options are built from: residual separable blocks, and what happens to each layer of the tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.layers import DepthwiseConv2d


class SeparableBlock(nn.Module):
    """x + pointwise(GELU(depthwise(LN(x)))): [B, H, W, C] -> the same.

    A depthwise separable convolution (arXiv 1610.02357) in a residual branch, with norm and GELU
    as in ConvNeXt (arXiv 2201.03545), which has a wider pointwise half.

    Args:
        channels: C.
        dilations: of the 3x3 kernels. The channels are divided evenly among them, so that several
            reach as far as kernels of several sizes.

    Raises:
        ValueError: a dilation below 1, or more dilations than channels.

    Example:
        >>> SeparableBlock(8, dilations=(1, 2))(torch.zeros(1, 6, 6, 8)).shape
        torch.Size([1, 6, 6, 8])
    """

    def __init__(self, channels: int, dilations: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        given = "dilations=" + "+".join(map(str, dilations))
        if min(dilations) < 1:
            raise ValueError(f"{given} must be at least 1 each")
        if len(dilations) > channels:
            raise ValueError(f"{given} are more than the {channels} channels")
        count = len(dilations)
        self.sizes = [(channels + part) // count for part in range(count)]
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.depthwise = nn.ModuleList(
            DepthwiseConv2d(size, 3, stride=1, padding=dilation, dilation=dilation)
            for size, dilation in zip(self.sizes, dilations)
        )
        self.pointwise = nn.Linear(channels, channels)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Shapes as above."""
        parts = self.norm(grid).permute(0, 3, 1, 2).split(self.sizes, dim=1)
        convolved = [layer(part) for layer, part in zip(self.depthwise, parts)]
        # torch.cat copies even a single tensor.
        joined = torch.cat(convolved, dim=1) if len(convolved) > 1 else convolved[0]
        return grid + self.pointwise(F.gelu(joined.permute(0, 2, 3, 1)))


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


class LevelConvolution(nn.Module):
    """x + depthwise(x) on all layers of the tower: [B, H, W, L*C] -> the same.

    Raises:
        ValueError: an even or negative kernel size.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"level_kernel={kernel_size} must be an odd number, or 0 for none")
        self.depthwise = DepthwiseConv2d(channels, kernel_size, stride=1, padding=kernel_size // 2)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Shapes as above."""
        return grid + self.depthwise(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class LevelGate(nn.Module):
    """Weighs the layers of the tower at each patch, by L times a softmax over L scores: [B, H, W, L*C] -> the same.

    The scores start at zero, so the weights at one. They are read off the normalised features,
    because those of CLIP have channels a thousand times larger than others.
    """

    def __init__(self, num_levels: int, channels: int) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.norm = nn.LayerNorm(num_levels * channels, eps=1e-6)
        self.score = nn.Linear(num_levels * channels, num_levels)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Shapes as above."""
        # Autocast would cast for a linear layer, not for a norm.
        normalised = self.norm(grid.to(self.norm.weight.dtype))
        weights = self.num_levels * self.score(normalised).softmax(-1)
        return (grid.unflatten(-1, (self.num_levels, -1)) * weights[..., None]).flatten(-2)
