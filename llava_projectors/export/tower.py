"""The vision tower of an export: its config and its weights, as LLaVA uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    if _was_trained(checkpoint.config):
        found, source = _trained_weights(checkpoint), f"the vision tower in {checkpoint.source}, which was trained,"
    else:
        # LLaVA too loads a frozen tower from where it came from.
        stored = checkpoint_tensors(tower.folder)
        found = {key: Weight(tensor) for key, tensor in stored.items() if not IGNORED.search(key)}
        source = f"the tower {tower.folder}"
    # Older stock models of SigLIP have the head in any case.
    expected = {key: shape for key, shape in shapes.items() if not (tower.is_siglip and key.startswith("head."))}
    bare = {key.removeprefix(INNER): weight for key, weight in found.items()}
    used = {f"{INNER}{key}": weight for key, weight in bare.items() if key in expected}
    check_whole(used, {f"{INNER}{key}": shape for key, shape in expected.items()}, source)
    return used


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


def _trained_weights(checkpoint: Checkpoint) -> dict[str, Weight]:
    found = {key[len(OWN) :]: weight for key, weight in checkpoint.weights.items() if key.startswith(OWN)}
    if not found:
        raise ExportError(
            f"{checkpoint.source} lacks the weights of its vision tower, which was trained by its config.json "
            "(unfreeze_mm_vision_tower, mm_tunable_parts): export a checkpoint that has them"
        )
    return found


def _was_trained(config: Mapping[str, Any]) -> bool:
    """Whether the stack that trained takes the tower from the checkpoint; only LLaVA-NeXT reads `mm_tunable_parts`."""
    parts = str(config.get("mm_tunable_parts") or "").split(",")
    return bool(config.get("unfreeze_mm_vision_tower") or (NEXT_SETTING in config and "mm_vision_tower" in parts))
