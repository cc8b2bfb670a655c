"""What a visual token was made from: the patches of the picture, by attention weight or by gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from PIL import Image

from llava_projectors import registry
from llava_projectors.projectors.base import Projector

# Enough random directions that a map does not change visibly with more.
PROBES = 8


def token_maps(projector: Projector, features: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """How much each patch went into each token.

    Where the projector has `region_weights` (TokenPacker), these are its attention weights, the
    mean over heads. Elsewhere it is the effective receptive field: the root mean square of the
    token's derivative by the patch, estimated with `PROBES` random directions (our choice, after
    Hutchinson's estimator).

    Args:
        projector: of any type.
        features: one image, [1, H*H, L*C].
        tokens: indices of visual tokens, row by row.

    Returns:
        [len(tokens), H, H], each map with sum 1.

    Raises:
        ValueError: a token that does not exist.
    """
    count = projector(features[:1]).shape[1]
    for token in tokens:
        if not 0 <= token < count:
            raise ValueError(f"token {token} does not exist: there are {count}, 0 to {count - 1}")
    weights = getattr(projector, "region_weights", None)
    maps = weights(features)[0][list(tokens)] if weights else _receptive_fields(projector, features, tokens)
    return (maps / maps.sum((1, 2), keepdim=True)).detach()


def _receptive_fields(projector: Projector, features: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    features = features.detach().requires_grad_()
    out = projector(features)[0]
    side = math.isqrt(features.shape[1])
    generator = torch.Generator().manual_seed(0)
    fields = []
    for token in tokens:
        squares = torch.zeros(features.shape[1], device=features.device)
        for _ in range(PROBES):
            direction = torch.randn(out.shape[1], generator=generator).to(out)
            (gradient,) = torch.autograd.grad(out[token] @ direction, features, retain_graph=True)
            squares += gradient[0].float().square().sum(-1)
        fields.append((squares / PROBES).sqrt().unflatten(0, (side, side)))
    return torch.stack(fields)


def random_model(type_string: str, width: int = 64, hidden_size: int = 128) -> tuple[Any, Projector, Any]:
    """A CLIP of ViT-L/14-336's depth and grid and a projector, narrow and with random weights.

    Returns:
        function from pixels [1, 3, 336, 336] to features, projector, image processor.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    from llava_projectors.integration.early_exit import EarlyExit
    from llava_projectors.integration.tower import resolve_layers

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
        hidden_states = EarlyExit(model, layers)(pixels).hidden_states
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


def show(
    image: Path,
    target: Path,
    type_string: Optional[str],
    path: Optional[str],
    base: Optional[str],
    tokens: Sequence[int],
) -> str:
    """Draw the maps of some tokens over the picture; returns what was drawn, in a line.

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
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    square = picture.crop((left, top, left + edge, top + edge)).resize((336, 336))
    pixels = processor(square, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = get_features(pixels)
        count = projector(features).shape[1]
    chosen = list(tokens) or spread(count)
    maps = token_maps(projector, features, chosen)
    kind = "attention" if hasattr(projector, "region_weights") else "receptive field by gradient"
    title = f"{type_string or projector.name}: {features.shape[1]} patches -> {count} visual tokens; {kind}; {source}"
    draw(square, maps.cpu(), chosen, count, title).savefig(target, dpi=100)
    return title


def spread(count: int) -> list[int]:
    """Six tokens: two rows of three, over the square of all."""
    side = math.isqrt(count)
    return [int(side * row) * side + int(side * column) for row in (0.3, 0.7) for column in (0.2, 0.5, 0.8)]


def draw(picture: Image.Image, maps: torch.Tensor, tokens: Sequence[int], count: int, title: str) -> Any:
    """A matplotlib figure: the picture with its patch grid, and for each token what it was made from."""
    from matplotlib.figure import Figure

    panels = len(tokens) + 1
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    edge, side, token_side = picture.width, maps.shape[-1], math.isqrt(count)
    for axis in axes:
        axis.set_axis_off()
    axes[0].imshow(picture)
    for line in range(side + 1):
        at = line * edge / side - 0.5
        axes[0].axhline(at, color="white", linewidth=0.3)
        axes[0].axvline(at, color="white", linewidth=0.3)
    axes[0].set_title(f"{side}x{side} patches", fontsize=9)
    for axis, token, weights in zip(axes[1:], tokens, maps):
        axis.imshow(picture, alpha=0.55)
        axis.imshow(weights, extent=(-0.5, edge - 0.5, edge - 0.5, -0.5), cmap="inferno", alpha=0.7)
        axis.set_title(f"token {token} (row {token // token_side}, column {token % token_side})", fontsize=9)
    figure.suptitle(title, fontsize=8, wrap=True)
    return figure
