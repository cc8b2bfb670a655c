"""What the command `llava-projectors export` does, and prints."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_projectors.commands.arguments import not_empty
from llava_projectors.export.convert import Export, export_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.folders import left_behind
from llava_projectors.export.start import start
from llava_projectors.export.templates import TEMPLATES
from llava_projectors.export.tensors import Output
from llava_projectors.export.verify import verify
from llava_projectors.files import read_json

DESCRIPTION = (
    "Reads a LLaVA checkpoint with one of our projectors tensor by tensor, whole, projector-only or LoRA (merged), and "
    "writes a folder that AutoModelForImageTextToText and vLLM load, with the projector's code in it."
)


def export(arguments: argparse.Namespace) -> int:
    """Export, say what was written, verify if asked to; returns the exit status.

    Raises:
        ValueError: the checkpoint cannot be exported; says why.
    """
    with_verification = arguments.verify or arguments.verify_python is not None
    if with_verification and not _can_import(arguments.package):
        raise ExportError(
            f"--verify compares with LLaVA, and {arguments.package} is not installed here: export in the environment "
            "that trained, or pass --package"
        )
    for folder in left_behind(arguments.output):
        print(f"{folder} is of an export that was killed, or that still runs: if none does, remove it", file=sys.stderr)
    if arguments.new_projector:
        _refuse_others(arguments)
        start(arguments.checkpoint, arguments.output, arguments.new_projector, progress=progress_bar)
        print(f"{arguments.new_projector}: a new projector, to be trained in {arguments.output}")
        return 0
    done = export_checkpoint(
        arguments.checkpoint,
        arguments.output,
        arguments.model_base,
        arguments.dtype,
        arguments.conv_mode,
        progress_bar,
        vision_tower=arguments.vision_tower,
        chat_template=arguments.chat_template,
    )
    _report(done, arguments)
    return _verified(arguments) if with_verification else 0


def _report(done: Export, arguments: argparse.Namespace) -> None:
    """What was written, and what of it a user may have to know."""
    output = arguments.output
    before = done.tower.patch_side**2
    print(f"{done.resolved.type_string}: {before} -> {done.tokens} visual tokens, written to {output}")
    if not (arguments.conv_mode or arguments.chat_template):
        print(
            f"Its chat template is {done.conversation}, chosen by LLM and tokenizer: a checkpoint does not "
            "say in which it was trained (--version). --conv-mode and --chat-template take another"
        )
    print(f"Its README.md says how to load and serve it, with transformers and vLLM: {output / 'README.md'}")
    if (penalty := read_json(output / "generation_config.json").get("repetition_penalty", 1.0)) != 1.0:
        print(
            f"repetition_penalty {penalty} of its generation_config.json acts on the answer alone in transformers, as "
            "in LLaVA; vLLM applies it to the prompt too",
            file=sys.stderr,
        )


def _verified(arguments: argparse.Namespace) -> int:
    """Compare the folder with LLaVA and say the result; returns the exit status."""
    checkpoint, output = arguments.checkpoint, arguments.output
    try:
        differences = verify(output, checkpoint, arguments.model_base, arguments.verify_python, arguments.package)
    except ValueError as error:
        print(f"{output} is written, and was not compared: {error}", file=sys.stderr)
        return 1
    print("NOT equal: " + "; ".join(differences) if differences else "equal")
    return 1 if differences else 0


def _refuse_others(arguments: argparse.Namespace) -> None:
    """Raise for options that `--new-projector` would not obey."""
    names = ("verify", "verify_python", "dtype", "model_base", "vision_tower", "conv_mode", "chat_template")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    if given:
        raise ExportError(f"--new-projector copies the model as it is: leave out {', '.join(given)}")


def _can_import(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent
        return False


def progress_bar(outputs: Sequence[Output]) -> Iterable[Output]:
    """A bar on stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return outputs
    return tqdm(outputs, desc="export", unit="tensor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors export`."""
    parser.add_argument(
        "checkpoint", type=not_empty, metavar="CHECKPOINT", help="folder or hub name of the LLaVA checkpoint"
    )
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to make; must not exist")
    parser.add_argument(
        "--new-projector",
        type=not_empty,
        metavar="TYPE",
        help="CHECKPOINT is one of transformers' LLaVA (llava-hf/llava-1.5-7b-hf): give it a new projector, to be "
        "trained there",
    )
    parser.add_argument(
        "--vision-tower", type=not_empty, help="where its vision tower is now (default: mm_vision_tower)"
    )
    parser.add_argument("--model-base", type=not_empty, help="its base model, for projector-only and LoRA checkpoints")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="of the weights (default: as they are stored)"
    )
    conversation = parser.add_mutually_exclusive_group()
    conversation.add_argument(
        "--conv-mode",
        choices=list(TEMPLATES),
        help="conversation of the chat template (default: vicuna_v1, which --version v1 trains; by LLM and tokenizer "
        "mistral_instruct, qwen_1_5, llava_llama_3 or llava_phi_3)",
    )
    conversation.add_argument("--chat-template", type=Path, metavar="FILE", help="another, in Jinja")
    parser.add_argument("--verify", action="store_true", help="compare with LLaVA's own answers; needs LLaVA")
    parser.add_argument(
        "--verify-python",
        type=not_empty,
        metavar="PYTHON",
        help="interpreter with current transformers to compare in (default: this stack, from the folder's weights)",
    )
    parser.add_argument(
        "--package", type=not_empty, default="llava", help="what LLaVA, or the fork, is imported as (default: llava)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export a checkpoint; status 1 with the reason when it cannot be, or is not what LLaVA says."""
    try:
        return export(arguments)
    except ValueError as error:
        print(f"cannot export {arguments.checkpoint}: {error}", file=sys.stderr)
        return 1
