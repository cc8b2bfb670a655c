"""The forks of LLaVA that were tried, a row each, and where one differs in what its own code does not tell.

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
        repository: on GitHub.
        commit: that was tried.
        package: that it is imported as.
        second_tower: settings that bring a second vision tower, which reads the features of the
            first as those of one layer.
        refused_settings: setting -> the values with which our types work, and why the others exclude
            them, and what to do where no value is left; what is not set at all is fine.
    """

    name: str
    repository: str
    commit: str
    package: str
    second_tower: tuple[str, ...] = ()
    refused_settings: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)


FORKS = (
    Fork("LLaVA", "haotian-liu/LLaVA", "c121f04", "llava"),
    Fork("LLaVA-NeXT", "LLaVA-VL/LLaVA-NeXT", "df17966", "llava"),
    Fork("ShareGPT4V", "ShareGPT4Omni/ShareGPT4V", "b6f70e9", "share4v"),
    Fork("LLaVA-Med", "microsoft/LLaVA-Med", "d406e3f", "llava"),
    Fork("FastVLM", "apple/ml-fastvlm", "592b4ad", "llava"),
    Fork("ViP-LLaVA", "WisconsinAIVision/ViP-LLaVA", "77079b1", "llava"),
    Fork("PruMerge", "42Shawn/LLaVA-PruMerge", "097c041", "llava"),
    Fork("RLAIF-V", "RLHF-V/RLAIF-V", "83d917b", "llava"),
    Fork("Table-LLaVA", "SpursGoZmy/Table-LLaVA", "25b9256", "llava"),
    Fork("Math-LLaVA", "HZQ950419/Math-LLaVA", "3480ba7", "llava"),
    Fork("LLaVA-Plus", "LLaVA-VL/LLaVA-Plus-Codebase", "a9f9d6f", "llava"),
    Fork("LLaVA-MORE", "aimagelab/LLaVA-MORE", "2460d39", "src.llava"),
    Fork("Bunny", "BAAI-DCAI/Bunny", "08273ac", "bunny"),
    Fork("MobileVLM", "Meituan-AutoML/MobileVLM", "688fdec", "mobilevlm"),
    Fork("GeoChat", "mbzuai-oryx/GeoChat", "4850920", "geochat"),
    Fork("LLaVA-HR", "luogen1996/LLaVA-HR", "1212ffb", "llava_hr"),
    Fork("TinyLLaVABench", "DLCV-BUAA/TinyLLaVABench", "2d2105f", "tinyllava"),
    Fork("VCoder", "SHI-Labs/VCoder", "4e85ace", "vcoder_llava"),
    # The first setting is an argument of its training script, the second stands in its config.
    Fork("MGM", "dvlab-research/MGM", "769820c", "mgm", second_tower=("vision_tower_aux", "mm_vision_tower_aux")),
    Fork(
        "DenseConnector",
        "HJYao00/DenseConnector",
        "0f8936c",
        "dc",
        refused_settings={"mm_dense_connector_type": (("none",), "it joins hidden states of its own choice")},
    ),
    # The first setting is an argument of its training script, the second stands in its config.
    Fork(
        "Video-LLaVA",
        "PKU-YuanGroup/Video-LLaVA",
        "984e65b",
        "videollava",
        refused_settings=dict.fromkeys(
            ("video_tower", "mm_video_tower"),
            ((), "it gives the projector frames with their CLS tokens. Train with the image tower alone"),
        ),
    ),
    Fork(
        "LLaVA-Mini",
        "ictnlp/LLaVA-Mini",
        "47da113",
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
