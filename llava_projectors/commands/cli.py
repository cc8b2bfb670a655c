"""The command `llava-projectors`."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional

import llava_projectors
from llava_projectors import autoload


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llava-projectors",
        description="Visual projectors that give LLaVA fewer visual tokens, without touching its code.",
    )
    parser.add_argument("--version", action="version", version=f"llava-projectors {llava_projectors.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="projector types, their options and token counts")
    listing.add_argument(
        "--image",
        type=picture_size,
        metavar="WIDTHxHEIGHT",
        help="grid and visual tokens of such a picture with --image_aspect_ratio slice, instead of the options",
    )
    listing.add_argument("--json", action="store_true", help="machine-readable output")
    listing.set_defaults(run=list_types)

    doctor = commands.add_parser(
        "doctor",
        help="try LLaVA, or a fork, with our types on a tiny model; exit status 0 only when they work",
        description="Checks the start-up hook, the versions around and every place that is patched, then builds a tiny "
        "random model of each LLM class of the package, by the package's own code, and counts the visual tokens that "
        "reach the LLM. Verdicts: works; cannot work, with the reason; not checked, with the reason. "
        "Exit status 0: everything works; 1: not.",
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    doctor.add_argument(
        "--package",
        action="append",
        metavar="NAME",
        help="a package to check, may be repeated (default: llava, and those in LLAVA_PROJECTORS_PACKAGES)",
    )
    doctor.add_argument("--type", default="saep", help="the type string to try (%(default)s)")
    doctor.add_argument(
        "--argument",
        action="append",
        default=[],
        type=setting,
        metavar="NAME=VALUE",
        help="a setting of your training command, without the dashes, may be repeated",
    )
    doctor.set_defaults(run=run_doctor)

    check = commands.add_parser(
        "check",
        help="check a type string, its layers on a tower, and weights, without loading an LLM",
        description="Reads configs and the headers of weights only, so it takes seconds. "
        "Exit status 0: all fits; 1: not, with the reason.",
    )
    check.add_argument("type", nargs="?", metavar="TYPE", help="a type string (default: the checkpoint's)")
    check.add_argument("--model-path", help="folder of a LLaVA checkpoint")
    check.add_argument("--vision-tower", help="folder or hub name of the vision tower (default: the checkpoint's)")
    check.add_argument("--select-layer", type=int, help="LLaVA's --mm_vision_select_layer (checkpoint's, or -2)")
    check.add_argument("--adapter", help="an mm_projector.bin, for --pretrain_mm_mlp_adapter")
    check.set_defaults(run=run_check)

    demo = commands.add_parser(
        "demo",
        help="train and ask tiny LLaVAs with each projector, by LLaVA's own scripts (some minutes on 2 cores)",
        description="Makes tiny checkpoints and data offline, runs LLaVA's own pretraining and fine-tuning on each "
        "type, loads the checkpoints with LLaVA's own loader, asks a question, and prints one table. "
        "Needs LLaVA and the extra llava-projectors[demo]. Uses CUDA when there is one.",
    )
    demo.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder for checkpoints and logs (%(default)s)"
    )
    demo.add_argument("--steps", type=at_least(1), default=80, help="fine-tuning steps of each type (%(default)s)")
    demo.set_defaults(run=run_demo)

    show = commands.add_parser(
        "show",
        help="draw over a picture, or on a page, what each visual token was made from",
        description="Writes a PNG: the picture as the model receives it, with its patch grid, and for six visual "
        "tokens, or those of --token, the patches that went into them: TokenPacker's attention weights, the effective "
        "receptive field of other types. With --html, or an --output that ends in .html, writes a page in one file "
        "instead: pointing at a token shows its patches, pointing at a patch the tokens that take it. "
        "Needs the extra llava-projectors[viz]; with --model-path also LLaVA.",
    )
    show.add_argument("image", type=Path, metavar="IMAGE", help="picture of any size and kind")
    weights_of = show.add_mutually_exclusive_group()
    weights_of.add_argument(
        "--type", help="a type string, with random weights (saep); the picture is cropped to its central square"
    )
    weights_of.add_argument(
        "--model-path",
        help="a trained LLaVA checkpoint with one of our projectors; the picture is padded or cropped as it says",
    )
    show.add_argument("--model-base", help="its base model, for projector-only and LoRA checkpoints")
    show.add_argument(
        "--tiles",
        type=int,
        choices=(9, 16, 25),
        help="cut the picture into at most so many tiles (default: as the checkpoint does; else one square)",
    )
    show.add_argument("--token", type=int, action="append", default=[], help="a visual token to draw, may be repeated")
    show.add_argument("--html", action="store_true", help="write a page with every token")
    show.add_argument("--output", type=Path, help="file to write (tokens.png; with --html tokens.html)")
    show.set_defaults(run=run_show)

    export = commands.add_parser(
        "export",
        help="write a trained checkpoint as a folder for current transformers and vLLM",
        description="Reads a LLaVA checkpoint with one of our projectors tensor by tensor, whole, projector-only or "
        "LoRA (merged), and writes a folder that AutoModelForImageTextToText and vLLM load, with the projector's code "
        "in it. Needs the extra llava-projectors[export].",
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or hub name of the LLaVA checkpoint")
    export.add_argument("output", type=Path, metavar="OUTPUT", help="folder to make; must not exist")
    export.add_argument("--model-base", help="its base model, for projector-only and LoRA checkpoints")
    export.add_argument(
        "--dtype", choices=["float16", "bfloat16", "float32"], help="of the weights (default: as they are stored)"
    )
    export.add_argument(
        "--conv-mode",
        choices=["vicuna_v1", "llava_v1", "mistral_instruct"],
        help="conversation of the chat template (default: vicuna_v1, which --version v1 trains; for Mistral "
        "mistral_instruct)",
    )
    export.add_argument("--verify", action="store_true", help="compare with LLaVA's own answers; needs LLaVA")
    export.add_argument(
        "--verify-python",
        metavar="PYTHON",
        help="interpreter with current transformers to compare in (default: this stack, from the folder's weights)",
    )
    export.set_defaults(run=run_export)

    planned = commands.add_parser(
        "plan",
        help="memory, batch and traffic of training on N GPUs, against LLaVA's 576 tokens",
        description="Counts what a training step of CLIP-L and an LLM takes on each GPU with DeepSpeed's ZeRO in "
        "bfloat16, how many sequences fit, and what is sent. Counted, not measured.",
    )
    planned.add_argument("--type", action="append", help="a type string, may be repeated (saep and tokenpacker)")
    planned.add_argument("--llm", choices=["7b", "13b", "mistral-7b"], default="7b", help="(%(default)s)")
    planned.add_argument("--gpus", type=at_least(1), default=8, help="over all nodes (%(default)s)")
    planned.add_argument("--memory", type=positive, default=80, help="of one GPU, in 10**9 bytes (%(default)s)")
    planned.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=3, help="stage of ZeRO (%(default)s)")
    planned.add_argument("--text", type=at_least(0), default=100, help="text tokens of a sequence (%(default)s)")
    planned.add_argument(
        "--stage", type=int, choices=[1, 2], default=2, help="1 trains the projector only (%(default)s)"
    )
    planned.add_argument("--no-checkpointing", action="store_true", help="without --gradient_checkpointing")
    planned.set_defaults(run=run_plan)

    parsed = parser.parse_args(arguments)
    try:
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"\n{parsed.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return 141


def setting(text: str) -> tuple[str, str]:
    """`NAME=VALUE` -> both, the name without dashes before it."""
    name, equals, value = text.lstrip("-").partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def list_types(arguments: argparse.Namespace) -> int:
    """Print every registered type, or what becomes of a picture with each."""
    from llava_projectors.commands.listing import (  # imports torch, which `--help` need not wait for
        print_image,
        print_types,
    )

    if arguments.image is None:
        print_types(arguments.json)
    else:
        width, height = arguments.image
        print_image(width, height, arguments.json)
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """A reader of whole numbers for argparse."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least}")
        return int(text)

    return read


