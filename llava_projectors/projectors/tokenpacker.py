"""TokenPacker: coarse point queries, each filled with the detail of the region beneath it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.base import Projector, multi_level_layers
from llava_projectors.projectors.grid import pad_grid, region_mask, to_regions
from llava_projectors.projectors.layers import TwoLayerMLP, by_rows, head_count
from llava_projectors.projectors.recompute import is_transforming, recomputed, remember
from llava_projectors.projectors.registration import register_projector


@register_projector("tokenpacker")
class TokenPacker(Projector):
    """TokenPacker, arXiv 2407.02392, sections 3.1 and 3.2; names and shapes as published.

    The selected hidden state, downsampled bilinearly, gives one low-resolution query per region;
    keys and values come from all levels at full resolution; each query attends only to the
    s x s patches of its region (region-to-point injection); an MLP maps to the LLM width.

    The published code fixes four levels of 1024 channels on a 24x24 grid. Here, our choice:
    embed_dim = mm_hidden_size, embed_dim // head_size heads (rounded down to a divisor, at least
    one), and any number of levels. Where s does not divide the grid, the border regions attend to the
    patches they have, and the coarse query repeats the last row and column. Weights of released
    checkpoints load unchanged. On a small controlled task (table "tokenpacker" in
    benchmarks/results/spatial.md) four levels are 1.2 points (0.0 to 2.5) ahead of one.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        scale_factor: s, side of the region of patches that becomes one token. LLaVA's config may
            give it (`config.scale_factor`), as released checkpoints do.
        layers: hidden states to aggregate, ascending; default `multi_level_layers`.
        head_size: channels of an attention head; 128 as published. Towers narrower than 256
            channels have one head with it.
        init: standard deviation of the initial weights: `published` is 0.02 for every layer, which
            was chosen at 1024 channels; `scaled` is 0.02 * sqrt(1024 / mm_hidden_size), so that a
            narrow tower's signals start as large as theirs.

    Raises:
        ValueError: a head size below 1.
    """

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
        head_size: int = 128,
        init: Literal["published", "scaled"] = "published",
    ) -> None:
        super().__init__(mm_hidden_size, hidden_size, layers, scale_factor)
        if head_size < 1:
            raise ValueError(f"head_size={head_size} must be at least 1")
        embed_dim = mm_hidden_size
        in_channels = self.num_levels * mm_hidden_size
        self.q_proj_1 = nn.Linear(mm_hidden_size, embed_dim, bias=False)
        self.k_proj_1 = TwoLayerMLP(in_channels, embed_dim)
        self.v_proj_1 = TwoLayerMLP(in_channels, embed_dim)
        self.ln_q_1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_k_1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_v_1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.clip_attn = RegionAttention(embed_dim, head_count(embed_dim, head_size))
        self.mlp = TwoLayerMLP(embed_dim, hidden_size)
        std = 0.02 if init == "published" else 0.02 * (1024 / mm_hidden_size) ** 0.5
        self.apply(partial(_init_weights, std=std))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, H*H, L*C] -> [B, ceil(H / scale_factor)**2, D], in the dtype of the weights."""
        grid = self.to_grid(features)
        query = self.point_queries(grid)
        key, key_made = remember(self.ln_k_1, self.k_proj_1(grid))
        value, value_made = remember(self.ln_v_1, self.v_proj_1(grid))
        with recomputed(key_made + value_made):
            out = self.clip_attn(query, key, value, self.stride)
        return self.mlp(out.flatten(1, 2))

    def point_queries(self, grid: torch.Tensor) -> torch.Tensor:
        """One per region, from the selected hidden state: [B, H, W, L*C] -> [B, h, w, E]."""
        coarse = downsample_bilinear(grid[..., -self.mm_hidden_size :], self.stride)
        return self.ln_q_1(by_rows(self.q_proj_1, coarse))

    @torch.no_grad()
    def region_weights(self, features: torch.Tensor) -> torch.Tensor:
        """What each token is made from, for looking at: the attention weights, the mean over heads.

        Not under ZeRO-3, where a forward alone may touch weights.

        Args:
            features: [B, H*H, L*C].

        Returns:
            [B, M, H, W], zero outside a token's region, each token's weights of sum 1.
        """
        grid = self.to_grid(features)
        query, key = self.point_queries(grid), self.ln_k_1(self.k_proj_1(grid))
        (batch, rows, columns), s = query.shape[:3], self.stride
        weights = self.clip_attn.weights(query, key, s).mean(1).unflatten(0, (batch, rows, columns))
        placed = weights.new_zeros(batch, rows, columns, rows, s, columns, s)
        for row in range(rows):
            for column in range(columns):
                placed[:, row, column, row, :, column] = weights[:, row, column].unflatten(-1, (s, s))
        return placed.flatten(5, 6).flatten(3, 4).flatten(1, 2)[..., : grid.shape[1], : grid.shape[2]]


