"""No projector weight is lost in silence: checks on adapter files, state dicts and loaded checkpoints.

LLaVA loads with `strict=False`, and transformers only warns about missing keys, so a projector
whose weights are absent or belong to another type would answer from random numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import nn

from llava_projectors import files
from llava_projectors.files import ProjectorWeightsError, projector_keys
from llava_projectors.projectors.base import Projector
from llava_projectors.registry import OPTIONS_SETTING, ResolvedSpec, as_trained, forms, resolve
from llava_projectors.spec import ProjectorSpecError

Shapes = dict[str, tuple[int, ...]]

# An attribute of the projector, so that a copy of the model still knows.
_AWAITED = "_awaited_weights"
PROJECTOR_FILE, TRAINABLES_FILE = ADAPTER_FILES = ("mm_projector.bin", "non_lora_trainables.bin")
# How most of LLaVA's models call the projector.
PLACE = "model.mm_projector."


# What is in a file or a state dict


@dataclass(frozen=True)
class Found:
    """What a file or a folder has.

    Attributes:
        shapes: name within the projector -> shape, of the weights that LLaVA's loader finds there.
        keys: of all its tensors.
    """

    shapes: Shapes
    keys: Collection[str]


def _found(tensors: Mapping[str, Any]) -> Found:
    """Of tensors by key, real or stored."""
    names = projector_keys(tensors)
    return Found({name: tuple(tensors[key].shape) for name, key in names.items()}, tensors.keys())


def read_adapter(path: str) -> Found:
    """What an adapter's file has, every number looked at.

    Raises:
        ProjectorWeightsError: the file cannot be read, is no dict of tensors, or holds NaN or infinity.
    """
    tensors = files.load_tensors(path)
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ProjectorWeightsError(
                f"{path} holds NaN or infinity in {key!r}: its training diverged; train it again with a smaller "
                "learning rate, or use an earlier checkpoint"
            )
    return _found(tensors)


def find_in_folder(folder: str) -> Found:
    """What a checkpoint's folder has: a full one, or its adapter's files; headers only.

    Raises:
        ProjectorWeightsError: a file is missing, or cannot be read.
    """
    if files.has_weights(folder):
        found = _found(files.checkpoint_tensors(folder))
        loaded = projector_keys(key for key in found.keys if not files.is_wrapped(key))
        return Found({name: shape for name, shape in found.shapes.items() if name in loaded}, found.keys)
    paths = [os.path.join(folder, name) for name in ADAPTER_FILES]
    return _found({k: v for path in paths if os.path.isfile(path) for k, v in files.stored_tensors(path).items()})


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


def likely_cause(projector: Projector, found: Collection[str], keys: Collection[str] = ()) -> str:
    """One sentence on how such weights came about, as far as was compared.

    Args:
        projector: that the weights were to be loaded into.
        found: names within the projector that the weights have.
        keys: all keys beside them, where they are known.
    """
    expected = expected_shapes(projector)
    prefix = other_prefix(expected, keys) if expected.keys() - set(found) else None
    if prefix is not None:
        return (
            f"All of them are there, but begin with {prefix!r}, and LLaVA's loader looks for {PLACE!r}: save the "
            "weights again with their keys renamed"
        )
    if not found:
        others = f": the keys are {_shorten(sorted(keys))}" if keys else ""
        return f"There are no projector weights at all{others}."
    looks_like = identify(found)
    if looks_like is None:
        return "The keys are those of no projector known here."
    if looks_like == identify(expected):
        return "The type is right but the sizes differ: another LLM, vision tower, stride, layer count or other option."
    return (
        f"The weights look like {looks_like!r}: they were trained as that type, or without this plugin; "
        "use that type, with the options of its training, or weights of your own type."
    )


def other_prefix(expected: Collection[str], keys: Collection[str]) -> Optional[str]:
    """What stands before every name of the projector, if all are among the keys but LLaVA's loader does not see it."""
    first = next(iter(expected), None)
    if first is None:
        return None
    prefixes = (key[: -len(first)] for key in keys if key == first or key.endswith(f".{first}"))
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in keys for name in expected)), None)


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
            projector = resolve(type_string).build_empty(128, 128)
        except ProjectorSpecError:  # a user's type may need options
            continue
        if names == {parameter for parameter, _ in projector.named_parameters()}:
            return type_string
    return None


