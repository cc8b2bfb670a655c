"""From a LLaVA checkpoint to a folder for current transformers: the plan, and its execution.

Everything is checked before the first byte is written; the folder is written under a temporary
name beside its place and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

import llava_projectors
from llava_projectors import files, registry
from llava_projectors.export.card import model_card
from llava_projectors.export.checkpoint import IGNORED, Checkpoint, Weight, read_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.templates import TEMPLATES, with_start_token
from llava_projectors.export.tensors import SHARD_BYTES, Output, item_size, write_checkpoint
from llava_projectors.export.tokenizer import END_TOKEN, export_tokenizer, spaces_differ
from llava_projectors.integration import weights
from llava_projectors.integration.forks import SECOND_TOWER_SETTINGS
from llava_projectors.integration.tower import resolve_layers
from llava_projectors.projectors import registration
from llava_projectors.serving.hook import NOT_STOCK
from llava_projectors.serving.travel import AUTO_MAP, DoesNotTravel, write_code

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LLMS = {"llava_llama": "llama", "llava": "llama", "llama": "llama", "llava_mistral": "mistral", "mistral": "mistral"}
# What describes the LLM in LLaVA's config; the rest there is LLaVA's own.
TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "attention_dropout", "mlp_bias",
    "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
VISION_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim",
)  # fmt: skip
TOWER_KINDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# Embedding rows are padded to a multiple of this: tensor parallelism splits them.
ROW_MULTIPLE = 64
OWN_TOWER = "model.vision_tower.vision_tower."


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Attributes:
        checkpoint: what it is made from.
        resolved: the projector's type and options.
        layers: the hidden states that it reads, absolute.
        tower: folder of the vision tower.
        vision_config: of the tower, as transformers writes it.
        text_config: of the LLM, as transformers writes it, without its number of rows.
        tokens: visual tokens of one picture.
        pads: whether pictures are padded to squares first.
        dtype: the name of the dtype of all weights.
    """

    checkpoint: Checkpoint
    resolved: registry.ResolvedSpec
    layers: tuple[int, ...]
    tower: Path
    vision_config: dict[str, Any]
    text_config: dict[str, Any]
    tokens: int
    pads: bool
    dtype: str

    @property
    def patches_per_side(self) -> int:
        """Side of the patch grid."""
        return int(self.vision_config["image_size"] // self.vision_config["patch_size"])

    @property
    def has_cls(self) -> bool:
        """Whether the tower's hidden states start with a CLS token."""
        return bool(self.vision_config["model_type"] == "clip_vision_model")


def local_folder(name: str) -> Path:
    """A folder on disk, or the local copy of a repository on the Hugging Face hub, fetched when it is not there yet.

    Raises:
        ExportError: neither.
    """
    if os.path.isdir(name):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, ignore_patterns=["*.h5", "*.msgpack", "*.ot"]))
    except Exception as error:  # offline, no such repository, no such folder: the remedy is one
        raise ExportError(f"there is no folder {name!r}, and the hub gives none: {error}") from error


def prepare(checkpoint: Checkpoint, dtype: Optional[str] = None) -> Export:
    """Look at everything but the weights.

    Args:
        checkpoint: to export.
        dtype: a name in `DTYPES`; default the one that the LLM is stored in.

    Raises:
        ExportError: the checkpoint has no projector of ours, or something that the export does not cover.
    """
    config, source = checkpoint.config, checkpoint.source
    type_string = config.get("mm_projector_type")
    if type_string is None:
        raise ExportError(f"{source} has no projector: its config.json has no mm_projector_type")
    if registration.LLAVA_TYPES.fullmatch(type_string):
        raise ExportError(
            f"{source} has LLaVA's own projector {type_string!r}: for it use transformers' "
            "convert_llava_weights_to_hf.py, or the checkpoints under llava-hf on the hub; this exports the types "
            f"{', '.join(registry.list_projectors())}"
        )
    aspect = config.get("image_aspect_ratio")
    if str(aspect).startswith(("slice", "anyres")):
        raise ExportError(f"{source} has image_aspect_ratio {aspect!r}: high-resolution tiles cannot be exported yet")
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise ExportError(f"{source} has mm_vision_select_feature {config['mm_vision_select_feature']!r}, not 'patch'")
    if config.get("mm_use_im_start_end"):
        raise ExportError(
            f"{source} has mm_use_im_start_end {config['mm_use_im_start_end']!r}: its prompts put a picture between "
            "<im_start> and <im_end>, which the exported chat template does not"
        )
    for setting in (*SECOND_TOWER_SETTINGS, "s2"):
        if config.get(setting):
            raise ExportError(f"{source} has {setting} {config[setting]!r}: one tower at one scale can be exported")
    if not config.get("mm_vision_tower"):
        raise ExportError(f"{source} names no vision tower: its config.json has no mm_vision_tower")
    resolved = _resolve(type_string, config)
    tower = local_folder(config["mm_vision_tower"])
    vision_config = _vision_config(tower)
    # LLaVA-NeXT's SigLIP tower drops the last layer and offers no choice.
    dropped = 1 if vision_config["model_type"] == "siglip_vision_model" else 0
    select_layer = -1 if dropped else config.get("mm_vision_select_layer", -2)
    side = vision_config["image_size"] // vision_config["patch_size"]
    return Export(
        checkpoint,
        resolved,
        resolve_layers(resolved, vision_config["num_hidden_layers"] - dropped, select_layer),
        tower,
        vision_config,
        _text_config(config, source),
        resolved.output_side(side) ** 2,
        aspect == "pad",
        dtype or _stored_dtype(checkpoint),
    )


