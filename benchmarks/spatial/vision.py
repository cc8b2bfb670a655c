"""The study's vision tower: a small ViT in CLIP's format, pre-trained on the generator's own labels.

Half-way up, the patches learn to say what covers them; at the top, the CLS token learns to say
what the whole picture holds. So the middle knows where, the top knows what, as in CLIP, and
`probe` measures how much of each a hidden state holds.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from benchmarks.spatial.scenes import (
    COLOURS,
    GLYPHS,
    IMAGE_SIZE,
    KINDS,
    PATCH_SIZE,
    PATCHES_A_SIDE,
    SHAPES,
    Scene,
    draw,
    make_scene,
)

WIDTH, LAYERS, HEADS = 128, 8, 4
SELECT_LAYER = -2
SELECTED = LAYERS + 1 + SELECT_LAYER  # the hidden state of that index
DENSE_LAYER = LAYERS // 2
# What a patch may be asked: which colour, shape and letter; 0 is none.
DENSE = {"colour": list(COLOURS), "shape": list(SHAPES), "letter": list(GLYPHS)}


def pixels(image: Image.Image) -> torch.Tensor:
    """[3, H, W], uint8."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 to float32 of about mean 0 and deviation 1."""
    return (images.float() - 127.5) / 64


def dense_labels(scene: Scene) -> torch.Tensor:
    """What covers the centre of each patch, and the letter whose centre it holds: [3, H, W]."""
    labels = torch.zeros(len(DENSE), PATCHES_A_SIDE, PATCHES_A_SIDE, dtype=torch.long)
    for thing in scene:
        for row in range(PATCHES_A_SIDE):
            for column in range(PATCHES_A_SIDE):
                if thing.covers((column + 0.5) * PATCH_SIZE, (row + 0.5) * PATCH_SIZE):
                    labels[0, row, column] = 1 + DENSE["colour"].index(thing.colour)
                    labels[1, row, column] = 1 + DENSE["shape"].index(thing.shape)
        labels[2, thing.y // PATCH_SIZE, thing.x // PATCH_SIZE] = 1 + DENSE["letter"].index(thing.letter)
    return labels


def picture_labels(scene: Scene) -> torch.Tensor:
    """Which kinds of objects and which letters the picture holds: [len(KINDS) + len(GLYPHS)]."""
    names, letters = {thing.name for thing in scene}, {thing.letter for thing in scene}
    return torch.tensor([float(kind in names) for kind in KINDS] + [float(glyph in letters) for glyph in GLYPHS])


def make_model() -> Any:
    """A CLIPVisionModel with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    return CLIPVisionModel(config)


def pretrain(folder: Path, steps: int, batch: int = 32, learning_rate: float = 1e-3) -> None:
    """Train on scenes made on the way, and write a checkpoint that LLaVA's tower loads."""
    from transformers import CLIPImageProcessor, get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    rng = random.Random("vision")
    model = make_model()
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, 1 + len(values)) for name, values in DENSE.items()})
    heads["picture"] = nn.Linear(WIDTH, len(KINDS) + len(GLYPHS))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    progress = tqdm(range(steps), desc="vision model", unit=" step")
    for step in progress:
        scenes = [make_scene(rng) for _ in range(batch)]
        out = model(normalize(torch.stack([pixels(draw(s, rng)) for s in scenes])), output_hidden_states=True)
        patches = out.hidden_states[DENSE_LAYER][:, 1:]
        labels = torch.stack([dense_labels(s) for s in scenes]).flatten(2)
        dense = [
            F.cross_entropy(heads[name](patches).flatten(0, 1), labels[:, number].flatten())
            for number, name in enumerate(DENSE)
        ]
        picture = F.binary_cross_entropy_with_logits(
            heads["picture"](out.pooler_output), torch.stack([picture_labels(s) for s in scenes])
        )
        # The letter is in one patch of thirty, a picture's kinds are a few of many: weighted up.
        loss = sum(dense[:2]) + 10 * dense[2] + 3 * picture
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix_str(" ".join(f"{float(x):.3f}" for x in [*dense, picture]))
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    mean, deviation = [0.5] * 3, [64 / 255] * 3
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=mean, image_std=deviation
    ).save_pretrained(folder)
