"""What `llava-projectors check` looks at: a type string, a vision tower, weights; no LLM is loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

from llava_projectors import files, registry
from llava_projectors.commands.arguments import not_empty
from llava_projectors.commands.tower import LLAVA_15_TOWER, builder_of, llava_15_config, refuse_lost_folder
from llava_projectors.integration import record, weights
from llava_projectors.integration.tower import depth_and_choice, resolve_layers
from llava_projectors.projectors.base import Projector
from llava_projectors.spec import ProjectorSpecError, format_value

DESCRIPTION = (
    "Reads configs and the headers of weights only, so it takes seconds. A type string by itself is judged on "
    f"LLaVA-1.5's vision tower, {LLAVA_15_TOWER}. Exit status 0: all fits; 1: something does not fit, cannot be read, "
    "or was not checked, with the reason."
)
VICUNA_WIDTH = 4096  # where nothing gives another
NOT_CHECKED = "not checked: "
# Channels of a hidden state and width of the LLM; None where nothing gives one.
Sizes = tuple[Optional[int], Optional[int]]


def check(
    type_string: Optional[str],
    model_path: Optional[str] = None,
    vision_tower: Optional[str] = None,
    adapter: Optional[str] = None,
    select_layer: Optional[int] = None,
) -> list[str]:
    """Check what a training or serving command would meet.

    Args:
        type_string: a type; None takes the checkpoint's own.
        model_path: folder of a LLaVA checkpoint, whole, LoRA or projector alone.
        vision_tower: folder or hub name of a CLIP or SigLIP model; default as the config.json of the checkpoint, or
            beside the adapter, says.
        adapter: an `mm_projector.bin`.
        select_layer: LLaVA's `mm_vision_select_layer`; default as in that config.json, else -2.

    Returns:
        what was found right, in lines; one that begins with `NOT_CHECKED` says what was not looked at.

    Raises:
        ProjectorSpecError: the type, its options, or its layers on this tower.
        ProjectorWeightsError: the weights.

    Example:
        >>> for line in check("saep:stride=3"):
        ...     print(line)
        type: saep:stride=3
        tower: none given; on LLaVA-1.5's 24x24 -> 8x8, 576 -> 64 visual tokens, hidden states 12+23
    """
    config = {} if model_path is None else files.read_config(model_path)
    named: Any = config.get("mm_projector_type") if type_string is None else type_string
    resolved = _resolve(named, config)
    source = model_path or adapter
    trained = config if model_path or adapter is None else weights.read_config_beside(adapter)
    tower = _recorded_tower(trained, source) if vision_tower is None else vision_tower
    vision = None if tower is None else _vision_config(tower)
    select_layer = _recorded_layer(trained, source) if select_layer is None else select_layer
    seen = _on_tower(resolved, tower, vision, select_layer, source)
    sizes = config.get("mm_hidden_size") or getattr(vision, "hidden_size", None), config.get("hidden_size")
    _build(resolved, *sizes)  # its options are checked where it is built
    fits = [] if model_path is None else [_checkpoint_fits(resolved, sizes, model_path)]
    if adapter is not None:
        fits += _adapter_fits(resolved, sizes, adapter, vision, select_layer)
    return [f"type: {registry.normalize(named)}", *seen, *fits]


def _resolve(type_string: Any, config: Mapping[str, Any]) -> registry.ResolvedSpec:
    if not registry.is_registered(type_string):
        raise registry.unknown_type(type_string)
    return registry.resolve(type_string, SimpleNamespace(**config))


def _recorded_tower(trained: Mapping[str, Any], source: Optional[str]) -> Optional[str]:
    """What the config.json of a training names, if there is one; an error where its path does not hold here."""
    tower = trained.get("mm_vision_tower")
    if tower is None or source is None:
        return None
    if not isinstance(tower, str):
        raise ProjectorSpecError(f"{source} has mm_vision_tower {tower!r} in its config.json, which names no tower")
    refuse_lost_folder(tower, source)
    return tower


def _recorded_layer(trained: Mapping[str, Any], source: Optional[str]) -> int:
    layer = trained.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise ProjectorSpecError(
            f"{source} has mm_vision_select_layer {layer!r} in its config.json, which is no number"
        )
    return layer


def _on_tower(
    resolved: registry.ResolvedSpec, tower: Optional[str], vision: Any, select_layer: int, source: Optional[str]
) -> list[str]:
    """Lines about grid and layers.

    Args:
        resolved: the type.
        tower: folder or hub name, or None.
        vision: its config.
        select_layer: LLaVA's `mm_vision_select_layer`.
        source: where weights are from, if there are some: they may be of another tower than LLaVA-1.5's.

    Raises:
        ProjectorSpecError: the layers do not exist, or the stride is larger than the grid.
    """
    if tower is not None:
        seen = _grid_and_layers(resolved, vision, select_layer)
        return [f"tower: {tower}, {seen}", f"tower's builder: {builder_of(tower, vision.model_type)}"]
    if source is not None:
        return [f"{NOT_CHECKED}layers and patch grid, for want of a vision tower (--vision-tower)"]
    try:
        seen = _grid_and_layers(resolved, llava_15_config(), select_layer)
    except ProjectorSpecError as error:
        raise ProjectorSpecError(f"{error} (LLaVA-1.5's, {LLAVA_15_TOWER}; --vision-tower names another)") from error
    return [f"tower: none given; on LLaVA-1.5's {seen}"]


def _grid_and_layers(resolved: registry.ResolvedSpec, vision: Any, select_layer: int) -> str:
    """`24x24 -> 12x12, 576 -> 144 visual tokens, hidden states 12+23`; errors as `_on_tower`."""
    layers = _layers(resolved, vision, select_layer)
    side = vision.image_size // vision.patch_size
    after = resolved.output_side(side)
    return (
        f"{side}x{side} -> {after}x{after}, {side**2} -> {after**2} visual tokens, hidden states {format_value(layers)}"
    )


def _layers(resolved: registry.ResolvedSpec, vision: Any, select_layer: int) -> tuple[int, ...]:
    return resolve_layers(resolved, *depth_and_choice(vision.model_type, vision.num_hidden_layers, select_layer))


def _vision_config(tower: str) -> Any:
    if tower == LLAVA_15_TOWER and not Path(tower).exists():
        return llava_15_config()  # without a network, too

    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(tower)
    except (AttributeError, OSError, TypeError, ValueError) as error:  # also of a config.json that holds no object
        first_line = str(error).split("\n")[0]
        raise ProjectorSpecError(f"cannot read the config of the vision tower {tower}: {first_line}") from error
    config = getattr(config, "vision_config", config)
    if not all(hasattr(config, name) for name in ("num_hidden_layers", "image_size", "patch_size")):
        raise ProjectorSpecError(f"the vision tower {tower} is a {config.model_type!r}, no ViT of layers and patches")
    return config


def _checkpoint_fits(resolved: registry.ResolvedSpec, sizes: Sizes, model_path: str) -> str:
    """A line; errors as `_compare`."""
    _compare(resolved, sizes, model_path, weights.find_in_folder(model_path))
    return f"checkpoint: {model_path}, every weight of the projector is there"


def _adapter_fits(
    resolved: registry.ResolvedSpec, sizes: Sizes, adapter: str, vision: Any, select_layer: int
) -> Iterator[str]:
    """Lines; raises where options or layers are others than its training's, which fit the weights all the same."""
    projector = _compare(resolved, sizes, adapter, weights.read_adapter(adapter))
    yield f"adapter: {adapter}, fits, and all its numbers are finite"
    if vision is None:
        return
    beside = weights.read_config_beside(adapter)
    different = record.differences(adapter, projector, resolved.options, _layers(resolved, vision, select_layer))
    if beside and different:
        raise files.ProjectorWeightsError(f"{adapter} {different}")
    if registry.OPTIONS_SETTING in beside:
        yield "adapter's training: the same options and layers"
    else:
        yield f"{NOT_CHECKED}what {adapter} was trained for: no config.json beside it records its options and layers"


