"""The upper half of the vision tower, trained as CLIP is: which caption belongs to which picture?

A tower that learned from labels as a whole still knows at its top where everything is, so features
of several layers have nothing to win there. Nobody asks CLIP for places: it only has to find the
caption of a picture among those of a batch (arXiv 2103.00020, section 2.3). So here only the lower
half learns from labels. The upper half begins with random weights that outweigh what the lower one
says, and learns from captions alone. They name the kinds of objects, neither letters nor places.
What a caption does not need is lost there, as `probe` shows.

Such weights leave hidden states eight times as large as the lower half's. A projector without a
norm would have to be trained with other learning rates for that alone, so `scale_stream` brings
them back: the tower does the same with smaller hidden states.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.spatial import vision
from benchmarks.spatial.optimize import Pause, minimize
from benchmarks.spatial.scenes import KINDS, Scene, draw, make_scene

EMBEDDING_SIZE = 64
# Of the upper half's first weights, against CLIP's. With 1, its layers add little to what they are given, and the
# letter and place of an object can be read off the top as well as off the middle, even after 300 steps.
INITIALIZER_FACTOR = 8.0
# The first temperature of CLIP, 0.07, as the logarithm of its inverse, and its largest, 100.
LOG_SCALE, MAX_LOG_SCALE = 2.66, 4.6
# Of the pre-training: scenes per step, and the highest rate.
BATCH, LEARNING_RATE = 32, 1e-3


class Matcher(nn.Module):
    """Cosines of pictures and captions, scaled: [B, B], a row a picture.

    A caption is a set of kinds, so its encoder is the mean of an embedding of each.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.picture = nn.Linear(vision.WIDTH, EMBEDDING_SIZE, bias=False)
        self.kinds = nn.Linear(len(KINDS), EMBEDDING_SIZE, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))

    def forward(self, pixels: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, H, W], uint8, and what each caption names [B, len(KINDS)]."""
        pictures = F.normalize(self.picture(vision.see(self.tower, pixels).pooler_output), dim=-1)
        captions = F.normalize(self.kinds(named / named.sum(-1, keepdim=True)), dim=-1)
        return self.log_scale.clamp(max=MAX_LOG_SCALE).exp() * pictures @ captions.T


def on_top_of(lower: Any) -> Any:
    """A whole tower: the lower half as it is, frozen, and a new upper one.

    Args:
        lower: a CLIPVisionModel of `vision.DENSE_LAYER` layers.
    """
    tower = vision.make_model(initializer_factor=INITIALIZER_FACTOR)
    kept = {name: value for name, value in lower.state_dict().items() if "post_layernorm" not in name}
    tower.load_state_dict(kept, strict=False)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(name not in kept)
    return tower


def loss(matcher: nn.Module, scenes: list[Scene], rng: random.Random, device: str = "cpu") -> torch.Tensor:
    """Cross-entropy of the right caption for each picture, and of the right picture for each caption."""
    pixels = torch.stack([vision.pixels(draw(scene, rng)) for scene in scenes]).to(device)
    named = torch.stack([vision.kind_labels(scene) for scene in scenes]).to(device)
    scores, right = matcher(pixels, named), torch.arange(len(scenes), device=device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def scale_stream(tower: Any, factor: float) -> None:
    """Make every hidden state of a CLIPVisionModel `factor` times as large, and nothing else.

    All that reads the residual stream normalises it first, so scaling all that writes to it is enough.
    """
    model = tower.vision_model
    writers = [model.pre_layrnorm]
    for layer in model.encoder.layers:
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    with torch.no_grad():
        for writer in writers:
            writer.weight.mul_(factor)
            writer.bias.mul_(factor)


@torch.no_grad()
def growth(tower: Any, scenes: list[Scene], rng: random.Random) -> float:
    """How much larger the selected hidden state is than the lower half's last, as a ratio of root mean squares."""
    pixels = torch.stack([vision.pixels(draw(scene, rng)) for scene in scenes]).to(tower.device)
    states = vision.see(tower, pixels).hidden_states
    middle, selected = (states[layer].float().square().mean().sqrt() for layer in (vision.DENSE_LAYER, vision.SELECTED))
    return (selected / middle).item()


def pretrain(
    lower: Path,
    folder: Path,
    steps: int,
    device: str = "cpu",
    deadline: float = math.inf,
) -> None:
    """Put an upper half on the one in `lower`, train it on scenes made on the way, and write the tower to `folder`.

    Raises:
        TimeIsUp: at the deadline; another call goes on.
    """
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    rng = random.Random("contrastive")
    matcher = Matcher(on_top_of(CLIPVisionModel.from_pretrained(lower))).to(device)
    minimize(
        lambda _: loss(matcher, [make_scene(rng) for _ in range(BATCH)], rng, device),
        [parameter for parameter in matcher.parameters() if parameter.requires_grad],
        steps,
        LEARNING_RATE,
        weight_decay=0.05,
        warmup=0.1,
        description="matching captions",
        pause=Pause(folder.with_suffix(".unfinished"), rng, deadline),
    )
    scale_stream(matcher.tower, 1 / growth(matcher.tower, [make_scene(rng) for _ in range(BATCH)], rng))
    vision.save(matcher.tower, folder)
