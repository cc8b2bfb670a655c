"""The vision tower of an export: its config and its weights, as LLaVA uses them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_projectors.export.checkpoint import IGNORED, Checkpoint, Weight
from llava_projectors.export.errors import ExportError
from llava_projectors.export.pictures import NEXT_SETTING
from llava_projectors.files import checkpoint_tensors, read_config
from llava_projectors.integration import weights

KINDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
SETTINGS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim",
)  # fmt: skip
# How LLaVA's checkpoints call a tower that was trained.
OWN = "model.vision_tower.vision_tower."
INNER = "vision_model."
# What saving in another dtype changes at most: bfloat16 keeps 8 bits, the smallest number of float16 is 6e-8.
RELATIVE, ABSOLUTE = 2**-7, 1e-7
# Others are a quantised model's, whose scales lie elsewhere.
PLAIN_DTYPES = ("torch.float64", "torch.float32", "torch.bfloat16", "torch.float16")


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
        folder: where it came from.
        config: as transformers writes it, of the layers that LLaVA keeps.
        select_layer: LLaVA's choice of hidden state.
    """

    folder: Path
    config: dict[str, Any]
    select_layer: int

    @property
    def is_siglip(self) -> bool:
        """Whether it is LLaVA-NeXT's SigLIP; else it is CLIP."""
        return bool(self.config["model_type"] == KINDS["siglip"])

    @property
    def tile_side(self) -> int:
        """Side of its pictures, in pixels."""
        return int(self.config["image_size"])

    @property
    def patch_side(self) -> int:
        """Side of its patch grid."""
        return self.tile_side // int(self.config["patch_size"])


def read_tower(folder: Path, config: Mapping[str, Any]) -> Tower:
    """The tower in a folder, as a checkpoint with this config uses it.

    Raises:
        ExportError: neither CLIP nor SigLIP, or several layers of it.
    """
    from transformers import CONFIG_MAPPING

    own = read_config(folder)
    kind = KINDS.get(str(own.get("model_type")), own.get("model_type"))
    if kind not in KINDS.values():
        raise ExportError(f"the vision tower {folder} is a {kind!r}: CLIP and SigLIP can be exported")
    made = CONFIG_MAPPING[str(kind)](**own.get("vision_config", own)).to_dict()
    for name in ("num_hidden_layers", "image_size", "patch_size"):
        if not isinstance(made[name], int) or made[name] < 1:
            raise ExportError(f"the config.json of the tower {folder} has {name} {made[name]!r}: copy the tower again")
    settings = {"model_type": kind, **{key: made[key] for key in SETTINGS if key in made}}
    if kind == KINDS["clip"]:
        layer = config.get("mm_vision_select_layer", -2)
        if not isinstance(layer, int):
            raise ExportError(f"the checkpoint has mm_vision_select_layer {layer!r}: one layer can be exported")
        return Tower(folder, settings, layer)
    if NEXT_SETTING not in config:
        raise ExportError(
            f"the vision tower {folder} is a SigLIP, and the checkpoint's config.json has no {NEXT_SETTING}, as "
            "LLaVA-NeXT's have: other forks read other layers of it. LLaVA-NeXT's way can be exported"
        )
    # LLaVA-NeXT deletes the last layer and the head, and offers no choice.
    settings.update(num_hidden_layers=settings["num_hidden_layers"] - 1, vision_use_head=False)
    return Tower(folder, settings, -1)