def _compare(resolved: registry.ResolvedSpec, given: Sizes, source: str, found: weights.Found) -> Projector:
    """The projector of these weights; raises unless they are those of the type.

    Sizes that no config gives are taken from the weights.
    """
    sizes = given if all(given) else weights.sizes_of(resolved, found.shapes, *given)
    projector = _build(resolved, *(sizes or given))
    expected = weights.expected_shapes(projector)
    wrong = weights.problems(expected if sizes else dict.fromkeys(expected, ()), found.shapes)
    if wrong:
        cause = weights.likely_cause(projector, found.shapes, found.keys)
    elif sizes is None:
        wrong = "no vision tower and LLM give weights of these shapes"
        cause = "They were trained with other options: pass the type string of their training."
    else:
        return projector
    raise files.ProjectorWeightsError(f"{source} does not fit {resolved.type_string}: {wrong}. {cause}")


def _build(resolved: registry.ResolvedSpec, channels: Optional[int], width: Optional[int]) -> Projector:
    """The projector without storage; sizes that are not known are LLaVA-1.5's."""
    try:
        return resolved.build_empty(channels or llava_15_config().hidden_size, width or VICUNA_WIDTH)
    except (RuntimeError, TypeError) as error:  # torch's, of sizes that no memory holds
        raise ProjectorSpecError(
            f"projector type {resolved.type_string!r} cannot be built: {str(error).splitlines()[0]}"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors check`."""
    parser.add_argument(
        "type", nargs="?", type=not_empty, metavar="TYPE", help="a type string (default: the checkpoint's)"
    )
    parser.add_argument("--model-path", type=not_empty, help="folder of a LLaVA checkpoint")
    parser.add_argument(
        "--vision-tower", type=not_empty, help="its folder or hub name (default: the checkpoint's or adapter's)"
    )
    parser.add_argument("--select-layer", type=int, help="LLaVA's --mm_vision_select_layer (theirs, or -2)")
    parser.add_argument("--adapter", type=not_empty, help="an mm_projector.bin, for --pretrain_mm_mlp_adapter")


def run(arguments: argparse.Namespace) -> int:
    """Print what fits; status 1 with the reason when something does not, or was not checked."""
    if arguments.type is None and arguments.model_path is None:
        print("nothing to check: give a TYPE, or --model-path", file=sys.stderr)
        return 1
    try:
        lines = check(
            arguments.type,
            model_path=arguments.model_path,
            vision_tower=arguments.vision_tower,
            adapter=arguments.adapter,
            select_layer=arguments.select_layer,
        )
    except (OSError, ValueError) as error:
        is_unread = str(error).startswith("cannot read")  # so nothing is known of whether it fits
        print(error if is_unread else f"does not fit: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return int(any(line.startswith(NOT_CHECKED) for line in lines))
