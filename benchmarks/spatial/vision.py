"""The study's vision tower: a small ViT in CLIP's format, pre-trained on the generator's own labels.

Half-way up, the patches learn to say what covers them; at the top, the CLS token learns to say
what the whole picture holds. So the middle knows where, the top knows what, as in CLIP, and
`probe` measures how much of each a hidden state holds.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from benchmarks.spatial.optimize import Pause, minimize, mixed_precision
from benchmarks.spatial.scenes import (
    COLOURS,
    GLYPHS,
    IMAGE_SIZE,
    KINDS,
    NUM_PATCHES_PER_SIDE,
    PATCH_SIZE,
    SHAPES,
    Scene,
    draw,
    make_scene,
)

WIDTH, LAYERS, HEADS = 128, 8, 4
SELECT_LAYER = -2
SELECTED = LAYERS + 1 + SELECT_LAYER  # the hidden state of that index
DENSE_LAYER = LAYERS // 2
# What a patch is asked: the number of answers besides none, and the weight, for the letter is in one patch of
# thirty. Without the last two, a patch forgets where it is, which CLIP's patches do not.
DENSE = {
    "colour": (len(COLOURS), 1.0),
    "shape": (len(SHAPES), 1.0),
    "letter": (len(GLYPHS), 10.0),
    "row": (NUM_PATCHES_PER_SIDE, 1.0),
    "column": (NUM_PATCHES_PER_SIDE, 1.0),
}
# Of the pre-training: scenes per step, and the highest rate.
BATCH, LEARNING_RATE = 32, 1e-3


def pixels(image: Image.Image) -> torch.Tensor:
    """[3, H, W], uint8."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 of about mean 0 and deviation 1."""
    return (images.float() - 127.5) / 64


def dense_labels(scene: Scene) -> torch.Tensor:
    """What covers the centre of each patch, the letter whose centre it holds, and where it is; 0 is none: [5, H, W]."""
    labels = torch.zeros(len(DENSE), NUM_PATCHES_PER_SIDE, NUM_PATCHES_PER_SIDE, dtype=torch.long)
    labels[3] = 1 + torch.arange(NUM_PATCHES_PER_SIDE)[:, None]
    labels[4] = 1 + torch.arange(NUM_PATCHES_PER_SIDE)
    for thing in scene:
        colour, shape = list(COLOURS).index(thing.colour), SHAPES.index(thing.shape)
        for row in range(NUM_PATCHES_PER_SIDE):
            for column in range(NUM_PATCHES_PER_SIDE):
                if thing.covers((column + 0.5) * PATCH_SIZE, (row + 0.5) * PATCH_SIZE):
                    labels[0, row, column] = 1 + colour
                    labels[1, row, column] = 1 + shape
        labels[2, thing.y // PATCH_SIZE, thing.x // PATCH_SIZE] = 1 + list(GLYPHS).index(thing.letter)
    return labels


def kind_labels(scene: Scene) -> torch.Tensor:
    """Which kinds of objects the picture holds: [len(KINDS)]."""
    names = {thing.name for thing in scene}
    return torch.tensor([float(kind in names) for kind in KINDS])


def picture_labels(scene: Scene) -> torch.Tensor:
    """Which kinds of objects and which letters the picture holds: [len(KINDS) + len(GLYPHS)]."""
    letters = {thing.letter for thing in scene}
    return torch.cat([kind_labels(scene), torch.tensor([float(glyph in letters) for glyph in GLYPHS])])


def make_model(layers: int = LAYERS, initializer_factor: float = 1.0) -> Any:
    """A CLIPVisionModel with random weights, `initializer_factor` times as large as CLIP's."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        initializer_factor=initializer_factor,
    )
    return CLIPVisionModel(config)


def pretrain(
    folder: Path,
    steps: int,
    device: str = "cpu",
    deadline: float = math.inf,
    layers: int = LAYERS,
) -> None:
    """Train on scenes made on the way, and write a checkpoint that LLaVA's tower loads.

    With DENSE_LAYER layers, it is the lower half of a tower.

    Raises:
        TimeIsUp: at the deadline; another call goes on.
    """
    torch.manual_seed(0)
    rng = random.Random("vision")
    model = make_model(layers)
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, 1 + number) for name, (number, _) in DENSE.items()})
    heads["picture"] = nn.Linear(WIDTH, len(KINDS) + len(GLYPHS))
    model.to(device)
    heads.to(device)
    minimize(
        lambda _: _loss(model, heads, [make_scene(rng) for _ in range(BATCH)], rng),
        [*model.parameters(), *heads.parameters()],
        steps,
        LEARNING_RATE,
        weight_decay=0.05,
        warmup=0.1,
        description="vision model",
        pause=Pause(folder.with_suffix(".unfinished"), rng, deadline),
    )
    save(model, folder)


def save(model: Any, folder: Path) -> None:
    """Write a checkpoint that LLaVA's tower loads, with its image processor."""
    from transformers import CLIPImageProcessor

    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    mean, deviation = [0.5] * 3, [64 / 255] * 3
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=mean, image_std=deviation
    ).save_pretrained(folder)


def see(model: Any, images: torch.Tensor) -> Any:
    """Outputs of a tower in training."""
    with mixed_precision(model.device):
        return model(normalize(images), output_hidden_states=True)


def _loss(model: Any, heads: nn.ModuleDict, scenes: list[Scene], rng: random.Random) -> torch.Tensor:
    images = torch.stack([pixels(draw(scene, rng)) for scene in scenes]).to(model.device)
    out = see(model, images)
    patches = out.hidden_states[DENSE_LAYER][:, 1:].flatten(0, 1)
    labels = torch.stack([dense_labels(scene) for scene in scenes], dim=1).flatten(1).to(model.device)
    loss = sum(
        weight * F.cross_entropy(heads[name](patches), expected)
        for (name, (_, weight)), expected in zip(DENSE.items(), labels)
    )
    held = torch.stack([picture_labels(scene) for scene in scenes]).to(model.device)
    # A picture's kinds are a few of many: weighted up, as the letter is.
    return loss + 3 * F.binary_cross_entropy_with_logits(heads["picture"](out.pooler_output), held)
