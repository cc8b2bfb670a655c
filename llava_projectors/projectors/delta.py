"""Delta-LLaVA: low-rank projections of multi-level features, point queries refined by attention and convolution."""

from __future__ import annotations

from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.base import Projector, multi_level_layers
from llava_projectors.projectors.layers import TwoLayerMLP, by_rows, head_count, sine_positions
from llava_projectors.projectors.registration import register_projector
from llava_projectors.projectors.tokenpacker import RegionAttention, downsample_bilinear


@register_projector("delta")
class Delta(Projector):
    """Delta-LLaVA (arXiv 2512.18910, WACV 2026; code mzamini92/Delta-LLaVA at e5cd91a).

    TokenPacker's region attention, with two changes. The projections of queries, keys and values
    are a matrix plus one of low rank, then GELU and LayerNorm (`DeltaProjection`). The downsampled
    queries pass a block of attention over the whole picture and convolution (`SpecializationBlock`,
    from Next-ViT, arXiv 2207.05501) and get positions before they are projected.

    Next-ViT's batch norms hold statistics in buffers, which LLaVA's adapter files lose. The code at
    e5cd91a has LayerNorm in the place of two of them and nothing in the place of the others, and so
    has this. The paper's text was not at hand.

    Ours: one LayerNorm where the code has two in a row; no stochastic depth (0.1 there), so that a
    step repeats itself; positions in parts of the picture, computed for any grid, where the code
    keeps a 24x24 table and interpolates it; narrower heads for narrow towers; border regions as
    in `tokenpacker`. Released weights do not load; rearranged, and with these positions, the code
    at e5cd91a gives the same tokens (width 1024, 24x24 patches, relative difference 5e-7 in float32).

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower, at least 2.
        hidden_size: D, width of the LLM.
        scale_factor: s, side of the region of patches that becomes one token.
        layers: hidden states for keys and values, ascending; default `multi_level_layers`, as published.
        rank: of the low-rank part of each projection.

    Raises:
        ValueError: a rank below 1.

    Example:
        >>> projector = Delta(8, 16, layers=(3, 7))
        >>> projector(torch.zeros(1, 6 * 6, 2 * 8)).shape
        torch.Size([1, 9, 16])
    """

    default_layers = staticmethod(multi_level_layers)
    stride_option = "scale_factor"

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        scale_factor: Literal[2, 3, 4] = 2,
        layers: Optional[tuple[int, ...]] = None,
        rank: int = 16,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, scale_factor)
        if rank < 1:
            raise ValueError(f"rank={rank} must be at least 1")
        in_channels = self.num_levels * mm_hidden_size
        self.refine = SpecializationBlock(mm_hidden_size)
        self.to_query = DeltaProjection(mm_hidden_size, mm_hidden_size, rank)
        self.to_key = DeltaProjection(in_channels, mm_hidden_size, rank)
        self.to_value = DeltaProjection(in_channels, mm_hidden_size, rank)
        self.attend = RegionAttention(mm_hidden_size, head_count(mm_hidden_size))
        self.mlp = TwoLayerMLP(mm_hidden_size, hidden_size)
        self.apply(_init_weights)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / scale_factor)**2, D], in the dtype of the weights."""
        grid = self.to_grid(features)
        coarse = self.refine(downsample_bilinear(grid[..., -self.mm_hidden_size :], self.stride))
        query = self.to_query(coarse + sine_positions(coarse.shape[1], coarse).view(coarse.shape[1:]))
        return self.mlp(self.attend(query, self.to_key(grid), self.to_value(grid), self.stride).flatten(1, 2))


class DeltaProjection(nn.Module):
    """LayerNorm(GELU((W + U V) x)), U V of rank `rank`: [..., in_features] -> [..., out_features].

    Computed as W x + U (V x), which never holds U V.
    """

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.shared = nn.Linear(in_features, out_features, bias=False)
        self.narrow = nn.Linear(in_features, rank, bias=False)
        self.widen = nn.Linear(rank, out_features, bias=False)
        self.norm = nn.LayerNorm(out_features, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes as above."""
        return self.norm(F.gelu(by_rows(self.shared, x) + by_rows(self.widen, by_rows(self.narrow, x))))


class SpecializationBlock(nn.Module):
    """Self-attention on three quarters of the channels, a grouped convolution on the rest, then an MLP.

    Heads and groups are 32 channels wide, as published, or narrower where C is small or no multiple.

    [B, h, w, C] -> the same, C at least 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head_size = head_size(channels)
        attended = 3 * (channels // self.head_size) // 4 * self.head_size
        rest = channels - attended
        self.enter = nn.Linear(channels, attended, bias=False)
        self.norm = nn.LayerNorm(attended)
        self.query_key_value = nn.Linear(attended, 3 * attended)
        self.merge = nn.Linear(attended, attended)
        self.branch = nn.Linear(attended, rest, bias=False)
        self.convolve = nn.Conv2d(rest, rest, 3, padding=1, groups=rest // self.head_size, bias=False)
        self.norm_convolved = nn.LayerNorm(rest)
        self.mix = nn.Linear(rest, rest, bias=False)
        self.expand = nn.Linear(channels, 2 * channels)
        self.contract = nn.Linear(2 * channels, channels)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Shapes as above."""
        attended = by_rows(self.enter, grid)
        attended = attended + self.attention(self.norm(attended))
        local = by_rows(self.branch, attended)
        convolved = self.convolve(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        local = local + by_rows(self.mix, F.relu(self.norm_convolved(convolved)))
        joined = torch.cat([attended, local], dim=-1)
        return joined + by_rows(self.contract, F.relu(by_rows(self.expand, joined)))

    def attention(self, grid: torch.Tensor) -> torch.Tensor:
        """Of every position over all: [B, h, w, K] -> the same."""
        heads = by_rows(self.query_key_value, grid).flatten(1, 2).unflatten(-1, (3, -1, self.head_size))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return by_rows(self.merge, out.transpose(1, 2).reshape(grid.shape))


def head_size(channels: int) -> int:
    """Channels of a head: 32, or the largest divisor of `channels` below that leaves at least four heads.

    Example:
        >>> [head_size(channels) for channels in (1024, 1152, 200, 33, 4)]
        [32, 32, 25, 3, 1]
    """
    size = max(1, min(32, channels // 4))
    while channels % size:
        size -= 1
    return size


def _init_weights(module: nn.Module) -> None:
    """As published: truncated normal of standard deviation 0.02, zero biases, Xavier for the low-rank part."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, DeltaProjection):  # after its own layers, which `apply` visits first
        nn.init.xavier_uniform_(module.narrow.weight)
        nn.init.xavier_uniform_(module.widen.weight)
