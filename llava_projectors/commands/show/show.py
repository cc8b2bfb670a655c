"""`llava-projectors show`: from a picture on the disk to a drawing, or a page, beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from PIL.Image import Image

from llava_projectors.commands.arguments import file_path, not_empty
from llava_projectors.commands.show.draw import draw
from llava_projectors.commands.show.models import Model, random_model, trained_model
from llava_projectors.commands.show.page import page
from llava_projectors.commands.show.picture import read_picture
from llava_projectors.commands.show.view import make_view
from llava_projectors.commands.writing import whole_file

DESCRIPTION = (
    "Writes a PNG for each picture: the picture as the model receives it, with its patch grid, and for six visual "
    "tokens, or those of --token, the patches that went into them: TokenPacker's attention weights, the effective "
    "receptive field of other types. With --html, or an --output that ends in .html, writes a page in one file "
    "instead: pointing at a token shows its patches, pointing at a patch the tokens that take it. With --model-path, "
    "needs LLaVA."
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
    check_target(target, image, tokens)
    picture = read_picture(image)
    return write(_model(type_string, path, base, patch_num), picture, target, tokens)


def _model(type_string: Optional[str], path: Optional[str], base: Optional[str], patch_num: Optional[int]) -> Model:
    return random_model(type_string or "saep", patch_num) if path is None else trained_model(path, base, patch_num)


def write(model: Model, picture: Image, target: Path, tokens: Sequence[int]) -> str:
    """Write the drawing or the page of one picture; returns its title."""
    is_page = target.suffix.lower() == PAGE
    view = make_view(model, picture, None if is_page else tokens)
    with whole_file(target) as file:
        if is_page:
            file.write_text(page(view), encoding="utf-8")
        else:
            draw(view).savefig(file, dpi=100)
    return view.title


def check_target(target: Path, image: Path, tokens: Sequence[int]) -> None:
    """Raise a ValueError unless a drawing of these tokens, or a page, can be written there."""
    from matplotlib.backend_bases import FigureCanvasBase

    endings = [PAGE, *(f".{name}" for name in sorted(FigureCanvasBase.get_supported_filetypes()))]
    if target.exists() and not target.is_file():
        raise ValueError(f"--output {target} is a folder, a device or a pipe, no file")
    if not target.parent.is_dir():
        raise ValueError(f"--output {target} would lie in a folder that does not exist: make {target.parent} first")
    if not os.access(target.parent, os.W_OK):
        raise ValueError(f"--output {target} cannot be written: no permission")
    if target.suffix.lower() not in endings:
        raise ValueError(f"--output {target} must end in one of {', '.join(endings)}")
    if target.exists() and image.exists() and target.samefile(image):
        raise ValueError(f"--output {target} would overwrite the picture itself: name another file")
    if target.suffix.lower() == PAGE and tokens:
        raise ValueError("a page has every token: leave --token out")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors show`."""
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="picture of any size and kind")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--type",
        type=not_empty,
        help="a type string, with random weights (saep); the picture is cropped to its central square",
    )
    weights.add_argument(
        "--model-path",
        type=not_empty,
        help="a trained LLaVA checkpoint with one of our projectors; the picture is padded or cropped as it says",
    )
    parser.add_argument("--model-base", type=not_empty, help="its base model, for projector-only and LoRA checkpoints")
    parser.add_argument(
        "--tiles",
        type=int,
        choices=(9, 16, 25),
        help="cut the picture into at most so many tiles (default: as the checkpoint does; else one square)",
    )
    parser.add_argument("--token", type=int, action="append", default=[], help="a visual token, may be repeated")
    parser.add_argument("--html", action="store_true", help="write a page with every token")
    parser.add_argument(
        "--output", type=file_path, help="file to write, or folder (IMAGE-tokens.png; with --html IMAGE-tokens.html)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Draw the maps of visual tokens; status 1 with the reason when they cannot be."""
    image = arguments.images[0]
    try:
        targets = targets_of(arguments)
        pictures = {}
        for image, target in targets.items():
            check_target(target, image, arguments.token)
            pictures[image] = read_picture(image)
        model = _model(arguments.type, arguments.model_path, arguments.model_base, arguments.tiles)
        for image, target in targets.items():
            print(write(model, pictures[image], target, arguments.token))
            print(f"Written to {target.resolve()}", flush=True)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().split("\n")[0]  # transformers makes several
        print(f"cannot show {image}: {first_line}", file=sys.stderr)
        return 1
    return 0


def targets_of(arguments: argparse.Namespace) -> dict[Path, Path]:
    """Picture -> the file to write.

    Raises:
        ValueError: two arguments contradict each other.
    """
    ending = PAGE if arguments.html else ".png"
    output = arguments.output or Path()
    if output.is_dir():
        targets = {image: output / f"{image.stem}-tokens{ending}" for image in arguments.images}
    else:
        target = output if output.suffix else output.with_name(output.name + ending)
        targets = dict.fromkeys(arguments.images, target)
    for target in targets.values():
        if arguments.html and target.suffix.lower() not in ("", PAGE):
            raise ValueError(f"--html writes a page, and --output {target} is none")
        if list(targets.values()).count(target) > 1:
            raise ValueError(f"two pictures would be written to {target}: name a folder for each, or one at a time")
    if arguments.model_base is not None and arguments.model_path is None:
        raise ValueError("--model-base belongs to a --model-path")
    return targets
