"""`python -m benchmarks.spatial.contrastive`: a vision tower trained as CLIP is, and what its hidden states know.

The study's own tower is told half-way up where everything is, and its top layers still know it, so
features of several layers have nothing to win there. Nobody tells CLIP: it is only asked which
caption of a batch belongs to which picture (arXiv 2103.00020, section 2.3). So is this one; a caption
names the kinds of objects, neither their places nor their letters.

The tower is written to FOLDER/vision, where `python -m benchmarks.spatial --folder FOLDER` takes it
instead of training its own.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.spatial import vision
from benchmarks.spatial.optimize import Pause, TimeIsUp, minimize
from benchmarks.spatial.probe import WHAT, probe
from benchmarks.spatial.scenes import KINDS, Scene, draw, make_scene
from benchmarks.spatial.store import Split
from benchmarks.speed.run import choose_device

EMBEDDING_SIZE = 64
# The first temperature of CLIP, 0.07, as the logarithm of its inverse.
LOG_SCALE = 2.66


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

    def forward(self, pixels: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, H, W], and which kinds each picture holds [B, len(KINDS)]."""
        pictures = F.normalize(self.picture(self.tower(pixels).pooler_output), dim=-1)
        captions = F.normalize(self.kinds(held / held.sum(-1, keepdim=True)), dim=-1)
        return self.log_scale.clamp(max=4.6).exp() * pictures @ captions.T


def loss(matcher: nn.Module, scenes: list[Scene], rng: random.Random, device: str = "cpu") -> torch.Tensor:
    """Cross-entropy of the right caption for each picture, and of the right picture for each caption."""
    pixels = torch.stack([vision.pixels(draw(scene, rng)) for scene in scenes]).to(device)
    held = torch.stack([vision.picture_labels(scene)[: len(KINDS)] for scene in scenes]).to(device)
    scores, right = matcher(vision.normalize(pixels), held), torch.arange(len(scenes), device=device)
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


def pretrain(
    folder: Path, steps: int, batch: int, learning_rate: float = 1e-3, device: str = "cpu", minutes: float = math.inf
) -> list[float]:
    """Train on scenes made on the way, and write a checkpoint that LLaVA's tower loads; returns the losses.

    Raises:
        TimeIsUp: after so many minutes; another call goes on.
    """
    torch.manual_seed(0)
    rng = random.Random("contrastive")
    matcher = Matcher(vision.make_model()).to(device)
    values = minimize(
        lambda _: loss(matcher, [make_scene(rng) for _ in range(batch)], rng, device),
        list(matcher.parameters()),
        steps,
        learning_rate,
        weight_decay=0.05,
        warmup=0.1,
        description="matching",
        pause=Pause(folder.with_suffix(".unfinished"), rng, time.time() + 60 * minutes),
    )
    vision.save(matcher.tower, folder)
    return values


def print_probe(train: Split, judged: Split) -> None:
    """One row per hidden state, one column for each thing that the probe asks, in per cent."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for layer, what, right in probe(train, judged):
        found[layer][what] = 100 * sum(right) / len(right)
    print("hidden state  " + "  ".join(WHAT))
    for layer, row in found.items():
        print(f"{layer:12}  " + "  ".join(f"{row[what]:{len(what)}.1f}" for what in WHAT))


def main() -> None:
    """Train unless there is a tower, look at the pictures, probe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spatial.contrastive", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="of the study that will use the tower")
    parser.add_argument("--steps", type=int, default=6000, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step, each against the others (%(default)s)")
    parser.add_argument("--pictures", type=int, nargs=2, default=(2000, 500), help="to fit and to judge the probe with")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the same command goes on")
    arguments = parser.parse_args()
    device = str(choose_device(arguments.device))
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tower = arguments.folder / "vision"
    if not (tower / "config.json").exists():
        try:
            values = pretrain(tower, arguments.steps, arguments.batch, device=device, minutes=arguments.minutes)
        except TimeIsUp as error:
            parser.exit(0, f"Time is up, {error}; the same command goes on.\n")
        last = values[-max(1, len(values) // 20) :]
        print(f"loss {values[0]:.2f} -> {sum(last) / len(last):.2f}")
    train, judged = (Split(f"probe-{n}", size, arguments.folder) for n, size in enumerate(arguments.pictures))
    for split in (train, judged):
        split.prepare(tower, device=device)
    print_probe(train, judged)


if __name__ == "__main__":
    main()
