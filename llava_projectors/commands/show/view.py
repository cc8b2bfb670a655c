"""A picture as the model receives it, its tiles, and the maps of visual tokens on them: all that is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from PIL import Image

from llava_projectors import slicing
from llava_projectors.commands.show.maps import token_maps
from llava_projectors.commands.show.models import Model
from llava_projectors.integration.image_processor import SlicingProcessor, tile_side
from llava_projectors.projectors.base import Projector


class Box(NamedTuple):
    """Patches of a tile's grid: `top` up to, not including, `bottom`, and likewise across."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True)
class View:
    """What a drawing or a page shows.

    Tokens are numbered tile by tile, in each row by row, without the separators between tiles.

    Attributes:
        title: types, counts and weights, in a line.
        picture: as the model receives it; the tiles where they belong, the thumbnail below them.
        edge: side of a tile in pixels.
        places: left and top of each tile in pixels.
        side: H, side of a tile's patch grid.
        count: visual tokens of a tile.
        regions: for each token of a tile the patches that it stands for, or None where no token has a place.
        tokens: which are shown.
        maps: [len(tokens), H, H], the share of the token that comes from each patch.
    """

    title: str
    picture: Image.Image
    edge: int
    places: list[tuple[int, int]]
    side: int
    count: int
    regions: Optional[list[Box]]
    tokens: list[int]
    maps: torch.Tensor

    @property
    def columns(self) -> int:
        """Tokens in a row of a tile."""
        return math.isqrt(self.count)

    @property
    def scale(self) -> float:
        """The largest share on any map, where the colours of all of them end."""
        return float(self.maps.max())

    def name(self, token: int) -> str:
        """`token 150 (tile 1, row 0, column 6)`; a single tile is not named."""
        tile, index = divmod(token, self.count)
        row, column = divmod(index, self.columns)
        of_tile = f"tile {tile}, " if len(self.places) > 1 else ""
        return f"token {token} ({of_tile}row {row}, column {column})"


def make_view(model: Model, picture: Image.Image, tokens: Optional[Sequence[int]] = None) -> View:
    """Prepare a picture as LLaVA does, and find out what its visual tokens were made from.

    Args:
        model: tower and projector.
        picture: RGB, of any size.
        tokens: which, or () for six of them, or None for all.

    Raises:
        ValueError: a token that does not exist.
    """
    canvas = model.pixels(picture).float().cpu()
    in_tiles = isinstance(model.processor, SlicingProcessor)
    edge = tile_side(model.processor) if in_tiles else canvas.shape[-1]
    grid, tiles = slicing.canvas_grid(canvas, edge), slicing.to_tiles(canvas, edge)
    with torch.no_grad():
        features = [model.features(tile[None]) for tile in tiles]
        count = model.projector(features[0]).shape[1]
    total = len(tiles) * count
    if tokens is None:
        tokens = range(total)
    chosen = list(tokens) or _spread(len(tiles), count)
    for token in chosen:
        if not 0 <= token < total:
            raise ValueError(f"token {token} does not exist: there are {total}, 0 to {total - 1}")
    side = math.isqrt(features[0].shape[1])
    places = [(column * edge, row * edge) for row in range(grid[0]) for column in range(grid[1])]
    return View(
        title=_title(model, picture, grid if in_tiles else None, edge, side, count),
        picture=_to_picture(canvas, model.processor, edge, len(tiles) > 1),
        edge=edge,
        places=[*places, (0, grid[0] * edge)][: len(tiles)],
        side=side,
        count=count,
        regions=own_regions(model.projector, side, count),
        tokens=chosen,
        maps=_maps(model.projector, features, chosen, count),
    )


def _title(
    model: Model, picture: Image.Image, grid: Optional[tuple[int, int]], edge: int, side: int, count: int
) -> str:
    """Type, counts, what the maps are, and where the weights are from; `grid` is that of tiles, if there are some."""
    what = f"{side**2} patches -> {count} visual tokens"
    if grid is not None:
        tiles = slicing.tile_count(grid)
        more = f" and a thumbnail of {edge} px" if tiles > 1 else f" of {edge} px"
        what = (
            f"{picture.width}x{picture.height} in {grid[0]}x{grid[1]} tiles{more}: {tiles} x {count} "
            f"visual tokens, {slicing.visual_tokens(grid, count)} with the separators"
        )
    kind = "attention" if hasattr(model.projector, "region_weights") else "receptive field by gradient"
    return f"{model.type_string}: {what}; {kind}; {model.source}"


def _maps(projector: Projector, features: Sequence[torch.Tensor], tokens: Sequence[int], count: int) -> torch.Tensor:
    """[len(tokens), H, H]; tokens of a tile together, because that is quicker."""
    maps: dict[int, torch.Tensor] = {}
    for tile in sorted({token // count for token in tokens}):
        members = sorted({token for token in tokens if token // count == tile})
        maps.update(zip(members, token_maps(projector, features[tile], [token % count for token in members]).cpu()))
    return torch.stack([maps[token] for token in tokens])


def own_regions(projector: Projector, side: int, count: int) -> Optional[list[Box]]:
    """Row by row, the square of patches beneath each token; None for tokens that have none, as a resampler's."""
    s = projector.stride
    columns = -(-side // s)
    if s == 1 or count != columns**2:
        return None
    corners = [(row * s, column * s) for row in range(columns) for column in range(columns)]
    return [Box(top, left, min(top + s, side), min(left + s, side)) for top, left in corners]


def _spread(tiles: int, count: int) -> list[int]:
    """Six tokens: two rows of three over the square of all, or over the tiles."""
    if tiles > 1:
        return [int((n + 0.5) * tiles * count / 6) for n in range(6)]
    side = math.isqrt(count)
    return [int(side * row) * side + int(side * column) for row in (0.3, 0.7) for column in (0.2, 0.5, 0.8)]


def _to_picture(canvas: torch.Tensor, processor: object, edge: int, has_thumbnail: bool) -> Image.Image:
    """Normalised pixels [3, H, W] -> the picture, white beside the thumbnail."""
    mean, std = (torch.tensor(getattr(processor, name))[:, None, None] for name in ("image_mean", "image_std"))
    pixels = (canvas * std + mean).clamp(0, 1)
    if has_thumbnail:
        pixels[:, -edge:, edge:] = 1
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())
