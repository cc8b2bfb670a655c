"""The patch grid: its regions, its padding, and which positions are patches."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F


def pad_grid(grid: torch.Tensor, stride: int, value: float = 0.0) -> torch.Tensor:
    """The value below and on the right until the stride divides both sides: [B, H, W, C] -> [B, H', W', C]."""
    height, width = grid.shape[1:3]
    if height % stride == 0 and width % stride == 0:
        return grid
    return F.pad(grid, (0, 0, 0, -width % stride, 0, -height % stride), value=value)


def to_regions(grid: torch.Tensor, stride: int) -> torch.Tensor:
    """A padded grid, cut into regions: [B, H', W', C] -> the view [B, H'/s, s, W'/s, s, C]."""
    return grid.unflatten(2, (-1, stride)).unflatten(1, (-1, stride))


def region_mask(grid: torch.Tensor, stride: int) -> Optional[torch.Tensor]:
    """Which positions of each region are patches: None for all, or bool [1, h, s, w, s, 1] for a grid [B, H, W, C]."""
    height, width = grid.shape[1:3]
    if height % stride == 0 and width % stride == 0:
        return None
    return to_regions(pad_grid(grid.new_ones(1, height, width, 1), stride), stride).bool()


def average_regions(grid: torch.Tensor, stride: int) -> torch.Tensor:
    """Mean of the patches of each region, padding left out: [B, H, W, C] -> [B, ceil(H/s), ceil(W/s), C]."""
    average = to_regions(pad_grid(grid, stride), stride).mean((2, 4))
    mask = region_mask(grid, stride)
    return average if mask is None else average / mask.to(average.dtype).mean((2, 4))


def max_regions(grid: torch.Tensor, stride: int) -> torch.Tensor:
    """The largest value of each channel among a region's patches: [B, H, W, C] -> [B, ceil(H/s), ceil(W/s), C]."""
    return to_regions(pad_grid(grid, stride, float("-inf")), stride).amax((2, 4))
