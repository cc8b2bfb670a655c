"""Settings of the LLM that only later versions of transformers obey than the one that trains.

LLaVA's stack keeps them in `config.json` without reading them. Whatever loads the checkpoint later would
compute something else than what was trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from llava_projectors.spec import ProjectorSpecError

ROPE_THETA = 10000.0  # what every class of LLaVA's time takes where the config has none
# Setting -> the first version of transformers in which every class that LLaVA uses reads it.
READ_SINCE = {
    "rope_parameters": (5, 0),
    "rope_scaling": (4, 45),
    "layer_types": (4, 53),
    "head_dim": (4, 46),
    "mlp_bias": (4, 41),
    "partial_rotary_factor": (5, 0),
}


def contradictions(config: Mapping[str, Any], read: Collection[str]) -> list[str]:
    """What later readers of a config would take otherwise than the version that trained with it.

    Args:
        config: LLaVA's, with the settings of its LLM.
        read: the settings that training read.

    Returns:
        for each setting one line with its value and what training used in its place.

    Example:
        >>> contradictions({"rope_parameters": {"rope_theta": 500000.0}}, read=["rope_theta"])
        ["rope_parameters {'rope_theta': 500000.0}, training used {'rope_theta': 10000.0}"]
    """
    found = []
    for name, used in _used(config, read).items():
        given = config.get(name)
        if given is None or name in read:
            continue
        seen, expected = given, used
        if name == "rope_parameters":
            seen = _without_defaults(given)
            if "rope_theta" not in seen:  # a later reader looks for it where training did
                expected = {key: value for key, value in used.items() if key != "rope_theta"}
        if seen != expected:
            found.append(f"{name} {given!r}, training used {used!r}")
    return found


def _used(config: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    """For each later setting, what a version that does not read it computes."""
    scaling = config.get("rope_scaling") if "rope_scaling" in read else None
    used: dict[str, Any] = {
        "rope_parameters": {"rope_theta": config.get("rope_theta") or ROPE_THETA, **_without_defaults(scaling or {})},
        "rope_scaling": None,
        "layer_types": ["full_attention"] * len(config.get("layer_types") or ()),
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
    }
    if config.get("hidden_size") and config.get("num_attention_heads"):
        used["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return used


def _without_defaults(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotations in one form: the kind as `rope_type`, left out where it is the usual one."""
    settings = {"rope_type" if name == "type" else name: value for name, value in rope.items() if value is not None}
    usual = {"rope_type": "default", "partial_rotary_factor": 1.0}
    return {name: value for name, value in settings.items() if usual.get(name) != value}


def refuse_contradictions(config: Any) -> None:
    """Raise before a model is trained with other settings than whatever loads it later will read.

    Args:
        config: of the model.

    Raises:
        ProjectorSpecError: names the settings.
    """
    import transformers

    if not isinstance(config, transformers.PretrainedConfig):  # a fork's own, which no later version reads
        return
    classes: tuple[Any, ...] = type(config).__mro__
    read = [name for cls in classes for name in inspect.signature(cls.__init__).parameters]
    found = contradictions(config.to_dict(), read)
    if found:
        raise ProjectorSpecError(
            f"the config.json of {config._name_or_path or 'the LLM'} has {'; '.join(found)}: transformers "
            f"{transformers.__version__}, which trains here, does not read it, and later versions do, so the trained "
            "model would be another one there. Write what is meant into settings that this version reads (rope_theta, "
            "rope_scaling), or remove it"
        )
