"""What runs around the Trainer of LLaVA's scripts, so that a run goes on from a `checkpoint-N` with its projector.

Of a LoRA run, the Trainer saves and restores the LoRA weights and the optimizer. What else is trained,
the projector above all, is in none of its checkpoints; LLaVA writes it after the last step only. Here
every `checkpoint-N` gets the file that LLaVA writes at the end, `non_lora_trainables.bin`, and the config.
DeepSpeed restores all that is trained from files of its own.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Optional

import torch

from llava_projectors import files, registry
from llava_projectors.files import ProjectorWeightsError
from llava_projectors.integration import weights
from llava_projectors.integration.gate import Arguments, Function, Package
from llava_projectors.integration.log import log
from llava_projectors.spec import ProjectorSpecError

# What, beside the type, makes a projector's features, and the flag of LLaVA's script that sets it.
FEATURE_SETTINGS = {
    "mm_vision_tower": "vision_tower",
    "mm_vision_select_layer": "mm_vision_select_layer",
    "mm_vision_select_feature": "mm_vision_select_feature",
    "image_aspect_ratio": "image_aspect_ratio",
}


def settings_of_trainer(arguments: Arguments) -> tuple[Any, ...]:
    """The config of the model that a Trainer trains."""
    trainer, *_ = arguments.values()
    return (getattr(getattr(trainer, "model", None), "config", None),)


def train(original: Function, package: Package, trainer: Any, resume: Any = None, *args: Any, **kwargs: Any) -> Any:
    """For `train(self, resume_from_checkpoint=None, ...)`."""
    resume = kwargs.pop("resume_from_checkpoint", resume)
    warn_of_failing_save(trainer)
    folder = folder_to_resume(trainer, resume)
    if folder is not None:
        refuse_other_run(trainer.model.config, folder)
        refuse_stage_1(folder)
        restore(trainer, folder)
    _freeze_as_asked(trainer, True)
    with frozen_may_be_missing(trainer):
        result = original(trainer, resume, *args, **kwargs)
    # LLaVA's script now saves, beside LoRA, what requires a gradient: a frozen projector would be saved nowhere.
    _freeze_as_asked(trainer, False)
    return result


def _freeze_as_asked(trainer: Any, freeze: bool) -> None:
    """Of a LoRA run with `--freeze_mm_mlp_adapter`, which may train several times."""
    if trains_adapter_alone(trainer.model) and getattr(trainer.model.config, "freeze_mm_mlp_adapter", False):
        for _, projector in weights.projectors_of(trainer.model):
            projector.requires_grad_(not freeze)


def save_model(
    original: Function, package: Package, trainer: Any, output_dir: Optional[str] = None, *args: Any, **kwargs: Any
) -> Any:
    """For `save_model(self, output_dir=None, ...)`, which writes the weights of a `checkpoint-N`, on every rank."""
    output_dir = kwargs.pop("output_dir", output_dir)
    result = original(trainer, output_dir, *args, **kwargs)
    if trains_adapter_alone(trainer.model):
        state = trainables(trainer.model)
        if trainer.args.should_save:
            folder = output_dir or trainer.args.output_dir
            trainer.model.config.save_pretrained(folder)
            torch.save(state, os.path.join(folder, weights.TRAINABLES_FILE))
    return result


def load_best_model(original: Function, package: Package, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """For `_load_best_model(self)`, which brings back the weights of an earlier `checkpoint-N` after the last step."""
    result = original(trainer, *args, **kwargs)
    restore(trainer, trainer.state.best_model_checkpoint)
    return result


def trains_adapter_alone(model: Any) -> bool:
    """Whether what is saved of the model is peft's part of it."""
    return hasattr(model, "peft_config")


def trainables(model: Any) -> dict[str, torch.Tensor]:
    """What is trained beside LoRA, and the projector also where it is frozen; ZeRO-3's gathered, on every rank."""
    ours = {f"{prefix}{name}" for prefix, p in weights.projectors_of(model) for name, _ in p.named_parameters()}
    return {
        name: _whole(parameter)
        for name, parameter in model.named_parameters()
        if name in ours or (parameter.requires_grad and "lora_" not in name)
    }


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    gather: Any = contextlib.nullcontext()
    if hasattr(parameter, "ds_id"):
        from deepspeed import zero

        gather = zero.GatheredParameters([parameter])
    with gather:
        return parameter.detach().cpu().clone()


def folder_to_resume(trainer: Any, resume: Any) -> Optional[str]:
    """The `checkpoint-N` that `train` will go on from; None where it starts anew, or says itself that there is none."""
    if resume is True:
        from transformers.trainer_utils import get_last_checkpoint

        resume = get_last_checkpoint(trainer.args.output_dir)
    return str(resume) if resume and os.path.isdir(resume) else None


