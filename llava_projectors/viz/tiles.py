"""A picture cut into tiles, with what some of its visual tokens were made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Callable

import torch
from PIL import Image

from llava_projectors import slicing
from llava_projectors.integration.image_processor import tile_side
from llava_projectors.projectors.base import Projector
from llava_projectors.viz.maps import token_maps

Placed = tuple[int, int, torch.Tensor]  # left and top in the canvas, map [H, H]


def draw_in_tiles(
    picture: Image.Image,
    processor: Any,
    get_features: Callable[[torch.Tensor], torch.Tensor],
    projector: Projector,
    tokens: Sequence[int],
) -> tuple[Any, str]:
    """Cut a picture, and draw some of its visual tokens.

    Args:
        picture: of any size.
        processor: that cuts, see `llava_projectors.integration.image_processor`.
        get_features: pixels [1, 3, side, side] -> features.
        projector: that reads them.
        tokens: numbers of visual tokens, counted tile by tile without the separators; () for six.

    Returns:
        A matplotlib figure, and a line that says what it shows.

    Raises:
        ValueError: a token that does not exist.
    """
    side = tile_side(processor)
    canvas = processor.preprocess(picture, return_tensors="pt")["pixel_values"][0]
    grid, tiles = slicing.canvas_grid(canvas, side), slicing.to_tiles(canvas, side)
    with torch.no_grad():
        features = [get_features(tile[None]) for tile in tiles]
        count = projector(features[0]).shape[1]
    total = len(tiles) * count
    chosen = list(tokens) or [int((n + 0.5) * total / 6) for n in range(6)]
    maps = {}
    for token in chosen:
        if not 0 <= token < total:
            raise ValueError(f"token {token} does not exist: there are {total}, 0 to {total - 1}")
        tile = token // count
        row, column = divmod(tile, grid[1]) if tile < grid[0] * grid[1] else (grid[0], 0)
        maps[token] = column * side, row * side, token_maps(projector, features[tile], [token % count])[0].cpu()
    more = f" and a thumbnail of {side} px" if len(tiles) > 1 else f" of {side} px"
    title = (
        f"{picture.width}x{picture.height} in {grid[0]}x{grid[1]} tiles{more}: {len(tiles)} x {count} visual tokens, "
        f"{slicing.visual_tokens(grid, count)} with the separators"
    )
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (canvas * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    return _draw(pixels, side, maps, title), title


def _draw(pixels: Any, side: int, maps: dict[int, Placed], title: str) -> Any:
    """The canvas with the borders of its tiles, and once more for each token, with its map in its tile."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    height, width = pixels.shape[:2]
    columns = min(4, len(maps) + 1)
    rows = -(-(len(maps) + 1) // columns)
    panel = 3.2
    figure = Figure(figsize=(panel * columns, panel * min(2.0, height / width) * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(pixels)
    axes[0].set_title("tiles, the thumbnail below" if height > side else "one tile", fontsize=9)
    for top in range(0, height, side):
        for left in range(0, width if top + side < height or height == side else side, side):
            axes[0].add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="yellow", linewidth=1))
    for axis, (token, (left, top, weights)) in zip(axes[1:], maps.items()):
        axis.imshow(pixels, alpha=0.55)
        axis.imshow(weights, extent=(left, left + side, top + side, top), cmap="inferno", alpha=0.8)
        axis.set_xlim(0, width)
        axis.set_ylim(height, 0)
        axis.set_title(f"token {token}", fontsize=9)
    figure.suptitle(title, fontsize=8, wrap=True)
    return figure
