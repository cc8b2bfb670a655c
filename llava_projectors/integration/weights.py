"""No projector weight is lost in silence: checks on adapter files, state dicts and loaded checkpoints.

LLaVA loads with `strict=False`, and transformers only warns about missing keys, so a projector
whose weights are absent or belong to another type would answer from random numbers.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import nn

from llava_projectors.projectors.base import Projector
from llava_projectors.registry import OPTIONS_SETTING, as_trained, build_projector, forms, resolve
from llava_projectors.spec import ProjectorSpecError

Shapes = dict[str, tuple[int, ...]]

# A key of the projector's; `seg_mm_projector.` and the like are a fork's further projectors.
_KEY = re.compile(r"(?:^|\.)mm_projector\.(.+)")
# An attribute of the projector, so that a copy of the model still knows.
_AWAITED = "_awaited_weights"
ADAPTER_FILES = ("mm_projector.bin", "non_lora_trainables.bin")


class ProjectorWeightsError(ValueError):
    """Weights do not fit the projector; the message names the keys and the likely cause."""


# What is in a file or a state dict


def projector_keys(keys: Collection[str]) -> dict[str, str]:
    """Name within the projector -> key, of the keys that are the projector's."""
    return {match[1]: key for key in keys for match in [_KEY.search(key)] if match}


def file_shapes(path: str) -> Shapes:
    """Name -> shape of the projector weights in a `.bin` or `.safetensors` file; tensor data is not read.

    Raises:
        ProjectorWeightsError: the file cannot be read, or is cut off.
    """
    try:
        if path.endswith(".safetensors"):
            shapes = _header_shapes(path)
        else:
            shapes = {key: tuple(value.shape) for key, value in _read_bin(path, "meta").items()}
    except Exception as error:  # torch raises a dozen kinds, none of which names the file
        raise ProjectorWeightsError(f"cannot read {path}: {_cause_of_bad_file(path, error)}") from error
    return {name: shapes[key] for name, key in projector_keys(shapes).items()}


def _header_shapes(path: str) -> Shapes:
    """Name -> shape of every tensor of a `.safetensors` file that is as long as its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size:  # before memory is taken for it
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < whole:
        raise ValueError(f"{whole - size} of {whole} bytes are missing")
    return {key: tuple(entry["shape"]) for key, entry in header.items()}


def read_adapter(path: str) -> Shapes:
    """Name -> shape of the projector weights in an adapter's file, every number of them looked at.

    Raises:
        ProjectorWeightsError: the file cannot be read, is no dict of tensors, or holds NaN or infinity.
    """
    try:
        found = _read_bin(path, "cpu")
    except Exception as error:  # torch raises a dozen kinds, none of which names the file
        raise ProjectorWeightsError(f"cannot read {path}: {_cause_of_bad_file(path, error)}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ProjectorWeightsError(
            f"{path} is no adapter: it holds {_kind(found)}, not a dict of tensors; "
            "pass the mm_projector.bin that LLaVA's pretraining writes"
        )
    for key, value in found.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ProjectorWeightsError(
                f"{path} holds NaN or infinity in {key!r}: its training diverged; train it again with a smaller "
                "learning rate, or use an earlier checkpoint"
            )
    return {name: tuple(found[key].shape) for name, key in projector_keys(found).items()}


def _read_bin(path: str, device: str) -> Any:
    """What `torch.save` wrote; on the device `meta`, without its numbers."""
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except (RuntimeError, TypeError):  # torch 2.0, or a file in the format before torch 1.6
        return torch.load(path, map_location=device, weights_only=True)


def _cause_of_bad_file(path: str, error: Exception) -> str:
    size = os.path.getsize(path)
    if size == 0:
        return "it is empty; copy it again"
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if isinstance(error, pickle.UnpicklingError):  # whose message recommends to load without weights_only
        return f"it is no file of tensors ({size} bytes): of another format, or with objects in it that are not loaded"
    first_line = str(error).split("\n")[0]
    return f"it is truncated or of another format ({size} bytes; {type(error).__name__}: {first_line}); copy it again"


def _kind(found: Any) -> str:
    if isinstance(found, dict):
        other = next(type(value).__name__ for value in found.values() if not isinstance(value, torch.Tensor))
        return f"a dict with a value of type {other}"
    return f"a {type(found).__name__}"


def checkpoint_shapes(folder: str) -> Shapes:
    """Name -> shape of the projector weights in a checkpoint's folder, sharded or not; headers only."""
    shapes: Shapes = {}
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = os.path.join(folder, f"{stem}.index.json")
        files = {stem}
        if os.path.isfile(index):
            with open(index, encoding="utf-8") as file:
                shard_of = json.load(file)["weight_map"]
            files = {shard_of[key] for key in projector_keys(shard_of).values()}
        for name in sorted(files):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                shapes.update(file_shapes(path))
        if shapes:
            break
    return shapes


