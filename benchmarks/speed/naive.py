"""TokenPacker without thought for speed, to measure ours against. Parameters have the published names.

`NaiveTokenPacker` is written down plainly, as the paper states it (arXiv 2407.02392, section 3): separate stacks for
keys and values, `nn.MultiheadAttention` over both, regrouped region by region. `PublishedTokenPacker` runs what the
published code runs, operation for operation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class NaiveTokenPacker(nn.Module):
    """[B, H*H, L*C] -> [B, (H/scale_factor)**2, D], with C = E = mm_hidden_size."""

    def __init__(self, mm_hidden_size: int, hidden_size: int, scale_factor: int, levels: int = 4) -> None:
        super().__init__()
        width = mm_hidden_size
        self.scale_factor = scale_factor
        self.num_levels = levels
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1 = nn.Sequential(nn.Linear(levels * width, width), nn.GELU(), nn.Linear(width, width))
        self.v_proj_1 = nn.Sequential(nn.Linear(levels * width, width), nn.GELU(), nn.Linear(width, width))
        self.ln_q_1 = nn.LayerNorm(width, eps=1e-6)
        self.ln_k_1 = nn.LayerNorm(width, eps=1e-6)
        self.ln_v_1 = nn.LayerNorm(width, eps=1e-6)
        self.clip_attn = nn.MultiheadAttention(width, max(1, width // 128))
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Downsample, project, attend region by region, map to the LLM's width."""
        side = math.isqrt(features.shape[1])
        rows = side // self.scale_factor
        width = self.q_proj_1.in_features
        image = features[..., -width:].transpose(1, 2).unflatten(2, (side, side))
        coarse = F.interpolate(image.float(), size=(rows, rows), mode="bilinear").to(features.dtype)
        query = self.ln_q_1(self.q_proj_1(coarse.flatten(2).transpose(1, 2)))
        key = self.regroup(self.ln_k_1(self.k_proj_1(features)), side)
        value = self.regroup(self.ln_v_1(self.v_proj_1(features)), side)
        attended, _ = self.clip_attn(query.reshape(1, -1, width), key, value)
        return self.mlp(attended.reshape(features.shape[0], rows * rows, width))

    def regroup(self, grid: torch.Tensor, side: int) -> torch.Tensor:
        """[B, H*H, E] -> [s*s, B * (H/s)**2, E]."""
        s = self.scale_factor
        grid = grid.unflatten(1, (side // s, s, side // s, s))
        return grid.permute(2, 4, 0, 1, 3, 5).reshape(s * s, -1, grid.shape[-1])


class PublishedTokenPacker(NaiveTokenPacker):
    """The same with the positions first, as the published code has it, and regrouped in three copies."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, (H/scale_factor)**2, D]."""
        batch, patches, _ = features.shape
        side = math.isqrt(patches)
        rows = side // self.scale_factor
        width = self.q_proj_1.in_features
        last = features[..., -width:]
        key = self.ln_k_1(self.k_proj_1(features)).permute(1, 0, 2)
        value = self.ln_v_1(self.v_proj_1(features)).permute(1, 0, 2)
        image = last.reshape(batch, side, side, -1).float().permute(0, 3, 1, 2)
        coarse = F.interpolate(image, size=(rows, rows), mode="bilinear").permute(0, 2, 3, 1)
        coarse = coarse.reshape(batch, -1, width).to(features.dtype)
        query = self.ln_q_1(self.q_proj_1(coarse)).permute(1, 0, 2)
        attended, _ = self.clip_attn(
            self.divide(query, rows, 1),
            self.divide(key, side, self.scale_factor),
            self.divide(value, side, self.scale_factor),
        )
        return self.mlp(attended.reshape(rows * rows, batch, width).permute(1, 0, 2))

    def divide(self, grid: torch.Tensor, side: int, size: int) -> torch.Tensor:
        """[H*H, B, E] -> [size*size, (H/size)**2 * B, E]."""
        batch, width = grid.shape[1:]
        regions = side // size
        grid = grid.reshape(regions, size, side, batch, width).permute(0, 2, 1, 3, 4)
        grid = grid.reshape(regions, regions, size, size, batch, width).permute(0, 1, 3, 2, 4, 5)
        grid = grid.reshape(regions, regions, size * size, batch, width).permute(2, 0, 1, 3, 4)
        return grid.reshape(size * size, -1, width)
