"""How large the study is: what was published in results/spatial.md, or a larger one for a GPU.

Sizes are read when the study's modules are imported, in every process of it, so they come from an environment
variable: `LLAVA_PROJECTORS_STUDY=large`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLE = "LLAVA_PROJECTORS_STUDY"


@dataclass(frozen=True)
class Sizes:
    """Of pictures and LLM.

    Attributes:
        image_size: side of a picture in pixels; a patch is 14 pixels wide.
        llm_width: hidden size of the LLM.
        llm_layers: its number of layers.
        llm_positions: longest sequence.
        pictures: of the training, validation and test splits.
        is_cached: whether the hidden states of all pictures go to the disk, or are computed when they are needed.
    """

    image_size: int
    llm_width: int
    llm_layers: int
    llm_positions: int
    pictures: tuple[int, int, int]
    is_cached: bool


ALL_SIZES = {
    "small": Sizes(168, 128, 4, 512, (6000, 500, 1000), True),
    # Their hidden states would take 80 GB.
    "large": Sizes(336, 512, 8, 1024, (60000, 5000, 10000), False),
}
NAME = os.environ.get(VARIABLE, "small")
if NAME not in ALL_SIZES:
    raise ValueError(f"{VARIABLE}={NAME} must be one of {', '.join(ALL_SIZES)}")
SIZES = ALL_SIZES[NAME]
