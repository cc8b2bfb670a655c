"""The vision tower that returns several hidden states, made from LLaVA's own tower.

LLaVA's loading and device handling stay as they are; only the choice of hidden states and the
reported grid change, so the tower becomes an instance of a subclass of its own class. Where a
fork differs in what cannot be told from its methods, its row in `forks.py` says so.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, Callable, ClassVar

import torch
from torch import nn

from llava_projectors.integration.forks import DROPPED_LAYERS, SECOND_TOWER_SETTINGS
from llava_projectors.integration.truncated_encoder import TruncatedVisionModel
from llava_projectors.registry import ResolvedSpec
from llava_projectors.spec import ProjectorSpecError, format_value


class MultiLayerTower(nn.Module):
    """Mixed in before the class of LLaVA's tower.

    Attributes:
        projector_layers: indices into the tower's hidden states, the last one LLaVA's own choice.
        patch_side: side of the patch grid before the projector.
        token_side: side of the grid of visual tokens after it.
        tower_class: LLaVA's class.
        tower_forward: its forward, which decides on dtypes, devices and gradients.
    """

    tower_class: ClassVar[type[nn.Module]]
    tower_forward: ClassVar[Callable[..., Any]]
    projector_layers: tuple[int, ...]
    patch_side: int
    token_side: int

    def forward(self, images: Any) -> Any:
        """LLaVA's own forward, on a copy of the tower whose vision model stops at the highest layer asked for."""
        tower: Any = copy.copy(self)
        truncated = TruncatedVisionModel(tower.vision_tower, self.projector_layers)
        tower._modules = {**self._modules, "vision_tower": truncated}
        return self.tower_forward(tower, images)

    def feature_select(self, image_forward_outs: Any) -> torch.Tensor:
        """Hidden states [B, N, C] or [B, 1 + N, C] -> [B, N, L*C]: no CLS token, layers side by side."""
        hidden_states, patches = image_forward_outs.hidden_states, self.patch_side**2
        return torch.cat([hidden_states[layer][:, -patches:] for layer in self.projector_layers], dim=-1)

    @property
    def num_patches_per_side(self) -> int:
        """Side of the grid that the LLM sees: LLaVA lays out high-resolution tiles by it."""
        return self.token_side

    @property
    def num_patches(self) -> int:
        """Visual tokens of one image: LLaVA's server budgets the context by it."""
        return self.token_side**2

    def select_from_images(self, images: Any) -> Any:
        """LLaVA's forward, for towers that have none with `feature_select`: [B, 3, H, W], or a list of [3, H, W]."""
        if isinstance(images, list):
            return [self.select_from_images(image.unsqueeze(0)) for image in images]
        tower: Any = self
        outs = tower.vision_tower(images.to(device=tower.device, dtype=tower.dtype), output_hidden_states=True)
        return self.feature_select(outs).to(images.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        return _rebuild, (self.tower_class,), dict(self.__dict__)


@cache
def _subclass(tower_class: Any) -> type[nn.Module]:
    selects = hasattr(tower_class, "feature_select")
    tower_forward = tower_class.forward if selects else MultiLayerTower.select_from_images
    return type(
        f"MultiLayer{tower_class.__name__}",
        (MultiLayerTower, tower_class),
        {"tower_class": tower_class, "tower_forward": staticmethod(tower_forward)},
    )


def _rebuild(tower_class: Any) -> nn.Module:
    cls = _subclass(tower_class)
    return cls.__new__(cls)


def convert_tower(tower: Any, resolved: ResolvedSpec, cfg: Any = None) -> None:
    """Turn LLaVA's tower, loaded or not, into one that serves this projector.

    Args:
        tower: what LLaVA's `build_vision_tower` returned.
        resolved: the projector that will read the features.
        cfg: what the tower was built from.

    Raises:
        ProjectorSpecError: the tower cannot serve it; says which setting to change.
    """
    if isinstance(tower, MultiLayerTower):
        return
    refuse_unsupported(tower, resolved)
    config = tower.config
    patch_side = config.image_size // config.patch_size
    depth = config.num_hidden_layers - DROPPED_LAYERS.get(type(tower).__name__, 0)
    layers = resolve_layers(resolved, depth, getattr(tower, "select_layer", -1))
    second = next((name for name in SECOND_TOWER_SETTINGS if getattr(cfg, name, None)), None)
    if second and len(layers) > 1:
        raise ProjectorSpecError(
            f"projector type {resolved.type_string!r} reads {len(layers)} layers, but the tower of --{second} takes "
            f"features of one: pass {resolved.cls.name}:layers={layers[-1]}"
        )
    token_side = resolved.output_side(patch_side)
    tower.__class__ = _subclass(tower.__class__)
    tower.projector_layers = layers
    tower.patch_side = patch_side
    tower.token_side = token_side


def refuse_unsupported(tower: Any, resolved: ResolvedSpec) -> None:
    """Raise for towers and settings whose features are not a square grid of C channels."""
    prefix = f"projector type {resolved.type_string!r}"
    kind = type(tower).__name__
    if not (hasattr(tower, "feature_select") or kind in DROPPED_LAYERS):
        raise ProjectorSpecError(
            f"{prefix} cannot use the vision tower {kind}: its hidden states cannot be told from its methods"
        )
    if tower.hidden_size != tower.config.hidden_size:
        raise ProjectorSpecError(
            f"{prefix} cannot use the multi-scale vision tower {kind}: it returns {tower.hidden_size} channels "
            f"a patch, not the {tower.config.hidden_size} of one hidden state; turn multi-scale features (s2) off"
        )
    if getattr(tower, "select_feature", "patch") != "patch":
        raise ProjectorSpecError(
            f"{prefix} needs the patch grid without the CLS token: "
            f"--mm_vision_select_feature {tower.select_feature} must be patch"
        )


def resolve_layers(resolved: ResolvedSpec, depth: int, select_layer: int) -> tuple[int, ...]:
    """Absolute indices of the hidden states to aggregate.

    Args:
        resolved: the projector; its `layers` option may count from the end.
        depth: number of layers of the tower; it has depth + 1 hidden states, 0 the embeddings.
        select_layer: LLaVA's `mm_vision_select_layer`, which may count from the end.

    Raises:
        ProjectorSpecError: out of range, unsorted, doubled, or not ending in `select_layer`.
    """
    given = resolved.options.get("layers")
    prefix = f"projector type {resolved.type_string!r}"
    tower_is = f"the vision tower has {depth} layers, hidden states 0 to {depth} or {-depth - 1} to -1"
    if not -depth - 1 <= select_layer <= depth:
        raise ProjectorSpecError(f"{prefix}: --mm_vision_select_layer {select_layer} is out of range; {tower_is}")
    selected = select_layer % (depth + 1)
    layers = given or resolved.cls.default_layers(selected)
    shown = f"layers={format_value(layers)}"
    for layer in layers:
        if not -depth - 1 <= layer <= depth:
            raise ProjectorSpecError(f"{prefix}: layer {layer} is out of range; {tower_is}")
    absolute = tuple(layer % (depth + 1) for layer in layers)
    if list(absolute) != sorted(set(absolute)):
        if not given:
            raise ProjectorSpecError(
                f"{prefix}: the default layers {format_value(layers)} need a selected layer of at least 6, "
                f"and --mm_vision_select_layer {select_layer} is {selected}; list them yourself, for example "
                f"{resolved.cls.name}:layers={selected}; {tower_is}"
            )
        raise ProjectorSpecError(
            f"{prefix}: {shown} must be ascending and without repeats "
            f"(here {format_value(absolute)}, counted from 0); {tower_is}"
        )
    if absolute[-1] != selected:
        raise ProjectorSpecError(
            f"{prefix}: {shown} must end in hidden state {selected}, which --mm_vision_select_layer "
            f"{select_layer} selects; end the list in {selected} or pass --mm_vision_select_layer {absolute[-1]}"
        )
    return absolute
