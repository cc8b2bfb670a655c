"""A page in one file: pointing at a token shows its patches, pointing at a patch the tokens that take it."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import torch
from PIL import Image

from llava_projectors.commands.show import colours
from llava_projectors.commands.show.view import Box, View

STEPS = 65535  # shares travel as 16 bits, of which this is the largest one


def page(view: View) -> str:
    """The page's HTML, which needs nothing else: picture, maps and script are in it.

    Args:
        view: with the maps of all tokens, in their order.
    """
    boxes, shares = _pack(view.maps)
    data = {
        "picture": _data_uri(view.picture, "JPEG", quality=92),
        "mosaic": _data_uri(_mosaic(view), "PNG"),
        "size": view.picture.size,
        "edge": view.edge,
        "places": view.places,
        "side": view.side,
        "count": view.count,
        "columns": view.columns,
        "regions": view.regions,
        "boxes": boxes,
        "shares": base64.b64encode(shares).decode(),
        "scale": view.scale,
        "colours": ["#{:02x}{:02x}{:02x}{:02x}".format(*colour) for colour in colours.table()],
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    # A `<` in the data could end the script that it stands in.
    safe = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("TITLE", html.escape(view.title)).replace('"DATA"', safe)


def _pack(maps: torch.Tensor) -> tuple[list[Box], bytes]:
    """Of each map the box that holds all of its shares, and those shares, one box after the other, little-endian."""
    boxes, shares = [], []
    for values in (maps / maps.max() * STEPS).round().numpy().astype("<u2"):
        rows, columns = values.any(1).nonzero()[0], values.any(0).nonzero()[0]
        box = Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        boxes.append(box)
        shares.append(values[box.top : box.bottom, box.left : box.right].tobytes())
    return boxes, b"".join(shares)


def _mosaic(view: View) -> Image.Image:
    """One pixel per token, its region's mean colour; grey where tokens have no place. Tiles lie as in the picture."""
    width, height = (length // view.edge * view.columns for length in view.picture.size)
    mosaic = Image.new("RGB", (width, height), "white")
    patch = view.edge / view.side
    for left, top in view.places:
        for token in range(view.count):
            row, column = divmod(token, view.columns)
            colour = (200, 200, 200)
            if view.regions is not None:
                region = view.regions[token]
                box = (region.left * patch, region.top * patch, region.right * patch, region.bottom * patch)
                moved = (left + box[0], top + box[1], left + box[2], top + box[3])
                colour = view.picture.resize((1, 1), Image.Resampling.BOX, box=moved).getpixel((0, 0))  # type: ignore
            corner = left // view.edge * view.columns + column, top // view.edge * view.columns + row
            mosaic.putpixel(corner, colour)
    return mosaic


def _data_uri(picture: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
