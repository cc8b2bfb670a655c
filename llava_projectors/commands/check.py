"""What `llava-projectors check` looks at: a type string, a vision tower, weights; no LLM is loaded."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace
from typing import Any, Optional

from llava_projectors import files, registry
from llava_projectors.commands.tower import builder_of
from llava_projectors.integration import weights
from llava_projectors.integration.tower import depth_and_choice, resolve_layers
from llava_projectors.projectors.base import Projector
from llava_projectors.spec import ProjectorSpecError, format_value

DESCRIPTION = (
    "Reads configs and the headers of weights only, so it takes seconds. "
    "Exit status 0: nothing that was checked is wrong, and what was not checked is named; 1: something does not fit or "
    "cannot be read, with the reason."
)
# Options are checked with these sizes where nothing gives others.
CLIP_CHANNELS, VICUNA_WIDTH = 1024, 4096


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
        model_path: folder of a LLaVA checkpoint, whole, LoRA or projector alone; of it, the config and the
            headers of the weights are read.
        vision_tower: folder or hub name of a CLIP or SigLIP model; of it, the config is read.
        adapter: an `mm_projector.bin`.
        select_layer: LLaVA's `mm_vision_select_layer`; default the checkpoint's, else -2. LLaVA-NeXT's SigLIP has
            no choice.

    Returns:
        what was found right, in lines.

    Raises:
        ProjectorSpecError: the type, its options, or its layers on this tower.
        ProjectorWeightsError: the weights.

    Example:
        >>> for line in check("saep:stride=3"):
        ...     print(line)
        type: saep:stride=3
        not checked: layers and patch grid, for want of a vision tower (--vision-tower)
    """
    config = SimpleNamespace() if model_path is None else SimpleNamespace(**files.read_config(model_path))
    type_string = type_string or getattr(config, "mm_projector_type", None)
    if not registry.is_registered(type_string):
        raise registry.unknown_type(type_string)
    resolved = registry.resolve(type_string, config)
    lines = [f"type: {registry.normalize(type_string)}"]

    tower = vision_tower or getattr(config, "mm_vision_tower", None)
    vision = None if tower is None else _vision_config(tower)
    if vision is not None:
        chosen = getattr(config, "mm_vision_select_layer", -2) if select_layer is None else select_layer
        layers = resolve_layers(resolved, *depth_and_choice(vision.model_type, vision.num_hidden_layers, chosen))
        side = vision.image_size // vision.patch_size
        after = resolved.output_side(side)
        lines.append(
            f"tower: {tower}, {side}x{side} -> {after}x{after}, {side**2} -> {after**2} visual tokens, "
            f"hidden states {format_value(layers)}"
        )
        lines.append(f"tower's builder: {builder_of(str(tower), vision.model_type)}")
    else:
        lines.append("not checked: layers and patch grid, for want of a vision tower (--vision-tower)")
    channels = getattr(config, "mm_hidden_size", None) or getattr(vision, "hidden_size", None)
    width = getattr(config, "hidden_size", None)
    _build(resolved, channels or CLIP_CHANNELS, width or VICUNA_WIDTH)  # its options are checked where it is built
    if model_path is not None:
        _compare(resolved, channels, width, model_path, weights.find_in_folder(model_path))
        lines.append(f"checkpoint: {model_path}, every weight of the projector is there")
    if adapter is not None:
        _compare(resolved, channels, width, adapter, weights.read_adapter(adapter))
        lines.append(f"adapter: {adapter}, fits, and all its numbers are finite")
    return lines


def _vision_config(tower: str) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        first_line = str(error).split("\n")[0]
        raise ProjectorSpecError(f"cannot read the config of the vision tower {tower}: {first_line}") from error
    config = getattr(config, "vision_config", config)
    if not all(hasattr(config, name) for name in ("num_hidden_layers", "image_size", "patch_size")):
        raise ProjectorSpecError(f"the vision tower {tower} is a {config.model_type!r}, no ViT of layers and patches")
    return config


def _compare(
    resolved: registry.ResolvedSpec, channels: Optional[int], width: Optional[int], source: str, found: weights.Found
) -> None:
    """Raise unless the weights are those of the type; sizes that no config gives are taken from the weights."""
    sizes = (channels, width) if channels and width else weights.sizes_of(resolved, found.shapes, channels, width)
    projector = _build(resolved, *(sizes or (channels or CLIP_CHANNELS, width or VICUNA_WIDTH)))
    expected = weights.expected_shapes(projector)
    wrong = weights.problems(expected if sizes else dict.fromkeys(expected, ()), found.shapes)
    if wrong:
        cause = weights.likely_cause(projector, found.shapes, found.keys)
    elif sizes is None:
        wrong = "no vision tower and LLM give weights of these shapes"
        cause = "They were trained with other options: pass the type string of their training."
    else:
        return
    raise files.ProjectorWeightsError(f"{source} does not fit {resolved.type_string}: {wrong}. {cause}")


def _build(resolved: registry.ResolvedSpec, channels: int, width: int) -> Projector:
    """The projector without storage."""
    try:
        return resolved.build_empty(channels, width)
    except (RuntimeError, TypeError) as error:  # torch's, of sizes that no memory holds
        raise ProjectorSpecError(
            f"projector type {resolved.type_string!r} cannot be built: {str(error).splitlines()[0]}"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors check`."""
    parser.add_argument("type", nargs="?", metavar="TYPE", help="a type string (default: the checkpoint's)")
    parser.add_argument("--model-path", help="folder of a LLaVA checkpoint")
    parser.add_argument("--vision-tower", help="folder or hub name of the vision tower (default: the checkpoint's)")
    parser.add_argument("--select-layer", type=int, help="LLaVA's --mm_vision_select_layer (checkpoint's, or -2)")
    parser.add_argument("--adapter", help="an mm_projector.bin, for --pretrain_mm_mlp_adapter")


def run(arguments: argparse.Namespace) -> int:
    """Print what fits; status 1 with the reason when something does not."""
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
        print(f"does not fit: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
