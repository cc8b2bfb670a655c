"""Pictures of any aspect ratio as a grid of tiles and a thumbnail, as TokenPacker-HD cuts them.

Plain tensors and numbers: nothing here knows LLaVA or a picture's file. A cut picture travels as one
*canvas*, [3, (rows + 1) * side, columns * side]: the tiles where they belong, and below them the
thumbnail, on the left. A single tile has no thumbnail, and its canvas is the tile. So the shape of a
canvas tells its grid, and a batch of them passes through code that knows of no grids.

Source: arXiv 2407.02392 section 3.3 and the published code; `docs/high_resolution.md` says what is ours.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal, Optional

import torch
import torch.nn.functional as F

from llava_projectors.spec import ProjectorSpecError, declared_options, parse_type_string

if TYPE_CHECKING:
    from typing import TypeGuard  # Python 3.10

NAME = "slice"
_KIND = "image_aspect_ratio"  # what errors call a setting
# Where LLaVA's config keeps an option; the published code reads the first.
CONFIG_OPTIONS = {"patch_num": "patch_num", "chunk_size": "slice_chunk_size"}
Grid = tuple[int, int]  # rows, columns

PATCH_NUMS = (9, 16, 25)

# Every grid of the published lists; of two that score alike the earlier one is taken.
_ALL_GRIDS: tuple[Grid, ...] = (
    (1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1), (1, 5), (5, 1), (1, 6), (6, 1), (2, 3), (3, 2),
    (1, 7), (7, 1), (4, 2), (2, 4), (1, 8), (8, 1), (3, 3), (1, 9), (9, 1),  # to here with 9 tiles
    (2, 5), (5, 2), (2, 6), (6, 2), (3, 4), (4, 3), (2, 7), (7, 2), (3, 5), (5, 3), (2, 8), (8, 2), (4, 4),  # with 16
    (3, 6), (6, 3), (2, 9), (9, 2), (4, 5), (5, 4), (2, 10), (10, 2), (3, 7), (7, 3), (11, 2), (2, 11), (4, 6), (6, 4),
    (12, 2), (2, 12), (3, 8), (8, 3), (5, 5),
)  # fmt: skip


class Slicing:
    """What `--image_aspect_ratio slice[:key=value,...]` gives.

    Args:
        patch_num: most tiles of a picture, the thumbnail aside: 9, 16 or 25.
        chunk_size: tiles that the vision tower and the projector take at a time.
    """

    def __init__(self, *, patch_num: Literal[9, 16, 25] = 9, chunk_size: int = 32) -> None:
        self.patch_num = patch_num
        self.chunk_size = chunk_size

    def most_tokens(self, tokens_of_tile: int) -> int:
        """Positions that a picture takes in the LLM at most."""
        return max(visual_tokens(grid, tokens_of_tile) for grid in grids(self.patch_num))


def is_slice(setting: object) -> TypeGuard[str]:
    """Whether an `image_aspect_ratio` is `slice`; options are not looked at."""
    return isinstance(setting, str) and setting.partition(":")[0].strip() == NAME


def parse_slicing(setting: str, **defaults: object) -> Slicing:
    """Read `slice`, `slice:patch_num=16` and the like.

    Args:
        setting: an `image_aspect_ratio` for which `is_slice` holds.
        defaults: options, as text or numbers, for those that the setting leaves out; None counts as absent.

    Raises:
        ProjectorSpecError: unknown option or value; says what is valid.
    """
    options = declared_options(Slicing)
    given = dict(parse_type_string(setting, options, kind=_KIND).options)
    for name, value in defaults.items():
        if value is not None:
            given.setdefault(name, options[name].parse(str(value), setting, kind=_KIND))
    slicing = Slicing(**given)
    if slicing.chunk_size < 1:
        raise ProjectorSpecError(f"chunk_size={slicing.chunk_size} in {_KIND} {setting!r} must be at least 1")
    return slicing


def slicing_of(config: object) -> Optional[Slicing]:
    """How LLaVA's config says to cut pictures, or None where its `image_aspect_ratio` is not `slice`.

    Raises:
        ProjectorSpecError: unknown option or value.
    """
    setting = getattr(config, "image_aspect_ratio", None)
    if not is_slice(setting):
        return None
    defaults = {option: getattr(config, attribute, None) for option, attribute in CONFIG_OPTIONS.items()}
    return parse_slicing(setting, **defaults)


@cache
def grids(patch_num: int) -> tuple[Grid, ...]:
    """The published list of (rows, columns) for 9, 16 or 25 tiles, in its order."""
    return tuple((rows, columns) for rows, columns in _ALL_GRIDS if rows * columns <= patch_num)


def choose_grid(width: int, height: int, patch_num: int, side: int = 336) -> Grid:
    """The grid that a picture is cut into.

    Of the allowed grids the first with the highest score: the share of the grid's area that the
    picture fills when it is scaled to fit, plus a tenth of the overlap (IoU) of the grid with a
    picture 1.4 times as large, both at the origin. In float32, as published: ties depend on it.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        patch_num: most tiles, 9, 16 or 25.
        side: of a tile, in pixels.

    Returns:
        rows, columns.

    Example:
        >>> choose_grid(640, 480, 9)
        (2, 3)
    """
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width}x{height} pixels cannot be cut into tiles")
    boxes = torch.tensor(grids(patch_num)) * side
    areas = boxes.prod(1)
    picture = torch.tensor([height, width])
    scale = (boxes / picture).amin(1)
    filled = torch.round(height * scale) * torch.round(width * scale) / areas
    enlarged = picture * 1.4
    overlap = torch.minimum(boxes, enlarged).prod(1)
    iou = overlap / (areas + enlarged.prod() - overlap)  # published with 1e-5 more, which float32 drops here
    return grids(patch_num)[int(torch.argmax(filled + 0.1 * iou))]


def tile_count(grid: Grid) -> int:
    """Tiles that the vision tower sees: the grid's, and the thumbnail where there is more than one."""
    tiles = grid[0] * grid[1]
    return tiles + 1 if tiles > 1 else 1


