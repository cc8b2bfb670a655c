"""LLaVA's checkpoints on disk: full, projector + base, LoRA + base; which tensor is where, under one set of names.

Nothing is loaded: a `Weight` knows its shape and reads itself, LoRA merged, when it is asked to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from llava_projectors import files
from llava_projectors.export.errors import ExportError
from llava_projectors.files import StoredTensor, stored_tensors

# What an adapter may ask for beyond `lora_alpha / r`, each of which is merged in another way.
OTHER_MERGES = (
    "use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
)  # fmt: skip
# Buffers that old versions of transformers saved.
IGNORED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")


@dataclass(frozen=True)
class LoraDelta:
    """What LoRA adds to a weight: `scale * up @ down`."""

    down: StoredTensor
    up: StoredTensor
    scale: float


@dataclass(frozen=True)
class Weight:
    """A weight of a checkpoint, not read yet."""

    stored: StoredTensor
    delta: Optional[LoraDelta] = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape

    def read(self) -> torch.Tensor:
        """The weight; with LoRA merged in float32, and then in float32."""
        tensor = self.stored.read()
        if self.delta is None:
            return tensor
        product = self.delta.up.read().float() @ self.delta.down.read().float()
        return tensor.float().add_(product, alpha=self.delta.scale)


@dataclass(frozen=True)
class Checkpoint:
    """A LLaVA checkpoint.

    Attributes:
        source: its folder.
        config: of its `config.json`.
        weights: name -> weight, named as in a full LLaVA checkpoint.
        llm: the folder that LLaVA's loader takes the LLM and its tokenizer from.
    """

    source: Path
    config: dict[str, Any]
    weights: Mapping[str, Weight]
    llm: Path


def read_checkpoint(source: Path, base: Optional[Path] = None) -> Checkpoint:
    """Find out what kind of checkpoint `source` is, and where its weights are.

    Args:
        source: a full checkpoint, or a folder with `mm_projector.bin` or a LoRA adapter.
        base: the LLM, or full LLaVA checkpoint, that the last two kinds were trained on.

    Raises:
        ExportError: the base is missing or one too many, or the adapter is of another kind.
        ProjectorSpecError: a config cannot be read.
        ProjectorWeightsError: a file of weights is missing or cut off.
    """
    adapters = [name for name in ("mm_projector.bin", "adapter_config.json") if (source / name).is_file()]
    _refuse_half_adapter(source, adapters)
    config = files.read_config(source)
    _refuse_wrong_base(source, adapters, base)
    tensors = dict(files.checkpoint_tensors(source if base is None else base))
    deltas: dict[str, LoraDelta] = {}
    if base is not None and "adapter_config.json" in adapters:
        tensors.update(_plain_names(stored_tensors(source / "non_lora_trainables.bin")))
        deltas = _lora_deltas(source, tensors)
    elif base is not None:
        tensors.update(_plain_names(stored_tensors(source / "mm_projector.bin")))
    weights = {name: Weight(stored, deltas.get(name)) for name, stored in tensors.items() if not IGNORED.search(name)}
    return Checkpoint(source, config, weights, source if base is None else base)


def _refuse_wrong_base(source: Path, adapters: Sequence[str], base: Optional[Path]) -> None:
    """Raise unless a folder is a full checkpoint without a base, or an adapter with one."""
    has_own = files.has_weights(source)
    if has_own and "adapter_config.json" in adapters:
        raise ExportError(
            f"{source} holds a full checkpoint and adapter_config.json, by which transformers would load the base that "
            "it names in the checkpoint's place: move one of them away"
        )
    if has_own and base is not None:
        raise ExportError(f"{source} is a full checkpoint: leave --model-base {base} out")
    if base is not None and not adapters:
        raise ExportError(f"{source} has neither mm_projector.bin nor a LoRA adapter to put on --model-base {base}")
    if not has_own and base is None:
        _refuse_without_llm(source, adapters)


def _refuse_without_llm(source: Path, adapters: Sequence[str]) -> None:
    """Raise for an adapter, and for what DeepSpeed saves."""
    if adapters:
        raise ExportError(
            f"{source} holds {adapters[0]} and no LLM: pass --model-base with the model that it was trained on"
        )
    if (source / "zero_to_fp32.py").is_file():
        raise ExportError(
            f"{source} holds the parts that DeepSpeed resumes from, and no weights: run `python zero_to_fp32.py . "
            "pytorch_model.bin` in it first"
        )


def _refuse_half_adapter(source: Path, adapters: Collection[str]) -> None:
    """Raise for what peft saves within a LoRA run: the adapter, without the projector."""
    if "adapter_config.json" in adapters and not (source / "non_lora_trainables.bin").is_file():
        raise ExportError(
            f"{source} has a LoRA adapter and no non_lora_trainables.bin, in which the projector is. A checkpoint-N of "
            "before llava_projectors 0.2.0 lacks it; LLaVA's script writes it when the run has ended, into the folder "
            "above: export that one"
        )


def _plain_names(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """As in a full checkpoint: the projector's, however they begin, and the others as LLaVA's loader renames them."""
    ours = {key: f"model.mm_projector.{name}" for name, key in files.projector_keys(tensors).items()}
    others = {key: key.removeprefix("base_model.") for key in tensors if key not in ours}
    if any(name.startswith("model.model.") for name in others.values()):
        others = {key: name.removeprefix("model.") for key, name in others.items()}
    return {name: tensors[key] for key, name in (others | ours).items()}


def _lora_deltas(source: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, LoraDelta]:
    """Weight name -> what the adapter adds to it.

    Raises:
        ExportError: a kind of adapter that would be merged in another way, or one that does not fit its base or its
            own settings.
    """
    path = source / "adapter_config.json"
    settings = files.read_json(path)
    scale = _lora_scale(path, settings)
    targets = _lora_targets(path, settings)
    pairs = _lora_pairs(source, tensors)
    for weight, pair in pairs.items():
        if not targets.fullmatch(weight.removesuffix(".weight")):
            raise ExportError(
                f"{path} has target_modules {settings['target_modules']!r}, and the adapter has weights for {weight}, "
                "which LLaVA would not load: copy the adapter and its config from one run"
            )
        (rows, columns), rank = tensors[weight].shape, settings["r"]
        expected, found = {"A": (rank, columns), "B": (rows, rank)}, {part: pair[part].shape for part in "AB"}
        if found != expected:
            raise ExportError(
                f"{pair['A'].path} has LoRA weights of the shapes {found} for {weight}; its base and r {rank!r} of "
                f"{path.name} need {expected}: pass the base that it was trained on, and the config of its run"
            )
    return {weight: LoraDelta(pair["A"], pair["B"], scale) for weight, pair in pairs.items()}


def _lora_pairs(source: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Name of a matrix of the base -> the adapter's `A` and `B` for it."""
    names = ("adapter_model.safetensors", "adapter_model.bin")
    path = next((source / name for name in names if (source / name).is_file()), None)
    if path is None:
        raise ExportError(f"{source} has adapter_config.json and no adapter_model.bin: copy it whole")
    parts: dict[str, dict[str, StoredTensor]] = {}
    for key, stored in stored_tensors(path).items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight", key)
        if found is None:
            raise ExportError(f"{path} holds {key!r}, which is no LoRA weight")
        parts.setdefault(f"{found[1]}.weight", {})[found[2]] = stored
    if not parts:
        raise ExportError(f"{path} holds no LoRA weights: copy it again, or export the base by itself")
    for weight, pair in parts.items():
        if weight not in tensors or len(tensors[weight].shape) != 2 or pair.keys() != {"A", "B"}:
            raise ExportError(f"{path} does not fit its base: {weight} has no match for {', '.join(pair)}")
    return parts