def sizes_of(
    resolved: ResolvedSpec, found: Shapes, channels: Optional[int], width: Optional[int]
) -> Optional[tuple[int, int]]:
    """C and D with which the type has just these shapes, or None.

    Args:
        resolved: the type.
        found: of the weights.
        channels: C, if it is known.
        width: D, if it is known.
    """
    levels = resolved.cls.count_levels(resolved.options.get("layers"))
    sizes = {size for shape in found.values() for size in shape if size}
    parts = {size // levels for size in sizes if size % levels == 0}
    for c in [channels] if channels else sorted(sizes | parts, reverse=True):
        for d in [width] if width else sorted(sizes, reverse=True):
            try:
                if expected_shapes(resolved.build_empty(c, d)) == found:
                    return c, d
            except (ProjectorSpecError, RuntimeError, TypeError, ZeroDivisionError):  # no sizes of such a projector
                continue
    return None


def read_config_beside(path: str) -> dict[str, Any]:
    """The config.json that LLaVA writes beside an adapter; empty where there is none that can be read."""
    try:
        return files.read_config(os.path.dirname(path))
    except ProjectorSpecError:
        return {}


# Where it is checked


def check_adapter(projector: Projector, type_string: str, path: str) -> None:
    """Raise before LLaVA loads `--pretrain_mm_mlp_adapter` into a projector that it does not fit."""
    found = read_adapter(path)
    wrong = problems(expected_shapes(projector), found.shapes)
    if not wrong:
        return
    cause = likely_cause(projector, found.shapes, found.keys)
    beside = read_config_beside(path)
    written_as = beside.get("mm_projector_type")
    if written_as is not None and found.shapes:
        trained_as = as_trained(written_as, beside.get(OPTIONS_SETTING, {}))
        if trained_as != type_string:
            cause = (
                f"The config.json beside it says it was trained as {trained_as!r}: pass that type, or its own weights."
            )
    raise ProjectorWeightsError(
        f"--pretrain_mm_mlp_adapter {path} does not fit --mm_projector_type {type_string}: {wrong}. {cause}"
    )


def await_weights(projector: Projector) -> None:
    """Refuse to compute with it and to save it until every parameter has got its numbers, by whatever way."""
    setattr(projector, _AWAITED, {name: _sample(value) for name, value in projector.named_parameters()})
    projector.register_forward_pre_hook(_refuse_without_weights)
    # Saved, it would look like a trained one.
    projector._register_state_dict_hook(_refuse_to_save_without_weights)  # type: ignore[no-untyped-call]


_is_loading: ContextVar[bool] = ContextVar("is_loading", default=False)


@contextmanager
def loading() -> Iterator[None]:
    """Within it, in this thread, a state dict may be read of a projector that awaits its weights.

    accelerate reads one to place a model, while LLaVA's loader has not ended; nothing is saved there.
    """
    token = _is_loading.set(True)
    try:
        yield
    finally:
        _is_loading.reset(token)


def awaited_weights(projector: Projector) -> frozenset[str]:
    """Parameters that a checkpoint has yet to provide: no state dict had them, and their numbers have not changed."""
    first: dict[str, Optional[torch.Tensor]] = getattr(projector, _AWAITED, {})
    parameters = dict(projector.named_parameters())
    kept = {name for name, sample in first.items() if name in parameters and _is_same(sample, parameters[name])}
    # The zeros of a bias and the ones of a norm may be the very numbers provided: they have come if others have.
    alike = {name for name, sample in first.items() if sample is not None and len(sample.unique()) == 1}
    return frozenset() if kept <= alike < first.keys() else frozenset(kept)


def _sample(parameter: torch.Tensor) -> Optional[torch.Tensor]:
    """Some of its numbers, in the narrowest dtype that it may be converted to; None where there are none."""
    if parameter.is_meta or not parameter.numel():
        return None
    return parameter.detach().flatten()[:64].cpu().half()


def _is_same(sample: Optional[torch.Tensor], parameter: torch.Tensor) -> bool:
    now = _sample(parameter)
    if sample is None or now is None:
        return True
    return torch.allclose(sample.float(), now.float(), rtol=0.01, atol=1e-6, equal_nan=True)


def check_adapter_files(folder: str) -> None:
    """Raise before LLaVA loads an adapter of a checkpoint's folder that is damaged, or half of one."""
    has_lora = os.path.isfile(os.path.join(folder, "adapter_config.json"))
    if has_lora and not (files.has_weights(folder) or os.path.isfile(os.path.join(folder, TRAINABLES_FILE))):
        raise ProjectorWeightsError(
            f"{folder} has a LoRA adapter but no {TRAINABLES_FILE}, which holds the projector: LLaVA writes it when a "
            "run ends, and with this plugin into every checkpoint-N"
        )
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
    awaited = getattr(module, _AWAITED, {})
    setattr(module, _AWAITED, {name: sample for name, sample in awaited.items() if name not in found})


def take_wrapped_keys(model: nn.Module) -> None:
    """Let a model take an adapter's weights whatever wrapped the model that wrote them, as LLaVA's training does."""
    model._register_load_state_dict_pre_hook(_unwrap_keys, with_module=True)  # type: ignore[no-untyped-call]


def _unwrap_keys(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    places = [place for place, _ in projectors_of(model)]
    own = f"{prefix}{places[0]}" if len(places) == 1 else ""  # of several, it is not known whose they are
    if own and not any(key.startswith(own) for key in state_dict):
        state_dict.update({f"{own}{name}": state_dict[key] for name, key in projector_keys(state_dict).items()})


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
        missing, mismatched, left_over = _reported(prefix, info)
        elsewhere = other_prefix(expected, info["unexpected_keys"]) is not None
        if not (missing or mismatched or left_over):
            continue
        if missing == expected.keys() and not left_over and not elsewhere:
            await_weights(projector)
            continue
        found: Shapes = {name: shape for name, shape in expected.items() if name not in missing}
        found.update(mismatched)
        found.update(dict.fromkeys(left_over, ()))
        raise _misfit(projector, source, problems(expected, found), found, info["unexpected_keys"])


def _reported(prefix: str, info: Mapping[str, Any]) -> tuple[set[str], Shapes, set[str]]:
    """What `from_pretrained` reports of the projector with this prefix, by names within it.

    Returns:
        the missing, those of another shape with the shape that they have, and those that nothing takes.
    """
    # transformers leaves the model's own prefix out where no key of the checkpoint has it.
    places = (prefix, prefix.partition(".")[2])
    missing = {key[len(place) :] for key in info["missing_keys"] for place in places if key.startswith(place)}
    mismatched = {entry[0][len(prefix) :]: tuple(entry[1]) for entry in info["mismatched_keys"] if prefix in entry[0]}
    # Under another prefix than the model's, they are not loaded, however they are called.
    return missing, mismatched, projector_keys(info["unexpected_keys"]).keys() - missing


def _misfit(
    projector: Projector, source: str, wrong: str, found: Shapes, keys: Collection[str]
) -> ProjectorWeightsError:
    return ProjectorWeightsError(
        f"the projector {projector.name!r} does not get its weights from {source}: {wrong}. "
        f"{likely_cause(projector, found, keys)}"
    )


def check_complete(model: nn.Module, source: str) -> None:
    """Raise when weights are still awaited after LLaVA's loader has finished."""
    for _, projector in projectors_of(model):
        missing = awaited_weights(projector)
        if missing:
            raise ProjectorWeightsError(
                f"the projector {projector.name!r} got no weights from {source}: "
                f"missing: {_shorten(sorted(missing))}{_explain_source(projector, source)}"
            )


def _explain_source(projector: Projector, source: str) -> str:
    """Why a checkpoint's own files did not provide the weights; nothing is known of one on the hub."""
    if not os.path.isdir(source):
        return ""
    found = find_in_folder(source)
    return f". {likely_cause(projector, found.shapes, found.keys)}"


def _refuse_to_save_without_weights(module: Projector, *_: Any) -> None:
    if not _is_loading.get():
        _refuse_without_weights(module)


def _refuse_without_weights(module: Projector, *_: Any) -> None:
    if not getattr(module, _AWAITED, None):
        return
    missing = awaited_weights(module)
    if missing:
        raise ProjectorWeightsError(
            f"the projector {module.name!r} has random weights, no checkpoint has provided: "
            f"{_shorten(sorted(missing))}. First load a checkpoint that has projector weights, "
            "or an mm_projector.bin or non_lora_trainables.bin, into the model"
        )
    setattr(module, _AWAITED, {})


def explain_failed_load(source: str, config: Any) -> Optional[ProjectorWeightsError]:
    """The projector's part in a `from_pretrained` that failed, if it has one: the error there names no key.

    Args:
        source: the checkpoint, looked at if it is a folder.
        config: that the model was built from, or None for the checkpoint's own.
    """
    try:
        if config is None:
            config = SimpleNamespace(**files.read_config(source))
        resolved = resolve(config.mm_projector_type, config)
        projector = resolved.build_empty(config.mm_hidden_size, config.hidden_size)
        found = find_in_folder(source)
    except (OSError, ValueError, AttributeError):  # no local folder, or no projector of ours: not our concern
        return None
    wrong = problems(expected_shapes(projector), found.shapes) if found.shapes else ""
    return _misfit(projector, source, wrong, found.shapes, found.keys) if wrong else None
