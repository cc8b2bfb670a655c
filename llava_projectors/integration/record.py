"""What a checkpoint's config says of its projector, so that it describes itself whatever the defaults become.

Beside LLaVA's own `mm_projector_type` stand every option of the type, its layers counted from 0, the
version of this package that trained it, and the tower's patch grid. `registry.resolve` reads the options back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

import llava_projectors
from llava_projectors import registry
from llava_projectors.integration import weights
from llava_projectors.integration.tower import ReducedTower, find_tower
from llava_projectors.projectors.base import Projector
from llava_projectors.registry import GRID_SETTING, OPTIONS_SETTING, VERSION_SETTING
from llava_projectors.spec import format_value


def options_of(projector: Projector, options: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Every option of a built projector, as JSON can hold it.

    Args:
        projector: a built one.
        options: that it was built with.
        layers: hidden states that it reads, counted from 0; empty where the tower's own features are read.

    Returns:
        name -> value; `layers`, where the type has them, are counted from 0. An
        option that is None is what the projector keeps under its name, if that is a value.
    """
    values = dict(options)
    for name, value in values.items():
        if value is None and not isinstance(getattr(projector, name, None), nn.Module):
            values[name] = getattr(projector, name, None)
    if "layers" in values:
        values["layers"] = tuple(layers) or values["layers"]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def write(model: Any) -> None:
    """Put the options into the model's config, which LLaVA saves with every checkpoint and adapter."""
    projector, tower = getattr(model, "mm_projector", None), find_tower(model)
    if isinstance(projector, Projector) and isinstance(tower, ReducedTower):
        options = options_of(projector, tower.projector_spec.options, tower.projector_layers)
        setattr(model.config, OPTIONS_SETTING, options)
        setattr(model.config, VERSION_SETTING, llava_projectors.__version__)
        setattr(model.config, GRID_SETTING, tower.patch_side)


def differences(path: str, projector: Projector, options: Mapping[str, Any], layers: Sequence[int]) -> str:
    """What an adapter was made for, if that is not what it will be used for, or cannot be known; else "".

    Args:
        path: the adapter's file; LLaVA saves a config.json beside it.
        projector: that it is to be loaded into.
        options: that the projector was built with.
        layers: hidden states that it will read, as for `options_of`.
    """
    config = weights.read_config_beside(path)
    if not config:
        return "has no readable config.json beside it, so it cannot be known which stride and layers it was trained for"
    recorded = projector.options_from_record(config.get(OPTIONS_SETTING, {})) or _options_by_type(config)
    now = projector.options_from_record(options_of(projector, options, layers))
    wrong = [
        f"{name}={format_value(recorded[name])} (now {format_value(now[name])})"
        for name in now
        if name in recorded and recorded[name] != now[name]
    ]
    return f"was trained with {', '.join(wrong)}" if wrong else ""


def _options_by_type(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the type string of a config without a record says, less the layers, which depend on the tower."""
    type_string = config.get("mm_projector_type")
    if not registry.is_registered(type_string):
        return {}
    options = registry.resolve(type_string, SimpleNamespace(**config)).options
    return {name: value for name, value in options.items() if value is not None and name != "layers"}