def tower_weights(tower: Tower, checkpoint: Checkpoint, shapes: weights.Shapes) -> dict[str, Weight]:
    """Name in the stock model -> weight: the checkpoint's where it was trained, else those of the tower's folder.

    Args:
        tower: to export.
        checkpoint: that uses it.
        shapes: name without `vision_model.` -> shape, of all that the stock model has.

    Raises:
        ExportError: weights are missing or of another shape.
    """
    # Older stock models of SigLIP have the head in any case.
    expected = {key: shape for key, shape in shapes.items() if not (tower.is_siglip and key.startswith("head."))}
    own = _bare({key[len(OWN) :]: weight for key, weight in checkpoint.weights.items() if key.startswith(OWN)})
    refuse_left_over([f"{OWN}{INNER}{key}" for key in own if key not in expected], checkpoint.source)
    if _was_trained(checkpoint.config):
        if not own:
            raise ExportError(
                f"{checkpoint.source} lacks the weights of its vision tower, which was trained by its config.json "
                "(unfreeze_mm_vision_tower, mm_tunable_parts): export a checkpoint that has them"
            )
        found, source = own, f"the vision tower in {checkpoint.source}, which was trained,"
    else:
        # LLaVA too loads a frozen tower from where it came from.
        found = _bare({key: Weight(tensor) for key, tensor in checkpoint_tensors(tower.folder).items()})
        source = f"the tower {tower.folder}"
    used = {f"{INNER}{key}": weight for key, weight in found.items() if key in expected}
    check_whole(used, {f"{INNER}{key}": shape for key, shape in expected.items()}, source)
    if found is not own:
        _refuse_other_weights(own, used, checkpoint.source, tower.folder)
    return used


def _bare(found: Mapping[str, Weight]) -> dict[str, Weight]:
    """Names without `vision_model.`; what old versions saved is left out."""
    return {key.removeprefix(INNER): weight for key, weight in found.items() if not IGNORED.search(key)}


def _refuse_other_weights(own: Mapping[str, Weight], used: Mapping[str, Weight], source: Path, folder: Path) -> None:
    """Raise where a checkpoint has another tower than the folder that it is exported from, but for rounding."""
    for key, weight in own.items():
        stored, expected = weight.read().float(), used[f"{INNER}{key}"].read().float()
        if stored.shape != expected.shape or not torch.allclose(stored, expected, RELATIVE, ABSOLUTE):
            raise ExportError(
                f"{source} has a vision tower of its own, other than {folder} ({OWN}{INNER}{key}), and its config.json "
                "does not say that it was trained. Where the fork that trained it takes it from the checkpoint, write "
                "unfreeze_mm_vision_tower true into config.json; where it is taken from the folder, as LLaVA does, "
                "remove these weights"
            )


def refuse_left_over(names: Collection[str], source: Path) -> None:
    """Raise for weights of a checkpoint that the folder has no place for.

    Args:
        names: of them.
        source: the checkpoint, for messages.

    Raises:
        ExportError: names some.
    """
    if names:
        shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ExportError(
            f"{source} has weights that LLaVA's model of its config.json does not have: {shown}. Where they are a part "
            "of a fork's model, the folder would be another one without them: serve it with that fork. Else copy "
            "weights and config.json from one run"
        )


def check_whole(found: Mapping[str, Weight], expected: weights.Shapes, source: str) -> None:
    """Raise ExportError unless weights have the expected names and shapes, and are plain numbers."""
    refuse_quantised(found, source)
    wrong = weights.problems(expected, {name: weight.shape for name, weight in found.items()})
    if wrong:
        raise ExportError(f"{source} is not whole or of another model: {wrong}")


def refuse_quantised(found: Mapping[str, Weight], source: str) -> None:
    """Raise ExportError for weights that need a scale from elsewhere."""
    for name, weight in found.items():
        if str(weight.stored.dtype) not in PLAIN_DTYPES:
            raise ExportError(
                f"{source} holds {name} in {weight.stored.dtype}: a quantised checkpoint cannot be exported; export "
                "the one that it was made from"
            )


def _was_trained(config: Mapping[str, Any]) -> bool:
    """Whether the stack that trained takes the tower from the checkpoint; only LLaVA-NeXT reads `mm_tunable_parts`."""
    parts = str(config.get("mm_tunable_parts") or "").split(",")
    return bool(config.get("unfreeze_mm_vision_tower") or (NEXT_SETTING in config and "mm_vision_tower" in parts))
