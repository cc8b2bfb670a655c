"""What `llava-projectors list` prints: every type with its options and token counts, also of a picture in tiles."""

from __future__ import annotations

import argparse
import json
from typing import Any

from llava_projectors import registry, slicing
from llava_projectors.commands.columns import print_columns
from llava_projectors.spec import PRESET, format_value

DESCRIPTION = "Types, what they are, their visual tokens at each stride, and their options."
INDENT = "    "
TILE = 336
NUM_PATCHES_PER_SIDE = TILE // 14


def print_types(as_json: bool = False) -> None:
    """Print every registered type."""
    types = [describe_type(name) for name in registry.list_projectors()]
    if as_json:
        print(json.dumps(types, indent=2))
        return
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
        for preset, options in entry["presets"].items():
            print(f"  {PRESET}={preset} stands for {options}")
        print()


def print_image(width: int, height: int, as_json: bool = False) -> None:
    """Print what `--image_aspect_ratio slice` makes of a picture, with every type."""
    report = describe_image(width, height)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    settings = list(report["grids"])
    print(f"A picture of {width}x{height} pixels, in tiles of {TILE} px (--image_aspect_ratio):\n")
    rows = []
    for setting, (grid_rows, grid_columns) in report["grids"].items():
        more = " and a thumbnail" if grid_rows * grid_columns > 1 else ""
        rows.append((setting, f"{grid_rows}x{grid_columns} tiles{more}"))
    print_columns(rows, INDENT)
    print("\nVisual tokens of one tile, and of the picture with its separators:\n")
    header = ("type", "tile", *settings)
    counts = [(row["type"], str(row["tile"]), *(str(row[setting]) for setting in settings)) for row in report["types"]]
    print_columns([header, *counts], INDENT)


def describe_image(width: int, height: int) -> dict[str, Any]:
    """The grid of a picture for 9, 16 and 25 tiles, and its visual tokens with every type at every stride."""
    found = {f"{slicing.NAME}:patch_num={n}": slicing.choose_grid(width, height, n, TILE) for n in slicing.PATCH_NUMS}
    types = []
    for name in registry.list_projectors():
        for row in describe_type(name)["tokens"]:
            counts = {setting: slicing.visual_tokens(grid, row["tokens"]) for setting, grid in found.items()}
            types.append({"type": row["type"], "tile": row["tokens"], **counts})
    return {"width": width, "height": height, "grids": found, "types": types}


def describe_type(name: str) -> dict[str, Any]:
    """What a type is, how many visual tokens it gives at every stride, and its options."""
    options = registry.projector_options(name)
    resolved = registry.resolve(name)
    key = resolved.cls.stride_option
    strides = options[key].values.choices if key in options else ()
    type_strings = [f"{name}:{key}={stride}" for stride in strides] or [name]
    counts = [(t, registry.resolve(t).output_side(NUM_PATCHES_PER_SIDE) ** 2) for t in type_strings]
    return {
        "name": name,
        "summary": (resolved.cls.__doc__ or "").strip().split("\n")[0],
        "tokens": [
            {"type": t, "tokens": n, "fewer": round(100 - 100 * n / NUM_PATCHES_PER_SIDE**2)} for t, n in counts
        ],
        "presets": {preset: str(registry.parse_spec(f"{name}:{PRESET}={preset}")) for preset in resolved.cls.presets},
        "options": [
            {
                "name": option.name,
                "default": "auto" if option.default is None else format_value(option.default),
                "choices": [format_value(choice) for choice in option.values.choices],
                "expects": option.values.expects,
            }
            for option in options.values()
        ],
    }


def width_and_height(text: str) -> tuple[int, int]:
    """`1920x1080` -> (1920, 1080)."""
    width, _, height = text.lower().partition("x")
    if not all(side.isdecimal() and 0 < int(side) < 2**31 for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size in pixels like 1920x1080")
    return int(width), int(height)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors list`."""
    parser.add_argument(
        "--image",
        type=width_and_height,
        metavar="WIDTHxHEIGHT",
        help="grid and visual tokens of such a picture with --image_aspect_ratio slice, instead of the options",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def run(arguments: argparse.Namespace) -> int:
    """Print every registered type, or what becomes of a picture with each."""
    if arguments.image is None:
        print_types(arguments.json)
    else:
        width, height = arguments.image
        print_image(width, height, arguments.json)
    return 0
