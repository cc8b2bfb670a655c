"""STF: neighbouring tokens of several layers joined, and fused by an MLP."""

from __future__ import annotations

from typing import Literal, Optional

import torch

from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.grid import pad_grid, to_regions
from llava_projectors.projectors.layers import TwoLayerMLP
from llava_projectors.projectors.registration import register_projector

NUM_LEVELS = 8


def every_eighth(selected: int) -> tuple[int, ...]:
    """Eight hidden states at even distances, `selected` the last: 3, 6, ... 21 and 23 of CLIP ViT-L, as published.

    Example:
        >>> every_eighth(23)
        (3, 6, 9, 12, 15, 18, 21, 23)
    """
    return tuple(-(-level * selected // NUM_LEVELS) for level in range(1, NUM_LEVELS + 1))


@register_projector("stf")
class STF(Projector):
    """Multi-block and spatial token fusion of LLaVA-STF (arXiv 2506.07138; code visresearch/LLaVA-STF at 0b84925).

    As in the code: an MLP of inner width 4*C joins the layers of each patch to C channels (multi-block
    fusion), the s*s patches of a region are laid side by side, and an MLP of inner width 16*C makes
    them one token (spatial fusion); eight layers, a GELU inside each MLP. The figure in the
    repository has another GELU behind each MLP, the code has none. The paper's text was not at hand.

    Ours: strides 3 and 4, zeros for the patches that a border region lacks, layers in ascending
    order (there the selected one comes first), a region's patches one behind the other (there
    channel by channel), `inner_size`. There the two MLPs are separate modules of a changed LLaVA;
    released weights do not load. Rearranged, the same weights give the code's tokens (relative
    difference 7e-7 in float32).

        x = join(features)                    [B, H, W, L*C] -> [B, H, W, C]
        tokens = fuse(regions of x)           [B, M, s*s*C]  -> [B, M, D], M = ceil(H / s)**2

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        stride: s, side of the region of patches that becomes one token.
        layers: hidden states to join, ascending; default `every_eighth`, which needs a tower of
            nine layers or more.
        inner_size: inner width of the spatial fusion; default 16 * mm_hidden_size, as published for
            stride 2.

    Raises:
        ValueError: an inner size below 1.

    Example:
        >>> projector = STF(8, 16, layers=(2, 5, 7))
        >>> projector(torch.zeros(1, 6 * 6, 3 * 8)).shape
        torch.Size([1, 9, 16])
    """

    default_layers = staticmethod(every_eighth)

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        stride: Literal[2, 3, 4] = 2,
        layers: Optional[tuple[int, ...]] = None,
        inner_size: Optional[int] = None,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, stride)
        if inner_size is None:
            inner_size = 16 * mm_hidden_size
        if inner_size < 1:
            raise ValueError(f"inner_size={inner_size} must be at least 1")
        self.inner_size = inner_size
        self.join = TwoLayerMLP(self.num_levels * mm_hidden_size, mm_hidden_size, 4 * mm_hidden_size)
        self.fuse = TwoLayerMLP(stride * stride * mm_hidden_size, hidden_size, inner_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / stride)**2, D], in the dtype of the weights."""
        regions = to_regions(pad_grid(self.join(self.to_grid(features)), self.stride), self.stride)
        return self.fuse(regions.transpose(2, 3).flatten(3).flatten(1, 2))
