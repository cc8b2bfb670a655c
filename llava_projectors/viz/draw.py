"""The picture with its patch grid and, for some visual tokens, what they were made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def draw(picture: Image.Image, maps: torch.Tensor, tokens: Sequence[int], count: int, title: str) -> Any:
    """A matplotlib figure: the picture with its patch grid, and for each token what it was made from."""
    from matplotlib.figure import Figure

    panels = len(tokens) + 1
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    edge, side, token_side = picture.width, maps.shape[-1], math.isqrt(count)
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(picture)
    for line in range(side + 1):
        at = line * edge / side - 0.5
        axes[0].axhline(at, color="white", linewidth=0.3)
        axes[0].axvline(at, color="white", linewidth=0.3)
    axes[0].set_title(f"{side}x{side} patches", fontsize=9)
    for axis, token, weights in zip(axes[1:], tokens, maps):
        axis.imshow(picture, alpha=0.55)
        axis.imshow(weights, extent=(-0.5, edge - 0.5, edge - 0.5, -0.5), cmap="inferno", alpha=0.7)
        axis.set_title(f"token {token} (row {token // token_side}, column {token % token_side})", fontsize=9)
    figure.suptitle(title, fontsize=8, wrap=True)
    return figure
