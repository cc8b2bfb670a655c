"""What runs in the place of LLaVA's functions, for models of our types alone: the gate has said so before.

Every replacement gets LLaVA's own function, the package it belongs to, and the call's arguments.
An error of a package that could not be patched whole waits until a projector is asked for: at
import time, LLaVA would swallow it.
"""

from __future__ import annotations

import inspect
import os
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import nn

from llava_projectors import files, registry
from llava_projectors.integration import high_resolution, layout, record, weights
from llava_projectors.integration.builders import is_asking
from llava_projectors.integration.gate import Arguments, Function, Package, is_our_type
from llava_projectors.integration.llm_settings import refuse_contradictions
from llava_projectors.integration.log import log
from llava_projectors.integration.tower import (
    MultiLayerTower,
    ReducedTower,
    convert_tower,
    find_tower,
    give_other_readers_one_layer,
    layers_of,
    see_real_grid,
)
from llava_projectors.integration.tower_weights import refuse_random_weights, watched
from llava_projectors.projectors.base import Projector
from llava_projectors.seam_names import TOWER_BUILDERS
from llava_projectors.spec import ProjectorSpecError

# An attribute of the script's arguments: a tower that was built to be looked at. The next call of its builder
# returns it, because a tower that is trained loads its weights at once, whatever `delay_load` says.
_SEEN_TOWER = "_seen_vision_tower"


def build_our_projector(original: Function, package: Package, config: Any, *args: Any, **kwargs: Any) -> Projector:
    """For `build_vision_projector(config, delay_load=False, **kwargs)`."""
    package.check_patched()
    projector = registry.resolve(config.mm_projector_type, config).build(config.mm_hidden_size, config.hidden_size)
    weights.guard(projector)
    return projector


def build_other_projector(
    original: Function, package: Package, settings: tuple[Any, ...], *args: Any, **kwargs: Any
) -> Any:
    """The package's own builder, whose refusal of a type is explained: what there is and what may have been meant."""
    try:
        return original(*args, **kwargs)
    except ValueError as error:
        if is_asking() or "unknown projector" not in str(error).lower():
            raise
        type_string = getattr(settings[0], "mm_projector_type", None)
        if registry.is_registered(type_string):
            raise ProjectorSpecError(f"{error}. {package.left(type_string)}") from error.__cause__
        raise registry.unknown_type(type_string) from error.__cause__


