"""How the visual tokens of a picture lie in the LLM's input, as LLaVA lays them: numbers and tensors only.

An exported folder says it as `image_layout`, in its config for the model, and in that of its image
processor, which counts and cuts. A picture becomes tiles [3, side, side], a tile tokens [M, D]. A picture of
one tile is seen whole; the frames of a video have one tile each.
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
Row = tuple[int, int, int]  # of a picture: height, width, tiles; of a video: 0, 0, frames


@dataclass(frozen=True)
class Frames:
    """LLaVA-NeXT's layout of a video: the tokens of each frame are pooled by 2, in both directions.

    Attributes:
        token_side: side of a frame's grid of tokens, before it is pooled.
        pool: `mm_spatial_pool_mode`: `bilinear`, which rounds up, or `average` or `max`, which round down.
        newline_position: where `image_newline` stands: behind each row (`grid`) or frame (`frame`), at the end
            (`one_token`), nowhere (`no_token`).
    """

    token_side: int
    pool: str
    newline_position: str

    @property
    def side(self) -> int:
        """Of a frame's pooled grid."""
        return (self.token_side + (self.pool == "bilinear")) // 2

    def positions(self, frames: int) -> int:
        """Positions that a video takes in the LLM."""
        behind_frame = {"grid": self.side, "frame": 1}.get(self.newline_position, 0)
        return frames * (self.side**2 + behind_frame) + (self.newline_position == "one_token")

    def pack(self, tokens: torch.Tensor, newline: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens [frames, M, D] of a video -> [positions, D]; `newline` [D], where it stands anywhere."""
        grid = tokens.unflatten(1, (self.token_side, self.token_side)).permute(0, 3, 1, 2)
        pooled = self._pooled(grid).permute(0, 2, 3, 1)  # [frames, side, side, D]
        if newline is None or self.newline_position == "no_token":
            return pooled.flatten(0, 2)
        newline = newline.to(tokens)
        if self.newline_position == "grid":
            return _ended(pooled, newline).flatten(0, 2)
        if self.newline_position == "frame":
            return _ended(pooled.flatten(1, 2), newline).flatten(0, 1)
        return _ended(pooled.flatten(0, 2), newline)

    def _pooled(self, grid: torch.Tensor) -> torch.Tensor:
        """[frames, D, side, side] before and after."""
        if self.pool == "bilinear":
            return F.interpolate(grid, (self.side, self.side), mode="bilinear")
        return F.avg_pool2d(grid, 2) if self.pool == "average" else F.max_pool2d(grid, 2)


def _ended(tokens: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """[..., positions, D] with `newline` [D] behind the last position: [..., positions + 1, D]."""
    return torch.cat([tokens, newline.expand(*tokens.shape[:-2], 1, -1)], dim=-2)


@dataclass(frozen=True)
class OneTile:
    """The whole picture is one tile.

    Attributes:
        token_side: side of a tile's grid of tokens.
        pad: whether it is padded to a square first; else its middle is cut out, or it is squeezed.
        newline: whether `image_newline` follows, as LLaVA-NeXT has it.
        video: of videos, where they were trained.
    """

    kind: ClassVar[str] = "one_tile"
    token_side: int
    pad: bool = False
    newline: bool = False
    video: Optional[Frames] = None
    cuts_several: ClassVar[bool] = True

    def tile_count(self, size: Size) -> int:
        """Tiles of a picture."""
        return 1

    def positions(self, size: Size) -> int:
        """Positions that a picture takes in the LLM."""
        return self.whole_positions

    @property
    def whole_positions(self) -> int:
        """Positions of a picture that is seen whole."""
        return self.token_side**2 + self.newline

    def pack(self, tokens: torch.Tensor, size: Size, newline: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens [tiles, M, D] of a picture -> [positions, D]; `newline` [D]."""
        return tokens[0] if newline is None else _ended(tokens[0], newline.to(tokens))

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
        cuts_several: whether several pictures of a prompt are cut too; LLaVA-NeXT cuts a single one, and sees
            several whole.
        video: of videos, where they were trained.
    """

    kind: ClassVar[str] = "slice"
    token_side: int
    tile_side: int
    patch_num: int
    separators: tuple[int, int]
    cuts_several: bool = True
    video: Optional[Frames] = None
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

    @property
    def whole_positions(self) -> int:
        """Positions of a picture that is seen whole."""
        return slicing.visual_tokens((1, 1), self.token_side**2)

    def pack(self, tokens: torch.Tensor, size: Size, separators: Optional[torch.Tensor]) -> torch.Tensor:
        """Tokens [tiles, M, D] of a picture -> [positions, D]; `separators` [2, D]: the embeddings of their ids."""
        assert separators is not None
        ends = [int(ends) for ends in slicing.ends_line(self.grid(size) if len(tokens) > 1 else (1, 1))]
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
        video: of videos, where they were trained.
    """

    kind: ClassVar[str] = "anyres"
    token_side: int
    tile_side: int
    resolutions: tuple[tuple[int, int], ...]
    merge: str = "flat"
    most_tiles: Optional[int] = None
    video: Optional[Frames] = None
    cuts_several: ClassVar[bool] = True

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

    @property
    def whole_positions(self) -> int:
        """Positions of a picture that is seen whole."""
        return self.token_side**2 + self.newline

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
        if len(tokens) == 1 and newline is not None:
            return _ended(tokens[0], newline.to(tokens))
        if self.merge == "flat" or len(tokens) == 1:
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
        return torch.cat([base, _ended(grid, newline.to(tokens)).flatten(0, 1)])

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
    if values.get("video") is not None:
        values["video"] = Frames(**values["video"])
    layout: Layout = KINDS[settings["kind"]](**values)
    return layout


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(one) for one in value) if isinstance(value, (list, tuple)) else value


def rows_of(layout: Layout, sizes: Sequence[Size], whole: Sequence[bool]) -> list[Row]:
    """A row for each picture.

    Args:
        layout: of every picture.
        sizes: of the pictures.
        whole: whether each is seen whole.
    """
    return [(*size, 1 if is_whole else layout.tile_count(size)) for size, is_whole in zip(sizes, whole)]


def row_of_video(frames: int) -> Row:
    """A row for a video."""
    return 0, 0, frames


def positions_of(layout: Layout, row: Row) -> int:
    """Positions that a picture, or a video, takes in the LLM."""
    height, width, count = row
    if not height:
        assert layout.video is not None
        return layout.video.positions(count)
    return layout.whole_positions if count == 1 else layout.positions((height, width))


def pack_pictures(
    layout: Layout, tokens: Sequence[torch.Tensor], rows: Any, extra: Optional[torch.Tensor]
) -> list[torch.Tensor]:
    """The tokens of all tiles, [M, D] each -> for each picture or video [positions, D].

    Args:
        layout: of every picture.
        tokens: of each tile of each picture.
        rows: [tiles, 3], each tile with the row of its picture, so that whoever splits a batch of tiles by
            pictures splits these alike; without them every tile is a picture.
        extra: the embeddings that `pack` takes beside the tokens.
    """
    if rows is None:
        rows = [(1, 1, 1)] * len(tokens)
    packed, start = [], 0
    while start < len(tokens):
        height, width, count = (int(value) for value in rows[start])
        tiles = torch.stack(list(tokens[start : start + count]))
        if height:
            packed.append(layout.pack(tiles, (height, width), extra))
        else:
            assert layout.video is not None
            packed.append(layout.video.pack(tiles, extra if layout.newline else None))
        start += count
    return packed
