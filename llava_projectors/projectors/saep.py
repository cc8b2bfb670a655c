"""SAEP: depthwise separable convolution over aggregated multi-layer features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Optional

import torch
from torch import nn

from llava_projectors.projectors.base import Projector, multi_level_layers
from llava_projectors.projectors.convolutions import LevelConvolution, LevelGate, LevelNorm, SeparableBlock
from llava_projectors.projectors.grid import average_regions, max_regions, pad_grid
from llava_projectors.projectors.layers import DepthwiseConv2d, TwoLayerMLP, sine_positions
from llava_projectors.projectors.registration import register_projector


@register_projector("saep")
class SAEP(Projector):
    """Spatial-Aware Efficient Projector, arXiv 2410.10319, as we read its abstract.

    From the paper: features of several layers of the vision tower, a modified depthwise
    separable convolution that keeps the spatial order, 75 % fewer visual tokens (stride 2).
    Our choices, each an option: which layers, the kernel size, the order of the two halves,
    the shortcut beside the depthwise half, the inner width. Ours without an option: one
    LayerNorm over the channels (eps 1e-6), and `mlp2x_gelu`'s shape as the readout. No option
    of these beats the defaults beyond the interval in the ablation on a small controlled task,
    table "saep" in benchmarks/results/spatial.md (stride 2): there a 3x3 kernel costs 1.0 point
    (-0.2 to 2.1), leaving the shortcut out 0.9 (-0.4 to 2.3); layers, order and inner width
    are within 0.6. Table "comparison" there: level with all tokens at a quarter of them.

        x = aggregate(features)                       [B, H, W, L*C] -> [B, H, W, inner]
        y = depthwise(x) + average of each region(x)                 -> [B, H/s, W/s, inner]
    (H/s rounded up; padded positions are zero to the convolution and do not count in the average)
        tokens = readout(norm(y))                                    -> [B, M, D]

    Further options are off by default. In the same study (table "comparison") one block before the
    stride, four behind it, `shortcut=max` and `level_norm=layer` on two layers are ahead of every
    other type, and at a harder scale, with one seed, of those that were run there. The default stays
    until that has more seeds.
    `shortcut=max`: what one patch of a region says is not diluted;
    `blocks_before` and `blocks_after`: neighbours are mixed more than once, as in Honeybee (arXiv
    2312.06742); `dilations`: these blocks see further, as mixed kernel sizes would (arXiv
    1907.09595), at the cost of 3x3; `level_norm`: no layer of the tower outweighs another by its
    magnitude, as in COMM (arXiv 2310.08825); `level_kernel`: each layer of the tower gets a spatial
    filter of its own; `gate`: which layers matter may differ by place; `positions`: the convolution
    alone tells a token only how near the border it is; `readout_size`: at stride 2 more than half
    of all operations are there.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        stride: s, side of the region of patches that becomes one token.
        layers: hidden states to aggregate, ascending; default `multi_level_layers`.
        kernel_size: side of the depthwise kernel, at least the stride; default the smallest odd
            number from stride + 2. A kernel reaches over its region by (kernel_size - stride) patches.
        order: `pointwise_first` aggregates the layers on the full grid; `depthwise_first` runs
            the convolution on all L*C channels and aggregates on the reduced grid.
        shortcut: what is added to the convolution, channel by channel: `average`, each region's mean;
            `max`, its largest value; `none`, nothing.
        inner_size: width between aggregation and readout; default mm_hidden_size.
        blocks_before: residual `SeparableBlock`s on the full grid, between aggregation and stride.
        blocks_after: the same on the reduced grid, before the norm.
        dilations: of the 3x3 kernels in these blocks; several divide the channels among them.
        level_norm: `layer` normalises each layer of the tower by itself (`LevelNorm`), before everything else.
        level_kernel: side, an odd number, of a depthwise convolution beside a shortcut on all L*C
            channels, behind `level_norm`; 0 for none.
        gate: `softmax` weighs the layers at each patch by a learned score, equal at the start.
        positions: `sine` adds `sine_positions` to what the readout reads.
        readout_size: inner width of the readout; default hidden_size.

    Raises:
        ValueError: a kernel smaller than the stride, a size or dilation below 1, a negative or even
            number where none can be, more dilations than channels, dilations without a block, or
            blocks before the stride where the layers are aggregated behind it.
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
        shortcut: Literal["average", "max", "none"] = "average",
        inner_size: Optional[int] = None,
        blocks_before: int = 0,
        blocks_after: int = 0,
        dilations: tuple[int, ...] = (1,),
        level_norm: Literal["none", "layer"] = "none",
        level_kernel: int = 0,
        gate: Literal["none", "softmax"] = "none",
        positions: Literal["none", "sine"] = "none",
        readout_size: Optional[int] = None,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, stride)
        if kernel_size is None:
            kernel_size = default_kernel_size(stride)
        if kernel_size < stride:
            raise ValueError(f"kernel_size={kernel_size} leaves patches out: it must be at least stride={stride}")
        self.kernel_size = kernel_size
        self.inner_size = mm_hidden_size if inner_size is None else inner_size
        self.readout_size = hidden_size if readout_size is None else readout_size
        for name in ("inner_size", "readout_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if blocks_before and order == "depthwise_first":
            raise ValueError(f"blocks_before={blocks_before} needs order=pointwise_first; or pass blocks_after")
        if dilations != (1,) and not (blocks_before or blocks_after):
            raise ValueError(f"dilations={'+'.join(map(str, dilations))} needs blocks_before or blocks_after")
        self.order = order
        self.shortcut = shortcut
        self.positions = positions
        in_channels = self.num_levels * mm_hidden_size
        depthwise_channels = self.inner_size if order == "pointwise_first" else in_channels
        self.aggregate = nn.Linear(in_channels, self.inner_size)
        self.depthwise = DepthwiseConv2d(
            depthwise_channels,
            kernel_size,
            stride=stride,
            # Enough on each side that the output is exactly grid / stride.
            padding=(kernel_size - stride + 1) // 2,
        )
        self.norm = nn.LayerNorm(self.inner_size, eps=1e-6)
        self.readout = TwoLayerMLP(self.inner_size, hidden_size, self.readout_size)
        # Without their options, these are empty: no parameter, no name, no random number drawn.
        self.levels = nn.Sequential()
        if level_norm == "layer":
            self.levels.append(LevelNorm(self.num_levels))
        if level_kernel:
            self.levels.append(LevelConvolution(in_channels, level_kernel))
        if gate == "softmax":
            self.levels.append(LevelGate(self.num_levels, mm_hidden_size))
        self.before = _blocks("blocks_before", blocks_before, self.inner_size, dilations)
        self.after = _blocks("blocks_after", blocks_after, self.inner_size, dilations)

    @classmethod
    def output_side(cls, side: int, options: Mapping[str, Any]) -> int:
        """As every projector's; a kernel larger than the patch grid is an error too.

        The default for a stride never is: a checkpoint's config gives it as a number.
        """
        kernel_size = options.get("kernel_size")
        if kernel_size not in (None, default_kernel_size(options["stride"])) and kernel_size > side:
            raise ValueError(f"kernel_size={kernel_size} is larger than {side}, the side of the patch grid")
        return super().output_side(side, options)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / stride)**2, D], in the dtype of the weights."""
        grid = self.levels(self.to_grid(features))
        if self.order == "pointwise_first":
            grid = self.reduce(self.before(self.aggregate(grid)))
        else:
            grid = self.aggregate(self.reduce(grid))
        tokens = self.norm(self.after(grid).flatten(1, 2))
        if self.positions == "sine":
            tokens = tokens + sine_positions(grid.shape[1], tokens)
        return self.readout(tokens)

    def reduce(self, grid: torch.Tensor) -> torch.Tensor:
        """The strided half: [B, H, W, K] -> [B, ceil(H/s), ceil(W/s), K]."""
        # Channels stay innermost in memory, so both permutations are views.
        channels_first = pad_grid(grid, self.stride).permute(0, 3, 1, 2)
        out = self.depthwise(channels_first).permute(0, 2, 3, 1)
        if self.shortcut == "none":
            return out
        pool = max_regions if self.shortcut == "max" else average_regions
        return out + pool(grid, self.stride)


def _blocks(name: str, count: int, channels: int, dilations: tuple[int, ...]) -> nn.Sequential:
    if count < 0:
        raise ValueError(f"{name}={count} must be 0 or more")
    return nn.Sequential(*(SeparableBlock(channels, dilations) for _ in range(count)))


def default_kernel_size(stride: int) -> int:
    """The smallest odd number from stride + 2: 5, 5, 7 for stride 2, 3, 4."""
    return stride + 2 + (stride + 1) % 2
