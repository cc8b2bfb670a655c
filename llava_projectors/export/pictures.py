"""A picture's road into the LLM: which layout a checkpoint has, and what the exported processor does."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

from llava_projectors.export.errors import ExportError
from llava_projectors.files import read_json
from llava_projectors.integration.high_resolution import SEPARATORS
from llava_projectors.serving.hook import NOT_STOCK, PROCESSOR_AUTO_MAP, STOCK_NAMES
from llava_projectors.serving.layout import AnyResolution, Frames, Layout, OneTile, Slices, as_settings
from llava_projectors.slicing import slicing_of

MERGES = ("flat", "spatial", "spatial_unpad")
# What LLaVA-NeXT alone writes into a config. There each picture is a list of its own, and `image_newline` follows
# also where it is one tile; LLaVA stacks such pictures, and then it does not.
NEXT_SETTING = "vision_tower_pretrained"
# What LLaVA-MORE alone writes.
MORE_SETTING = "model_architecture"
# `mm_spatial_pool_mode`: how LLaVA-NeXT pools the frames of a video.
POOLS = ("average", "max", "bilinear")


def image_layout(config: Mapping[str, Any], source: Path, tile_side: int, token_side: int) -> Layout:
    """How LLaVA lays out the pictures of a checkpoint.

    Args:
        config: of the checkpoint.
        source: the checkpoint, for messages.
        tile_side: pixels of the tower's pictures.
        token_side: of the grid of visual tokens of a tile.

    Raises:
        ExportError: settings that cannot be exported.
        ProjectorSpecError: `slice` with an unknown option.
    """
    aspect, merge = config.get("image_aspect_ratio"), config.get("mm_patch_merge_type") or "flat"
    if merge not in MERGES:
        raise ExportError(f"{source} has mm_patch_merge_type {merge!r}: {', '.join(MERGES)} can be exported")
    is_next = NEXT_SETTING in config
    video = _video(config, merge, token_side) if is_next else None
    slicing = slicing_of(SimpleNamespace(**config))
    if slicing is not None:
        separators = _separators(config, source)
        return Slices(token_side, tile_side, slicing.patch_num, separators, not is_next, video)
    matched = re.fullmatch(r"anyres(?:_max_(\d+))?", str(aspect))
    if matched and (is_next or not matched[1]):
        most = int(matched[1]) if matched[1] and merge == "spatial_unpad" else None
        if merge != "flat" and MORE_SETTING in config:
            raise ExportError(
                f"{source} has {MORE_SETTING} {config[MORE_SETTING]!r}, as LLaVA-MORE writes, and mm_patch_merge_type "
                f"{merge!r}: LLaVA-MORE lays out tiles by their own size, not the picture's. With 'flat' it can be "
                "exported"
            )
        resolutions = _resolutions(config.get("image_grid_pinpoints"), tile_side, source)
        return AnyResolution(token_side, tile_side, resolutions, merge, most, video)
    if aspect not in (None, "pad", "square"):
        raise ExportError(
            f"{source} has image_aspect_ratio {aspect!r}: pad, square, slice and anyres can be exported, and "
            "anyres_max_N of LLaVA-NeXT, which alone knows it"
        )
    return OneTile(token_side, aspect == "pad", is_next and merge == "spatial_unpad", video)


def _separators(config: Mapping[str, Any], source: Path) -> tuple[int, int]:
    separators = config.get(SEPARATORS)
    if separators is None:
        raise ExportError(
            f"{source} has image_aspect_ratio {config['image_aspect_ratio']!r} and no {SEPARATORS}: write the ids of "
            "',' and the newline into its config.json, [29892, 0] in the released models"
        )
    comma, newline = separators
    return comma, newline


def _video(config: Mapping[str, Any], merge: str, token_side: int) -> Optional[Frames]:
    """LLaVA-NeXT's layout of videos; None where LLaVA-NeXT itself fails on them, or its versions differ."""
    pool = config.get("mm_spatial_pool_mode")
    # Where newer versions pool by 2 whatever the config says, older ones and LongVA pool by the config.
    if pool not in POOLS or config.get("add_faster_video") or config.get("mm_spatial_pool_stride") not in (None, 2):
        return None
    if merge == "flat":
        return Frames(token_side, pool, "no_token")
    position, has_newline = config.get("mm_newline_position", "one_token"), "unpad" in merge
    if position == "one_token" and not has_newline:
        position = "no_token"
    is_known = position == "no_token" or (has_newline and position in ("grid", "frame", "one_token"))
    return Frames(token_side, pool, position) if is_known else None


