"""What `check` says of a vision tower: where its folder is, which builder takes it, whether its weights fit that."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_projectors import files
from llava_projectors.spec import ProjectorSpecError

CLIP = ("clip", "clip_vision_model")
# A weight of the first layer, by which the names of all are told.
FIRST_LAYER = "vision_model.encoder.layers.0."
LLAVA_15_TOWER = "openai/clip-vit-large-patch14-336"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def llava_15_config() -> SimpleNamespace:
    """What the config of LLaVA-1.5's vision tower says of its grid and layers; nothing is downloaded for it."""
    return SimpleNamespace(
        model_type="clip_vision_model", num_hidden_layers=24, image_size=336, patch_size=14, hidden_size=1024
    )


def refuse_lost_folder(tower: str, source: str) -> None:
    """Raise when a checkpoint names its vision tower by a path that leads nowhere from the current folder.

    LLaVA looks from the folder in which it is started. A path with one slash may be a name on the hub; it is taken
    for one unless it leads to a folder from a folder above the checkpoint.

    Args:
        tower: `mm_vision_tower` of a config.json.
        source: the checkpoint's folder, or a file in it.

    Raises:
        ProjectorSpecError: says where the tower is, if that is known, and what to do.
    """
    if Path(tower).exists():
        return
    remedy = f"set mm_vision_tower in the config.json of {source} to"
    for folder in Path(source).absolute().parents:
        if (folder / tower).is_dir():
            raise ProjectorSpecError(
                f"{source} has mm_vision_tower {tower!r} in its config.json, a path from {folder}: LLaVA looks from "
                f"the folder in which it is started, here {Path.cwd()}. Start it in {folder}, or {remedy} "
                f"{folder / tower}"
            )
    if "/" in tower and HUB_NAME.fullmatch(tower) is None:
        raise ProjectorSpecError(
            f"{source} has mm_vision_tower {tower!r} in its config.json, which is no folder here, in {Path.cwd()}: "
            f"{remedy} the tower's full path"
        )


def builder_of(tower: str, model_type: Any) -> str:
    """Which builder takes the tower, in words; its files are read where it is a folder.

    LLaVA makes a CLIP of every path that exists; LLaVA-NeXT of every path whose name does not say siglip.

    Args:
        tower: folder or hub name.
        model_type: what its config.json says.

    Raises:
        ProjectorSpecError: the tower that they make would have random weights.
        ProjectorWeightsError: a file of weights is missing or cut off.
    """
    is_siglip = str(model_type).startswith("siglip")
    names = list(files.checkpoint_tensors(tower)) if files.has_weights(tower) else []
    is_named_so = any(name.startswith(FIRST_LAYER) for name in names)
    if names and not is_named_so:
        raise ProjectorSpecError(
            f"the vision tower {tower} is a {model_type!r}, and none of its {len(names)} weights is named "
            f"{FIRST_LAYER}*: LLaVA and LLaVA-NeXT would make a CLIP of it, with random weights"
        )
    if is_siglip and "siglip" not in tower:
        raise ProjectorSpecError(
            f"the vision tower {tower} is a {model_type!r}: LLaVA makes a CLIP of it, with random weights, and "
            "LLaVA-NeXT too, unless the name of the folder says siglip"
        )
    if model_type not in CLIP and not is_siglip and not is_named_so:
        raise ProjectorSpecError(
            f"the vision tower {tower} is a {model_type!r}: LLaVA and LLaVA-NeXT make a CLIP of a folder, and load "
            "no other tower by this name"
        )
    return "LLaVA-NeXT's SigLIP tower; LLaVA has none" if is_siglip else "the CLIP tower of LLaVA and LLaVA-NeXT"
