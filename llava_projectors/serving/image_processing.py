"""The image processor of an exported folder: LLaVA's own road from a picture to pixels, on every version.

Processors of transformers have changed: later ones lay transparency on white, where LLaVA drops it, and
resize with another library. This one needs PIL and NumPy alone, and travels in the folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ImageProcessingMixin

from llava_projectors import slicing
from llava_projectors.serving.hook import NOT_STOCK, STOCK_NAMES
from llava_projectors.serving.layout import (
    AnyResolution,
    Layout,
    OneTile,
    Size,
    Slices,
    layout_of,
    row_of_video,
    rows_of,
)


class _NoSettings(TypedDict):
    """Nothing."""


class LlavaProjectorsImageProcessor(ImageProcessingMixin):  # type: ignore[misc]
    """Pictures -> tiles, cut and normalised as LLaVA does it.

    Args:
        image_layout: see `llava_projectors.serving.layout`.
        tile_side: side of a tile, in pixels.
        shortest_edge: to which a picture's shorter side is resized before its middle is cut out; None squeezes
            the picture into the tile.
        image_mean: of each channel, of values from 0 to 1.
        image_std: likewise.
        resample: PIL's number of the filter.
        size: in the file, where it stands in the way of other image processors.
    """

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012
    valid_kwargs = _NoSettings  # transformers 5 asks for what a call may change

    def __init__(
        self,
        image_layout: Any = None,
        tile_side: int = 336,
        shortest_edge: Optional[int] = None,
        image_mean: Any = (0.0, 0.0, 0.0),
        image_std: Any = (1.0, 1.0, 1.0),
        resample: int = 3,
        size: Any = NOT_STOCK,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_layout = image_layout or {"kind": "one_tile", "token_side": 1}
        self.tile_side = tile_side
        self.shortest_edge = shortest_edge
        self.image_mean = image_mean
        self.image_std = image_std
        self.resample = resample

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with what other image processors cannot read."""
        parent: Any = super()
        settings: dict[str, Any] = {**parent.to_dict(), **STOCK_NAMES, "size": NOT_STOCK}
        return settings

    @property
    def layout(self) -> Layout:
        """How pictures become tiles."""
        return layout_of(self.image_layout)

    @property
    def size(self) -> dict[str, int]:
        """Of a picture with the most positions; vLLM measures its memory with one."""
        height, width = self.layout.largest_size()
        return {"height": max(height, self.tile_side), "width": max(width, self.tile_side)}

    @property
    def crop_size(self) -> dict[str, int]:
        """Of a tile, for programs that ask."""
        return {"height": self.tile_side, "width": self.tile_side}

    def __call__(self, images: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
        """See `preprocess`."""
        return self.preprocess(images, return_tensors, **kwargs)

    def preprocess(
        self,
        images: Any,
        return_tensors: Any = None,
        image_aspect_ratio: Optional[str] = None,
        whole: Any = (),
        videos: Any = None,
        **_: Any,
    ) -> Any:
        """Pictures -> `pixel_values` [tiles, 3, side, side], all tiles of the first picture first.

        Where their number depends on the picture, `image_sizes` [tiles, 3] has the `layout.Row` of each tile's.

        Args:
            images: a picture or lists of them: PIL, or uint8 [height, width, 3] or [3, height, width].
            return_tensors: as in transformers.
            image_aspect_ratio: `pad`, where pictures are cut by `anyres`: each is padded to a square and seen
                whole, as LLaVA-NeXT trains several pictures of a prompt; likewise where it sees several whole.
                There `slice` cuts each.
            whole: for each picture, whether it is seen whole.
            videos: videos in the place of pictures: each a list of frames, or an array of them.

        Raises:
            ValueError: another aspect ratio, or videos where none were trained.
        """
        if videos is not None:
            data = self._videos([[to_picture(frame) for frame in flat(video)] for video in videos])
        else:
            pictures = [to_picture(image) for image in flat(images)]
            flags = list(whole) or seen_whole(self.layout, [1] * len(pictures), image_aspect_ratio)
            data = self._pictures(pictures, flags)
        return BatchFeature(data, tensor_type=return_tensors)

    def _pictures(self, pictures: list[Image.Image], whole: list[bool]) -> dict[str, Any]:
        layout = self.layout
        cut = [self.to_tiles(picture, layout, flag) for picture, flag in zip(pictures, whole)]
        data = {"pixel_values": np.stack([tile for tiles in cut for tile in tiles])}
        if not isinstance(layout, OneTile):
            rows = rows_of(layout, [size_of(picture) for picture in pictures], whole)
            data["image_sizes"] = np.array([row for row in rows for _ in range(row[2])])
        return data

    def _videos(self, videos: list[list[Image.Image]]) -> dict[str, Any]:
        if self.layout.video is None:
            raise ValueError("this model was not trained on videos: pass their frames as pictures")
        rows = [row_of_video(len(frames)) for frames in videos for _ in frames]
        pixels = np.stack([self.to_pixels(frame) for frames in videos for frame in frames])
        return {"pixel_values": pixels, "image_sizes": np.array(rows)}

    def to_tiles(self, picture: Image.Image, layout: Layout, whole: bool = False) -> list[Any]:
        """A picture in RGB -> its tiles, arrays float32 [3, side, side]; seen whole it has one."""
        if isinstance(layout, OneTile):
            return [self.to_pixels(to_square(picture, self._background()) if layout.pad else picture)]
        if isinstance(layout, Slices):
            tiles = self._slices(picture, layout)
            return tiles[-1:] if whole else tiles
        if whole:
            return [self.to_pixels(to_square(picture, self._background()))]
        side = self.shortest_edge or self.tile_side
        squeezed = picture.resize((side, side))
        return [self.to_pixels(tile) for tile in [squeezed, *any_resolution_tiles(picture, layout)]]

    def _slices(self, picture: Image.Image, layout: Slices) -> list[Any]:
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255.0).contiguous()
        canvas = slicing.to_canvas((pixels - mean) / std, layout.grid(size_of(picture)), self.tile_side)
        return [tile.numpy() for tile in slicing.to_tiles(canvas, self.tile_side)]

    def to_pixels(self, picture: Image.Image) -> Any:
        """A picture -> one tile, resized, its middle cut out, normalised."""
        side = self.tile_side
        width, height = side, side
        if self.shortest_edge is not None:
            short = min(picture.size)
            width, height = (
                self.shortest_edge if length == short else int(self.shortest_edge * length / short)
                for length in picture.size
            )
        array = np.array(picture.resize((width, height), resample=Image.Resampling(self.resample)))
        top, left = (height - side) // 2, (width - side) // 2
        array = array[top : top + side, left : left + side]
        # In this order and these dtypes, so that the last bit is LLaVA's too.
        scaled = (array * (1 / 255)).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32) for values in (self.image_mean, self.image_std))
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))

    def _background(self) -> tuple[int, ...]:
        return tuple(int(value * 255) for value in self.image_mean)


