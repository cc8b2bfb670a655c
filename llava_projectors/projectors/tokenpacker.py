"""TokenPacker: coarse point queries, each filled with the detail of the region beneath it."""

from __future__ import annotations

from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.base import (
    Projector,
    multi_level_layers,
    pad_grid,
    region_mask,
    to_regions,
    two_layer_mlp,
)


class TokenPacker(Projector):
    """TokenPacker, arXiv 2407.02392, sections 3.1 and 3.2; names and shapes as published.

    The selected hidden state, downsampled bilinearly, gives one low-resolution query a region;
    keys and values come from all levels at full resolution; each query attends only to the
    s x s patches of its region (region-to-point injection); an MLP maps to the LLM width.

    The published code fixes four levels of 1024 channels on a 24x24 grid. Here, our choice:
    embed_dim = mm_hidden_size, embed_dim // 128 heads (rounded down to a divisor, at least one),
    and any number of levels. Where s does not divide the grid, the border regions attend to the
    patches they have, and the coarse query repeats the last row and column. Weights of released
    checkpoints load unchanged.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        scale_factor: s, side of the region of patches that becomes one token. LLaVA's config may
            give it (`config.scale_factor`), as released checkpoints do.
        layers: hidden states to aggregate, ascending; default `multi_level_layers`.
    """

    name = "tokenpacker"
    default_layers = staticmethod(multi_level_layers)
    stride_option = "scale_factor"
    config_options = ("scale_factor",)

    def __init__(
        self,
        mm_hidden_size: int,
        hidden_size: int,
        *,
        scale_factor: Literal[2, 3, 4] = 2,
        layers: Optional[tuple[int, ...]] = None,
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, scale_factor)
        embed_dim = mm_hidden_size
        num_heads = max(1, embed_dim // 128)
        while embed_dim % num_heads:
            num_heads -= 1
        in_channels = self.num_levels * mm_hidden_size
        self.q_proj_1 = nn.Linear(mm_hidden_size, embed_dim, bias=False)
        self.k_proj_1 = two_layer_mlp(in_channels, embed_dim)
        self.v_proj_1 = two_layer_mlp(in_channels, embed_dim)
        self.ln_q_1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_k_1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_v_1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.clip_attn = RegionAttention(embed_dim, num_heads)
        self.mlp = two_layer_mlp(embed_dim, hidden_size)
        self.apply(_init_weights)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / scale_factor)**2, D], in the dtype of the weights."""
        grid = self.to_grid(features)
        s = self.stride
        coarse = downsample_bilinear(grid[..., -self.mm_hidden_size :], s)
        query = self.ln_q_1(self.q_proj_1(coarse))
        key = self.ln_k_1(self.k_proj_1(grid))
        value = self.ln_v_1(self.v_proj_1(grid))
        mask = region_mask(grid, s)
        out = self.clip_attn(query, _flatten_regions(key, s), _flatten_regions(value, s), mask)
        return self.mlp(out.flatten(1, 2))


class RegionAttention(nn.Module):
    """Multi-head attention of one query a region over the patches of that region.

    Parameters are named and laid out as in `nn.MultiheadAttention`, and are touched only inside
    this forward: under ZeRO-3 they are empty anywhere else. `out_proj` is called, never read,
    so a quantised layer may stand in for it.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """query [B, h, w, E], key and value [B, h, w, R, E], mask of `region_mask` -> [B, h, w, E]."""
        q_weight, k_weight, v_weight = self.in_proj_weight.chunk(3)
        q_bias, k_bias, v_bias = self.in_proj_bias.chunk(3)
        heads = (self.num_heads, -1)
        q = F.linear(query, q_weight, q_bias).unflatten(-1, heads)
        k = F.linear(key, k_weight, k_bias).unflatten(-1, heads)
        v = F.linear(value, v_weight, v_bias).unflatten(-1, heads)
        scores = torch.einsum("bhwnd,bhwrnd->bhwnr", q * q.shape[-1] ** -0.5, k)
        if mask is not None:
            patches = mask.transpose(2, 3).flatten(3)  # [1, h, w, R]
            scores = scores.masked_fill(~patches.unsqueeze(3), float("-inf"))
        out = torch.einsum("bhwnr,bhwrnd->bhwnd", scores.softmax(-1).to(v.dtype), v)
        return self.out_proj(out.flatten(-2))


def downsample_bilinear(grid: torch.Tensor, stride: int) -> torch.Tensor:
    """`F.interpolate(mode="bilinear")` by 1/stride, as a mean: [B, H, W, C] -> [B, ceil(H/s), ceil(W/s), C].

    A sample falls on the centre of its region: the mean of the four central patches when the
    stride is even, the central patch when it is odd. Summed in at least float32, since bilinear
    interpolation in bfloat16 is missing or slow on some builds. The last row and column are repeated
    until the stride divides the grid.
    """
    for dim in (1, 2):
        size = grid.shape[dim]
        if size % stride:
            index = torch.arange(size + -size % stride, device=grid.device).clamp(max=size - 1)
            grid = grid.index_select(dim, index)
    regions = to_regions(grid, stride)
    centre = slice((stride - 1) // 2, stride // 2 + 1)
    centre_patches = regions[:, :, centre, :, centre]
    summed_in = torch.promote_types(grid.dtype, torch.float32)
    return centre_patches.mean((2, 4), dtype=summed_in).to(grid.dtype)


def _flatten_regions(grid: torch.Tensor, stride: int) -> torch.Tensor:
    """[B, H, W, C] -> [B, ceil(H/s), ceil(W/s), s*s, C], padded with zeros."""
    return to_regions(pad_grid(grid, stride), stride).transpose(2, 3).flatten(3, 4)


def _init_weights(module: nn.Module) -> None:
    """Truncated normal of standard deviation 0.02 and zero biases, as published."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