def _lora_targets(path: Path, settings: Mapping[str, Any]) -> re.Pattern[str]:
    """The modules that peft puts an adapter's weights into: a list of last parts of names, or an expression."""
    targets = settings.get("target_modules")
    if isinstance(targets, list) and all(isinstance(target, str) for target in targets):
        return re.compile(rf"(?:.*\.)?(?:{'|'.join(map(re.escape, targets))})")
    try:
        return re.compile(targets)  # type: ignore[arg-type]
    except (re.error, TypeError):
        raise ExportError(
            f"{path} has target_modules {targets!r}, not the names of modules: copy the config of the adapter's run"
        ) from None


def _lora_scale(path: Path, settings: Mapping[str, Any]) -> float:
    """By what the product of an adapter's weights is multiplied.

    Raises:
        ExportError: a kind of adapter that would be merged in another way, or no numbers.
    """
    strange = [f"{name}={settings[name]}" for name in OTHER_MERGES if settings.get(name)]
    if settings.get("layers_to_transform") is not None:  # 0 is a layer
        strange.append(f"layers_to_transform={settings['layers_to_transform']}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start != "gaussian":  # they change the base's own weights
        strange.append(f"init_lora_weights={start}")
    if settings.get("peft_type") != "LORA" or strange:
        raise ExportError(
            f"{path} asks for {', '.join(strange) or settings.get('peft_type')}, which LLaVA's scripts do not train; "
            "merge it with peft and export the merged checkpoint"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, (int, float))):
        raise ExportError(
            f"{path} has r {rank!r} and lora_alpha {alpha!r}, not a rank of at least 1 and a number: copy the config "
            "of the adapter's run"
        )
    return float(alpha / rank)