class RegionAttention(nn.Module):
    """Multi-head attention of one query per region over the patches of that region.

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

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stride: int) -> torch.Tensor:
        """query [B, h, w, E], key and value [B, H, W, E] -> [B, h, w, E], with h = ceil(H / stride)."""
        _, k_weight, v_weight = (weight.unflatten(0, (self.num_heads, -1)) for weight in self.in_proj_weight.chunk(3))
        v_bias = self.in_proj_bias.chunk(3)[2]  # the keys' bias falls out of the softmax
        q = self.scaled_queries(query)
        # Autocast has chosen the dtype of q; it would not reach the backward pass of what follows.
        key, value = key.to(q.dtype), value.to(q.dtype)
        k_weight, v_weight = k_weight.to(q.dtype), v_weight.to(q.dtype)
        out, _ = _attend(q, key, value, k_weight, v_weight, region_patches(key, stride), stride)
        return self.out_proj(out.flatten(1) + v_bias).view(query.shape)

    def scaled_queries(self, query: torch.Tensor) -> torch.Tensor:
        """[B, h, w, E] -> [B*h*w, n, d], for n heads of d channels."""
        projected = F.linear(query, self.in_proj_weight.chunk(3)[0], self.in_proj_bias.chunk(3)[0])
        heads = projected.unflatten(-1, (self.num_heads, -1)).flatten(0, 2)
        return heads * heads.shape[-1] ** -0.5

    def weights(self, query: torch.Tensor, key: torch.Tensor, stride: int) -> torch.Tensor:
        """Only the attention weights [B*h*w, n, s*s], for the arguments of `forward`."""
        k_weight = self.in_proj_weight.chunk(3)[1].unflatten(0, (self.num_heads, -1))
        return _region_softmax(_score(self.scaled_queries(query), key, k_weight, stride), region_patches(key, stride))


def _attend(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    patches: Optional[torch.Tensor],
    stride: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the projections of keys and values done once per region instead of once per patch.

    q . (W_k x) = (W_k^T q) . x, and the weighted sum of W_v x is W_v of the weighted sum.

    Args:
        q: scaled queries [B*h*w, n, d], for n heads.
        key: keys before their projection [B, H, W, E].
        value: values before their projection [B, H, W, E].
        k_weight: [n, d, E].
        v_weight: [n, d, E].
        patches: which positions of a region are patches, bool [h*w, 1, s*s], or None for all.
        stride: s.

    Returns:
        The attended values [B*h*w, n, d] and the attention weights [B*h*w, n, s*s].
    """
    score, mix = (_score, _mix) if is_transforming() else (_Score.apply, _Mix.apply)
    # CUDA's autocast makes a softmax float32, and would not reach the backward pass of `mix`.
    weights = _region_softmax(score(q, key, k_weight, stride), patches).to(value.dtype)
    return mix(weights, value, v_weight, stride), weights


def region_patches(grid: torch.Tensor, stride: int) -> Optional[torch.Tensor]:
    """Which positions of a region are patches: bool [h*w, 1, s*s] for a grid [B, H, W, C], or None for all."""
    mask = region_mask(grid, stride)
    return None if mask is None else mask.transpose(2, 3).reshape(-1, 1, stride * stride)


