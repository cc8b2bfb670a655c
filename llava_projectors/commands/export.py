"""What the command `llava-projectors export` does, and prints."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional

from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.tensors import Output
from llava_projectors.export.verify import LOOSE, TOLERANCE, verify

DESCRIPTION = (
    "Reads a LLaVA checkpoint with one of our projectors tensor by tensor, whole, projector-only or LoRA (merged), and "
    "writes a folder that AutoModelForImageTextToText and vLLM load, with the projector's code in it."
)


def export(
    checkpoint: str,
    output: Path,
    base: Optional[str],
    dtype: Optional[str],
    conversation: Optional[str],
    with_verification: bool,
    python: Optional[str],
) -> int:
    """Export, say what was written, verify if asked to; returns the exit status.

    Raises:
        ValueError: the checkpoint cannot be exported, or the folder cannot be compared; says why.
    """
    if with_verification and importlib.util.find_spec("llava") is None:
        raise ExportError("--verify compares with LLaVA, which is not installed here: export in LLaVA's environment")
    done = export_checkpoint(checkpoint, output, base, dtype, conversation, progress_bar)
    before = done.patches_per_side**2
    print(f"{done.resolved.type_string}: {before} -> {done.tokens} visual tokens, written to {output}")
    print(f"Its README.md says how to load and serve it, with transformers and vLLM: {output / 'README.md'}")
    if not with_verification:
        return 0
    largest = verify(output, checkpoint, base, python)
    # LLaVA's loader makes every weight float16.
    tolerance = TOLERANCE if done.dtype == "float16" and base is None else LOOSE
    print("equal" if largest <= tolerance else f"NOT equal: more than {tolerance:.0e}")
    return 0 if largest <= tolerance else 1


def progress_bar(outputs: Sequence[Output]) -> Iterable[Output]:
    """A bar on stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return outputs
    return tqdm(outputs, desc="export", unit="tensor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub name of the LLaVA checkpoint")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to make; must not exist")
    parser.add_argument("--model-base", help="its base model, for projector-only and LoRA checkpoints")
    parser.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="of the weights (default: as they are stored)"
    )
    parser.add_argument(
        "--conv-mode",
        choices=["vicuna_v1", "llava_v1", "mistral_instruct"],
        help="conversation of the chat template (default: vicuna_v1, which --version v1 trains; for Mistral "
        "mistral_instruct)",
    )
    parser.add_argument("--verify", action="store_true", help="compare with LLaVA's own answers; needs LLaVA")
    parser.add_argument(
        "--verify-python",
        metavar="PYTHON",
        help="interpreter with current transformers to compare in (default: this stack, from the folder's weights)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Export a checkpoint; status 1 with the reason when it cannot be, or is not what LLaVA says."""
    try:
        return export(
            arguments.checkpoint,
            arguments.output,
            arguments.model_base,
            arguments.dtype,
            arguments.conv_mode,
            arguments.verify or arguments.verify_python is not None,
            arguments.verify_python,
        )
    except ValueError as error:
        print(f"cannot export {arguments.checkpoint}: {error}", file=sys.stderr)
        return 1
