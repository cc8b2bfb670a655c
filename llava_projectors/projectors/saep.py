"""SAEP: depthwise separable convolution over aggregated multi-layer features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Optional

import torch
from torch import nn

from llava_projectors.projectors.base import Projector, middle_and_selected
from llava_projectors.projectors.convolutions import LevelNorm, SeparableBlock
from llava_projectors.projectors.grid import average_regions, max_regions, pad_grid
from llava_projectors.projectors.layers import DepthwiseConv2d, TwoLayerMLP, by_rows
from llava_projectors.projectors.registration import register_projector


@register_projector("saep")
class SAEP(Projector):
    """Spatial-Aware Efficient Projector, arXiv 2410.10319, as we read its abstract.

    From the paper: features of several layers of the vision tower, a modified depthwise
    separable convolution that keeps the spatial order, 75 % fewer visual tokens (stride 2).
    Everything else is our choice. All of it has an option, except the LayerNorm over the channels
    before the readout (eps 1e-6) and the readout's shape, which is that of `mlp2x_gelu`.

        x = aggregate(level_norm(features))           [B, H, W, L*C] -> [B, H, W, inner]
        x = before(x)                                                -> [B, H, W, inner]
        y = depthwise(x) + largest of each region(x)                 -> [B, H/s, W/s, inner]
    (H/s rounded up; padded positions are zero to the convolution and the shortcut does not see them)
        tokens = readout(norm(after(y)))                             -> [B, M, D]

    What each part is for:
    `layers`: the selected layer has lost detail that one in the middle of the tower still has;
    `level_norm`: no layer outweighs another by its magnitude, as in COMM (arXiv 2310.08825);
    `blocks_before` and `blocks_after`: neighbours are mixed more than once, as in Honeybee (arXiv
    2312.06742); `shortcut=max`: what one patch of a region says is not diluted.
    For those who want it cheaper: `order=depthwise_first` aggregates on the reduced grid, and a
    `readout_size` of half the LLM's width saves a quarter of all operations at stride 2.

    `preset=plain` is the form nearest to the abstract: the separable convolution and nothing beside
    it but the mean of each region.

    The defaults were chosen in a study on a controlled task, at two scales (benchmarks/spatial/README.md).
    There they are ahead of every other type of this package, and of `preset=plain`.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        stride: s, side of the region of patches that becomes one token.
        layers: hidden states to aggregate, ascending; default `middle_and_selected`.
        kernel_size: side of the depthwise kernel, at least the stride; default the smallest odd
            number from stride + 2. A kernel reaches over its region by (kernel_size - stride) patches.
        order: `pointwise_first` aggregates the layers on the full grid; `depthwise_first` runs
            the convolution on all L*C channels and aggregates on the reduced grid.
        shortcut: what is added to the convolution, channel by channel: `max`, each region's largest
            value; `average`, its mean; `none`, nothing.
        inner_size: width between aggregation and readout; default mm_hidden_size.
        blocks_before: residual `SeparableBlock`s on the full grid, between aggregation and stride;
            default 1, with `depthwise_first` 0.
        blocks_after: the same on the reduced grid, before the norm.
        level_norm: `layer` normalises each layer of the tower by itself (`LevelNorm`), before everything
            else; or `none`.
        readout_size: inner width of the readout; default hidden_size.

    Raises:
        ValueError: a kernel smaller than the stride, a size below 1, a negative number of blocks, or
            blocks before the stride where the layers are aggregated behind it.
    """

    default_layers = staticmethod(middle_and_selected)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "plain": {"blocks_before": 0, "blocks_after": 0, "level_norm": "none", "shortcut": "average"},
    }
    without_record: ClassVar[Mapping[str, Any]] = presets["plain"]
    removed_options: ClassVar[Mapping[str, Any]] = {
        "dilations": [1],
        "level_kernel": 0,
        "gate": "none",
        "positions": "none",
    }

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        stride: Literal[2, 3, 4] = 2,
        layers: Optional[tuple[int, ...]] = None,
        kernel_size: Optional[int] = None,
        order: Literal["pointwise_first", "depthwise_first"] = "pointwise_first",
        shortcut: Literal["average", "max", "none"] = "max",
        inner_size: Optional[int] = None,
        blocks_before: Optional[int] = None,
        blocks_after: int = 4,
        level_norm: Literal["none", "layer"] = "layer",
        readout_size: Optional[int] = None,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, stride)
        self.kernel_size = default_kernel_size(stride) if kernel_size is None else kernel_size
        self.inner_size = mm_hidden_size if inner_size is None else inner_size
        self.readout_size = hidden_size if readout_size is None else readout_size
        is_reduced_first = order == "depthwise_first"
        self.blocks_before = int(not is_reduced_first) if blocks_before is None else blocks_before
        _check_sizes(self, is_reduced_first, blocks_after)
        self.order = order
        self.shortcut = shortcut
        in_channels = self.num_levels * mm_hidden_size
        # In the order of the forward pass, so that `projector[-1]` is the last linear layer.
        self.levels = LevelNorm(self.num_levels) if level_norm == "layer" else nn.Identity()
        self.aggregate = nn.Linear(in_channels, self.inner_size)
        self.before = _blocks(self.blocks_before, self.inner_size)
        self.depthwise = DepthwiseConv2d(
            in_channels if is_reduced_first else self.inner_size,
            self.kernel_size,
            stride=stride,
            # Enough on each side that the output is exactly grid / stride.
            padding=(self.kernel_size - stride + 1) // 2,
        )
        self.after = _blocks(blocks_after, self.inner_size)
        self.norm = nn.LayerNorm(self.inner_size, eps=1e-6)
        self.readout = TwoLayerMLP(self.inner_size, hidden_size, self.readout_size)

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
            grid = self.reduce(self.before(by_rows(self.aggregate, grid)))
        else:
            grid = by_rows(self.aggregate, self.reduce(grid))
        return self.readout(self.norm(self.after(grid).flatten(1, 2)))

    def reduce(self, grid: torch.Tensor) -> torch.Tensor:
        """The strided half: [B, H, W, K] -> [B, ceil(H/s), ceil(W/s), K]."""
        # Channels stay innermost in memory, so both permutations are views.
        channels_first = pad_grid(grid, self.stride).permute(0, 3, 1, 2)
        out = self.depthwise(channels_first).permute(0, 2, 3, 1)
        if self.shortcut == "none":
            return out
        pool = max_regions if self.shortcut == "max" else average_regions
        return out + pool(grid, self.stride)


def _check_sizes(projector: SAEP, is_reduced_first: bool, blocks_after: int) -> None:
    """Raise a ValueError for sizes of which no projector can be made."""
    if projector.kernel_size < projector.stride:
        raise ValueError(
            f"kernel_size={projector.kernel_size} leaves patches out: it must be at least stride={projector.stride}"
        )
    for name in ("inner_size", "readout_size"):
        if getattr(projector, name) < 1:
            raise ValueError(f"{name}={getattr(projector, name)} must be at least 1")
    for name, count in (("blocks_before", projector.blocks_before), ("blocks_after", blocks_after)):
        if count < 0:
            raise ValueError(f"{name}={count} must be 0 or more")
    if projector.blocks_before and is_reduced_first:
        raise ValueError(f"blocks_before={projector.blocks_before} needs order=pointwise_first; or pass blocks_after")


def _blocks(count: int, channels: int) -> nn.Sequential:
    return nn.Sequential(*(SeparableBlock(channels) for _ in range(count)))


def default_kernel_size(stride: int) -> int:
    """The smallest odd number from stride + 2: 5, 5, 7 for stride 2, 3, 4."""
    return stride + 2 + (stride + 1) % 2
