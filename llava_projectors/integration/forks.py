"""The forks of LLaVA that are known, a row each, and where one differs in what its own code does not tell.

A fork that is laid out like LLaVA needs no row: the table of seams finds its places by pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fork:
    """One code base.

    Attributes:
        name: what people call it.
        package: that it is imported as.
        second_tower: settings that bring a second vision tower, which reads the features of the
            first as those of one layer.
        refused_settings: setting -> the values with which our types work, and why they do not work with
            others; where no value is listed, also what to do. Without the setting they work.
    """

    name: str
    package: str
    second_tower: tuple[str, ...] = ()
    refused_settings: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)


FORKS = (
    Fork("LLaVA", "llava"),
    Fork("LLaVA-NeXT", "llava"),
    Fork("ShareGPT4V", "share4v"),
    Fork("LLaVA-Med", "llava"),
    Fork("FastVLM", "llava"),
    Fork("ViP-LLaVA", "llava"),
    Fork("PruMerge", "llava"),
    Fork("RLAIF-V", "llava"),
    Fork("Table-LLaVA", "llava"),
    Fork("Math-LLaVA", "llava"),
    Fork("LLaVA-Plus", "llava"),
    Fork("LLaVA-MORE", "src.llava"),
    Fork("Bunny", "bunny"),
    Fork("MobileVLM", "mobilevlm"),
    Fork("GeoChat", "geochat"),
    Fork("LLaVA-HR", "llava_hr"),
    Fork("TinyLLaVABench", "tinyllava"),
    Fork("VCoder", "vcoder_llava"),
    Fork("LongVA", "longva"),
    Fork("EAGLE", "eagle"),
    Fork("Vitron", "vitron"),
    Fork("LLaVAction", "llavaction"),
    # The first setting is an argument of its training script, the second stands in its config.
    Fork("MGM", "mgm", second_tower=("vision_tower_aux", "mm_vision_tower_aux")),
    Fork(
        "DenseConnector",
        "dc",
        refused_settings={"mm_dense_connector_type": (("none",), "it joins hidden states of its own choice")},
    ),
    # The first setting is an argument of its training script, the second stands in its config.
    Fork(
        "Video-LLaVA",
        "videollava",
        refused_settings=dict.fromkeys(
            ("video_tower", "mm_video_tower"),
            ((), "it gives the projector frames with their CLS tokens. Train with the image tower alone"),
        ),
    ),
    Fork(
        "LLaVA-Mini",
        "llavamini",
        refused_settings={
            "compressor_size": (
                (),
                "its compressor puts one visual token in the place of an image's, and calls the projector twice. "
                "Train with its own projector types",
            )
        },
    ),
)

SECOND_TOWER_SETTINGS = tuple(setting for fork in FORKS for setting in fork.second_tower)
REFUSED_SETTINGS = {setting: rule for fork in FORKS for setting, rule in fork.refused_settings.items()}


def known_forks() -> str:
    """`package (names)`, for messages."""
    names: dict[str, list[str]] = {}
    for fork in FORKS:
        names.setdefault(fork.package, []).append(fork.name)
    return ", ".join(f"{package} ({', '.join(forks)})" for package, forks in names.items())
