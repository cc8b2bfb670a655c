"""`llava-projectors show`: from a picture on the disk to a drawing, or a page, beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from llava_projectors.commands.show.draw import draw
from llava_projectors.commands.show.models import random_model, trained_model
from llava_projectors.commands.show.page import page
from llava_projectors.commands.show.picture import read_picture
from llava_projectors.commands.show.view import make_view
from llava_projectors.commands.writing import whole_file

DESCRIPTION = (
    "Writes a PNG: the picture as the model receives it, with its patch grid, and for six visual tokens, or those of "
    "--token, the patches that went into them: TokenPacker's attention weights, the effective receptive field of other "
    "types. With --html, or an --output that ends in .html, writes a page in one file instead: pointing at a token "
    "shows its patches, pointing at a patch the tokens that take it. With --model-path, needs LLaVA."
)
PAGE = ".html"


def show(
    image: Path,
    target: Path,
    type_string: Optional[str] = None,
    path: Optional[str] = None,
    base: Optional[str] = None,
    tokens: Sequence[int] = (),
    patch_num: Optional[int] = None,
) -> str:
    """Show what visual tokens were made from; returns what was shown, in a line.

    Args:
        image: a picture of any kind that PIL reads.
        target: file to write. `.html` gives a page with all tokens, other endings a drawing of some.
        type_string: for random weights; default `saep`. Not with `path`.
        path: a trained LLaVA checkpoint.
        base: its base model, for projector-only and LoRA checkpoints.
        tokens: which to draw; default six.
        patch_num: cut the picture into up to 9, 16 or 25 tiles; default as the checkpoint does, else not.

    Raises:
        ValueError: a token that does not exist, a checkpoint without a projector of ours, a bad type string or target.
        OSError: the picture or the checkpoint cannot be read, the target cannot be written.
    """
    is_page = target.suffix.lower() == PAGE
    if is_page and tokens:
        raise ValueError("a page has every token: leave --token out")
    check_target(target, image)
    picture = read_picture(image)
    model = random_model(type_string or "saep", patch_num) if path is None else trained_model(path, base, patch_num)
    if is_page:
        view = make_view(model, picture)
        with whole_file(target) as file:
            file.write_text(page(view), encoding="utf-8")
    else:
        view = make_view(model, picture, tokens)
        with whole_file(target) as file:
            draw(view).savefig(file, dpi=100)
    return view.title


def check_target(target: Path, image: Path) -> None:
    """Raise a ValueError unless a drawing or a page can be written there."""
    from matplotlib.backend_bases import FigureCanvasBase

    endings = [PAGE, *(f".{name}" for name in sorted(FigureCanvasBase.get_supported_filetypes()))]
    if target.is_dir():
        raise ValueError(f"--output {target} is a folder: name a file in it, such as {target / 'tokens.png'}")
    if target.exists() and not target.is_file():
        raise ValueError(f"--output {target} is a device or a pipe, no file")
    if not target.parent.is_dir():
        raise ValueError(f"--output {target} would lie in a folder that does not exist: make {target.parent} first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"--output {target} cannot be written: no permission")
    if target.suffix.lower() not in endings:
        raise ValueError(f"--output {target} must end in one of {', '.join(endings)}")
    if target.exists() and image.exists() and target.samefile(image):
        raise ValueError(f"--output {target} would overwrite the picture itself: name another file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors show`."""
    parser.add_argument("image", type=Path, metavar="IMAGE", help="picture of any size and kind")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--type", help="a type string, with random weights (saep); the picture is cropped to its central square"
    )
    weights.add_argument(
        "--model-path",
        help="a trained LLaVA checkpoint with one of our projectors; the picture is padded or cropped as it says",
    )
    parser.add_argument("--model-base", help="its base model, for projector-only and LoRA checkpoints")
    parser.add_argument(
        "--tiles",
        type=int,
        choices=(9, 16, 25),
        help="cut the picture into at most so many tiles (default: as the checkpoint does; else one square)",
    )
    parser.add_argument("--token", type=int, action="append", default=[], help="a visual token, may be repeated")
    parser.add_argument("--html", action="store_true", help="write a page with every token")
    parser.add_argument("--output", type=Path, help="file to write (tokens.png; with --html tokens.html)")


def run(arguments: argparse.Namespace) -> int:
    """Draw the maps of visual tokens; status 1 with the reason when they cannot be."""
    try:
        target = target_of(arguments)
        title = show(
            arguments.image,
            target,
            arguments.type,
            arguments.model_path,
            arguments.model_base,
            arguments.token,
            arguments.tiles,
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]  # transformers makes several
        print(f"cannot show {arguments.image}: {first_line}", file=sys.stderr)
        return 1
    print(title)
    print(f"Written to {target.resolve()}")
    return 0


def target_of(arguments: argparse.Namespace) -> Path:
    """The file to write.

    Raises:
        ValueError: two arguments contradict each other.
    """
    ending = PAGE if arguments.html else ".png"
    output = arguments.output or Path("tokens")
    target = output if output.suffix or output.is_dir() else output.with_name(output.name + ending)
    if arguments.html and target.suffix.lower() not in ("", PAGE):
        raise ValueError(f"--html writes a page, and --output {target} is none")
    if arguments.model_base is not None and arguments.model_path is None:
        raise ValueError("--model-base belongs to a --model-path")
    return target
