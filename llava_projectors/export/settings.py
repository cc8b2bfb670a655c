"""What a checkpoint's config says that LLaVA and LLaVA-NeXT do not: a fork's model is another one there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_projectors.export.errors import ExportError
from llava_projectors.registry import GRID_SETTING, OPTIONS_SETTING

# What LLaVA and LLaVA-NeXT write about pictures, read here or without effect in them.
KNOWN = frozenset((
    OPTIONS_SETTING, GRID_SETTING, "mm_projector_type", "mm_hidden_size", "mm_vision_tower", "mm_vision_select_layer",
    "mm_vision_select_feature", "mm_patch_merge_type", "mm_use_im_patch_token", "mm_use_im_start_end", "use_mm_proj",
    "mm_tunable_parts", "mm_resampler_type", "mm_newline_position", "mm_spatial_pool_mode", "mm_spatial_pool_stride",
    "mm_spatial_pool_out_channels", "image_aspect_ratio", "image_grid_pinpoints", "image_crop_resolution",
    "image_split_resolution", "vision_tower", "vision_tower_pretrained", "add_faster_video", "s2", "s2_scales",
    "image_token_index", "image_token_id",  # LLaVA-OneVision's on the hub, for other programs
))  # fmt: skip
ABOUT_PICTURES = re.compile(r"(?:^|_)(?:mm|images?|img|vision|visual|videos?|towers?|encoders?|s2|siglip)(?:_|$)")
OF_TRAINING = re.compile(r"^(?:tune|freeze|unfreeze|pretrain)_|_lr$")  # of weights, which are looked at themselves
OFF = (None, False, "", "none")
CLASSES = re.compile(r"(?:Llava|Bunny)?(?:Llama|LLaMA|Mistral|Qwen2?|Phi3?)ForCausalLM")


def refuse_settings_of_forks(config: Mapping[str, Any], source: Path) -> None:
    """Raise for settings about pictures that are neither known nor off.

    Args:
        config: of the checkpoint.
        source: the checkpoint, for messages.

    Raises:
        ExportError: names them.
    """
    unknown = [
        f"{name} {value!r}"
        for name, value in config.items()
        if ABOUT_PICTURES.search(name) and not OF_TRAINING.search(name) and name not in KNOWN and value not in OFF
    ]
    if unknown:
        raise ExportError(
            f"the config.json of {source} has {', '.join(unknown)}, which LLaVA and LLaVA-NeXT do not read: a fork's "
            "model may do by them with pictures what the folder would not. Remove what changes nothing in your model, "
            "and compare with --verify and --package"
        )


def refuse_other_grid(config: Mapping[str, Any], source: Path, patch_side: int) -> None:
    """Raise unless the tower of a folder gives the patch grid that was trained with.

    Args:
        config: of the checkpoint.
        source: the checkpoint, for messages.
        patch_side: of the tower's grid.

    Raises:
        ExportError: it gives another.
    """
    trained = config.get(GRID_SETTING) or patch_side
    if trained != patch_side:
        raise ExportError(
            f"{source} was trained on {trained}x{trained} patches ({GRID_SETTING} in its config.json), and its vision "
            f"tower gives {patch_side}x{patch_side} by its own config.json: either another tower was named, or a fork "
            "made larger pictures than that, which cannot be exported"
        )


def refuse_other_class(config: Mapping[str, Any], source: Path) -> None:
    """Raise for a checkpoint that a class of a fork wrote, under a `model_type` of LLaVA's.

    Args:
        config: of the checkpoint.
        source: the checkpoint, for messages.

    Raises:
        ExportError: names the class.
    """
    for name in config.get("architectures") or ():
        if not CLASSES.fullmatch(str(name)):
            raise ExportError(
                f"the config.json of {source} has model_type {config.get('model_type')!r}, and was written by "
                f"{name}, which is no class of LLaVA's: the folder would compute what LLaVA's computes. Serve it with "
                "the code that trained it"
            )
