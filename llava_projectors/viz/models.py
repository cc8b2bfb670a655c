"""Where the features come from that are drawn: a narrow model with random weights, or a user's checkpoint."""

from __future__ import annotations

from typing import Any, Optional

import torch

from llava_projectors import registry
from llava_projectors.projectors.base import Projector


def random_model(type_string: str, width: int = 64, hidden_size: int = 128) -> tuple[Any, Projector, Any]:
    """A CLIP of ViT-L/14-336's depth and grid and a projector, narrow and with random weights.

    Returns:
        function from pixels [1, 3, 336, 336] to features, projector, image processor.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from llava_projectors.integration.tower import resolve_layers
    from llava_projectors.integration.truncated_encoder import TruncatedVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=24, num_attention_heads=2,
        image_size=336, patch_size=14,
    )  # fmt: skip
    model = CLIPVisionModel(config).eval()
    resolved = registry.resolve(type_string)
    layers = resolve_layers(resolved, config.num_hidden_layers, -2)
    size = {"height": 336, "width": 336}
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size)

    def features(pixels: torch.Tensor) -> torch.Tensor:
        hidden_states = TruncatedVisionModel(model, layers)(pixels).hidden_states
        return torch.cat([hidden_states[layer][:, 1:] for layer in layers], dim=-1)

    return features, resolved.build(width, hidden_size).eval(), processor


def trained_model(path: str, base: Optional[str]) -> tuple[Any, Projector, Any]:
    """Tower, projector and image processor of a checkpoint, by LLaVA's own loader; as `random_model`.

    Raises:
        ValueError: the checkpoint's projector is not one of ours.
    """
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, model, processor, _ = load_pretrained_model(path, base, name, device=device, device_map=device)
    projector = model.get_model().mm_projector
    if not isinstance(projector, Projector):
        kind = model.config.mm_projector_type
        raise ValueError(f"{path} has a projector of type {kind!r}, which gives every patch a token of its own")
    tower = model.get_vision_tower().float()
    return lambda pixels: tower(pixels.to(device)), projector.float(), processor