def adapter_shapes(folder: str) -> Shapes:
    """Name -> shape of the projector weights in the adapter files of a folder, if it has any; headers only."""
    paths = [os.path.join(folder, name) for name in ADAPTER_FILES]
    return {name: shape for path in paths if os.path.isfile(path) for name, shape in file_shapes(path).items()}


def expected_shapes(projector: Projector) -> Shapes:
    """Name -> shape of a projector's parameters; quantised ones have none to compare."""
    return {
        name: tuple(getattr(p, "ds_shape", p.shape)) if p.is_floating_point() else ()
        for name, p in projector.named_parameters()
    }


def partitioned_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters that ZeRO-3 has partitioned: they are empty outside a forward."""
    return {name for name, parameter in module.named_parameters() if hasattr(parameter, "ds_id")}


# What is wrong with it


def problems(expected: Shapes, found: Shapes, *, partial: bool = False) -> str:
    """Missing, unexpected and wrong-shape names in one line, or "" when all is well.

    Args:
        expected: of the projector.
        found: of the weights.
        partial: the weights may be one of several parts, so nothing counts as missing.
    """
    groups = {
        "missing": [] if partial else [name for name in expected if name not in found],
        "unexpected": sorted(name for name in found if name not in expected),
        "wrong shape": [
            f"{name} is {list(found[name])}, not {list(shape)}"
            for name, shape in expected.items()
            if shape and found.get(name, shape) != shape
        ],
    }
    return "; ".join(f"{what}: {_shorten(names)}" for what, names in groups.items() if names)


def _shorten(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def likely_cause(projector: Projector, found: Collection[str]) -> str:
    """One sentence on how such weights came about."""
    if not found:
        return "There are no projector weights at all: the file is of another kind, or was cut or saved incompletely."
    looks_like = identify(found)
    if looks_like is None:
        return "The keys are those of no projector known here."
    if looks_like == identify(expected_shapes(projector)):
        return "The type is right but the sizes differ: another LLM, vision tower, stride, layer count or other option."
    return (
        f"The weights look like {looks_like!r}: they were trained as that type, or without this plugin; "
        "use that type, with the options of its training, or weights of your own type."
    )


def identify(found: Collection[str]) -> Optional[str]:
    """The projector type that has these parameter names, or None."""
    names = set(found)
    if names == {"weight", "bias"}:
        return "linear"
    linears = {int(name.split(".")[0]) for name in names if re.fullmatch(r"\d+\.(weight|bias)", name)}
    if names and len(names) == 2 * len(linears) and linears == set(range(0, 2 * len(linears), 2)):
        return f"mlp{len(linears)}x_gelu"
    for type_string in forms():
        try:
            with torch.device("meta"):
                projector = build_projector(type_string, 128, 128)
        except ProjectorSpecError:  # a user's type may need options
            continue
        if names == {parameter for parameter, _ in projector.named_parameters()}:
            return type_string
    return None


def read_config_beside(path: str) -> dict[str, Any]:
    """The config.json that LLaVA writes beside an adapter; empty where there is none."""
    try:
        with open(os.path.join(os.path.dirname(path), "config.json"), encoding="utf-8") as file:
            config: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return {}
    return config


# Where it is checked


def check_adapter(projector: Projector, type_string: str, path: str) -> None:
    """Raise before LLaVA loads `--pretrain_mm_mlp_adapter` into a projector that it does not fit."""
    found = read_adapter(path)
    wrong = problems(expected_shapes(projector), found)
    if not wrong:
        return
    beside = read_config_beside(path)
    written_as = beside.get("mm_projector_type")
    cause = likely_cause(projector, found)
    if written_as is not None:
        trained_as = as_trained(written_as, beside.get(OPTIONS_SETTING, {}))
        cause = f"The config.json beside it says it was trained as {trained_as!r}: pass that type, or its own weights."
    raise ProjectorWeightsError(
        f"--pretrain_mm_mlp_adapter {path} does not fit --mm_projector_type {type_string}: {wrong}. {cause}"
    )


def awaited_weights(projector: Projector) -> frozenset[str]:
    """Parameters that a checkpoint was to provide and has not, yet."""
    awaited: frozenset[str] = getattr(projector, _AWAITED, frozenset())
    return awaited


def check_adapter_files(folder: str) -> None:
    """Raise before LLaVA loads an adapter of a checkpoint's folder that is damaged."""
    for name in ADAPTER_FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            read_adapter(path)


