"""The second half of the vision tower's training, as CLIP is trained: which caption belongs to which picture?

After its training with labels, the top of the tower still knows where everything is, so features of
several layers have nothing to win there. Nobody asks CLIP for places: it only has to find the
caption of a picture among those of a batch (arXiv 2103.00020, section 2.3). So does this tower
from now on, and what that does not need is lost, as `probe` shows. A caption names the objects and
their letters, not their places. Half of the pictures have the kinds of another one, with other
letters and in other places, or nobody would read letters.
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
from benchmarks.spatial.scenes import GLYPHS, KINDS, Scene, draw, make_scene

EMBEDDING_SIZE = 64
# The first temperature of CLIP, 0.07, as the logarithm of its inverse, and its largest, 100.
LOG_SCALE, MAX_LOG_SCALE = 2.66, 4.6
# Of the pre-training: scenes per step, and the highest rate.
BATCH, LEARNING_RATE = 64, 1e-3


class Matcher(nn.Module):
    """Cosines of pictures and captions, scaled: [B, B], a row a picture.

    A caption is a set of names, so its encoder is the mean of an embedding of each.
    """

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower
        self.picture = nn.Linear(vision.WIDTH, EMBEDDING_SIZE, bias=False)
        self.names = nn.Linear(len(KINDS) * len(GLYPHS), EMBEDDING_SIZE, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(LOG_SCALE))

    def forward(self, pixels: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, H, W], and what each caption names [B, len(KINDS) * len(GLYPHS)]."""
        pictures = F.normalize(self.picture(self.tower(pixels).pooler_output), dim=-1)
        captions = F.normalize(self.names(named / named.sum(-1, keepdim=True)), dim=-1)
        return self.log_scale.clamp(max=MAX_LOG_SCALE).exp() * pictures @ captions.T


def names(scene: Scene) -> torch.Tensor:
    """1 for each kind and letter that the caption names, as one: [len(KINDS) * len(GLYPHS)]."""
    named = torch.zeros(len(KINDS), len(GLYPHS))
    for thing in scene:
        named[KINDS.index(thing.name), list(GLYPHS).index(thing.letter)] = 1
    return named.flatten()


def make_scenes(rng: random.Random, number: int) -> list[Scene]:
    """An even number of scenes, of which two and two have the same kinds."""
    first = [make_scene(rng) for _ in range(number // 2)]
    return first + [make_scene(rng, [thing.name for thing in scene]) for scene in first]


def loss(matcher: nn.Module, scenes: list[Scene], rng: random.Random, device: str = "cpu") -> torch.Tensor:
    """Cross-entropy of the right caption for each picture, and of the right picture for each caption."""
    pixels = torch.stack([vision.pixels(draw(scene, rng)) for scene in scenes]).to(device)
    named = torch.stack([names(scene) for scene in scenes]).to(device)
    scores, right = matcher(vision.normalize(pixels), named), torch.arange(len(scenes), device=device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def pretrain(
    labelled: Path,
    folder: Path,
    steps: int,
    device: str = "cpu",
    deadline: float = math.inf,
) -> None:
    """Go on with the tower in `labelled`, on scenes made on the way, and write it to `folder`.

    Raises:
        TimeIsUp: at the deadline; another call goes on.
    """
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    rng = random.Random("contrastive")
    matcher = Matcher(CLIPVisionModel.from_pretrained(labelled)).to(device)
    minimize(
        lambda _: loss(matcher, make_scenes(rng, BATCH), rng, device),
        list(matcher.parameters()),
        steps,
        LEARNING_RATE,
        weight_decay=0.05,
        warmup=0.1,
        description="matching captions",
        pause=Pause(folder.with_suffix(".unfinished"), rng, deadline),
    )
    vision.save(matcher.tower, folder)