def positive(text: str) -> float:
    """A reader of numbers above zero for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def picture_size(text: str) -> tuple[int, int]:
    """`1920x1080` -> (1920, 1080)."""
    width, _, height = text.lower().partition("x")
    if not all(side.isdecimal() and 0 < int(side) < 2**31 for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels like 1920x1080")
    return int(width), int(height)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; status 1 unless everything works."""
    try:
        import torch  # noqa: F401
    except Exception as error:
        print(f"torch cannot be imported: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"remedy: reinstall it, {sys.executable} -m pip install --force-reinstall torch", file=sys.stderr)
        return 1
    from llava_projectors.commands.doctor import diagnose, print_diagnosis
    from llava_projectors.commands.trial import WORKS

    logging.disable(logging.INFO)  # DeepSpeed reports its accelerator on import
    packages = arguments.package or list(autoload.armed_packages()) or ["llava"]
    diagnosis = diagnose(packages, arguments.type, dict(arguments.argument))
    print_diagnosis(diagnosis, arguments.json)
    return 0 if diagnosis.verdict == WORKS else 1


def run_check(arguments: argparse.Namespace) -> int:
    """Print what fits; status 1 with the reason when something does not."""
    from llava_projectors.commands.check import check

    if arguments.type is None and arguments.model_path is None:
        print("nothing to check: give a TYPE, or --model-path", file=sys.stderr)
        return 1
    try:
        lines = check(
            arguments.type, arguments.model_path, arguments.vision_tower, arguments.adapter, arguments.select_layer
        )
    except ImportError as error:
        return lacks_package("the check", "viz", error)
    except (OSError, ValueError) as error:
        print(f"does not fit: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo, or say what to install for it."""
    try:
        from llava_projectors.commands.demo import demo
        from llava_projectors.tiny.assets import photographs

        photographs()
    except ImportError as error:
        return lacks_package("the demo", "demo", error)
    return demo(arguments.output, arguments.steps)


def run_show(arguments: argparse.Namespace) -> int:
    """Draw the maps of visual tokens; status 1 with the reason when they cannot be."""
    ending = ".html" if arguments.html else ".png"
    output = arguments.output or Path("tokens")
    target = output if output.suffix or output.is_dir() else output.with_name(output.name + ending)
    if arguments.html and target.suffix.lower() not in ("", ending):
        print(f"cannot show {arguments.image}: --html writes a page, and --output {target} is none", file=sys.stderr)
        return 1
    if arguments.model_base is not None and arguments.model_path is None:
        print(f"cannot show {arguments.image}: --model-base belongs to a --model-path", file=sys.stderr)
        return 1
    try:
        from llava_projectors.commands.show import show

        title = show(
            arguments.image,
            target,
            arguments.type,
            arguments.model_path,
            arguments.model_base,
            arguments.token,
            arguments.tiles,
        )
    except ImportError as error:
        return lacks_package("the picture", "viz", error)
    except (OSError, ValueError) as error:
        print(f"cannot show {arguments.image}: {first_line(error)}", file=sys.stderr)
        return 1
    print(title)
    print(f"Written to {target.resolve()}")
    return 0


def first_line(error: Exception) -> str:
    """Of an error's message, which transformers makes several lines long."""
    return str(error).strip().split("\n")[0]


def run_plan(arguments: argparse.Namespace) -> int:
    """Print the plan of LLaVA's own projector and of the types asked for."""
    from llava_projectors.commands.plan import LLMS, plan, print_plan
    from llava_projectors.spec import ProjectorSpecError

    try:
        plans = [
            plan(
                type_string,
                LLMS[arguments.llm],
                gpus=arguments.gpus,
                memory=int(arguments.memory * 1e9),
                zero=arguments.zero,
                text=arguments.text,
                train_llm=arguments.stage == 2,
                checkpointing=not arguments.no_checkpointing,
            )
            for type_string in ["mlp2x_gelu", *(arguments.type or ["saep", "tokenpacker"])]
        ]
    except ProjectorSpecError as error:
        print(error, file=sys.stderr)
        return 1
    print_plan(plans)
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Export a checkpoint; status 1 with the reason when it cannot be, or is not what LLaVA says."""
    try:
        from llava_projectors.commands.export import export
    except ImportError as error:
        return lacks_package("the export", "export", error)
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
    except ImportError as error:
        return lacks_package("the export", "export", error)
    except ValueError as error:
        print(f"cannot export {arguments.checkpoint}: {error}", file=sys.stderr)
        return 1


def lacks_package(what: str, extra: str, error: ImportError) -> int:
    """Say which package is missing and how to get it; returns the exit status."""
    print(f"{what} lacks a package: {error}", file=sys.stderr)
    print(
        f"remedy: pip install 'llava-projectors[{extra}]' and LLaVA itself (or `make demo` in a checkout, "
        "which makes an environment of its own)",
        file=sys.stderr,
    )
    return 1
