"""The image processor of a tower whose pictures are cut into tiles, made from LLaVA's own processor.

LLaVA's dataset and `process_images` hand a picture whole to the tower's image processor unless
`image_aspect_ratio` is `pad` or `anyres`, so here it can be cut, in the workers of a data loader as
well, with nothing patched. The processor becomes an instance of a subclass of its own class, as the
tower does, because LLaVA's script may hold the very object already.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Optional

import numpy as np
import torch
from PIL import Image

from llava_projectors import slicing
from llava_projectors.spec import ProjectorSpecError


class SlicingProcessor:
    """Mixed in before the class of an image processor.

    Attributes:
        patch_num: most tiles of a picture, the thumbnail aside.
        processor_class: the class that it was.
    """

    patch_num: ClassVar[int]
    processor_class: ClassVar[type]

    def preprocess(self, images: Any, return_tensors: Any = None) -> Any:
        """Pictures, one or a list -> `pixel_values`: their canvases, [B, 3, H, W] or a list of [3, H, W].

        Whole pictures of any mode and size, PIL or uint8 [height, width, 3]. Always tensors, as LLaVA asks.
        The frames of a video, one array [frames, height, width, 3], are not cut: [frames, 3, side, side] by
        the processor's own class.
        """
        from transformers import BatchFeature

        if getattr(images, "ndim", None) == 4:
            own: Any = super()
            return own.preprocess(images, return_tensors="pt")
        pictures = images if isinstance(images, (list, tuple)) else [images]
        canvases: Any = [self.to_canvas(picture) for picture in pictures]
        if all(canvas.shape == canvases[0].shape for canvas in canvases):
            canvases = torch.stack(canvases)
        return BatchFeature({"pixel_values": canvases})

    def to_canvas(self, image: Any) -> torch.Tensor:
        """One picture -> its canvas, normalised; see `llava_projectors.slicing`."""
        pixels = to_pixels(image)
        mean, std = (torch.tensor(getattr(self, name))[:, None, None] for name in ("image_mean", "image_std"))
        side = tile_side(self)
        grid = slicing.choose_grid(pixels.shape[2], pixels.shape[1], self.patch_num, side)
        return slicing.to_canvas((pixels - mean) / std, grid, side)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        return _rebuild, (self.processor_class, self.patch_num), dict(self.__dict__)


@cache
def _subclass(processor_class: Any, patch_num: int) -> Any:
    # It keeps its name, which a saved processor's file tells other programs to load.
    attributes = {"patch_num": patch_num, "processor_class": processor_class}
    return type(processor_class.__name__, (SlicingProcessor, processor_class), attributes)


def _rebuild(processor_class: Any, patch_num: int) -> Any:
    cls = _subclass(processor_class, patch_num)
    return cls.__new__(cls)


def set_slicing(processor: Any, patch_num: Optional[int]) -> None:
    """Make a processor cut pictures into up to `patch_num` tiles, or give it its own class back for None.

    Raises:
        ProjectorSpecError: its pictures are not normalised squares.
    """
    processor_class = processor.processor_class if isinstance(processor, SlicingProcessor) else type(processor)
    if patch_num is None:
        processor.__class__ = processor_class
        return
    tile_side(processor)
    if not all(len(getattr(processor, name, None) or ()) == 3 for name in ("image_mean", "image_std")):
        raise _unfit(processor, "image_mean and image_std of three channels")
    processor.__class__ = _subclass(processor_class, patch_num)


def tile_side(processor: Any) -> int:
    """Side in pixels of the square that the processor feeds the vision tower.

    Raises:
        ProjectorSpecError: it is no square.
    """
    size: Any = getattr(processor, "crop_size", None) or getattr(processor, "size", None)
    try:
        height, width = size["height"], size["width"]
    except (TypeError, KeyError):
        raise _unfit(processor, "a crop_size with height and width") from None
    if height != width:
        raise _unfit(processor, f"a square crop_size, not {height}x{width}")
    return int(height)


def _unfit(processor: Any, needs: str) -> ProjectorSpecError:
    return ProjectorSpecError(
        f"image_aspect_ratio {slicing.NAME!r} cannot use the vision tower's image processor "
        f"{type(processor).__name__}: tiles need {needs}; pass --image_aspect_ratio pad"
    )


def to_pixels(image: Any) -> torch.Tensor:
    """A picture -> float32 [3, height, width] from 0 to 1; alpha is dropped, as LLaVA drops it.

    Raises:
        ValueError: an array that is no picture, or a picture whose numbers have no known range.
        OSError: a truncated file, from PIL.
    """
    highest = 255.0
    if isinstance(image, Image.Image) and has_deep_grey(image):
        grey, highest = deep_grey(image)
        array = grey[..., None].repeat(3, -1)
    elif isinstance(image, Image.Image):
        array = np.array(image.convert("RGB"))
    else:
        array = np.array(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(
                f"a picture to be cut into tiles is a PIL image or uint8 [height, width, 3], not {array.dtype} "
                f"{list(array.shape)}"
            )
    return torch.from_numpy(array).permute(2, 0, 1).float().div(highest).contiguous()


def has_deep_grey(image: Image.Image) -> bool:
    """Whether a picture holds grey of more than 8 bits, which PIL's conversion to RGB would clip to white."""
    return image.mode == "F" or image.mode.startswith("I")


def deep_grey(image: Image.Image) -> tuple[Any, float]:
    """Grey of 16 bits, or 32 bits of integers -> its numbers [height, width], and the number that is white.

    White is 65535 in 16 bits. Files of 32 bits hold either depth, so white follows their largest number.

    Raises:
        ValueError: the numbers have no known range.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    grey = np.asarray(image.convert("I"))
    lowest, highest = int(grey.min()), int(grey.max())
    if lowest < 0 or highest > 65535:
        raise ValueError(f"its pixels are numbers from {lowest} to {highest}; save it with 8 or 16 bits")
    return grey, 255.0 if image.mode == "I" and highest <= 255 else 65535.0
