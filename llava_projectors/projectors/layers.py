"""Layers that several projectors are built from."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import nn

from llava_projectors.projectors.recompute import recomputed, remember


def head_count(width: int, head_size: int = 128) -> int:
    """Attention heads of `head_size` channels, or wider ones where that does not divide the width."""
    heads = max(1, width // head_size)
    while width % heads:
        heads -= 1
    return heads


def sine_positions(side: int, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the row, then of the column, over the channels: [side*side, D], dtype and device as `like`.

    Both are counted in parts of the side, so that a query and the patches at its place agree.
    """
    channels = like.shape[-1]
    place = (torch.arange(side, device=like.device, dtype=torch.float32) + 0.5) / side
    # Wavelengths from the whole picture to about a patch of a 64x64 grid.
    frequency = 2 * math.pi * 64 ** (torch.arange(-(-channels // 4), device=like.device) / max(1, channels // 4))
    angles = place[:, None] * frequency
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = waves[:, None].expand(-1, side, -1)
    columns = waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1)[..., :channels].flatten(0, 1).to(like.dtype)


def by_rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A linear layer, called on [rows, channels]: [..., in_features] -> [..., out_features].

    What stands in for `nn.Linear` may take no grid: layers of bitsandbytes in 8 bits flatten three dimensions only.
    """
    return layer(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


class TwoLayerMLP(nn.Sequential):
    """Linear, GELU, Linear: the shape of LLaVA-1.5's `mlp2x_gelu`, and of TokenPacker's key and value stacks.

    Values and parameter names of the plain `nn.Sequential`; the GELU's output is not kept for
    the backward pass. `hidden_features`, the width between, is `out_features` unless given.
    """

    def __init__(self, in_features: int, out_features: int, hidden_features: Optional[int] = None) -> None:
        hidden = out_features if hidden_features is None else hidden_features
        super().__init__(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        expand, activate, mix = self
        activated, made = remember(activate, expand(x.flatten(0, -2)))
        with recomputed(made):
            return mix(activated).unflatten(0, x.shape[:-1])


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one filter per channel; on a CPU, half precision is computed in float32.

    oneDNN has no fast backward pass for it in bfloat16: 24 ms against 2.4 ms in float32, for 4
    images of 24x24 patches and 1024 channels on two cores.
    """

    def __init__(self, channels: int, kernel_size: int, *, stride: int, padding: int) -> None:
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
