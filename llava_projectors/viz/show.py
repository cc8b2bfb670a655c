"""`llava-projectors show`: from a picture on the disk to a drawing beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from PIL import Image

from llava_projectors.integration.image_processor import SlicingProcessor, set_slicing
from llava_projectors.viz.draw import draw
from llava_projectors.viz.maps import token_maps
from llava_projectors.viz.models import random_model, trained_model
from llava_projectors.viz.tiles import draw_in_tiles


def show(
    image: Path,
    target: Path,
    type_string: Optional[str],
    path: Optional[str],
    base: Optional[str],
    tokens: Sequence[int],
    patch_num: Optional[int] = None,
) -> str:
    """Draw the maps of some tokens over the picture; returns what was drawn, in a line.

    With `patch_num`, or a checkpoint that was trained so, the picture is cut into tiles, else cropped to its
    central square.

    Raises:
        ValueError: a token that does not exist, or a checkpoint without a projector of ours.
        OSError: the picture cannot be read.
    """
    with Image.open(image) as opened:
        picture = opened.convert("RGB")
    if path is None:
        get_features, projector, processor = random_model(type_string or "saep")
        source = "random weights: where a token looks by its build, not what was learned"
    else:
        get_features, projector, processor = trained_model(path, base)
        source = path
    if patch_num is not None:
        set_slicing(processor, patch_num)
    kind = "attention" if hasattr(projector, "region_weights") else "receptive field by gradient"
    if isinstance(processor, SlicingProcessor):
        figure, title = draw_in_tiles(picture, processor, get_features, projector, tokens)
        figure.savefig(target, dpi=100)
        return f"{type_string or projector.name}: {title}; {kind}; {source}"
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge)).resize((336, 336))
    pixels = processor(square, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = get_features(pixels)
        count = projector(features).shape[1]
    chosen = list(tokens) or spread(count)
    maps = token_maps(projector, features, chosen)
    title = f"{type_string or projector.name}: {features.shape[1]} patches -> {count} visual tokens; {kind}; {source}"
    draw(square, maps.cpu(), chosen, count, title).savefig(target, dpi=100)
    return title


def spread(count: int) -> list[int]:
    """Six tokens: two rows of three, over the square of all."""
    side = math.isqrt(count)
    return [int(side * row) * side + int(side * column) for row in (0.3, 0.7) for column in (0.2, 0.5, 0.8)]
