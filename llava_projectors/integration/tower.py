"""The vision tower that serves our projectors, made from LLaVA's own tower.

LLaVA's loading and device handling stay as they are; only the choice of hidden states and the
reported grid change, so the tower becomes an instance of a subclass of its own class. A tower with
hidden states returns several of them side by side. A tower without (EVA, MobileCLIP, ConvNeXt)
passes its own features on, to projectors that read one layer.

The patch grid is what the tower returns. What its config says is announced until then, and no more.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Callable, ClassVar, Optional

import torch
from torch import nn

from llava_projectors.integration import fast_tower
from llava_projectors.integration.forks import REFUSED_SETTINGS, SECOND_TOWER_SETTINGS
from llava_projectors.integration.image_processor import set_slicing
from llava_projectors.integration.log import log
from llava_projectors.integration.tower_code import (
    dropped_layers,
    further_models,
    mentions,
    names_in,
    returns_tuple,
    tuples_returned,
)
from llava_projectors.integration.tower_weights import refuse_random_weights, watched
from llava_projectors.integration.truncated_encoder import can_keep, keeping
from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.recompute import is_compiling
from llava_projectors.registry import OPTIONS_SETTING, ResolvedSpec
from llava_projectors.slicing import Slicing, slicing_of
from llava_projectors.spec import ProjectorSpecError, format_value

# How LLaVA and its forks call the method that gives a model's tower.
TOWER_GETTERS = ("get_vision_tower", "get_image_tower")
# An attribute of a module that has been told once.
_READS_ONE_LAYER = "_reads_one_layer"


class ReducedTower(nn.Module):
    """Mixed in before the class of LLaVA's tower: reports the grid that the LLM sees.

    Attributes:
        projector_spec: the projector that reads the features.
        projector_layers: indices of the hidden states to return, or () for the tower's own features.
        patch_side: side of the patch grid before the projector; None until it is known.
        slicing: how pictures are cut into tiles, or None where they are not.
        warned_of_length: whether a warning was given that a picture is too long.
        tower_class: LLaVA's class.
    """

    tower_class: ClassVar[type[nn.Module]]
    projector_spec: ResolvedSpec
    projector_layers: tuple[int, ...]
    patch_side: Optional[int]
    slicing: Optional[Slicing] = None
    warned_of_length: bool = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """LLaVA's own, which makes the image processor."""
        tower_class: Any = self.tower_class
        tower_class.load_model(self, *args, **kwargs)
        if self.slicing is not None:
            self.set_slicing(self.slicing)

    def set_slicing(self, slicing: Optional[Slicing]) -> None:
        """Make the image processor, now or once it is loaded, cut pictures into tiles, or stop it."""
        self.slicing = slicing
        tower: Any = self
        if tower.is_loaded:
            set_slicing(tower.image_processor, None if slicing is None else slicing.patch_num)

    @property
    def num_patches_per_side(self) -> int:
        """Side of the grid that the LLM sees: LLaVA lays out high-resolution tiles by it."""
        if self.patch_side is None:
            raise ProjectorSpecError(
                f"the patch grid of {self.tower_class.__name__} is not known before its first forward"
            )
        return self.projector_spec.output_side(self.patch_side)

    @property
    def num_patches(self) -> int:
        """Visual tokens of one image, the most where it is cut into tiles: LLaVA's server budgets the context by it."""
        tokens = self.num_patches_per_side**2
        return tokens if self.slicing is None else self.slicing.most_tokens(tokens)

    def see_grid(self, num_positions: int) -> int:
        """Take the grid from the number of positions that the vision model returned.

        Returns:
            1 when the first position is the CLS token, else 0.

        Raises:
            ProjectorSpecError: neither the positions nor those after the first are a square.
        """
        num_positions = operator.index(num_positions)  # a compiler's symbol becomes a number
        for num_extra in (0, 1):
            if math.isqrt(num_positions - num_extra) ** 2 == num_positions - num_extra:
                self.patch_side = math.isqrt(num_positions)
                return num_extra
        side = self.patch_side
        expected = "" if side is None else f", not the {side}x{side} = {side**2} patches and one CLS token expected"
        raise ProjectorSpecError(
            f"projector type {self.projector_spec.type_string!r} needs a square grid of patches: the vision tower "
            f"{self.tower_class.__name__} returned {num_positions} positions{expected}"
        )

    def describe(self) -> str:
        """`576 -> 144 visual tokens per image (24x24 -> 12x12), hidden states 12+23`."""
        layers = (
            f"hidden states {format_value(self.projector_layers)}"
            if self.projector_layers
            else "the tower's own features"
        )
        side = self.patch_side
        if side is None:
            return f"the tower's grid is known after its first forward, {layers}"
        after = self.num_patches_per_side
        return f"{side**2} -> {after**2} visual tokens per image ({side}x{side} -> {after}x{after}), {layers}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        mixin = MultiLayerTower if self.projector_layers else OneLayerTower
        return _rebuild, (mixin, self.tower_class), dict(self.__dict__)