def _resolve(type_string: str, config: Mapping[str, Any]) -> registry.ResolvedSpec:
    class Attributes:
        scale_factor = None

    attributes = Attributes()
    vars(attributes).update(config)
    return registry.resolve(type_string, attributes)


def _vision_config(tower: Path) -> dict[str, Any]:
    config = files.read_config(tower)
    kind = TOWER_KINDS.get(str(config.get("model_type")), config.get("model_type"))
    if kind not in TOWER_KINDS.values():
        raise ExportError(f"the vision tower {tower} is a {kind!r}: CLIP and SigLIP can be exported")
    from transformers import CONFIG_MAPPING

    given = config.get("vision_config", config)
    settings = CONFIG_MAPPING[str(kind)](**given).to_dict()
    return {"model_type": kind, **{key: settings[key] for key in VISION_KEYS if key in settings}}


def _text_config(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    model_type = config.get("model_type")
    if model_type not in LLMS:
        raise ExportError(f"{source} has an LLM of model_type {model_type!r}: {', '.join(LLMS)} can be exported")
    from transformers import CONFIG_MAPPING

    kind = LLMS[str(model_type)]
    usual = CONFIG_MAPPING[kind]()
    # None is written where it is not what the class takes by itself, as for Mistral's sliding_window.
    settings = {
        key: config[key]
        for key in TEXT_KEYS
        if config.get(key) is not None or (key in config and getattr(usual, key, None) is not None)
    }
    # The head is written out, also where the checkpoint shares it with the embeddings.
    return {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        **settings,
        "tie_word_embeddings": False,
    }


def plan_weights(export: Export, image_token: int, num_tokens: int) -> list[Output]:
    """Every tensor of the folder, checked against the shapes that the models have.

    Args:
        export: what is to be written.
        image_token: the id of `<image>`, the last unless the tokenizer had it before.
        num_tokens: ids of the tokenizer.

    Raises:
        ProjectorWeightsError: the projector's weights are not whole, or another type's.
        ExportError: the LLM's or the tower's are not.
    """
    source = dict(export.checkpoint.weights)
    rows = -(-num_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
    num_known = image_token if image_token == num_tokens - 1 else num_tokens

    with torch.device("meta"):
        projector = export.resolved.build(export.vision_config["hidden_size"], export.text_config["hidden_size"])
        llm_shapes = _model_shapes(export.text_config, "AutoModelForCausalLM")
        tower_shapes = _model_shapes(export.vision_config, "AutoModel")
    projector_weights = {name: source.pop(key) for name, key in files.projector_keys(source).items()}
    _check_projector(export, projector, projector_weights)

    tower = {key[len(OWN_TOWER) :]: source.pop(key) for key in list(source) if key.startswith(OWN_TOWER)}
    if not (tower and _has_trained_tower(export.checkpoint.config)):
        # LLaVA too loads a frozen tower from where it came from.
        found = files.checkpoint_tensors(export.tower)
        tower = {key: Weight(stored) for key, stored in found.items() if not IGNORED.search(key)}
    tower = {f"vision_model.{_bare(key)}": weight for key, weight in tower.items() if _bare(key) in tower_shapes}
    _check(tower, {f"vision_model.{key}": shape for key, shape in tower_shapes.items()}, f"the tower {export.tower}")

    if "lm_head.weight" not in source and export.checkpoint.config.get("tie_word_embeddings"):
        source["lm_head.weight"] = source["model.embed_tokens.weight"]
    known_rows = {"model.embed_tokens.weight": (), "lm_head.weight": ()}
    _check(source, {**llm_shapes, **known_rows}, str(export.checkpoint.source))

    outputs = [Output(f"model.vision_tower.{key}", weight.shape, weight.read) for key, weight in tower.items()]
    outputs += [
        Output(f"model.multi_modal_projector.{name}", weight.shape, weight.read)
        for name, weight in projector_weights.items()
    ]
    for key, weight in source.items():
        new = key if key == "lm_head.weight" else f"model.language_model.{key[len('model.') :]}"
        if key in known_rows:
            outputs.append(Output(new, (rows, weight.shape[1]), _padded(weight, num_known, rows)))
        else:
            outputs.append(Output(new, weight.shape, weight.read))
    return outputs


def _has_trained_tower(config: Mapping[str, Any]) -> bool:
    """Whether LLaVA, or LLaVA-NeXT by its list of parts, takes the tower from the checkpoint."""
    return bool(
        config.get("unfreeze_mm_vision_tower") or "mm_vision_tower" in (config.get("mm_tunable_parts") or "").split(",")
    )


def _model_shapes(config: Mapping[str, Any], auto_class: str) -> weights.Shapes:
    """Parameter name -> shape of a stock model, names without `vision_model.`, which transformers 5 has dropped."""
    import transformers

    made = transformers.CONFIG_MAPPING[config["model_type"]](**config)
    model = getattr(transformers, auto_class).from_config(made)
    return {_bare(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _bare(key: str) -> str:
    return key[len("vision_model.") :] if key.startswith("vision_model.") else key


def _check_projector(export: Export, projector: Any, found: Mapping[str, Weight]) -> None:
    shapes = {name: weight.shape for name, weight in found.items()}
    wrong = weights.problems(weights.expected_shapes(projector), shapes)
    if wrong:
        raise files.ProjectorWeightsError(
            f"the projector {export.resolved.type_string!r} does not get its weights from {export.checkpoint.source}: "
            f"{wrong}. {weights.likely_cause(projector, shapes, export.checkpoint.weights)}"
        )


def _check(found: Mapping[str, Weight], expected: weights.Shapes, source: str) -> None:
    wrong = weights.problems(expected, {name: weight.shape for name, weight in found.items()})
    if wrong:
        raise ExportError(f"{source} is not whole or of another model: {wrong}")


def _padded(weight: Weight, known: int, rows: int) -> Callable[[], torch.Tensor]:
    """Rows beyond the `known` tokens are the mean of theirs, whose logit is never the largest."""

    def make() -> torch.Tensor:
        own = weight.read()[:known]
        mean = own.float().mean(0, keepdim=True).to(own.dtype)
        return torch.cat([own, mean.expand(rows - len(own), -1)])

    return make


def folder_config(export: Export, image_token: int, rows: int) -> dict[str, Any]:
    """The exported `config.json`, but for `auto_map`."""
    options = dict(export.resolved.options)
    if "layers" in options:
        options["layers"] = export.layers
    return {
        "model_type": "llava",
        "architectures": ["LlavaProjectorsForConditionalGeneration"],
        "mm_projector_type": export.resolved.type_string,
        "mm_projector_options": {
            name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
        },
        "llava_projectors_version": llava_projectors.__version__,
        "projector_hidden_act": NOT_STOCK,
        "image_token_index": image_token,
        "image_seq_length": export.tokens,
        "vision_feature_layer": list(export.layers),
        "vision_feature_select_strategy": "default" if export.has_cls else "full",
        "tie_word_embeddings": False,
        "torch_dtype": export.dtype,
        "vision_config": export.vision_config,
        "text_config": {**export.text_config, "vocab_size": rows},
    }


def write_processor(export: Export, target: Path) -> None:
    """Write what `LlavaProcessor` reads: the picture's road into the tower, and the number of tokens."""
    path = export.tower / "preprocessor_config.json"
    settings = files.read_json(path)
    for name in ("image_processor_type", "feature_extractor_type", "processor_class", "_processor_class"):
        settings.pop(name, None)
    kind = "CLIPImageProcessor" if export.has_cls else "SiglipImageProcessor"
    if export.pads:
        kind = "LlavaImageProcessor"
        settings["do_pad"] = True
        settings.setdefault("do_center_crop", "crop_size" in settings)
    settings = {"image_processor_type": kind, **settings, "processor_class": "LlavaProcessor"}
    _write_json(target / "preprocessor_config.json", settings)
    # transformers counts the patches, adds this number, and takes one off for the CLS token of "default".
    additional = export.tokens - export.patches_per_side**2 + export.has_cls
    _write_json(
        target / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": export.vision_config["patch_size"],
            "num_additional_image_tokens": additional,
            "vision_feature_select_strategy": "default" if export.has_cls else "full",
            "image_token": "<image>",
        },
    )


def export_checkpoint(
    source: str,
    target: Path,
    base: Optional[str] = None,
    dtype: Optional[str] = None,
    conversation: Optional[str] = None,
    progress: Callable[[Sequence[Output]], Iterable[Output]] = iter,
    shard_bytes: int = SHARD_BYTES,
) -> Export:
    """Write a LLaVA checkpoint as a folder for current transformers and vLLM.

    Args:
        source: folder or hub name of a full checkpoint, a projector or a LoRA adapter.
        target: folder to make; must not exist.
        base: the LLM, or full checkpoint, below a projector or an adapter.
        dtype: a name in `DTYPES`; default the one that the checkpoint is stored in.
        conversation: a name in `TEMPLATES`; default by the LLM.
        progress: wraps the tensors as they are written.
        shard_bytes: largest size of a file of weights.

    Raises:
        ExportError: the checkpoint cannot be exported, or the target cannot be written.
        ProjectorWeightsError: the projector's weights are not whole, or a file is missing or cut off.
        ProjectorSpecError: its type string or options are not valid, or a config cannot be read.
    """
    if target.exists():
        raise ExportError(f"{target} exists already: name another folder, or remove it")
    checkpoint = read_checkpoint(local_folder(source), None if base is None else local_folder(base))
    export = prepare(checkpoint, dtype)
    torch_dtype = DTYPES[export.dtype]
    chosen = conversation or ("mistral_instruct" if export.text_config["model_type"] == "mistral" else "vicuna_v1")
    template = TEMPLATES[chosen]
    with _temporary_folder(target) as folder:
        image_token, num_tokens, has_end = export_tokenizer(checkpoint.tokenizer, folder, template)
        if conversation is None and not has_end:
            raise ExportError(
                f"{source} has a tokenizer without {END_TOKEN!r}, with which answers end in every conversation that "
                f"can be exported ({', '.join(TEMPLATES)}). If it was trained in one of them all the same, for "
                "example by --version v1, pass that as --conv-mode"
            )
        (folder / "chat_template_vllm.jinja").write_text(with_start_token(template), encoding="utf-8")
        outputs = plan_weights(export, image_token, num_tokens)
        _check_room(folder, outputs, torch_dtype)
        write_processor(export, folder)
        rows = next(output.shape[0] for output in outputs if output.key == "lm_head.weight")
        config = folder_config(export, image_token, rows)
        try:
            write_code(export.resolved.type_string, folder)
            config["auto_map"] = AUTO_MAP
            travels = None
        except DoesNotTravel as reason:
            travels = str(reason)
        _write_json(folder / "config.json", config)
        ids = {name: config["text_config"].get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
        spaces = spaces_differ(checkpoint.tokenizer)
        card = model_card(config, str(source), base, target.name, chosen, travels, spaces)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_checkpoint(folder, outputs, torch_dtype, progress, shard_bytes)
    return export


def _stored_dtype(checkpoint: Checkpoint) -> str:
    stored = checkpoint.weights.get("model.norm.weight")
    names = [name for name, dtype in DTYPES.items() if stored is not None and stored.stored.dtype == dtype]
    if not names:
        raise ExportError(
            f"{checkpoint.source} stores the LLM in no dtype of {', '.join(DTYPES)}: a quantised checkpoint cannot be "
            "exported; pass --dtype if it only lacks model.norm.weight"
        )
    return names[0]


def _check_room(folder: Path, outputs: Sequence[Output], dtype: torch.dtype) -> None:
    needed = sum(torch.Size(output.shape).numel() for output in outputs) * item_size(dtype)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"the export takes {needed / 1e6:.1f} MB and {folder.parent} has {free / 1e6:.1f} MB free: "
            "make room, or name a folder on another disk"
        )


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it at the end, and is removed when something fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(f"cannot write beside {target}: {error}") from error
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.rename(target)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}. Nothing of it is left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