def _resolutions(pinpoints: Any, side: int, source: Path) -> tuple[tuple[int, int], ...]:
    """[width, height] of each resolution, from a list, one as text, or LLaVA-NeXT's range `(1x1),...,(6x6)`."""
    try:
        resolutions = tuple((int(width), int(height)) for width, height in _pairs(pinpoints, side))
    except (TypeError, ValueError, SyntaxError, IndexError):
        resolutions = ()
    if not resolutions or any(length <= 0 or length % side for pair in resolutions for length in pair):
        raise ExportError(
            f"{source} has image_grid_pinpoints {pinpoints!r}: anyres needs pairs of multiples of the tower's {side} px"
        )
    return resolutions


def _pairs(pinpoints: Any, side: int) -> Any:
    """What LLaVA reads `image_grid_pinpoints` as: pairs, unless it is something else."""
    if not isinstance(pinpoints, str):
        return pinpoints
    if "x" not in pinpoints:
        return ast.literal_eval(pinpoints)
    corners = [tuple(map(int, pair)) for pair in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
    (left, top), (right, bottom) = corners[0], corners[-1]
    return [(x * side, y * side) for x in range(left, right + 1) for y in range(top, bottom + 1)]


def processor_settings(layout: Layout, tower: Path, tile_side: int, is_siglip: bool) -> dict[str, Any]:
    """The exported `preprocessor_config.json`.

    Args:
        layout: of the pictures.
        tower: its folder.
        tile_side: pixels of the tower's pictures.
        is_siglip: LLaVA-NeXT prepares pictures for SigLIP by numbers of its own, and not by the folder's.
    """
    path = tower / "preprocessor_config.json"
    prepare = _siglip(path) if is_siglip else _clip(read_json(path), path)
    if prepare.pop("tile_side", tile_side) != tile_side:
        raise ExportError(f"{path} makes pictures of another size than the {tile_side} px of the tower's config.json")
    return {
        **STOCK_NAMES,
        "auto_map": PROCESSOR_AUTO_MAP,
        "image_layout": as_settings(layout),
        "tile_side": tile_side,
        **prepare,
        "size": NOT_STOCK,
    }


def _siglip(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    used: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    for name, value in used.items():
        if found.get(name, value) != value:
            raise ExportError(f"{path} has {name} {found[name]!r}, but LLaVA-NeXT uses {value!r} whatever it says")
    return used


def _clip(found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What CLIP's image processor of LLaVA's time reads; the rest, newer settings among it, it ignored."""
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not found.get(name, True):
            raise ExportError(f"{path} has {name} {found[name]!r}: only pictures prepared as CLIP's can be exported")
    if abs(found.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-9:
        raise ExportError(f"{path} has rescale_factor {found['rescale_factor']!r}, not 1/255")
    size, crop = found.get("size", 224), found.get("crop_size", 224)
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else size
    side = _square(crop if found.get("do_center_crop", True) else size, path)
    if shortest is None:
        _square(size, path)
    elif not isinstance(shortest, int) or shortest < side or not found.get("do_center_crop", True):
        raise ExportError(f"{path} resizes to {size!r} and crops {crop!r}: pictures would be of several sizes")
    return {
        "tile_side": side,
        "shortest_edge": shortest,
        "image_mean": found.get("image_mean", [0.48145466, 0.4578275, 0.40821073]),
        "image_std": found.get("image_std", [0.26862954, 0.26130258, 0.27577711]),
        "resample": found.get("resample", 3),
    }


def _square(size: Any, path: Path) -> int:
    found: Optional[int] = size if isinstance(size, int) else None
    if isinstance(size, Mapping) and size.get("height") == size.get("width"):
        found = size.get("height")
    if found is None:
        raise ExportError(f"{path} has a size of {size!r}: towers of square pictures can be exported")
    return found
