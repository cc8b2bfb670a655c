"""C-Abstractor, the convolutional projector of Honeybee."""

from __future__ import annotations

from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.grid import average_regions
from llava_projectors.projectors.layers import DepthwiseConv2d, TwoLayerMLP, by_rows
from llava_projectors.projectors.registration import register_projector


@register_projector("c_abstractor")
class CAbstractor(Projector):
    """Residual bottlenecks, average pooling, residual bottlenecks, MLP: Honeybee (arXiv 2312.06742, section 3.2).

    As there: `depth` blocks on each side of the pooling, squeeze-and-excitation in each. Ours:
    LayerNorm over channels, because a batch norm's statistics are buffers, which LLaVA's adapter
    files lose; depthwise in place of grouped convolutions; no learned position embedding, which
    would fix the grid; any stride, border regions that average the patches they have.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        stride: s, side of the region of patches that becomes one token.
        layers: hidden states to read, ascending; default the one that LLaVA selects.
        depth: blocks before the pooling, and again behind it; Honeybee has 3.

    Raises:
        ValueError: a depth below 1.
    """

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        stride: Literal[2, 3, 4] = 2,
        layers: Optional[tuple[int, ...]] = None,
        depth: int = 3,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, stride)
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self.embed = nn.Linear(self.num_levels * mm_hidden_size, mm_hidden_size)
        self.before = nn.Sequential(*(Bottleneck(mm_hidden_size) for _ in range(depth)))
        self.after = nn.Sequential(*(Bottleneck(mm_hidden_size) for _ in range(depth)))
        self.readout = TwoLayerMLP(mm_hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / stride)**2, D], in the dtype of the weights."""
        grid = self.before(by_rows(self.embed, self.to_grid(features)))
        return self.readout(self.after(average_regions(grid, self.stride)).flatten(1, 2))


class Bottleneck(nn.Module):
    """Pointwise, 3x3 depthwise, squeeze-and-excitation, pointwise, beside a shortcut: [B, H, W, C] -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, channels)
        self.depthwise = DepthwiseConv2d(channels, 3, stride=1, padding=1)
        self.squeeze = nn.Linear(channels, max(1, channels // 4))
        self.excite = nn.Linear(max(1, channels // 4), channels)
        self.contract = nn.Linear(channels, channels)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """One residual step."""
        hidden = F.silu(by_rows(self.expand, self.norm(grid)))
        hidden = F.silu(self.depthwise(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(hidden.mean((1, 2))))))
        return grid + by_rows(self.contract, hidden * gate[:, None, None])
