"""Layers that several projectors are built from."""

from __future__ import annotations

import torch
from torch import nn

from llava_projectors.projectors.recompute import recomputed, remember


def head_count(width: int) -> int:
    """Attention heads of 128 channels, or wider ones where that does not divide the width."""
    heads = max(1, width // 128)
    while width % heads:
        heads -= 1
    return heads


class TwoLayerMLP(nn.Sequential):
    """Linear, GELU, Linear: the shape of LLaVA-1.5's `mlp2x_gelu`, and of TokenPacker's key and value stacks.

    Values and parameter names of the plain `nn.Sequential`; the GELU's output is not kept for
    the backward pass.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        expand, activate, mix = self
        activated, made = remember(activate, expand(x))
        with recomputed(made):
            return mix(activated)


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one filter a channel; on a CPU, half precision is computed in float32.

    oneDNN has no fast backward pass for it in bfloat16: 24 ms against 2.4 ms in float32, for 4
    images of 24x24 patches and 1024 channels on two cores.
    """

    def __init__(self, channels: int, kernel_size: int, *, stride: int, padding: int) -> None:
        super().__init__(channels, channels, kernel_size, stride=stride, padding=padding, groups=channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H', W']."""
        if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), bias).to(x.dtype)
