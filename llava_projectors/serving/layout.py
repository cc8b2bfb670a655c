"""How the visual tokens of a picture lie in the LLM's input, as LLaVA lays them: numbers and tensors only.

An exported folder says it as `image_layout`, in its config for the model, and in that of its image
processor, which counts and cuts. A picture becomes tiles [3, side, side], a tile tokens [M, D].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, Optional, Union

import torch
import torch.nn.functional as F

from llava_projectors import slicing

Size = tuple[int, int]  # of a picture: height, width


@dataclass(frozen=True)
class OneTile:
    """The whole picture is one tile.

    Attributes:
        token_side: side of a tile's grid of tokens.
        pad: whether it is padded to a square first; else its middle is cut out, or it is squeezed.
        newline: whether `image_newline` follows, as LLaVA-NeXT has it.
    """

    kind: ClassVar[str] = "one_tile"
    token_side: int
    pad: bool = False
    newline: bool = False

    def tile_count(self, size: Size) -> int:
        """Tiles of a picture."""
        return 1

    def positions(self, size: Size) -> int:
        """Positions that a picture takes in the LLM."""
        return self.token_side**2 + self.newline

    def pack(self, tokens: torch.Tensor, size: Size, newline: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens [tiles, M, D] of a picture -> [positions, D]; `newline` [D]."""
        return tokens[0] if newline is None else torch.cat([tokens[0], newline[None].to(tokens)])

    def largest_size(self) -> Size:
        """A picture with the most positions."""
        return (1, 1)


