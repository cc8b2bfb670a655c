"""TokenPacker written down plainly, as its paper states it (arXiv 2407.02392, section 3), to measure ours against.

`nn.MultiheadAttention` over keys and values that are regrouped region by region, separate stacks
for keys and values, and no thought for speed. Parameters have the published names.
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