def _region_softmax(scores: torch.Tensor, patches: Optional[torch.Tensor]) -> torch.Tensor:
    """Over the patches of each region, [B*h*w, n, s*s]."""
    if patches is not None:
        scores = scores.unflatten(0, (-1, len(patches))).masked_fill(~patches, float("-inf")).flatten(0, 1)
    return scores.softmax(-1)


def _score(q: torch.Tensor, key: torch.Tensor, k_weight: torch.Tensor, stride: int) -> torch.Tensor:
    """[B*h*w, n, s*s]"""
    folded = torch.einsum("bnd,nde->bne", q, k_weight)
    return torch.einsum("bne,bre->bnr", folded, _flatten_regions(key, stride))


def _mix(weights: torch.Tensor, value: torch.Tensor, v_weight: torch.Tensor, stride: int) -> torch.Tensor:
    """[B*h*w, n, d]"""
    mixed = torch.einsum("bnr,bre->bne", weights, _flatten_regions(value, stride))
    return torch.einsum("bne,nde->bnd", mixed, v_weight)


class _Score(torch.autograd.Function):
    """`_score`, keeping only its arguments for the backward pass.

    Autograd would also keep the regrouped keys and n*E numbers per region; here they are made again.
    The backward pass is plain torch, so that it can be differentiated too.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, key: torch.Tensor, k_weight: torch.Tensor, stride: int) -> torch.Tensor:
        ctx.save_for_backward(q, key, k_weight)
        ctx.stride = stride
        return _score(q, key, k_weight, stride)

    @staticmethod
    def backward(ctx: Any, d_scores: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        q, key, k_weight = ctx.saved_tensors
        d_folded = torch.einsum("bnr,bre->bne", d_scores, _flatten_regions(key, ctx.stride))
        d_q = torch.einsum("bne,nde->bnd", d_folded, k_weight)
        d_k_weight = torch.einsum("bnd,bne->nde", q, d_folded)
        del d_folded
        folded = torch.einsum("bnd,nde->bne", q, k_weight)
        d_key = _to_grid(torch.einsum("bnr,bne->bre", d_scores, folded), key.shape, ctx.stride)
        return d_q, d_key, d_k_weight, None


class _Mix(torch.autograd.Function):
    """`_mix`, keeping only its arguments for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, weights: torch.Tensor, value: torch.Tensor, v_weight: torch.Tensor, stride: int
    ) -> torch.Tensor:
        ctx.save_for_backward(weights, value, v_weight)
        ctx.stride = stride
        return _mix(weights, value, v_weight, stride)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        weights, value, v_weight = ctx.saved_tensors
        shape, values = value.shape, _flatten_regions(value, ctx.stride)
        del value
        d_v_weight = torch.einsum("bnd,bne->nde", d_out, torch.einsum("bnr,bre->bne", weights, values))
        d_mixed = torch.einsum("bnd,nde->bne", d_out, v_weight)
        d_weights = torch.einsum("bne,bre->bnr", d_mixed, values)
        del values
        d_value = _to_grid(torch.einsum("bnr,bne->bre", weights, d_mixed), shape, ctx.stride)
        return d_weights, d_value, d_v_weight, None


def _flatten_regions(grid: torch.Tensor, stride: int) -> torch.Tensor:
    """[B, H, W, E] -> [B*h*w, s*s, E], padded with zeros."""
    return to_regions(pad_grid(grid, stride), stride).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def _to_grid(regions: torch.Tensor, shape: torch.Size, stride: int) -> torch.Tensor:
    """The inverse of `_flatten_regions`, for a grid of this shape: [B*h*w, s*s, E] -> [B, H, W, E]."""
    batch, height, width, channels = shape
    rows, columns = -(-height // stride), -(-width // stride)
    grid = regions.view(batch, rows, columns, stride, stride, channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return grid[:, :height, :width]


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
    columns = regions[:, :, centre, :, centre].unbind(4)
    patches = [patch for column in columns for patch in column.unbind(2)]
    total = patches[0].to(torch.promote_types(grid.dtype, torch.float32))
    for patch in patches[1:]:
        total = total + patch
    return (total / len(patches)).to(grid.dtype)


def _init_weights(module: nn.Module, std: float) -> None:
    """Truncated normal and zero biases, as published."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