def visual_tokens(grid: Grid, tokens_of_tile: int) -> int:
    """Positions that a cut picture takes in the LLM: one separator follows each tile's tokens."""
    return tile_count(grid) * (tokens_of_tile + 1)


def ends_line(grid: Grid) -> list[bool]:
    """For each tile, row by row, and the thumbnail: whether the separator after it ends a line."""
    rows, columns = grid
    tiles = [column == columns - 1 for _ in range(rows) for column in range(columns)]
    return [*tiles, True] if len(tiles) > 1 else tiles


def to_canvas(picture: torch.Tensor, grid: Grid, side: int = 336) -> torch.Tensor:
    """Scale a picture to its grid, and add the thumbnail.

    Bilinear without antialiasing, zeros on the right and below. As published, the thumbnail is made
    from the padded grid and not from the picture, squeezed to the picture's aspect.

    Args:
        picture: normalised, [3, height, width].
        grid: rows, columns.
        side: of a tile, in pixels.

    Returns:
        the canvas, [3, (rows + 1) * side, columns * side], or [3, side, side] for one tile.
    """
    rows, columns = grid
    height, width = picture.shape[-2:]
    tiles = _fit(picture, (rows * side, columns * side), (height, width))
    if rows * columns == 1:
        return tiles
    canvas = picture.new_zeros(3, (rows + 1) * side, columns * side)
    canvas[:, : rows * side] = tiles
    canvas[:, rows * side :, :side] = _fit(tiles, (side, side), (height, width))
    return canvas


def _fit(picture: torch.Tensor, box: tuple[int, int], aspect: tuple[int, int]) -> torch.Tensor:
    """[3, H, W] -> [3, *box], of the given height and width scaled to fit, with zeros right and below."""
    scale = min(box[0] / aspect[0], box[1] / aspect[1])
    # One side comes out as the box's; very thin pictures would round to nothing on the other.
    size = [min(most, max(1, round(length * scale))) for most, length in zip(box, aspect)]
    fitted = picture.new_zeros(3, *box)
    fitted[:, : size[0], : size[1]] = F.interpolate(picture[None], size=size, mode="bilinear")[0]
    return fitted


def canvas_grid(canvas: torch.Tensor, side: int = 336) -> Grid:
    """The grid of a canvas, from its shape.

    Raises:
        ValueError: no canvas has this shape.
    """
    shape = canvas.shape
    rows, columns = (length // side for length in shape[-2:])
    if len(shape) == 3 and shape[0] == 3 and tuple(shape[1:]) == (rows * side, columns * side):
        if (rows, columns) == (1, 1):
            return 1, 1
        if (rows - 1) * columns > 1:
            return rows - 1, columns
    raise ValueError(
        f"a picture of shape {list(shape)} is no canvas of {side} px tiles with a thumbnail below; "
        "prepare pictures with the image processor that LLaVA's loader returns"
    )


def to_tiles(canvas: torch.Tensor, side: int = 336) -> list[torch.Tensor]:
    """The tiles of a canvas, row by row, and its thumbnail: views [3, side, side]."""
    rows, columns = canvas_grid(canvas, side)
    places = [(row, column) for row in range(rows) for column in range(columns)]
    if len(places) > 1:
        places.append((rows, 0))
    return [canvas[:, row * side : (row + 1) * side, column * side : (column + 1) * side] for row, column in places]


def to_whole(canvas: torch.Tensor, side: int = 336) -> torch.Tensor:
    """The one tile of a canvas that shows the whole picture: its thumbnail, a view [3, side, side]."""
    return to_tiles(canvas, side)[-1]