def build_tower(original: Function, package: Package, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    """For `build_vision_tower(cfg, delay_load=False, **kwargs)`."""
    package.check_patched()
    resolved = registry.resolve(cfg.mm_projector_type, cfg)
    # The tower's config is enough for every check, so the weights wait until all have passed.
    load_now = not kwargs.pop("delay_load", False)
    seen = vars(cfg).pop(_SEEN_TOWER, None)
    if seen is not None and not (args or kwargs):
        if load_now and not getattr(seen, "is_loaded", True):
            seen.load_model()
        return seen
    with watched() as reports:  # some load their weights at once
        try:
            tower = original(cfg, *args, delay_load=True, **kwargs)
        except Exception:  # some forks' towers are not prepared to wait; a real error comes again
            tower = original(cfg, *args, **kwargs)
    convert_tower(tower, resolved, cfg)
    if isinstance(tower, MultiLayerTower):
        refuse_random_weights(tower, reports)
    if load_now and not getattr(tower, "is_loaded", True):
        tower.load_model()
    return tower


def construct_model(original: Function, package: Package, model: Any, *args: Any, **kwargs: Any) -> None:
    """For `__init__(self, config)` of LLaVA's meta model, which builds tower and projector of a checkpoint."""
    original(model, *args, **kwargs)
    give_other_readers_one_layer(model)
    keep_whole(model)
    announce_projector(model)


def keep_whole(model: Any) -> None:
    """Let `device_map="auto"` put the projector on one device: its forward uses weights of its parts together."""
    projector = getattr(model, "mm_projector", None)
    if isinstance(projector, Projector):
        model._no_split_modules = [*(model._no_split_modules or []), type(projector).__name__]


def settings_of_training(arguments: Arguments) -> tuple[Any, ...]:
    """The config of the model and the arguments of the training script."""
    model, *rest = arguments.values()
    return (model.config, *rest[:1])


def initialize_vision_modules(
    original: Function, package: Package, model: Any, model_args: Any, *args: Any, **kwargs: Any
) -> Any:
    """For `initialize_vision_modules(self, model_args, fsdp=None)`, which prepares a model for training."""
    refuse_contradictions(model.config)
    trained = getattr(model, "mm_projector", None)
    if trained is not None:
        refuse_other_projector(package, model, model_args)
    model_args.mm_projector_type = registry.normalize(model_args.mm_projector_type)
    look_at_adapter(model, model_args, _tower_builder(original))
    result = original(model, model_args, *args, **kwargs)
    if trained is not None and getattr(model_args, "pretrain_mm_mlp_adapter", None) is None:
        model.mm_projector = trained  # some forks build a new one in its place, on random weights
    see_real_grid(find_tower(model))
    record.write(model)
    if trained is None:
        announce_projector(model)
    return result


def settings_of_model_in_use(arguments: Arguments) -> tuple[Any, ...]:
    """The config of the model that a method is called on."""
    model, *_ = arguments.values()
    return (model.config,)


def initialize_other_readers(original: Function, package: Package, model: Any, *args: Any, **kwargs: Any) -> Any:
    """For methods that add further readers of the vision tower: a segmentation or a depth projector."""
    result = original(model, *args, **kwargs)
    give_other_readers_one_layer(model)
    return result


def _tower_builder(function: Function) -> Function:
    """The (patched) function by which LLaVA's own code builds a tower."""
    names = inspect.unwrap(function).__globals__
    builder: Optional[Function] = next((names[name] for name in TOWER_BUILDERS if name in names), None)
    if builder is None:
        raise ProjectorSpecError(
            f"{function.__qualname__} of {function.__module__} builds its vision towers by neither "
            f"{' nor '.join(TOWER_BUILDERS)}: our types cannot be used with it"
        )
    return builder


def settings_of_checkpoint(arguments: Arguments) -> tuple[Any, ...]:
    """The config that `from_pretrained` is given, or would read."""
    _, source, *_ = arguments.values()
    config = arguments.get("config")
    if config is None or isinstance(config, (str, os.PathLike)):
        config = find_config(source if config is None else config, arguments)
    return (config,)


def load_checkpoint(original: Function, package: Package, cls: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    """For the class method `from_pretrained` of LLaVA's models, which transformers defines."""
    with_info = kwargs.pop("output_loading_info", False)
    try:
        model, info = original(cls, source, *args, output_loading_info=True, **kwargs)
    except files.ProjectorWeightsError:
        raise
    except (RuntimeError, ValueError) as error:
        explained = weights.explain_failed_load(str(source), kwargs.get("config"))
        if explained is None:
            raise
        raise explained from error
    weights.check_pretrained(model, info, str(source))
    weights.take_wrapped_keys(model)
    return (model, info) if with_info else model


def settings_of_model(arguments: Arguments) -> tuple[Any, ...]:
    """The config of the checkpoint that `load_pretrained_model` is to load."""
    return (find_config(next(iter(arguments.values())), arguments),)


def load_model(original: Function, package: Package, model_path: Any, *args: Any, **kwargs: Any) -> Any:
    """For `load_pretrained_model(model_path, model_base, model_name, ...)`, which inference and serving use."""
    weights.check_adapter_files(str(model_path))
    with weights.loading():
        loaded = original(model_path, *args, **kwargs)
    for value in loaded:
        if isinstance(value, nn.Module):
            weights.check_complete(value, str(model_path))
            high_resolution.complete(value, tokenizer=loaded[0])
            layout.announce_layout(value)
    return loaded


# The arguments of a loader that say where transformers looks for a file, and as whom.
_LOOKUP = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token", "use_auth_token")


def find_config(source: Any, arguments: Arguments) -> Optional[SimpleNamespace]:
    """What a checkpoint's config.json says, found as the call with these arguments finds it."""
    given = {**arguments, **arguments.get("kwargs", {})}
    lookup = {name: given[name] for name in _LOOKUP if given.get(name) is not None}
    try:
        from transformers.utils import cached_file

        return SimpleNamespace(**files.read_json(cached_file(source, "config.json", **lookup)))
    except Exception:  # no such checkpoint, no network, no config: the original says so better
        return None


def refuse_other_projector(package: Package, model: Any, model_args: Any) -> None:
    """Raise when training would go on with another projector, or other features, than the checkpoint's.

    LLaVA would keep the old modules and write the new settings into the config.
    """
    config, requested = model.config, str(getattr(model_args, "mm_projector_type", None))
    existing = getattr(config, "mm_projector_type", "linear")
    types = (existing, requested)
    ours = [is_our_type(t, package) for t in types]
    if not (all(ours) and _mean_the_same(model, existing, requested)):
        raise ProjectorSpecError(
            f"the checkpoint has a projector of type {existing!r}, but --mm_projector_type is {requested!r}, and LLaVA "
            f"would keep the old projector under the new name. To train on with it, pass --mm_projector_type "
            f"{existing}. To train a {requested!r} projector, start from the base LLM (for example "
            "lmsys/vicuna-7b-v1.5): pretrain the projector, then fine-tune with --pretrain_mm_mlp_adapter"
        )
    for setting in ("mm_vision_select_layer", "mm_vision_select_feature"):
        trained, asked = getattr(config, setting, None), getattr(model_args, setting, None)
        if None not in (trained, asked) and trained != asked:
            raise ProjectorSpecError(
                f"the checkpoint was trained with --{setting} {trained}, but --{setting} is {asked}: its projector "
                f"would be trained on other features than it is served with. Pass --{setting} {trained}"
            )


def _mean_the_same(model: Any, existing: str, requested: str) -> bool:
    """Whether both type strings mean the module that the model has."""
    try:
        before, after = (registry.resolve(t, model.config) for t in (existing, requested))
        tower = find_tower(model)
        if isinstance(tower, MultiLayerTower):
            layers_of(tower, tower.tower_class, after)  # layers counted from the end may be others
    except ProjectorSpecError:
        return False
    return before.same_projector(after)


def look_at_adapter(model: Any, model_args: Any, build_tower: Function) -> None:
    """Look at `--pretrain_mm_mlp_adapter` before LLaVA loads it into the projector."""
    path = getattr(model_args, "pretrain_mm_mlp_adapter", None)
    if path is None or not os.path.isfile(path):  # a missing file is LLaVA's to report
        return
    type_string = model_args.mm_projector_type
    tower = find_tower(model)
    if tower is None:
        tower = build_tower(model_args, delay_load=True)
        setattr(model_args, _SEEN_TOWER, tower)
    resolved = registry.resolve(type_string, model.config)
    projector = resolved.build_empty(tower.hidden_size, model.config.hidden_size)
    weights.check_adapter(projector, type_string, path)
    different = record.differences(path, projector, tower.projector_spec.options, tower.projector_layers)
    if different:
        log(f"WARNING: {path} {different}; its weights fit and go on as {type_string!r}")


def announce_projector(model: Any) -> None:
    """One line about a model's projector, if it has one yet."""
    projector, tower = getattr(model, "mm_projector", None), find_tower(model)
    if projector is None:
        return
    # Some forks build their projector without writing its type into the config.
    type_string = getattr(model.config, "mm_projector_type", None)
    asked = "a projector type of ours" if type_string is None else f"projector type {type_string!r}"
    if not isinstance(projector, Projector):
        raise ProjectorSpecError(
            f"{asked} was asked for, but {type(model).__name__} built a {type(projector).__name__} by itself, "
            "not by its build_vision_projector: it cannot use our types"
        )
    if not isinstance(tower, ReducedTower):
        raise ProjectorSpecError(
            f"{asked} needs the patched vision tower, but {type(tower).__name__} was built around the patch; "
            "run `llava-projectors doctor`"
        )
    # DeepSpeed's zero.Init would empty the projector that `check_tokens` builds as well.
    if tower.patch_side is not None and not weights.partitioned_parameters(projector):
        check_tokens(tower.projector_spec, projector, tower.patch_side)
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in projector.parameters())  # ZeRO-3 empties p
    log(f"{type_string}: {tower.describe()}, {parameters / 1e6:.2f}M parameters")


def check_tokens(resolved: registry.ResolvedSpec, projector: Projector, side: int) -> None:
    """Raise unless the projector gives as many visual tokens as its class says; nothing is computed where it can be.

    Raises:
        ProjectorSpecError: with both shapes.
    """
    shape = (1, side**2, projector.num_levels * projector.mm_hidden_size)
    try:
        found = _output_shape(resolved, projector, shape, "meta")
    except Exception:  # a forward that looks at numbers, as a boolean mask does
        try:
            found = _output_shape(resolved, projector, shape, "cpu")
        except Exception:  # one that needs another device: the first forward tells
            return
    promised = [1, resolved.output_side(side) ** 2, projector.hidden_size]
    if found != promised:
        raise ProjectorSpecError(
            f"projector type {resolved.type_string!r} breaks its contract on a grid of {side}x{side} patches: its "
            f"output_side promises visual tokens [images, tokens, channels] {promised}, its forward returns {found}"
        )


def _output_shape(
    resolved: registry.ResolvedSpec, projector: Projector, shape: tuple[int, ...], device: str
) -> list[int]:
    with torch.device(device), torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin = resolved.build(projector.mm_hidden_size, projector.hidden_size)
        return list(twin(torch.zeros(shape)).shape)