@dataclass(frozen=True)
class Slices:
    """`image_aspect_ratio slice`: a grid of tiles and a thumbnail with separators; see `llava_projectors.slicing`.

    Attributes:
        token_side: side of a tile's grid of tokens.
        tile_side: side of a tile, in pixels.
        patch_num: most tiles, the thumbnail aside.
        separators: ids of "," and the newline, whose embeddings stand behind each tile.
    """

    kind: ClassVar[str] = "slice"
    token_side: int
    tile_side: int
    patch_num: int
    separators: tuple[int, int]
    newline: ClassVar[bool] = False

    def grid(self, size: Size) -> slicing.Grid:
        """Rows and columns of a picture's tiles."""
        return slicing.choose_grid(size[1], size[0], self.patch_num, self.tile_side)

    def tile_count(self, size: Size) -> int:
        """Tiles of a picture, the thumbnail among them."""
        return slicing.tile_count(self.grid(size))

    def positions(self, size: Size) -> int:
        """Positions that a picture takes in the LLM."""
        return slicing.visual_tokens(self.grid(size), self.token_side**2)

    def pack(self, tokens: torch.Tensor, size: Size, separators: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens [tiles, M, D] of a picture -> [positions, D]; `separators` [2, D]: the embeddings of their ids."""
        assert separators is not None
        ends = [int(ends) for ends in slicing.ends_line(self.grid(size))]
        return torch.cat([tokens, separators[ends][:, None].to(tokens)], dim=1).flatten(0, 1)

    def largest_size(self) -> Size:
        """A picture with the most positions."""
        rows, columns = max(slicing.grids(self.patch_num), key=slicing.tile_count)
        return rows * self.tile_side, columns * self.tile_side


@dataclass(frozen=True)
class AnyResolution:
    """LLaVA's `anyres`: the picture squeezed into one tile, then scaled and padded to the best of some resolutions.

    Attributes:
        token_side: side of a tile's grid of tokens.
        tile_side: side of a tile, in pixels.
        resolutions: [width, height] to choose from.
        merge: `mm_patch_merge_type`: `flat` (tile by tile), `spatial` (row by row), `spatial_unpad` (row by row
            without what covers padding, `image_newline` behind each row).
        most_tiles: N of `anyres_max_N`: with more, tokens are interpolated to as many as N tiles have.
    """

    kind: ClassVar[str] = "anyres"
    token_side: int
    tile_side: int
    resolutions: tuple[tuple[int, int], ...]
    merge: str = "flat"
    most_tiles: Optional[int] = None

    @property
    def newline(self) -> bool:
        """Whether the model has `image_newline`."""
        return "unpad" in self.merge

    def best_resolution(self, size: Size) -> tuple[int, int]:
        """Width and height: the most of the picture's own pixels, then the least waste; the first of equal ones."""
        height, width = size

        def worth(resolution: tuple[int, int]) -> tuple[int, int]:
            scale = min(resolution[0] / width, resolution[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - resolution[0] * resolution[1]

        return max(self.resolutions, key=worth)

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tiles, without the squeezed one."""
        width, height = self.best_resolution(size)
        return height // self.tile_side, width // self.tile_side

    def tile_count(self, size: Size) -> int:
        """Tiles of a picture, the squeezed one among them."""
        rows, columns = self.grid(size)
        return rows * columns + 1

    def positions(self, size: Size) -> int:
        """Positions that a picture takes in the LLM."""
        rows, columns = self.grid(size)
        base = self.token_side**2
        if not self.newline:
            return base * (rows * columns + 1)
        height, width = self._kept(size)[2]
        return base + height * (width + 1)

    def _kept(self, size: Size) -> tuple[slice, slice, tuple[int, int]]:
        """The rows and columns of tokens that cover the picture, and the grid that they are interpolated to."""
        rows, columns = self.grid(size)
        height, width = rows * self.token_side, columns * self.token_side
        if size[1] / size[0] > width / height:
            padding = (height - int(size[0] * (width / size[1]))) // 2
            kept = slice(padding, height - padding), slice(0, width)
        else:
            padding = (width - int(size[1] * (height / size[0]))) // 2
            kept = slice(0, height), slice(padding, width - padding)
        height, width = (one.stop - one.start for one in kept)
        if self.most_tiles is not None:
            times = math.sqrt(height * width / (self.most_tiles * self.token_side**2))
            if times > 1.1:
                return (*kept, (int(height // times), int(width // times)))
        return (*kept, (height, width))

    def pack(self, tokens: torch.Tensor, size: Size, newline: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens [tiles, M, D] of a picture -> [positions, D]; `newline` [D]."""
        if self.merge == "flat":
            return tokens.flatten(0, 1)
        rows, columns = self.grid(size)
        side = self.token_side
        base, tiles = tokens[0], tokens[1:].unflatten(1, (side, side)).unflatten(0, (rows, columns))
        grid = tiles.transpose(1, 2).flatten(0, 1).flatten(1, 2)  # [rows * side, columns * side, D]
        if newline is None:
            return torch.cat([base, grid.flatten(0, 1)])
        down, across, shape = self._kept(size)
        grid = grid[down, across]
        if grid.shape[:2] != shape:
            grid = F.interpolate(grid.permute(2, 0, 1)[None], shape, mode="bilinear")[0].permute(1, 2, 0)
        ends = newline.to(tokens).expand(grid.shape[0], 1, -1)
        return torch.cat([base, torch.cat([grid, ends], dim=1).flatten(0, 1)])

    @cache  # noqa: B019 (it is a value)
    def largest_size(self) -> Size:
        """A picture with the most positions."""
        sizes = [(height, width) for width, height in self.resolutions]
        if self.most_tiles is not None:
            # Interpolation rounds down, so a picture that covers fewer rows or columns may keep more of them.
            shares = [n / 64 for n in range(16, 64)]
            sizes += [(round(height * share), width) for height, width in sizes for share in shares]
            sizes += [(height, round(width * share)) for width, height in self.resolutions for share in shares]
            sizes += [(3 * height, 3 * width) for height, width in sizes]
        return max(sizes, key=self.positions)


Layout = Union[OneTile, Slices, AnyResolution]
KINDS: dict[str, Any] = {cls.kind: cls for cls in (OneTile, Slices, AnyResolution)}


def as_settings(layout: Layout) -> dict[str, Any]:
    """What stands in a config."""
    return {"kind": layout.kind, **asdict(layout)}


def layout_of(settings: Mapping[str, Any]) -> Layout:
    """The layout that a config describes."""
    values = {name: _as_tuples(value) for name, value in settings.items() if name != "kind"}
    layout: Layout = KINDS[settings["kind"]](**values)
    return layout


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(one) for one in value) if isinstance(value, (list, tuple)) else value


def rows_of(layout: Layout, sizes: Sequence[Size]) -> list[tuple[int, int, int]]:
    """What stands beside each tile: height and width of its picture, and how many tiles that has.

    One row a tile, so that whoever splits a batch of tiles by pictures splits these alike.
    """
    counts = [layout.tile_count(size) for size in sizes]
    return [(*size, count) for size, count in zip(sizes, counts) for _ in range(count)]


def pack_pictures(
    layout: Layout, tokens: Sequence[torch.Tensor], rows: Any, extra: Optional[torch.Tensor]
) -> list[torch.Tensor]:
    """The tokens of all tiles, [M, D] each -> for each picture [positions, D].

    Args:
        layout: of every picture.
        tokens: of each tile of each picture.
        rows: [tiles, 3], see `rows_of`; without them every tile is a picture.
        extra: the embeddings that `pack` takes beside the tokens.
    """
    if rows is None:
        rows = [(1, 1, 1)] * len(tokens)
    packed, start = [], 0
    while start < len(tokens):
        height, width, count = (int(value) for value in rows[start])
        packed.append(layout.pack(torch.stack(list(tokens[start : start + count])), (height, width), extra))
        start += count
    return packed
