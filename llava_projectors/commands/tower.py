"""What `check` says of a vision tower's folder: which builder takes it, and whether its weights are that builder's."""

from __future__ import annotations

from typing import Any

from llava_projectors import files
from llava_projectors.spec import ProjectorSpecError

CLIP = ("clip", "clip_vision_model")
# A weight of the first layer, by which the names of all are told.
FIRST_LAYER = "vision_model.encoder.layers.0."


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
