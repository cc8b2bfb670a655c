"""What a picture or a frame takes in the LLM where LLaVA's own code lays out several tiles or pools a video.

Nothing here changes a model: it tells the user at the start how long a picture will be.
LLaVA's code is asked where it can be, and else known by the names of the functions that it calls.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from typing import Any, Optional

import torch

from llava_projectors.integration.log import log
from llava_projectors.integration.tower import ReducedTower, find_tower
from llava_projectors.seam_names import INPUTS_PREPARER

# By these LLaVA and LLaVA-NeXT lay out the tiles of `anyres`.
_ANYRES_FUNCTIONS = {"get_anyres_image_grid_shape", "unpad_image"}
_MERGE_TYPES = ("flat", "spatial", "spatial_unpad")


def announce_layout(model: Any) -> None:
    """Say what a picture takes with `anyres`, and a frame of a video, once a model of ours is set up."""
    tower = find_tower(model)
    if not isinstance(tower, ReducedTower) or tower.patch_side is None:
        return
    setting = getattr(model.config, "image_aspect_ratio", None)
    most = most_tokens(model, tower)
    if most is not None:
        log(f"{setting}: a picture takes up to {most} visual tokens")
    _announce_frames(model, tower)


def most_tokens(model: Any, tower: Any) -> Optional[int]:
    """Visual tokens of a picture at most, newlines counted, with `anyres`; None where it is laid out otherwise."""
    config: Any = model.config
    merge_type = str(getattr(config, "mm_patch_merge_type", "flat"))
    limit = re.fullmatch(r"anyres(?:_max_(\d+))?", str(getattr(config, "image_aspect_ratio", None)))
    if limit is None or merge_type not in _MERGE_TYPES or not _lays_out_tiles(model, has_limit=bool(limit[1])):
        return None
    side, pixels = tower.num_patches_per_side, getattr(tower.config, "image_size", 0)
    grids = {(height // pixels, width // pixels) for width, height in _resolutions(config) if pixels}
    if not grids:
        return None
    if merge_type != "spatial_unpad":
        return side**2 * (1 + max(rows * columns for rows, columns in grids))
    most_tiles = int(limit[1]) if limit[1] else None
    return side**2 + max(_most_unpadded(rows * side, columns * side, side, most_tiles) for rows, columns in grids)


def _lays_out_tiles(model: Any, has_limit: bool) -> bool:
    """Whether the model's own code lays out the tiles of `anyres`, and of `anyres_max` where there is a limit."""
    code = inspect.unwrap(getattr(type(model), INPUTS_PREPARER)).__code__
    return {*code.co_names} >= _ANYRES_FUNCTIONS and (not has_limit or "anyres_max" in code.co_consts)


def _resolutions(config: Any) -> list[tuple[int, int]]:
    """Width and height of the canvases that a picture is scaled to."""
    given: Any = getattr(config, "image_grid_pinpoints", None)
    try:
        pairs = ast.literal_eval(given) if isinstance(given, str) else given
        return [(int(width), int(height)) for width, height in pairs]
    except (TypeError, ValueError, SyntaxError):
        return []


def _most_unpadded(height: int, width: int, side: int, most_tiles: Optional[int]) -> int:
    """Positions of a grid of tokens at most, whatever is cut off because it is padding, a newline after each row.

    With a limit of tiles LLaVA-NeXT scales the grid down when it has more than 1.1 times their side.
    """
    if most_tiles is None:
        return height * (width + 1)
    cuts = [(height - 2 * cut, width) for cut in range((height + 1) // 2)]
    cuts += [(height, width - 2 * cut) for cut in range((width + 1) // 2)]
    most = 0
    for rows, columns in cuts:
        times = math.sqrt(rows * columns / (most_tiles * side**2))
        if times > 1.1:
            rows, columns = int(rows // times), int(columns // times)
        most = max(most, rows * (columns + 1))
    return most


def _announce_frames(model: Any, tower: Any) -> None:
    """Say what a frame takes, and warn where the pooling leaves a part of it out."""
    side = tower.num_patches_per_side
    pooled = _pool_rows(model, side)
    if pooled is None:
        return
    mode, (tokens, left_out) = model.config.mm_spatial_pool_mode, pooled
    after = math.isqrt(tokens)
    log(f"video: a frame takes {tokens} visual tokens ({side}x{side} -> {after}x{after}, {mode})")
    if left_out:
        share = 1 - (1 - left_out / side) ** 2
        option = tower.projector_spec.cls.stride_option
        log(
            f"WARNING: mm_spatial_pool_mode {mode!r} leaves out the last {left_out} of {side} rows and columns of each "
            f"frame of a video, {share:.0%} of it: set mm_spatial_pool_mode bilinear, or train with a {option} that "
            f"gives an even grid ({_even_strides(tower)})"
        )


def _pool_rows(model: Any, side: int) -> Optional[tuple[int, int]]:
    """Tokens of a frame after the model's own pooling, and rows of the grid that it does not read; None without one.

    Each of `side` frames is a grid with ones in one row.
    """
    pool = getattr(model, "get_2dPool", None)
    if pool is None or getattr(model.config, "mm_spatial_pool_mode", None) is None:
        return None
    frames = torch.eye(side)[:, :, None].expand(side, side, side).reshape(side, side**2, 1)
    try:
        pooled = pool(frames)
    except Exception:  # of another kind, or with another mode: its first video tells
        return None
    return pooled.shape[1], side - int(pooled.flatten(1).any(1).sum())


def _even_strides(tower: Any) -> str:
    grids = {stride: -(-tower.patch_side // stride) for stride in (2, 3, 4)}
    return ", ".join(f"{stride}: {after}x{after}" for stride, after in grids.items() if after % 2 == 0)
