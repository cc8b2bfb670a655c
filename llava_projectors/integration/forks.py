"""The forks of LLaVA that were tried, a row each, and where one differs in what its own code does not tell.

A fork that is laid out like LLaVA needs no row: the table of seams finds its places by pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fork:
    """One code base.

    Attributes:
        name: what people call it.
        repository: on GitHub.
        commit: that was tried.
        package: that it is imported as.
        dropped_layers: class of a vision tower -> layers that it deletes after loading and that
            its config still counts. Such a tower offers no choice and returns its last hidden state.
        second_tower: settings that bring a second vision tower, which reads the features of the
            first as those of one layer.
    """

    name: str
    repository: str
    commit: str
    package: str
    dropped_layers: Mapping[str, int] = field(default_factory=dict)
    second_tower: tuple[str, ...] = ()


FORKS = (
    Fork("LLaVA", "haotian-liu/LLaVA", "c121f04", "llava"),
    Fork("LLaVA-NeXT", "LLaVA-VL/LLaVA-NeXT", "df17966", "llava", dropped_layers={"SigLipVisionTower": 1}),
    Fork("ShareGPT4V", "ShareGPT4Omni/ShareGPT4V", "b6f70e9", "share4v"),
    Fork("LLaVA-Med", "microsoft/LLaVA-Med", "d406e3f", "llava"),
    # The first setting is an argument of its training script, the second stands in its config.
    Fork("MGM", "dvlab-research/MGM", "769820c", "mgm", second_tower=("vision_tower_aux", "mm_vision_tower_aux")),
)

DROPPED_LAYERS = {tower: layers for fork in FORKS for tower, layers in fork.dropped_layers.items()}
SECOND_TOWER_SETTINGS = tuple(setting for fork in FORKS for setting in fork.second_tower)


def known_forks() -> str:
    """`package (names)`, for messages."""
    names: dict[str, list[str]] = {}
    for fork in FORKS:
        names.setdefault(fork.package, []).append(fork.name)
    return ", ".join(f"{package} ({', '.join(forks)})" for package, forks in names.items())
