"""The command `llava-projectors`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from llava_projectors import autoload
from llava_projectors.columns import print_columns

INDENT = "    "


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llava-projectors",
        description="Visual projectors that give LLaVA fewer visual tokens, without touching its code.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="projector types, their options and token counts")
    listing.add_argument("--json", action="store_true", help="machine-readable output")
    listing.set_defaults(run=list_types)

    doctor = commands.add_parser(
        "doctor",
        help="check that LLaVA is there and patched; exit status 1 with a remedy when not",
        description="Checks the start-up hook, LLaVA (or a fork), every place that is patched in it, and the "
        "versions of the libraries around. Exit status 0: all is well; 1: not, with a remedy for each problem.",
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable output")
    doctor.add_argument(
        "--package",
        action="append",
        metavar="NAME",
        help="a package to check, may be repeated (default: llava, and those in LLAVA_PROJECTORS_PACKAGES)",
    )
    doctor.set_defaults(run=run_doctor)

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
    demo.add_argument("--steps", type=int, default=80, help="fine-tuning steps of each type (%(default)s)")
    demo.set_defaults(run=run_demo)

    bench = commands.add_parser(
        "bench",
        help="time and memory of projectors, tower and whole models, against LLaVA's own and the FLOP bound",
        description="Interleaves the candidates in one run, writes one CSV with machine and versions, prints a table "
        "of each suite and the project's bars. Models have random weights; nothing is downloaded. On a CPU a full run "
        "takes 25 to 45 minutes on 2 cores (an LLM of 0.3 B); on CUDA it is sized for under ten minutes (the shape "
        "of LLaVA-7B, whose full training step wants some 90 GiB; what does not fit is left out and named). "
        "Needs LLaVA and the extra llava-projectors[bench].",
    )
    bench.add_argument(
        "--suite",
        action="append",
        choices=["projector", "tower", "model", "scaling"],
        help="a suite to run, may be repeated (default: all)",
    )
    bench.add_argument("--quick", action="store_true", help="small sizes, about a minute on 2 cores")
    bench.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    bench.add_argument("--csv", type=Path, default=Path("runs/bench.csv"), help="where to write (%(default)s)")
    bench.set_defaults(run=run_bench)

    plot = commands.add_parser("plot", help="draw a CSV of `bench` as a PNG")
    plot.add_argument("csv", type=Path, nargs="?", default=Path("runs/bench.csv"), help="what to draw (%(default)s)")
    plot.add_argument("--output", type=Path, help="picture to write (default: beside the CSV, .png)")
    plot.set_defaults(run=run_plot)

    show = commands.add_parser(
        "show",
        help="draw over a picture what each visual token was made from",
        description="Writes a PNG: the picture with its patch grid and, for six visual tokens or those of --token, the "
        "patches that went into them: TokenPacker's attention weights, the effective receptive field of other types. "
        "Needs the extra llava-projectors[bench]; with --model-path also LLaVA.",
    )
    show.add_argument("image", type=Path, metavar="IMAGE", help="picture, cropped to its central square")
    weights_of = show.add_mutually_exclusive_group()
    weights_of.add_argument("--type", help="a type string, with random weights (saep)")
    weights_of.add_argument("--model-path", help="a LLaVA checkpoint with one of our projectors, trained")
    show.add_argument("--model-base", help="its base model, for projector-only and LoRA checkpoints")
    show.add_argument("--token", type=int, action="append", default=[], help="a visual token, may be repeated")
    show.add_argument("--output", type=Path, default=Path("tokens.png"), help="picture to write (%(default)s)")
    show.set_defaults(run=run_show)

    parsed = parser.parse_args(arguments)
    return int(parsed.run(parsed))


def list_types(arguments: argparse.Namespace) -> int:
    """Print every registered type."""
    types = [_describe_type(name) for name in _registry().list_projectors()]
    if arguments.json:
        print(json.dumps(types, indent=2))
        return 0
    print("Visual tokens of a 336 px image, 14 px patches (24x24 = 576 without reduction):\n")
    for entry in types:
        print(f"{entry['name']}: {entry['summary']}")
        rows = [(row["type"], f"{row['tokens']} tokens", f"{row['fewer']} % fewer") for row in entry["tokens"]]
        print_columns(rows, INDENT)
        print("  options (name:key=value,key=value; lists joined by +):")
        print_columns(
            [
                (option["name"], f"default {option['default']}", " | ".join(option["choices"]) or option["expects"])
                for option in entry["options"]
            ],
            INDENT,
        )
        print()
    return 0


def _registry() -> Any:
    from llava_projectors import registry  # imports torch, which `--help` need not wait for

    return registry


def _describe_type(name: str) -> dict[str, Any]:
    from llava_projectors.spec import format_value

    registry, side = _registry(), 336 // 14
    options = registry.projector_options(name)
    resolved = registry.resolve(name)
    key = resolved.cls.stride_option
    strides = options[key].choices if key in options else ()
    type_strings = [f"{name}:{key}={stride}" for stride in strides] or [name]
    counts = [(t, registry.resolve(t).output_side(side) ** 2) for t in type_strings]
    return {
        "name": name,
        "summary": (resolved.cls.__doc__ or "").strip().split("\n")[0],
        "tokens": [{"type": t, "tokens": n, "fewer": round(100 - 100 * n / side**2)} for t, n in counts],
        "options": [
            {
                "name": option.name,
                "default": "auto" if option.default is None else format_value(option.default),
                "choices": [format_value(choice) for choice in option.choices],
                "expects": option.expects,
            }
            for option in options.values()
        ],
    }


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; status 1 when a package cannot be patched."""
    disabled = autoload.is_disabled()
    packages = arguments.package or list(autoload.armed_packages()) or ["llava"]
    try:
        import torch  # noqa: F401
    except Exception as error:
        print(f"torch cannot be imported: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"remedy: reinstall it, {sys.executable} -m pip install --force-reinstall torch", file=sys.stderr)
        return 1
    from llava_projectors.integration.doctor import diagnose

    logging.disable(logging.INFO)  # DeepSpeed reports its accelerator on import
    shown_variable = f"{autoload.DISABLE_VARIABLE}={os.environ[autoload.DISABLE_VARIABLE]}" if disabled else None
    diagnosis = diagnose(packages, shown_variable)
    if arguments.json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
        return 0 if diagnosis.healthy else 1
    print(f"python        {diagnosis.python}")
    print(f"hook          {'armed' if diagnosis.armed else 'not armed'} in a fresh interpreter")
    for package in diagnosis.packages:
        print(f"{package.package:<14}{package.version or 'version unknown'}, {package.place or 'not found'}")
        print_columns([(seam.state, seam.seam, ", ".join(seam.where)) for seam in package.seams], INDENT)
    print("versions      " + ", ".join(f"{name} {version or '-'}" for name, version in diagnosis.versions.items()))
    for problem in [*diagnosis.problems, *(p for package in diagnosis.packages for p in package.problems)]:
        print(f"PROBLEM: {problem}")
    if diagnosis.healthy:
        print("All is well: pass --mm_projector_type saep (or tokenpacker) to LLaVA's scripts.")
    return 0 if diagnosis.healthy else 1


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo, or say what to install for it."""
    try:
        from llava_projectors.demo.run import demo
    except ImportError as error:
        return lacks_package("the demo", "demo", error)
    return demo(arguments.output, arguments.steps)


def run_bench(arguments: argparse.Namespace) -> int:
    """Run the benchmark suites, or say what to install for them."""
    try:
        from llava_projectors.benchmarks.run import bench, choose_device
        from llava_projectors.benchmarks.suites import SUITES
    except ImportError as error:
        return lacks_package("the benchmark", "bench", error)
    try:
        device = choose_device(arguments.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return bench(arguments.suite or list(SUITES), device, arguments.quick, arguments.csv)


def run_plot(arguments: argparse.Namespace) -> int:
    """Draw the CSV; status 1 with the reason when it cannot be."""
    try:
        from llava_projectors.benchmarks.plot import plot
    except ImportError as error:
        return lacks_package("the plot", "bench", error)
    target = arguments.output or arguments.csv.with_suffix(".png")
    try:
        plot(arguments.csv, target)
    except (OSError, ValueError) as error:
        print(f"cannot draw {arguments.csv}: {error}", file=sys.stderr)
        print("remedy: run `llava-projectors bench --quick`, then draw the CSV it names", file=sys.stderr)
        return 1
    print(f"Drawn to {target}")
    return 0


def run_show(arguments: argparse.Namespace) -> int:
    """Draw the maps of visual tokens; status 1 with the reason when they cannot be."""
    try:
        from llava_projectors.viz import show

        title = show(
            arguments.image,
            arguments.output,
            arguments.type,
            arguments.model_path,
            arguments.model_base,
            arguments.token,
        )
    except ImportError as error:
        return lacks_package("the picture", "bench", error)
    except (OSError, ValueError) as error:
        print(f"cannot show {arguments.image}: {error}", file=sys.stderr)
        return 1
    print(title)
    print(f"Drawn to {arguments.output}")
    return 0


def lacks_package(what: str, extra: str, error: ImportError) -> int:
    """Say which package is missing and how to get it; returns the exit status."""
    print(f"{what} lacks a package: {error}", file=sys.stderr)
    print(
        f"remedy: pip install 'llava-projectors[{extra}]' and LLaVA itself (or `make demo` in a checkout, "
        "which makes an environment of its own)",
        file=sys.stderr,
    )
    return 1
