"""Splits of scenes, and every hidden state of their pictures, computed once for all runs.

The tower is frozen, so what it says about a picture is the same in every step of every run.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from benchmarks.spatial import vision
from benchmarks.spatial.questions import Turn, ask, caption
from benchmarks.spatial.scenes import NUM_PATCHES_PER_SIDE, Scene, draw, make_scene


@dataclass(frozen=True)
class Split:
    """Scenes that no other split has, from a seed of their own.

    Attributes:
        name: of a split of the plan, which the scenes follow from.
        size: number of pictures.
        folder: where the hidden states are kept.
    """

    name: str
    size: int
    folder: Path

    @cached_property
    def scenes(self) -> list[Scene]:
        """One for each picture."""
        rng = random.Random(self.name)
        return [make_scene(rng) for _ in range(self.size)]

    def picture(self, index: int) -> Image.Image:
        """RGB."""
        return draw(self.scenes[index], random.Random(f"{self.name} {index}"))

    def images(self, indices: Iterable[int]) -> torch.Tensor:
        """What the vision model is given: [number of pictures, 3, H, W]."""
        return vision.normalize(torch.stack([vision.pixels(self.picture(index)) for index in indices]))

    def caption(self, index: int) -> str:
        """The text of stage 1."""
        return caption(self.scenes[index])

    def questions(self, index: int, repeat: int = 0) -> dict[str, Turn]:
        """One question of each family; others for every `repeat`."""
        return ask(self.scenes[index], random.Random(f"{self.name} {index} {repeat}"))

    @property
    def path(self) -> Path:
        """The file of hidden states."""
        return self.folder / f"{self.name}-{self.size}.npy"

    @cached_property
    def hidden_states(self) -> Any:
        """[size, SELECTED + 1, N, C] in float16, read from the disk as it is needed."""
        return numpy.load(self.path, mmap_mode="r")

    @torch.no_grad()
    def prepare(self, vision_folder: Path, batch: int = 64, device: str = "cpu") -> None:
        """Run the vision model over all pictures, unless that was done."""
        from transformers import CLIPVisionModel

        if self.path.exists():
            return
        model = CLIPVisionModel.from_pretrained(vision_folder).to(device).eval()
        shape = (self.size, vision.SELECTED + 1, NUM_PATCHES_PER_SIDE**2, vision.WIDTH)
        unfinished = self.path.with_suffix(".part")
        open_memmap: Any = numpy.lib.format.open_memmap
        states = open_memmap(unfinished, mode="w+", dtype=numpy.float16, shape=shape)
        for start in tqdm(range(0, self.size, batch), desc=f"hidden states, {self.name}", unit=" batch"):
            indices = range(start, min(start + batch, self.size))
            found = model(self.images(indices).to(device), output_hidden_states=True).hidden_states
            chosen = [state[:, 1:] for state in found[: vision.SELECTED + 1]]
            states[start : indices.stop] = torch.stack(chosen, dim=1).cpu().numpy()
        states.flush()
        unfinished.rename(self.path)


class CachedTower(nn.Module):
    """In the place of LLaVA's tower: pictures are given by their numbers, features are looked up.

    Args:
        split: where the pictures are from.
        layers: hidden states to put side by side.
        vision_model: the frozen CLIPVisionModel.
    """

    def __init__(self, split: Split, layers: tuple[int, ...], vision_model: Any = None) -> None:
        super().__init__()
        self.split, self.layers = split, layers
        self._hidden = [vision_model]  # in a list, it is no part of the model that is trained

    @property
    def vision_model(self) -> Any:
        """As it was given."""
        return self._hidden[0]

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """[B] -> [B, N, L*C], float32."""
        chosen = [self.split.hidden_states[index, list(self.layers)] for index in indices.tolist()]
        states = torch.from_numpy(numpy.stack(chosen)).to(indices.device).float()
        return states.transpose(1, 2).flatten(2)


class LookingTower(CachedTower):
    """The same, where the hidden states of all pictures would not fit on the disk: each is looked at when asked for."""

    @torch.no_grad()
    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """[B] -> [B, N, L*C], float32."""
        # One picture has several questions in a batch.
        unique, places = indices.cpu().unique(return_inverse=True)
        images = self.split.images(unique.tolist()).to(indices.device)
        model = self.vision_model.to(indices.device).float()
        states = model(images, output_hidden_states=True).hidden_states
        found = torch.cat([states[layer][:, 1:] for layer in self.layers], dim=2)
        return found[places.to(indices.device)]
