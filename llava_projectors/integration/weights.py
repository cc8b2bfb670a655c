"""Checks that weights in a file are those of the projector that will load them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Optional

import torch

from llava_projectors.projectors.base import Projector
from llava_projectors.registry import build_projector, list_projectors
from llava_projectors.spec import ProjectorSpecError

Shapes = Mapping[str, tuple[int, ...]]


class ProjectorWeightsError(ValueError):
    """Weights do not fit the projector; the message names the keys and the likely cause."""


def adapter_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the projector weights in an `mm_projector.bin`; no tensor data is read.

    Keys are cut as LLaVA's `initialize_vision_modules` cuts them.
    """
    weights: dict[str, torch.Tensor] = torch.load(path, map_location="meta", weights_only=True)
    return {
        key.split("mm_projector.", 1)[1]: tuple(value.shape) for key, value in weights.items() if "mm_projector." in key
    }


def check_adapter(projector: Projector, type_string: str, path: str) -> None:
    """Raise before LLaVA loads `--pretrain_mm_mlp_adapter` into a projector that it does not fit.

    Raises:
        ProjectorWeightsError: missing, unexpected or wrong-shape keys, and what they look like.
    """
    found = adapter_shapes(path)
    expected = {name: tuple(value.shape) for name, value in projector.named_parameters()}
    if found == expected:
        return
    problems = []
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {list(found[name])}, not {list(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", reshaped)):
        if keys:
            problems.append(f"{what}: {_shorten(keys)}")
    raise ProjectorWeightsError(
        f"--pretrain_mm_mlp_adapter {path} does not fit --mm_projector_type {type_string}: "
        f"{'; '.join(problems)}. {_explain(found, path, bool(missing or unexpected))}"
    )


def _shorten(keys: list[str], limit: int = 4) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _explain(found: Shapes, path: str, other_keys: bool) -> str:
    written_as = sibling_type(path)
    if written_as is not None:
        return f"The config.json beside it says it was trained as {written_as!r}: pass that type, or its own weights."
    looks_like = identify(found)
    if looks_like is None:
        return "The keys are those of no projector known here."
    if other_keys:
        return f"The weights look like {looks_like!r}: pass that type, or weights of your own type."
    return "The type is right but the sizes differ: another LLM, vision tower or option of the type."


def sibling_type(path: str) -> Optional[str]:
    """The `mm_projector_type` in the config.json that LLaVA writes beside an adapter, if any."""
    try:
        with open(os.path.join(os.path.dirname(path), "config.json"), encoding="utf-8") as file:
            value: Any = json.load(file).get("mm_projector_type")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, str) else None


def identify(found: Shapes) -> Optional[str]:
    """The projector type that has these parameter names, or None."""
    names = set(found)
    if names == {"weight", "bias"}:
        return "linear"
    linears = {int(name.split(".")[0]) for name in names if re.fullmatch(r"\d+\.(weight|bias)", name)}
    if names and len(names) == 2 * len(linears) and linears == set(range(0, 2 * len(linears), 2)):
        return f"mlp{len(linears)}x_gelu"
    for name in list_projectors():
        try:
            with torch.device("meta"):
                projector = build_projector(name, 128, 128)
        except ProjectorSpecError:  # a user's type may need options
            continue
        if names == {parameter for parameter, _ in projector.named_parameters()}:
            return name
    return None