def flat(images: Any) -> list[Any]:
    """One picture, or lists of pictures in any depth, as one list."""
    if isinstance(images, (list, tuple)):
        return [picture for image in images for picture in flat(image)]
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    return list(images) if is_batch else [images]


def seen_whole(layout: Layout, places: Sequence[int], image_aspect_ratio: Optional[str] = None) -> list[bool]:
    """For each picture, whether it is seen whole.

    Args:
        layout: of every picture.
        places: how many pictures each prompt has.
        image_aspect_ratio: see `LlavaProjectorsImageProcessor.preprocess`.

    Raises:
        ValueError: an aspect ratio that no call may ask for.
    """
    known = ["pad"] * isinstance(layout, AnyResolution) + ["pad", "slice"] * (not layout.cuts_several)
    if image_aspect_ratio is None:
        return [not layout.cuts_several and count > 1 for count in places for _ in range(count)]
    if image_aspect_ratio not in known:
        raise ValueError(
            f"image_aspect_ratio {image_aspect_ratio!r}: a folder with this image_layout, {layout.kind!r}, takes "
            f"{' or '.join(map(repr, known)) or 'none'} in a call"
        )
    return [image_aspect_ratio == "pad"] * sum(places)


def size_of(picture: Image.Image) -> Size:
    """Height and width."""
    return picture.height, picture.width


def to_picture(image: Any) -> Image.Image:
    """A picture in RGB, as PIL makes it: transparency is dropped.

    Raises:
        ValueError: an array that is no picture.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"a picture is a PIL image, or uint8 [height, width, 3] or [3, height, width], not {array.dtype} "
            f"{list(array.shape)}"
        )
    return Image.fromarray(array)


def to_square(picture: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """Padded on both sides to a square."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


def any_resolution_tiles(picture: Image.Image, layout: AnyResolution) -> list[Image.Image]:
    """Scaled to fit the best resolution, on black in its middle, cut row by row."""
    width, height = layout.best_resolution(size_of(picture))
    across, down = width / picture.width, height / picture.height
    if across < down:
        fitted = width, min(math.ceil(picture.height * across), height)
    else:
        fitted = min(math.ceil(picture.width * down), width), height
    canvas = Image.new("RGB", (width, height))
    canvas.paste(picture.resize(fitted), ((width - fitted[0]) // 2, (height - fitted[1]) // 2))
    side = layout.tile_side
    corners = [(x, y) for y in range(0, height, side) for x in range(0, width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