def refuse_other_run(config: Any, folder: str) -> None:
    """Raise when `folder` was trained with another projector, or on other features, than the run that would go on.

    Raises:
        ProjectorSpecError: names the setting of both.
    """
    try:
        kept = files.read_config(folder)
    except ProjectorSpecError:
        if os.path.exists(os.path.join(folder, "config.json")):
            raise
        return  # of LoRA, as saved without this plugin: `restore` finds no projector
    ways_out = "or start anew in another --output_dir"
    before, now = str(kept.get("mm_projector_type")), config.mm_projector_type
    if not _same_projector(before, kept, now, config):
        meant = registry.as_trained(before, kept.get(registry.OPTIONS_SETTING) or {})
        raise ProjectorSpecError(
            f"cannot go on from {folder}: it was trained as {meant!r}, but --mm_projector_type is {now!r}. "
            f"Pass --mm_projector_type {meant}, {ways_out}"
        )
    for setting, flag in FEATURE_SETTINGS.items():
        trained, asked = kept.get(setting), getattr(config, setting, None)
        if trained is not None and trained != asked:
            raise ProjectorSpecError(
                f"cannot go on from {folder}: it was trained with --{flag} {trained}, but --{flag} is {asked}. "
                f"Pass --{flag} {trained}, {ways_out}"
            )


def _same_projector(before: str, kept: Mapping[str, Any], now: str, config: Any) -> bool:
    if not registry.is_registered(before):
        return False
    try:
        return registry.resolve(before, SimpleNamespace(**kept)).same_projector(registry.resolve(now, config))
    except ProjectorSpecError:
        return False


def refuse_stage_1(folder: str) -> None:
    """Raise for a `checkpoint-N` that LLaVA's stage 1 has saved, from which no Trainer can go on."""
    adapter = os.path.join(folder, weights.PROJECTOR_FILE)
    if os.path.isfile(adapter) and not files.has_weights(folder):
        raise ProjectorWeightsError(
            f"cannot go on from {folder}: of a run with --tune_mm_mlp_adapter, LLaVA saves the projector alone, "
            "without optimizer and step. Start anew in another --output_dir; "
            f"--pretrain_mm_mlp_adapter {adapter} starts from its projector"
        )


def restore(trainer: Any, folder: str) -> None:
    """Bring the projector of a `checkpoint-N` back, or make sure that the Trainer will.

    Raises:
        ProjectorWeightsError: the folder does not have it.
    """
    if any(getattr(trainer, name, False) for name in ("is_deepspeed_enabled", "is_fsdp_enabled")):
        return
    is_adapter = trains_adapter_alone(trainer.model)
    path = os.path.join(folder, weights.TRAINABLES_FILE)
    state = files.load_tensors(path) if is_adapter and os.path.isfile(path) else {}
    found = set(state if is_adapter else weights.find_in_folder(folder).keys)
    for prefix, projector in weights.projectors_of(trainer.model):
        names = [f"{prefix}{name}" for name, _ in projector.named_parameters()]
        lost = weights.problems(dict.fromkeys(names, ()), dict.fromkeys(found.intersection(names), ()))
        if lost:
            raise ProjectorWeightsError(
                f"cannot go on from {folder}: it lacks weights of the projector, whose training up to there would be "
                f"lost ({lost}). Start anew in another --output_dir"
            )
    if state:
        trainer.model.load_state_dict(state, strict=False)
        log(f"going on from {folder}, with its projector")


@contextlib.contextmanager
def frozen_may_be_missing(trainer: Any) -> Iterator[None]:
    """Let DeepSpeed load its checkpoint of a LoRA run, which it saves without frozen parameters.

    transformers before 4.39 has it loaded strictly, so that no LoRA run with DeepSpeed goes on.
    """
    model = trainer.model
    if not (getattr(trainer, "is_deepspeed_enabled", False) and trains_adapter_alone(model)):
        yield
        return
    load = model.load_state_dict

    def load_state_dict(state: Any, strict: bool = True, **kwargs: Any) -> Any:
        result = load(state, strict=False, **kwargs)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        lost = sorted(trained.intersection(result.missing_keys))
        if strict and (lost or result.unexpected_keys):
            raise RuntimeError(f"DeepSpeed's checkpoint is of another model: missing {lost}, {result.unexpected_keys}")
        return result

    model.load_state_dict = load_state_dict
    try:
        yield
    finally:
        del model.load_state_dict


def warn_of_failing_save(trainer: Any) -> None:
    """Say before the first step when transformers will refuse to save the LLM's generation_config, and with it all."""
    config: Any = getattr(trainer.model, "generation_config", None)
    saves_llm = not (trains_adapter_alone(trainer.model) or getattr(trainer.args, "tune_mm_mlp_adapter", False))
    reason = _reason_not_to_save(config) if config is not None and saves_llm else None
    if reason is None:
        return
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    file = f"generation_config.json of {trainer.model.config.name_or_path}"
    helps = _reason_not_to_save(sampling) is None
    remedy = f'set "do_sample": true in the {file}' if helps else f"delete the {file}"
    log(
        f"WARNING: this run would lose its model: transformers refuses to save it ({reason}). Stop, {remedy}, and "
        "start again"
    )


def _reason_not_to_save(config: Any) -> Optional[str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except ValueError as error:
            return " ".join(str(error).split())
    return None