class MultiLayerTower(ReducedTower):
    """A tower that returns several hidden states side by side.

    Attributes:
        class_forward: the forward of LLaVA's class when it was looked at last; some packages replace it.
        tower_forward: the same, which decides on dtypes, devices and gradients, or `select_from_images`
            for classes that choose their hidden states elsewhere than in `feature_select`.
    """

    class_forward: ClassVar[Callable[..., Any]]
    tower_forward: ClassVar[Callable[..., Any]]

    def forward(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """LLaVA's own forward, in which the vision model stops at the highest layer asked for."""
        if self.tower_class.forward is not self.class_forward:
            _look_at_forward(type(self))
        if is_compiling():  # a compiler leaves out what is not used
            return self.tower_forward(self, images, *args, **kwargs)
        with keeping(self.projector_layers):
            return self.tower_forward(self, images, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """LLaVA's own; what it loads is prepared for the forward.

        Raises:
            ProjectorWeightsError: weights that the features pass through are missing.
        """
        with watched() as reports:
            super().load_model(*args, **kwargs)
        self.prepare()
        refuse_random_weights(self, reports)

    def prepare(self) -> None:
        """Let the vision model that was loaded keep the hidden states of `forward`, and run what a user asks for."""
        choice, changed = fast_tower.wanted(), 0
        for module in self.children():
            can_keep(module)
            changed += fast_tower.speed_up(module, choice)
        if changed:
            log(f"{fast_tower.VARIABLE}={choice}: {changed} modules of the vision tower run another forward")

    def feature_select(self, image_forward_outs: Any, *_: Any, **__: Any) -> torch.Tensor:
        """Hidden states [B, N, C] or [B, 1 + N, C] -> [B, N, L*C]: no CLS token, layers side by side.

        Some forks pass `select_feature` too; the patches are what it can mean here.
        """
        given = image_forward_outs.hidden_states
        try:
            states = [given[layer] for layer in self.projector_layers]
        except IndexError:
            raise ProjectorSpecError(
                f"hidden state {self.projector_layers[-1]} does not exist: the vision tower that was loaded has "
                f"{len(given) - 1} layers"
            ) from None
        num_extra = self.see_grid(states[-1].shape[1])
        return torch.cat([state[:, num_extra:] for state in states], dim=-1)

    @property
    def hidden_size(self) -> int:
        """C, the channels of one hidden state, also where LLaVA's class joins several."""
        tower: Any = self
        return int(tower.config.hidden_size)

    def select_from_images(self, images: Any) -> Any:
        """[B, 3, H, W] or a list of [3, H, W] -> features, for classes whose forward reads hidden states by itself."""
        if isinstance(images, list):
            return [self.select_from_images(image.unsqueeze(0)) for image in images]
        tower: Any = self
        outs = tower.vision_tower(images.to(device=tower.device, dtype=tower.dtype), output_hidden_states=True)
        return self.feature_select(outs).to(images.dtype)

    def select_pair_from_images(self, images: Any) -> Any:
        """As `select_from_images`, for classes that return the vision model's outputs too."""
        tower: Any = self
        outs = tower.vision_tower(images.to(device=tower.device, dtype=tower.dtype), output_hidden_states=True)
        return self.feature_select(outs).to(images.dtype), outs


class OneLayerTower(ReducedTower):
    """A tower whose own features go to the projector as they are."""

    def forward(self, images: Any) -> Any:
        """The features of LLaVA's class, [B, N, C] or a list of them; N is checked to be a square."""
        features = self.tower_class.forward(self, images)
        for one in features if isinstance(features, list) else [features]:
            if not isinstance(one, torch.Tensor) or one.ndim != 3 or self.see_grid(one.shape[1]):
                returned = list(one.shape) if isinstance(one, torch.Tensor) else f"a {type(one).__name__}"
                raise ProjectorSpecError(
                    f"projector type {self.projector_spec.type_string!r} needs features [images, patches, channels] of "
                    f"a square grid; the vision tower {self.tower_class.__name__} returned {returned}"
                )
        return features


@cache
def _subclass(mixin: Any, tower_class: Any) -> type[nn.Module]:
    name = f"{mixin.__name__.removesuffix('Tower')}{tower_class.__name__}"
    cls: Any = type(name, (mixin, tower_class), {"tower_class": tower_class})
    if mixin is MultiLayerTower:
        _look_at_forward(cls)
    return cls  # type: ignore[no-any-return]


def _look_at_forward(cls: Any) -> None:
    cls.tower_forward = staticmethod(_forward_of(cls.tower_class))
    cls.class_forward = staticmethod(cls.tower_class.forward)


def _rebuild(mixin: Any, tower_class: Any) -> nn.Module:
    cls = _subclass(mixin, tower_class)
    return cls.__new__(cls)


def _forward_of(tower_class: Any) -> Callable[..., Any]:
    """The class's own forward where it selects in `feature_select` alone, else ours.

    Raises:
        ProjectorSpecError: ours cannot stand for it.
    """
    names = names_in(tower_class, "forward")
    forward: Callable[..., Any] = tower_class.forward
    if "feature_select" in names and "hidden_states" not in names:
        return forward
    shown, function = f"the forward of the vision tower {tower_class.__name__}", inspect.unwrap(forward)
    definer = next(base for base in tower_class.__mro__ if "forward" in vars(base))
    if function.__module__ != definer.__module__:
        raise ProjectorSpecError(
            f"{shown} was replaced by {function.__module__}, which chooses hidden states by itself: it cannot be used "
            "beside the projector types of llava_projectors"
        )
    further = list(inspect.signature(function).parameters)[2:]
    if further:
        raise ProjectorSpecError(
            f"{shown} takes {', '.join(further)} beside the images and chooses hidden states by itself: the projector "
            "types of llava_projectors cannot read it"
        )
    return MultiLayerTower.select_pair_from_images if returns_tuple(forward) else MultiLayerTower.select_from_images


def find_tower(model: Any) -> Any:
    """The vision tower of LLaVA's meta model, or None."""
    getter = next((getattr(model, name) for name in TOWER_GETTERS if hasattr(model, name)), None)
    return None if getter is None else getter()


def convert_tower(tower: Any, resolved: ResolvedSpec, cfg: Any = None) -> None:
    """Turn LLaVA's tower, loaded or not, into one that serves this projector.

    Args:
        tower: what LLaVA's `build_vision_tower` returned.
        resolved: the projector that will read the features.
        cfg: what the tower was built from.

    Raises:
        ProjectorSpecError: the tower cannot serve it; says which setting to change.
    """
    if isinstance(tower, ReducedTower):
        return
    refuse_unsupported_tower(tower, resolved, cfg)
    layers, side = _layers_and_side(tower, resolved)
    second = next((name for name in SECOND_TOWER_SETTINGS if getattr(cfg, name, None)), None)
    if second:
        refuse_several_layers(
            tower, resolved, f"whose features --{second} reads too", str(layers[-1]) if layers else "-1"
        )
    if side is not None:
        resolved.output_side(side)  # a stride larger than the grid is an error now
    tower_class: Any = type(tower)
    tower.__class__ = _subclass(MultiLayerTower if layers else OneLayerTower, tower_class)
    tower.projector_spec = resolved
    tower.projector_layers = layers
    tower.patch_side = side
    if layers and tower.is_loaded:
        tower.prepare()
    slicing = slicing_of(cfg)
    if slicing is not None:
        tower.set_slicing(slicing)


def _layers_and_side(tower: Any, resolved: ResolvedSpec) -> tuple[tuple[int, ...], Optional[int]]:
    """The hidden states that the tower is to return, () for its own features, and the side of its patch grid.

    The side is None where only the first forward tells.

    Raises:
        ProjectorSpecError: the features are not hidden states of the `vision_tower` alone, and the projector reads
            several, or the forward returns several tensors.
    """
    tower_class: Any = type(tower)
    if not (mentions(tower_class, "output_hidden_states") and hasattr(tower.config, "num_hidden_layers")):
        reason = "which gives no hidden states"
    elif not mentions(tower_class, "vision_tower"):
        reason = "whose vision model is not its `vision_tower`"
    elif further := further_models(tower):
        reason = f"which joins its `vision_tower` with {' and '.join(further)}"
    else:
        return layers_of(tower, tower_class, resolved), tower.config.image_size // tower.config.patch_size
    tuples = tuples_returned(tower_class.forward)
    if tuples and all(tuples):
        raise ProjectorSpecError(
            f"projector type {resolved.type_string!r} needs one tensor of features: the forward of the vision "
            f"tower {tower_class.__name__} returns several"
        )
    refuse_several_layers(tower, resolved, reason, "-1")
    return (), math.isqrt(getattr(tower, "num_patches", 0)) or None


def give_other_readers_one_layer(model: Any) -> None:
    """Let other projectors of a model, which read the same tower, see the one layer that LLaVA itself selects.

    Theirs are named like `seg_mm_projector`. The layer is the last block of what the tower returns.
    """
    tower = find_tower(model)
    if not isinstance(tower, MultiLayerTower):
        return
    for name, module in model.named_children():
        is_other = name.endswith("_mm_projector") and not isinstance(module, Projector)
        if is_other and not getattr(module, _READS_ONE_LAYER, False):
            module.register_forward_pre_hook(partial(_last_channels, tower.hidden_size))
            setattr(module, _READS_ONE_LAYER, True)


def _last_channels(channels: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    features, *rest = inputs
    return (features[..., -channels:], *rest)


def see_real_grid(tower: Any) -> None:
    """Run a loaded tower once on a black picture, so that what is announced, and refused, is what it returns.

    Nothing is known before training where the weights are not here (meta device, ZeRO-3).

    Raises:
        ProjectorSpecError: its features cannot serve the projector.
    """
    size, weight = picture_size(tower), next(tower.parameters(), None)
    if size is None or weight is None or weight.is_meta or hasattr(weight, "ds_id"):
        return
    picture = torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            features = tower(picture)
    except ProjectorSpecError:
        raise
    except (AttributeError, LookupError, TypeError) as error:
        raise _refused_forward(tower, f"ends in {type(error).__name__}: {error}") from error
    except (RuntimeError, ValueError) as error:
        # It takes our one tensor apart, or its `vision_tower` is a list of models.
        if "to unpack" in str(error) or 'missing the required "forward"' in str(error):
            raise _refused_forward(tower, f"ends in {type(error).__name__}: {error}") from error
        _see_embedded_grid(tower)
    else:
        _check_features(tower, features)


def _see_embedded_grid(tower: Any) -> None:
    """Take the grid from the position embedding: a fork that resizes pictures elsewhere has it for what it makes."""
    model = getattr(tower, "vision_tower", tower)
    vision_model = getattr(model, "vision_model", model)
    embedding = getattr(getattr(vision_model, "embeddings", None), "position_embedding", None)
    if embedding is not None:  # else the first forward tells, or fails with an error of its own
        tower.see_grid(embedding.weight.shape[0])


def _check_features(tower: Any, features: Any) -> None:
    """Raise unless a forward has returned features, a list of them, or them with something beside."""
    parts = features if isinstance(features, list) else [features]
    if not isinstance(features, tuple) and not all(isinstance(p, torch.Tensor) and p.ndim == 3 for p in parts):
        shown = ", ".join(str(list(p.shape)) if isinstance(p, torch.Tensor) else type(p).__name__ for p in parts)
        raise _refused_forward(tower, f"returns {shown}, not features [images, patches, channels]")


def _refused_forward(tower: Any, what: str) -> ProjectorSpecError:
    return ProjectorSpecError(
        f"projector type {tower.projector_spec.type_string!r} cannot use the vision tower "
        f"{tower.tower_class.__name__}: its forward {what}"
    )


def picture_size(tower: Any) -> Optional[int]:
    """Side of the pictures that the tower's processor makes, in pixels."""
    processor = getattr(tower, "image_processor", None)
    for value in (getattr(processor, "crop_size", None), getattr(processor, "size", None)):
        if isinstance(value, Mapping):
            value = value.get("height", value.get("shortest_edge"))
        if isinstance(value, (tuple, list)):
            value = value[0]
        if isinstance(value, int):
            return value
    return None


def refuse_several_layers(tower: Any, resolved: ResolvedSpec, reason: str, layer: str) -> None:
    """Raise unless the projector reads one layer."""
    count = resolved.cls.count_levels(resolved.options.get("layers"))
    if count > 1:
        raise ProjectorSpecError(
            f"projector type {resolved.type_string!r} reads {count} layers of the vision tower "
            f"{type(tower).__name__}, {reason}: pass {resolved.cls.name}:layers={layer}, or a type of one layer"
        )


def refuse_unsupported_tower(tower: Any, resolved: ResolvedSpec, cfg: Any) -> None:
    """Raise for towers and settings whose features are not a square grid of C channels."""
    prefix = f"projector type {resolved.type_string!r}"
    if hasattr(tower, "s2_scales"):
        raise ProjectorSpecError(
            f"{prefix} cannot use the multi-scale vision tower {type(tower).__name__}, which joins several scales; "
            "turn multi-scale features (s2) off"
        )
    if getattr(tower, "select_feature", "patch") != "patch":
        raise ProjectorSpecError(
            f"{prefix} needs the patch grid without the CLS token: "
            f"--mm_vision_select_feature {tower.select_feature} must be patch"
        )
    if returns_tuple(getattr(type(tower), "feature_select", None)):
        raise ProjectorSpecError(
            f"{prefix} needs one tensor of features: feature_select of the vision tower {type(tower).__name__} returns "
            "several"
        )
    for setting, (accepted, reason) in REFUSED_SETTINGS.items():
        value = getattr(cfg, setting, None)
        if value is not None and value not in accepted:
            raise ProjectorSpecError(
                f"{prefix} and --{setting} {value} exclude each other: {reason}"
                + (f". Pass --{setting} {accepted[0]}" if accepted else "")
            )


def layers_of(tower: Any, tower_class: Any, resolved: ResolvedSpec) -> tuple[int, ...]:
    """Absolute indices of a tower's hidden states that a projector asks for; errors as `resolve_layers`."""
    depth = tower.config.num_hidden_layers - dropped_layers(tower_class)
    return resolve_layers(resolved, depth, getattr(tower, "select_layer", -1))


def depth_and_choice(model_type: str, num_layers: int, select_layer: int) -> tuple[int, int]:
    """Layers of a tower, and the hidden state that LLaVA selects, by the checkpoint's config alone.

    LLaVA-NeXT's SigLIP tower drops the last layer and offers no choice.

    Args:
        model_type: in the tower's config.
        num_layers: in the tower's config.
        select_layer: LLaVA's `mm_vision_select_layer`.
    """
    return (num_layers - 1, -1) if model_type == "siglip_vision_model" else (num_layers, select_layer)


def resolve_layers(resolved: ResolvedSpec, depth: int, select_layer: int) -> tuple[int, ...]:
    """Absolute indices of the hidden states to aggregate.

    Args:
        resolved: the projector; its `layers` option may count from the end.
        depth: number of layers of the tower; it has depth + 1 hidden states, 0 the embeddings.
        select_layer: LLaVA's `mm_vision_select_layer`, which may count from the end.

    Raises:
        ProjectorSpecError: out of range, unsorted, doubled, not ending in `select_layer`, or others than
            the checkpoint was trained with.
    """
    prefix = f"projector type {resolved.type_string!r}"
    tower_is = f"the vision tower has {depth} layers, hidden states 0 to {depth} or {-depth - 1} to -1"

    def from_start(layer: int, what: str) -> int:
        if not -depth - 1 <= layer <= depth:
            raise ProjectorSpecError(f"{prefix}: {what} {layer} is out of range; {tower_is}")
        return layer % (depth + 1)

    selected = from_start(select_layer, "--mm_vision_select_layer")
    layers = resolved.options.get("layers") or resolved.cls.default_layers(selected)
    absolute = tuple(from_start(layer, "layer") for layer in layers)
    shown = f"layers={format_value(layers)}"
    if list(absolute) != sorted(set(absolute)):
        raise ProjectorSpecError(f"{prefix}: {_why_unordered(resolved, absolute, select_layer, selected)}; {tower_is}")
    if absolute[-1] != selected:
        raise ProjectorSpecError(
            f"{prefix}: {shown} must end in hidden state {selected}, which --mm_vision_select_layer "
            f"{select_layer} selects; end the list in {selected} or pass --mm_vision_select_layer {absolute[-1]}"
        )
    # `resolve` cannot count from the end.
    asked = tuple(layer % (depth + 1) for layer in resolved.given.get("layers", layers))
    if asked != absolute:
        raise ProjectorSpecError(
            f"{prefix} has layers={format_value(asked)}, counted from 0, but the checkpoint was trained with {shown} "
            f"({OPTIONS_SETTING} in its config.json); {tower_is}"
        )
    return absolute


def _why_unordered(resolved: ResolvedSpec, absolute: tuple[int, ...], select_layer: int, selected: int) -> str:
    """What is wrong with layers that do not ascend: the defaults do so in every tower that is deep enough."""
    given = resolved.options.get("layers")
    if given:
        return (
            f"layers={format_value(given)} must be ascending and without repeats "
            f"(here {format_value(absolute)}, counted from 0)"
        )
    return (
        f"the default layers need a deeper tower: with --mm_vision_select_layer {select_layer} they would be "
        f"{format_value(absolute)}; list the layers yourself, for example {resolved.cls.name}:layers={selected}"
    )
