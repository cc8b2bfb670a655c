"""A tiny random SigLIP for the trial of a package that knows such towers, as LLaVA-NeXT's own scripts name one.

LLaVA-NeXT takes an existing path for a CLIP, so this tower lies under its name in a cache of the hub.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SIGLIP = "google/siglip-so400m-patch14-384"
# Its own depth and grid, and few channels.
TINY_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
DEPTH, IMAGE_SIZE, PATCH_SIZE = 27, 384, 14


def make_siglip(cache: Path) -> None:
    """Write the checkpoint and its image processor as a download from the hub.

    Raises:
        ImportError: this transformers has no SigLIP.
    """
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": DEPTH, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **TINY_SIZES}
    snapshot = snapshot_folder(cache, SIGLIP)
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(snapshot)
    SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(snapshot)


def snapshot_folder(cache: Path, name: str) -> Path:
    """A new folder in which transformers finds the files of a hub's repository of this name."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(name.encode()).hexdigest()
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def shrink(config_class: Any, sizes: Mapping[str, Any]) -> None:
    """Make sizes the defaults of a config's class."""
    initialize = config_class.__init__
    names = initialize.__code__.co_varnames[1 : initialize.__code__.co_argcount]
    defaults = dict(zip(names, initialize.__defaults__))
    initialize.__defaults__ = tuple(sizes.get(name, value) for name, value in defaults.items())


@contextmanager
def siglip_at_hand(package: str, cache: Path) -> Iterator[None]:
    """Let transformers find the checkpoint, and a package's own config of it have the tiny sizes.

    LLaVA-NeXT's tower asks its own class for the sizes and not the checkpoint.
    """
    from transformers.utils import hub

    configs = [
        value
        for name, module in list(sys.modules.items())
        if name.startswith(f"{package}.")
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == name and value.__name__ == "SigLipVisionConfig"
    ]
    before = hub.TRANSFORMERS_CACHE, [config.__init__.__defaults__ for config in configs]  # type: ignore[misc]
    hub.TRANSFORMERS_CACHE = str(cache)
    for config in configs:
        shrink(config, TINY_SIZES)
    try:
        yield
    finally:
        hub.TRANSFORMERS_CACHE = before[0]
        for config, defaults in zip(configs, before[1]):
            config.__init__.__defaults__ = defaults  # type: ignore[misc]
