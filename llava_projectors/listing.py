"""What `llava-projectors list` prints: every type with its options and token counts."""

from __future__ import annotations

import json
from typing import Any

from llava_projectors import registry
from llava_projectors.columns import print_columns
from llava_projectors.spec import format_value

INDENT = "    "
NUM_PATCHES_PER_SIDE = 336 // 14


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
        print()


def describe_type(name: str) -> dict[str, Any]:
    """What a type is, how many visual tokens it gives at every stride, and its options."""
    options = registry.projector_options(name)
    resolved = registry.resolve(name)
    key = resolved.cls.stride_option
    strides = options[key].choices if key in options else ()
    type_strings = [f"{name}:{key}={stride}" for stride in strides] or [name]
    counts = [(t, registry.resolve(t).output_side(NUM_PATCHES_PER_SIDE) ** 2) for t in type_strings]
    return {
        "name": name,
        "summary": (resolved.cls.__doc__ or "").strip().split("\n")[0],
        "tokens": [
            {"type": t, "tokens": n, "fewer": round(100 - 100 * n / NUM_PATCHES_PER_SIDE**2)} for t, n in counts
        ],
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
