"""What takes the place of LLaVA's functions: each does nothing new unless the model is of one of our types.

A wrapper factory gets LLaVA's own function and `check_patched`, which raises when the package
could not be patched whole. That error waits until a projector is asked for: at import time,
LLaVA would swallow it.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any, Callable

import torch
from torch import nn

from llava_projectors import registry
from llava_projectors.integration import weights
from llava_projectors.integration.tower import MultiLayerTower, convert_tower
from llava_projectors.projectors.base import Projector
from llava_projectors.spec import ProjectorSpecError, format_value

Function = Callable[..., Any]

logger = logging.getLogger("llava_projectors")


def projector_builder(original: Function, check_patched: Callable[[], None]) -> Function:
    """For `build_vision_projector(config, delay_load=False, **kwargs)`."""

    @functools.wraps(original)
    def build_vision_projector(config: Any, *args: Any, **kwargs: Any) -> Any:
        type_string = getattr(config, "mm_projector_type", None)
        if registry.is_registered(type_string):
            check_patched()
            projector = registry.resolve(type_string, config).build(config.mm_hidden_size, config.hidden_size)
            weights.guard(projector)
            return projector
        try:
            return original(config, *args, **kwargs)
        except ValueError as error:
            if "unknown projector" not in str(error).lower():
                raise
            raise registry.unknown_type(type_string) from error

    return build_vision_projector


def tower_builder(original: Function, check_patched: Callable[[], None]) -> Function:
    """For `build_vision_tower(cfg, delay_load=False, **kwargs)`."""

    @functools.wraps(original)
    def build_vision_tower(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        type_string = getattr(cfg, "mm_projector_type", None)
        if not registry.is_registered(type_string):
            return original(cfg, *args, **kwargs)
        check_patched()
        resolved = registry.resolve(type_string, cfg)
        # The tower's config is enough for every check, so the weights wait until all have passed.
        load_now = not kwargs.pop("delay_load", False)
        tower = original(cfg, *args, delay_load=True, **kwargs)
        convert_tower(tower, resolved, cfg)
        if load_now and not tower.is_loaded:
            tower.load_model()
        return tower

    return build_vision_tower


def model_constructor(original: Function, check_patched: Callable[[], None]) -> Function:
    """For `__init__(self, config)` of LLaVA's meta model, which builds tower and projector of a checkpoint."""

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, config, *args, **kwargs)
        announce(self)

    return __init__


def vision_initializer(original: Function, check_patched: Callable[[], None]) -> Function:
    """For `initialize_vision_modules(self, model_args, fsdp=None)`, which prepares a model for training."""

    @functools.wraps(original)
    def initialize_vision_modules(self: Any, model_args: Any, *args: Any, **kwargs: Any) -> Any:
        requested = getattr(model_args, "mm_projector_type", None)
        is_new = getattr(self, "mm_projector", None) is None
        if not is_new:
            refuse_other_projector(self.config, requested)
        if registry.is_registered(requested):
            build_tower = original.__globals__["build_vision_tower"]
            check_adapter(self, model_args, requested, build_tower)
        result = original(self, model_args, *args, **kwargs)
        if is_new:
            announce(self)
        return result

    return initialize_vision_modules


def checkpoint_loader(original: Any, check_patched: Callable[[], None]) -> Any:
    """For the class method `from_pretrained` of LLaVA's models, which transformers defines."""
    function = original.__func__

    def from_pretrained(cls: Any, source: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        try:
            model, info = function(cls, source, *args, output_loading_info=True, **kwargs)
        except weights.ProjectorWeightsError:
            raise
        except (RuntimeError, ValueError) as error:
            explained = weights.explain_failed_load(str(source), kwargs.get("config"))
            if explained is None:
                raise
            raise explained from error
        weights.check_pretrained(model, info, str(source))
        return (model, info) if output_loading_info else model

    wrapper: Any = functools.update_wrapper(from_pretrained, function)
    return classmethod(wrapper)


def model_loader(original: Function, check_patched: Callable[[], None]) -> Function:
    """For `load_pretrained_model(model_path, model_base, model_name, ...)`, which inference and serving use."""

    @functools.wraps(original)
    def load_pretrained_model(model_path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(model_path, *args, **kwargs)
        for value in loaded:
            if isinstance(value, nn.Module):
                weights.check_complete(value, str(model_path))
        return loaded

    return load_pretrained_model


def refuse_other_projector(config: Any, requested: Any) -> None:
    """Raise when a checkpoint's projector is of another type than the one asked for, and either is ours.

    LLaVA would keep the old module and write the new type into the config.
    """
    existing = getattr(config, "mm_projector_type", "linear")
    types = (existing, requested)
    ours = [registry.is_registered(t) for t in types]
    if not any(ours):
        return
    if all(ours):
        before, after = (registry.resolve(t, config) for t in types)
        if before.same_projector(after):
            return
    raise ProjectorSpecError(
        f"the checkpoint has a projector of type {existing!r}, but --mm_projector_type is {requested!r}, and LLaVA "
        f"would keep the old projector under the new name. To train on with it, pass --mm_projector_type {existing}. "
        f"To train a {requested!r} projector, start from the base LLM (for example lmsys/vicuna-7b-v1.5): "
        "pretrain the projector, then fine-tune with --pretrain_mm_mlp_adapter"
    )


def check_adapter(model: Any, model_args: Any, type_string: str, build_tower: Function) -> None:
    """Compare `--pretrain_mm_mlp_adapter` with the projector before any tower weight is loaded."""
    path = getattr(model_args, "pretrain_mm_mlp_adapter", None)
    if path is None or not os.path.isfile(path):  # a missing file is LLaVA's to report
        return
    tower = model.get_vision_tower() or build_tower(model_args, delay_load=True)
    resolved = registry.resolve(type_string, model.config)
    with torch.device("meta"):
        projector = resolved.build(tower.hidden_size, model.config.hidden_size)
    weights.check_adapter(projector, type_string, path)
    written_as = weights.sibling_type(path)
    if registry.is_registered(written_as) and not resolved.same_projector(registry.resolve(written_as)):
        log(f"WARNING: {path} was trained as {written_as!r}; its weights fit and go on as {type_string!r}")


def announce(model: Any) -> None:
    """One line about a model that has one of our projectors; silence about any other."""
    projector, tower = getattr(model, "mm_projector", None), model.get_vision_tower()
    if not isinstance(projector, Projector):
        return
    if not isinstance(tower, MultiLayerTower):
        raise ProjectorSpecError(
            f"projector type {model.config.mm_projector_type!r} needs the patched vision tower, "
            f"but {type(tower).__name__} was built around the patch; run `llava-projectors doctor`"
        )
    before, after = tower.patch_side, tower.token_side
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in projector.parameters())  # ZeRO-3 empties p
    log(
        f"{model.config.mm_projector_type}: {before**2} -> {after**2} visual tokens an image "
        f"({before}x{before} -> {after}x{after}), hidden states {format_value(tower.projector_layers)}, "
        f"{parameters / 1e6:.2f}M parameters"
    )


def log(message: str) -> None:
    """One line on stderr, from the first process of a distributed run only."""
    if os.environ.get("RANK", "0") != "0":
        return
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("llava_projectors: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    logger.info(message)
