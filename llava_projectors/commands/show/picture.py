"""A picture from the disk, of any mode, as 8 bits of red, green and blue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from llava_projectors.integration.image_processor import deep_grey, has_deep_grey
from llava_projectors.integration.log import log


def read_picture(path: Path) -> Image.Image:
    """Read a picture as LLaVA reads it, but for two things that LLaVA's `convert("RGB")` loses.

    16 bits of grey are scaled to 8, where LLaVA has nearly all of them white; what is transparent lies on
    white, where LLaVA shows whatever colour the file has there, mostly black. One line says so. As in
    LLaVA, the orientation in a photograph's EXIF data is not applied.

    Raises:
        ValueError: its numbers have no known range, or it is too large for PIL.
        OSError: it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            opened.load()
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    if has_deep_grey(opened):
        grey, white = deep_grey(opened)
        if white > 255:
            log(f"{path}: 16 bits of grey, scaled to 8 here; LLaVA's own scripts clip them, so it sees mostly white")
        return Image.fromarray((grey * (255 / white)).round().astype(np.uint8)).convert("RGB")
    if opened.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in opened.info:
        opened = opened.convert("RGBA")
        if opened.getextrema()[3] != (255, 255):
            log(f"{path}: transparent parts are laid on white here; LLaVA's own scripts drop the transparency")
        return Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened).convert("RGB")
    return opened.convert("RGB")
