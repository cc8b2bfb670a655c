"""The command `llava-projectors`: finds the module of a command, which declares its arguments and runs it."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from typing import Optional

import llava_projectors

# Command -> module beside this one, extra of setup.cfg that it needs, line of `--help`. Modules are imported
# only when their command is given, because torch takes seconds.
COMMANDS = {
    "list": ("listing", "", "projector types, their options and token counts"),
    "doctor": ("doctor", "llava", "try LLaVA, or a fork, with our types on a tiny model; exit status 0: they work"),
    "check": ("check", "llava", "check a type string, its layers on a tower, and weights, without loading an LLM"),
    "demo": ("demo", "demo", "train and ask tiny LLaVAs with each projector, by LLaVA's own scripts (minutes)"),
    "show": ("show.show", "viz", "draw over a picture, or on a page, what each visual token was made from"),
    "export": ("export", "export", "write a trained checkpoint as a folder for current transformers and vLLM"),
    "plan": ("plan", "", "memory, batch and traffic of training on N GPUs, against LLaVA's 576 tokens"),
}
# What pip calls a package that is imported by another name.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "google": "protobuf"}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in words if not word.startswith("-")), "")
    try:
        parsed = _parser(chosen).parse_args(arguments)
        status = int(parsed.run(parsed))
        sys.stdout.flush()
        return status
    except ImportError as error:
        print(f"{chosen} cannot run: {error}; {_remedy(chosen, error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{chosen}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return 141


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of the chosen one.

    Raises:
        ImportError: its module needs a package that cannot be imported.
    """
    parser = argparse.ArgumentParser(
        prog="llava-projectors",
        description="Visual projectors that give LLaVA fewer visual tokens, without touching its code.",
    )
    parser.add_argument("--version", action="version", version=f"llava-projectors {llava_projectors.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module_name, _, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name == chosen:
            _import_torch()
            module = importlib.import_module(f"{__package__}.{module_name}")
            command.description = module.DESCRIPTION
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def _import_torch() -> None:
    """Every command needs it, and a broken one raises errors of many kinds."""
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise ImportError(f"torch cannot be imported: {type(error).__name__}: {error}", name="torch") from error


def _remedy(command: str, error: ImportError) -> str:
    """How to get the package that an import missed."""
    missing = (error.name or "").partition(".")[0]
    if missing == "llava":
        return (
            "remedy: install LLaVA in this environment, `pip install -e .` in its checkout or "
            "`pip install --no-deps llava-torch==1.2.2.post1`; `make demo` in a checkout of this package does all of it"
        )
    pip = f"{sys.executable} -m pip install"
    if missing and isinstance(error, ModuleNotFoundError):
        return f"remedy: {pip} '{_requirement(command, DISTRIBUTIONS.get(missing, missing))}'"
    if missing == "torch":
        return f"remedy: {pip} --force-reinstall torch"
    return "remedy: `llava-projectors doctor` says which versions are installed and which were tested"


def _requirement(command: str, distribution: str) -> str:
    """The distribution with the versions that the command's extra asks for, as `pip install` takes it."""
    _, extra, _ = COMMANDS[command]
    try:
        requirements = importlib.metadata.requires("llava-projectors") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        requirements = []
    for line in requirements:
        requirement, _, condition = line.partition(";")
        if re.split(r"[^\w.-]", requirement)[0] == distribution and f'"{extra}"' in condition.replace("'", '"'):
            return requirement.strip()
    return distribution
