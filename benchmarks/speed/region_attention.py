"""TokenPacker's region attention as one fused pass over each region.

Eager code copies keys and values into regions, then reads them again for the scores and for the
sum. Here a program reads the patches of its region where they lie, once for each. Regions do not
overlap, so the backward pass needs no atomics.

Not in the wheel: it has run in Triton's interpreter only. For sm_80, sm_90 and sm_100 it compiles without spills at
1024 and 1152 channels and stride 2; at 3200 channels and stride 3 it spills. By count it saves at most 50 of 1140
microseconds of a forward at batch 32 on an H100, so a measurement on a GPU (`python -m benchmarks.speed --device cuda`,
candidate `triton tokenpacker`) has to speak for it first.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl


class FusedAttend(torch.autograd.Function):
    """The same function as `tokenpacker._attend`, arguments and results included; contiguous keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        k_weight: torch.Tensor,
        v_weight: torch.Tensor,
        patches: Optional[torch.Tensor],
        stride: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `tokenpacker._attend`."""
        key, value = key.contiguous(), value.contiguous()
        folded = torch.einsum("bnd,nde->bne", q, k_weight).contiguous()
        mixed = torch.empty_like(folded)
        weights = q.new_empty(*q.shape[:2], stride * stride)
        _launch(_forward, (folded, key, value, weights, mixed), key.shape, folded.shape, stride)
        ctx.save_for_backward(q, key, value, k_weight, v_weight, weights)
        ctx.stride = stride
        ctx.mark_non_differentiable(weights)
        return torch.einsum("bne,nde->bnd", mixed, v_weight), weights

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor, _: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        """Gradients of all but the last two arguments.

        Raises:
            NotImplementedError: they are to be differentiated again. `once_differentiable` says so only
                where autograd visits it, which `torch.autograd.grad` does not.
        """
        if torch.is_grad_enabled():
            raise NotImplementedError("the fused kernel has no second derivative (create_graph=True)")
        q, key, value, k_weight, v_weight, weights = ctx.saved_tensors
        folded = torch.einsum("bnd,nde->bne", q, k_weight).contiguous()
        d_mixed = torch.einsum("bnd,nde->bne", d_out, v_weight).contiguous()
        mixed, d_folded = torch.empty_like(folded), torch.empty_like(folded)
        d_key, d_value = torch.empty_like(key), torch.empty_like(value)
        tensors = (folded, key, value, weights, d_mixed, mixed, d_folded, d_key, d_value)
        _launch(_backward, tensors, key.shape, folded.shape, ctx.stride)
        d_q = torch.einsum("bne,nde->bnd", d_folded, k_weight)
        d_k_weight = torch.einsum("bnd,bne->nde", q, d_folded)
        d_v_weight = torch.einsum("bnd,bne->nde", d_out, mixed)
        return d_q, d_key, d_value, d_k_weight, d_v_weight, None, None


def _launch(
    kernel: Any, tensors: tuple[torch.Tensor, ...], grid_shape: torch.Size, folded_shape: torch.Size, stride: int
) -> None:
    """One program for each region."""
    _, height, width, channels = grid_shape
    regions, heads, _ = folded_shape
    if not regions:
        return
    kernel[(regions,)](
        *tensors,
        height,
        width,
        -(-height // stride),
        -(-width // stride),
        **block_sizes(heads, channels, stride),
    )


def block_sizes(heads: int, channels: int, stride: int) -> dict[str, int]:
    """What is constant in a compiled kernel."""
    return {
        "HEADS": heads,
        "CHANNELS": channels,
        "STRIDE": stride,
        "HEADS_BLOCK": _power_of_two(heads),
        "REGION_BLOCK": _power_of_two(stride * stride),
        "CHANNELS_BLOCK": min(64, _power_of_two(channels)),
    }


def _power_of_two(number: int) -> int:
    """The smallest that is not less than `number`."""
    return 1 << (number - 1).bit_length()


@triton.jit
def _patches_of(region, height, width, rows, columns, STRIDE, REGION_BLOCK: tl.constexpr):
    """Places of a region in the list of all patches, and which of them are patches."""
    place = tl.arange(0, REGION_BLOCK)
    image = region // (rows * columns)
    y = region // columns % rows * STRIDE + place // STRIDE
    x = region % columns * STRIDE + place % STRIDE
    is_patch = (place < STRIDE * STRIDE) & (y < height) & (x < width)
    return (image * height + y).to(tl.int64) * width + x, is_patch


@triton.jit
def _forward(
    folded, key, value, weights, mixed, height, width, rows, columns,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, REGION_BLOCK: tl.constexpr, CHANNELS_BLOCK: tl.constexpr,
):  # fmt: skip
    region = tl.program_id(0)
    patch, is_patch = _patches_of(region, height, width, rows, columns, STRIDE, REGION_BLOCK)
    head, place = tl.arange(0, HEADS_BLOCK), tl.arange(0, REGION_BLOCK)
    row, is_row = region.to(tl.int64) * HEADS + head, head < HEADS
    scores = tl.zeros((HEADS_BLOCK, REGION_BLOCK), tl.float32)
    for start in range(0, CHANNELS, CHANNELS_BLOCK):
        channel = start + tl.arange(0, CHANNELS_BLOCK)
        inside = (channel < CHANNELS)[None, :]
        at_row, at_patch = row[:, None] * CHANNELS + channel[None, :], patch[:, None] * CHANNELS + channel[None, :]
        f = tl.load(folded + at_row, mask=is_row[:, None] & inside, other=0.0).to(tl.float32)
        k = tl.load(key + at_patch, mask=is_patch[:, None] & inside, other=0.0).to(tl.float32)
        scores += tl.sum(f[:, None, :] * k[None, :, :], axis=2)
    scores = tl.where(is_patch[None, :], scores, float("-inf"))
    w = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    w = w / tl.sum(w, axis=1)[:, None]
    at_weight = row[:, None] * (STRIDE * STRIDE) + place[None, :]
    tl.store(weights + at_weight, w, mask=is_row[:, None] & (place < STRIDE * STRIDE)[None, :])
    for start in range(0, CHANNELS, CHANNELS_BLOCK):
        channel = start + tl.arange(0, CHANNELS_BLOCK)
        inside = (channel < CHANNELS)[None, :]
        at_row, at_patch = row[:, None] * CHANNELS + channel[None, :], patch[:, None] * CHANNELS + channel[None, :]
        v = tl.load(value + at_patch, mask=is_patch[:, None] & inside, other=0.0).to(tl.float32)
        tl.store(mixed + at_row, tl.sum(w[:, :, None] * v[None, :, :], axis=1), mask=is_row[:, None] & inside)


@triton.jit
def _backward(
    folded, key, value, weights, d_mixed, mixed, d_folded, d_key, d_value, height, width, rows, columns,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, REGION_BLOCK: tl.constexpr, CHANNELS_BLOCK: tl.constexpr,
):  # fmt: skip
    region = tl.program_id(0)
    patch, is_patch = _patches_of(region, height, width, rows, columns, STRIDE, REGION_BLOCK)
    head, place = tl.arange(0, HEADS_BLOCK), tl.arange(0, REGION_BLOCK)
    row, is_row = region.to(tl.int64) * HEADS + head, head < HEADS
    at_weight = row[:, None] * (STRIDE * STRIDE) + place[None, :]
    w = tl.load(weights + at_weight, mask=is_row[:, None] & is_patch[None, :], other=0.0).to(tl.float32)
    d_w = tl.zeros((HEADS_BLOCK, REGION_BLOCK), tl.float32)
    for start in range(0, CHANNELS, CHANNELS_BLOCK):
        channel = start + tl.arange(0, CHANNELS_BLOCK)
        inside = (channel < CHANNELS)[None, :]
        at_row, at_patch = row[:, None] * CHANNELS + channel[None, :], patch[:, None] * CHANNELS + channel[None, :]
        d_m = tl.load(d_mixed + at_row, mask=is_row[:, None] & inside, other=0.0).to(tl.float32)
        v = tl.load(value + at_patch, mask=is_patch[:, None] & inside, other=0.0).to(tl.float32)
        d_w += tl.sum(d_m[:, None, :] * v[None, :, :], axis=2)
        tl.store(mixed + at_row, tl.sum(w[:, :, None] * v[None, :, :], axis=1), mask=is_row[:, None] & inside)
    d_scores = w * (d_w - tl.sum(w * d_w, axis=1)[:, None])
    for start in range(0, CHANNELS, CHANNELS_BLOCK):
        channel = start + tl.arange(0, CHANNELS_BLOCK)
        inside = (channel < CHANNELS)[None, :]
        at_row, at_patch = row[:, None] * CHANNELS + channel[None, :], patch[:, None] * CHANNELS + channel[None, :]
        row_mask, patch_mask = is_row[:, None] & inside, is_patch[:, None] & inside
        d_m = tl.load(d_mixed + at_row, mask=row_mask, other=0.0).to(tl.float32)
        f = tl.load(folded + at_row, mask=row_mask, other=0.0).to(tl.float32)
        k = tl.load(key + at_patch, mask=patch_mask, other=0.0).to(tl.float32)
        tl.store(d_value + at_patch, tl.sum(w[:, :, None] * d_m[:, None, :], axis=0), mask=patch_mask)
        tl.store(d_key + at_patch, tl.sum(d_scores[:, :, None] * f[:, None, :], axis=0), mask=patch_mask)
        tl.store(d_folded + at_row, tl.sum(d_scores[:, :, None] * k[None, :, :], axis=1), mask=row_mask)
