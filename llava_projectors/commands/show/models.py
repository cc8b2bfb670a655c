"""Where the features come from that are drawn: a narrow model with random weights, or a user's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from PIL import Image

from llava_projectors import files, registry
from llava_projectors.commands.tower import HUB_NAME, refuse_lost_folder
from llava_projectors.integration.image_processor import SlicingProcessor, set_slicing
from llava_projectors.integration.loader import load
from llava_projectors.integration.log import log
from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.registration import LLAVA_TYPE_PATTERN
from llava_projectors.spec import base_name


@dataclass(frozen=True)
class Model:
    """A vision tower and a projector.

    Attributes:
        type_string: of the projector.
        source: where the weights are from, in words.
        features: pixels [1, 3, side, side] -> features [1, H*H, L*C].
        projector: that reads them.
        processor: the tower's image processor.
        config: LLaVA's, or None for a model that LLaVA has not made.
    """

    type_string: str
    source: str
    features: Callable[[torch.Tensor], torch.Tensor]
    projector: Projector
    processor: Any
    config: Any = None

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """What the tower gets of a picture, as LLaVA prepares it: [3, side, side], or a canvas of tiles."""
        if self.config is None or isinstance(self.processor, SlicingProcessor):
            return self.processor.preprocess(tall_enough(picture), return_tensors="pt")["pixel_values"][0]
        from llava.mm_utils import process_images

        pixels = process_images([tall_enough(picture)], self.processor, self.config)[0]
        if pixels.ndim == 4:
            log("image_aspect_ratio anyres: drawn on the overview of the whole picture, the first of its tiles")
            return pixels[0]
        return pixels


def tall_enough(picture: Image.Image) -> Image.Image:
    """A picture of one or three rows, each row and column repeated: transformers takes these heights for channels."""
    if picture.height not in (1, 3):
        return picture
    return picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST)


def random_model(type_string: str, patch_num: Optional[int] = None, width: int = 64, hidden_size: int = 16) -> Model:
    """A CLIP of ViT-L/14-336's depth and grid and a projector, narrow and with random weights.

    Args:
        type_string: of the projector.
        patch_num: most tiles that a picture is cut into; None for its central square.
        width: C, channels of the tower.
        hidden_size: D, width of the tokens.

    Raises:
        ValueError: the type string is bad, or a type of LLaVA's own.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from llava_projectors.integration.tower import resolve_layers
    from llava_projectors.integration.truncated_encoder import can_keep, keeping

    if LLAVA_TYPE_PATTERN.fullmatch(base_name(type_string)):
        raise ValueError(f"type {type_string!r} is LLaVA's own, which gives every patch a token of its own")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=24, num_attention_heads=2,
        image_size=336, patch_size=14,
    )  # fmt: skip
    resolved = registry.resolve(type_string)
    layers = resolve_layers(resolved, config.num_hidden_layers, -2)
    model = CLIPVisionModel(config).eval()
    can_keep(model)
    size = {"height": 336, "width": 336}
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size)
    set_slicing(processor, patch_num)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        with keeping(layers):
            hidden_states = model(pixels, output_hidden_states=True).hidden_states
        return torch.cat([hidden_states[layer][:, 1:] for layer in layers], dim=-1)

    source = "random weights: where a token looks by its build, not what was learned"
    return Model(type_string, source, features, resolved.build(width, hidden_size).eval(), processor)


def trained_model(path: str, base: Optional[str], patch_num: Optional[int] = None) -> Model:
    """Tower, projector and image processor of a checkpoint, by LLaVA's own loader.

    Args:
        path: folder or hub name of the checkpoint.
        base: its base model, for a checkpoint that holds only a projector or LoRA.
        patch_num: most tiles that a picture is cut into; None as the checkpoint does.

    Raises:
        ValueError: its projector is not one of ours, or LLaVA's loader could not load it.
        OSError: a file is missing.
    """
    from llava.mm_utils import get_model_name_from_path

    name = get_model_name_from_path(path)
    check_checkpoint(path, base, name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, model, processor = load(path, base, name, device)
    projector = model.get_model().mm_projector
    tower = model.get_vision_tower().float()
    if patch_num is not None:
        set_slicing(processor, patch_num)
    kind = model.config.mm_projector_type
    return Model(kind, path, lambda pixels: tower(pixels.to(device)), projector.float(), processor, model.config)


def check_checkpoint(path: str, base: Optional[str], name: str) -> None:
    """Raise a ValueError, before minutes of loading, for what LLaVA's loader would not make a model of ours from.

    Args:
        path: folder or hub name; of a folder, it is also looked at which weights it has.
        base: the base model, if any.
        name: by which LLaVA's loader chooses a class.
    """
    from transformers import PretrainedConfig

    for option, place in (("--model-path", path), ("--model-base", base)):
        if place is not None and not Path(place).is_dir() and HUB_NAME.fullmatch(place) is None:
            raise ValueError(f"{option} {place} is no folder")
    config = files.read_config(path) if Path(path).is_dir() else PretrainedConfig.get_config_dict(path)[0]
    kind = config.get("mm_projector_type")
    if kind is None:
        raise ValueError(f"{path} is no LLaVA checkpoint: its config.json has no mm_projector_type")
    if not registry.is_registered(kind):
        raise ValueError(f"{path} has a projector of type {kind!r}, none of ours; `llava-projectors list` shows them")
    if "llava" not in name.lower():
        raise ValueError(f"LLaVA's loader goes by the name, and {name!r} lacks 'llava': rename the folder")
    if "mpt" in name.lower() and config.get("model_type") != "llava_mpt":
        raise ValueError(f"LLaVA's loader takes {name!r} for an MPT, because it contains 'mpt': rename the folder")
    refuse_lost_folder(str(config.get("mm_vision_tower")), path)
    if Path(path).is_dir():
        _check_weights(Path(path), base, name)


def _check_weights(folder: Path, base: Optional[str], name: str) -> None:
    adapters = [file for file in ("adapter_config.json", "mm_projector.bin") if (folder / file).is_file()]
    if files.has_weights(folder):
        if base is not None and not adapters:
            raise ValueError(f"{folder} is a full checkpoint: leave --model-base {base} out")
    elif not adapters:
        raise ValueError(f"{folder} has no weights: no model*.safetensors, pytorch_model*.bin or mm_projector.bin")
    elif base is None:
        raise ValueError(f"{folder} has {adapters[0]} and no LLM: pass --model-base with the model it was trained on")
    elif adapters[0] == "adapter_config.json" and "lora" not in name.lower():
        raise ValueError(f"LLaVA's loader goes by the name, and {name!r} lacks 'lora': rename the folder")
