"""SAEP: depthwise separable convolution over aggregated multi-layer features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional

import torch
from torch import nn

from llava_projectors.projectors.base import Projector, multi_level_layers
from llava_projectors.projectors.grid import average_regions, pad_grid
from llava_projectors.projectors.layers import DepthwiseConv2d, TwoLayerMLP
from llava_projectors.projectors.registration import register_projector


@register_projector("saep")
class SAEP(Projector):
    """Spatial-Aware Efficient Projector, arXiv 2410.10319, as we read its abstract.

    From the paper: features of several layers of the vision tower, a modified depthwise
    separable convolution that keeps the spatial order, 75 % fewer visual tokens (stride 2).
    Our choices, each an option: which layers, the kernel size, the order of the two halves,
    the shortcut beside the depthwise half, the inner width. Ours without an option: one
    LayerNorm over the channels (eps 1e-6), and `mlp2x_gelu`'s shape as the readout. No option
    beats the defaults beyond the interval in the ablation on a small controlled task, table
    "saep" in benchmarks/results/spatial.md (stride 2): there a 3x3 kernel costs 1.0 point
    (-0.2 to 2.1), leaving the shortcut out 0.9 (-0.4 to 2.3); layers, order and inner width
    are within 0.6. Table "comparison" there: level with all tokens at a quarter of them.

        x = aggregate(features)                       [B, H, W, L*C] -> [B, H, W, inner]
        y = depthwise(x) + average of each region(x)                 -> [B, H/s, W/s, inner]
    (H/s rounded up; padded positions are zero to the convolution and do not count in the average)
        tokens = readout(norm(y))                                    -> [B, M, D]

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        stride: s, side of the region of patches that becomes one token.
        layers: hidden states to aggregate, ascending; default `multi_level_layers`.
        kernel_size: side of the depthwise kernel, at least the stride; default the smallest odd
            number from stride + 2. A kernel reaches over its region by (kernel_size - stride) patches.
        order: `pointwise_first` aggregates the layers on the full grid; `depthwise_first` runs
            the convolution on all L*C channels and aggregates on the reduced grid.
        shortcut: `average` adds each region's mean to the convolution; `none` does not.
        inner_size: width between aggregation and readout; default mm_hidden_size.

    Raises:
        ValueError: a kernel smaller than the stride, or an inner size below 1.
    """

    default_layers = staticmethod(multi_level_layers)

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        stride: Literal[2, 3, 4] = 2,
        layers: Optional[tuple[int, ...]] = None,
        kernel_size: Optional[int] = None,
        order: Literal["pointwise_first", "depthwise_first"] = "pointwise_first",
        shortcut: Literal["average", "none"] = "average",
        inner_size: Optional[int] = None,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, stride)
        if kernel_size is None:
            kernel_size = stride + 2 + (stride + 1) % 2
        if kernel_size < stride:
            raise ValueError(f"kernel_size={kernel_size} leaves patches out: it must be at least stride={stride}")
        if inner_size is None:
            inner_size = mm_hidden_size
        if inner_size < 1:
            raise ValueError(f"inner_size={inner_size} must be at least 1")
        self.kernel_size = kernel_size
        self.inner_size = inner_size
        self.order = order
        self.shortcut = shortcut
        in_channels = self.num_levels * mm_hidden_size
        depthwise_channels = inner_size if order == "pointwise_first" else in_channels
        self.aggregate = nn.Linear(in_channels, inner_size)
        self.depthwise = DepthwiseConv2d(
            depthwise_channels,
            kernel_size,
            stride=stride,
            # Enough on each side that the output is exactly grid / stride.
            padding=(kernel_size - stride + 1) // 2,
        )
        self.norm = nn.LayerNorm(inner_size, eps=1e-6)
        self.readout = TwoLayerMLP(inner_size, hidden_size)

    @classmethod
    def output_side(cls, side: int, options: Mapping[str, Any]) -> int:
        """As every projector's; a kernel larger than the patch grid is an error too."""
        kernel_size = options.get("kernel_size")
        if kernel_size is not None and kernel_size > side:
            raise ValueError(f"kernel_size={kernel_size} is larger than {side}, the side of the patch grid")
        return super().output_side(side, options)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / stride)**2, D], in the dtype of the weights."""
        grid = self.to_grid(features)
        if self.order == "pointwise_first":
            grid = self.reduce(self.aggregate(grid))
        else:
            grid = self.aggregate(self.reduce(grid))
        return self.readout(self.norm(grid.flatten(1, 2)))

    def reduce(self, grid: torch.Tensor) -> torch.Tensor:
        """The strided half: [B, H, W, K] -> [B, ceil(H/s), ceil(W/s), K]."""
        # Channels stay innermost in memory, so both permutations are views.
        channels_first = pad_grid(grid, self.stride).permute(0, 3, 1, 2)
        out = self.depthwise(channels_first).permute(0, 2, 3, 1)
        return out + average_regions(grid, self.stride) if self.shortcut == "average" else out
