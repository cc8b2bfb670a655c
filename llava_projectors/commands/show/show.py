"""`llava-projectors show`: from a picture on the disk to a drawing, or a page, beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from llava_projectors.commands.show.draw import draw
from llava_projectors.commands.show.models import random_model, trained_model
from llava_projectors.commands.show.page import page
from llava_projectors.commands.show.picture import read_picture
from llava_projectors.commands.show.view import make_view

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
        target.write_text(page(view), encoding="utf-8")
    else:
        view = make_view(model, picture, tokens)
        draw(view).savefig(target, dpi=100)
    return view.title


def check_target(target: Path, image: Path) -> None:
    """Raise a ValueError unless a drawing or a page can be written there."""
    from matplotlib.backend_bases import FigureCanvasBase

    endings = [PAGE, *(f".{name}" for name in sorted(FigureCanvasBase.get_supported_filetypes()))]
    if target.is_dir():
        raise ValueError(f"--output {target} is a folder: name a file in it, such as {target / 'tokens.png'}")
    if not target.parent.is_dir():
        raise ValueError(f"--output {target} would lie in a folder that does not exist: make {target.parent} first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ValueError(f"--output {target} cannot be written: no permission")
    if target.suffix.lower() not in endings:
        raise ValueError(f"--output {target} must end in one of {', '.join(endings)}")
    if target.exists() and image.exists() and target.samefile(image):
        raise ValueError(f"--output {target} would overwrite the picture itself: name another file")
