"""How large the study is: its first scale, in results/spatial.md, a harder one, or the largest, for a GPU.

Sizes are read when the study's modules are imported, in every process of it, so they come from an environment
variable: `LLAVA_PROJECTORS_STUDY=medium`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLE = "LLAVA_PROJECTORS_STUDY"


@dataclass(frozen=True)
class Sizes:
    """Of pictures, models and training.

    Attributes:
        image_size: side of a picture in pixels; a patch is 14 pixels wide.
        objects: fewest and most in a picture.
        radii: of the smallest and the largest object, in pixels. Letters have one size.
        has_photographs: whether a part of a photograph is the background, or a shade of grey.
        llm_width: hidden size of the LLM.
        llm_layers: its number of layers.
        llm_positions: longest sequence.
        pictures: of the training, validation and test splits.
        is_cached: whether the hidden states of all pictures go to the disk, or are computed when they are needed.
        vision_steps: of the vision tower's training with labels, 32 pictures each.
        matching_steps: of its upper half's training with captions after that; 0 where labels train all of it.
        language_steps: of the LLM's, 16 dialogues each.
        steps: of stages 1 and 2.
    """

    image_size: int = 168
    objects: tuple[int, int] = (3, 6)
    radii: tuple[int, int] = (10, 20)
    has_photographs: bool = False
    llm_width: int = 128
    llm_layers: int = 4
    llm_positions: int = 512
    pictures: tuple[int, int, int] = (6000, 500, 1000)
    is_cached: bool = True
    vision_steps: int = 1500
    matching_steps: int = 0
    language_steps: int = 3500
    steps: tuple[int, int] = (1200, 400)


ALL_SIZES = {
    "small": Sizes(),
    "medium": Sizes(
        image_size=252,
        objects=(4, 8),
        has_photographs=True,
        llm_width=160,
        llm_layers=6,
        llm_positions=768,
        vision_steps=2000,
        matching_steps=500,
        language_steps=4000,
        steps=(2000, 600),
    ),
    # Their hidden states would take 80 GB.
    "large": Sizes(
        image_size=336,
        llm_width=512,
        llm_layers=8,
        llm_positions=1024,
        pictures=(60000, 5000, 10000),
        is_cached=False,
    ),
}
NAME = os.environ.get(VARIABLE, "small")
if NAME not in ALL_SIZES:
    raise ValueError(f"{VARIABLE}={NAME} must be one of {', '.join(ALL_SIZES)}")
SIZES = ALL_SIZES[NAME]