def guard(projector: Projector) -> None:
    """Let no state dict with other keys or shapes into this projector, however it is loaded."""
    projector._register_load_state_dict_pre_hook(_check_state_dict, with_module=True)  # type: ignore[no-untyped-call]


def _check_state_dict(module: Projector, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    expected = expected_shapes(module)
    found = {
        key[len(prefix) :]: tuple(getattr(value, "ds_shape", value.shape))
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    # In a checkpoint of ZeRO-3 itself, which runs resume from, these are empty; the optimizer's files hold their parts.
    found.update({name: expected[name] for name in partitioned_parameters(module) if found.get(name) == (0,)})
    wrong = problems(expected, found, partial=True)
    if wrong:
        raise ProjectorWeightsError(
            f"weights do not fit the projector {module.name!r}: {wrong}. {likely_cause(module, found)}"
        )
    setattr(module, _AWAITED, awaited_weights(module) - found.keys())


def projectors_of(model: nn.Module) -> Iterator[tuple[str, Projector]]:
    """Every projector of ours in a model, with its prefix."""
    return ((f"{name}.", module) for name, module in model.named_modules() if isinstance(module, Projector))


def check_pretrained(model: nn.Module, info: Mapping[str, Any], source: str) -> None:
    """Look at what `from_pretrained` reports of a checkpoint.

    A checkpoint without any projector weight may be the base LLM of an adapter that LLaVA loads next;
    so the weights are awaited, and the first forward without them is an error. Anything else that is
    not whole is an error now.

    Raises:
        ProjectorWeightsError: projector weights are missing, left over or of another shape.
    """
    for prefix, projector in projectors_of(model):
        expected = expected_shapes(projector)
        missing = {key[len(prefix) :] for key in info["missing_keys"] if key.startswith(prefix)}
        mismatched = {
            entry[0][len(prefix) :]: tuple(entry[1]) for entry in info["mismatched_keys"] if prefix in entry[0]
        }
        left_over = projector_keys(info["unexpected_keys"])
        if not (missing or mismatched or left_over):
            continue
        if missing == expected.keys() and not left_over:
            setattr(projector, _AWAITED, frozenset(missing))
            projector.register_forward_pre_hook(_refuse_without_weights)
            continue
        found: Shapes = {name: shape for name, shape in expected.items() if name not in missing}
        found.update(mismatched)
        found.update(dict.fromkeys(left_over, ()))
        raise _misfit(projector, source, problems(expected, found), found)


def _misfit(projector: Projector, source: str, wrong: str, found: Shapes) -> ProjectorWeightsError:
    return ProjectorWeightsError(
        f"the projector {projector.name!r} does not get its weights from {source}: {wrong}. "
        f"{likely_cause(projector, found)}"
    )


def check_complete(model: nn.Module, source: str) -> None:
    """Raise when weights are still awaited after LLaVA's loader has finished."""
    for _, projector in projectors_of(model):
        missing = awaited_weights(projector)
        if missing:
            raise ProjectorWeightsError(
                f"the projector {projector.name!r} got no weights from {source}: "
                f"missing: {_shorten(sorted(missing))}. {_explain_source(projector, source)}"
            )


def _explain_source(projector: Projector, source: str) -> str:
    """Why a checkpoint's own files did not provide the weights."""
    return likely_cause(projector, adapter_shapes(source))


def _refuse_without_weights(module: Projector, _: Any) -> None:
    missing = awaited_weights(module)
    if missing:
        raise ProjectorWeightsError(
            f"the projector {module.name!r} has random weights, no checkpoint has provided: "
            f"{_shorten(sorted(missing))}. First load a checkpoint that has projector weights, "
            "or an mm_projector.bin or non_lora_trainables.bin, into the model"
        )


def explain_failed_load(source: str, config: Any) -> Optional[ProjectorWeightsError]:
    """The projector's part in a `from_pretrained` that failed, if it has one: the error there names no key.

    Args:
        source: the checkpoint, looked at if it is a folder.
        config: that the model was built from, or None for the checkpoint's own.
    """
    try:
        if config is None:
            with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
                config = SimpleNamespace(**json.load(file))
        with torch.device("meta"):
            resolved = resolve(config.mm_projector_type, config)
            projector = resolved.build(config.mm_hidden_size, config.hidden_size)
        found = checkpoint_shapes(source)
    except (OSError, ValueError, AttributeError):  # no local folder, or no projector of ours: not our concern
        return None
    wrong = problems(expected_shapes(projector), found) if found else ""
    return _misfit(projector, source, wrong, found) if wrong else None
