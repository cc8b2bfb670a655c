"""Tiny checkpoints and data for the forks' training scripts, written into a folder."""

import sys
from pathlib import Path

from llava_projectors.tiny import assets

folder = Path(sys.argv[1])
assets.make_vision_tower(folder / "openai" / "clip-vit")
assets.make_llm(folder / "vicuna")
assets.make_dataset(folder / "data", num_scenes=2)
