"""From a LLaVA checkpoint to a folder for current transformers: the plan, and its execution.

Everything is checked before the first byte is written; the folder is written under a temporary
name beside its place and renamed when it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch

import llava_projectors
from llava_projectors import files, registry
from llava_projectors.export.card import model_card
from llava_projectors.export.checkpoint import Checkpoint, Weight, read_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.folders import check_room, local_folder, temporary_folder, write_json
from llava_projectors.export.llm import LLMS, generation_config, text_config
from llava_projectors.export.pictures import image_layout, processor_settings
from llava_projectors.export.settings import refuse_other_class, refuse_other_grid, refuse_settings_of_forks
from llava_projectors.export.templates import ChatTemplate, between_marks, by_own_template, choose, write_templates
from llava_projectors.export.tensors import SHARD_BYTES, Output, write_checkpoint
from llava_projectors.export.tokenizer import Exported, export_tokenizer, spaces_differ
from llava_projectors.export.tower import (
    INNER,
    OWN,
    Tower,
    check_whole,
    read_tower,
    refuse_left_over,
    refuse_quantised,
    tower_weights,
)
from llava_projectors.integration import weights
from llava_projectors.integration.tower import resolve_layers
from llava_projectors.projectors import registration
from llava_projectors.serving.hook import NOT_STOCK
from llava_projectors.serving.layout import Layout, as_settings
from llava_projectors.serving.travel import AUTO_MAP, DoesNotTravel, write_code

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Embedding rows are padded to a multiple of this: tensor parallelism splits them.
ROW_MULTIPLE = 64
NEWLINE = "model.image_newline"


@dataclass(frozen=True)
class Export:
    """What is to be written.

    Attributes:
        checkpoint: what it is made from.
        resolved: the projector's type and options.
        layers: the hidden states that it reads, absolute.
        tower: the vision tower.
        text_config: of the LLM, as transformers writes it, without its number of rows.
        layout: how the visual tokens of a picture lie in the LLM's input.
        dtype: the name of the dtype of all weights.
        conversation: the name of the chat template; "" until it is chosen.
    """

    checkpoint: Checkpoint
    resolved: registry.ResolvedSpec
    layers: tuple[int, ...]
    tower: Tower
    text_config: dict[str, Any]
    layout: Layout
    dtype: str
    conversation: str = ""

    @property
    def tokens(self) -> int:
        """Visual tokens of one tile."""
        return self.layout.token_side**2


def prepare(checkpoint: Checkpoint, dtype: Optional[str] = None, vision_tower: Optional[str] = None) -> Export:
    """Look at everything but the weights.

    Args:
        checkpoint: to export.
        dtype: a name in `DTYPES`; default the one that the LLM is stored in.
        vision_tower: folder or hub name of the tower; default the checkpoint's `mm_vision_tower`.

    Raises:
        ExportError: the checkpoint has no projector of ours, or something that the export does not cover.
    """
    config, source = checkpoint.config, checkpoint.source
    type_string = _our_type(config, source)
    _refuse_unsupported(config, source)
    text = text_config(config, source)
    refuse_other_class(config, source)
    tower = read_tower(_tower_folder(config, source, vision_tower), config)
    refuse_other_grid(config, source, tower.patch_side)
    resolved = _resolve(type_string, config)
    return Export(
        checkpoint,
        resolved,
        resolve_layers(resolved, tower.config["num_hidden_layers"], tower.select_layer),
        tower,
        text,
        image_layout(config, source, tower.tile_side, resolved.output_side(tower.patch_side)),
        dtype or _stored_dtype(checkpoint),
    )


def _tower_folder(config: Mapping[str, Any], source: Path, vision_tower: Optional[str]) -> Path:
    """Where the vision tower is; arguments and errors as of `prepare`."""
    name = vision_tower or config.get("mm_vision_tower")
    if not name:
        raise ExportError(
            f"{source} names no vision tower: its config.json has no mm_vision_tower; pass --vision-tower"
        )
    if not isinstance(name, str):
        raise ExportError(f"the config.json of {source} has mm_vision_tower {name!r}, not a name; pass --vision-tower")
    role = "--vision-tower" if vision_tower else f"mm_vision_tower in the config.json of {source}"
    folder = local_folder(name, role, "Pass --vision-tower with the folder that it is in now")
    beside = source / "vision_tower"
    if not vision_tower and files.has_weights(beside) and folder.resolve() != beside.resolve():
        raise ExportError(
            f"{beside} is a vision tower too, as ShareGPT4Video and ConvLLaVA save the one that they trained, and "
            f"mm_vision_tower in the config.json is {name!r}: pass --vision-tower with the one to export"
        )
    return folder


def _our_type(config: Mapping[str, Any], source: Path) -> str:
    type_string = config.get("mm_projector_type")
    if "image_layout" in config:
        raise ExportError(f"{source} is an exported folder already: name the checkpoint that it was made from")
    if type_string is None:
        raise ExportError(f"{source} has no projector: its config.json has no mm_projector_type")
    if not isinstance(type_string, str):
        raise ExportError(f"the config.json of {source} has mm_projector_type {type_string!r}, which is no type string")
    if registration.LLAVA_TYPE_PATTERN.fullmatch(type_string):
        raise ExportError(
            f"{source} has LLaVA's own projector {type_string!r}: for it use transformers' "
            "convert_llava_weights_to_hf.py, or the checkpoints under llava-hf on the hub; this exports the types "
            f"{', '.join(registry.list_projectors())}"
        )
    return type_string


def _refuse_unsupported(config: Mapping[str, Any], source: Path) -> None:
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise ExportError(f"{source} has mm_vision_select_feature {config['mm_vision_select_feature']!r}, not 'patch'")
    if config.get("s2"):
        raise ExportError(f"{source} has s2 {config['s2']!r}: one tower at one scale can be exported")
    if config.get("mm_resampler_type"):
        raise ExportError(
            f"{source} has mm_resampler_type {config['mm_resampler_type']!r}: what LLaVA-NeXT puts between tower and "
            "projector cannot be exported"
        )
    refuse_settings_of_forks(config, source)


def _resolve(type_string: str, config: Mapping[str, Any]) -> registry.ResolvedSpec:
    class Attributes:
        scale_factor = None

    attributes = Attributes()
    vars(attributes).update(config)
    return registry.resolve(type_string, attributes)


def plan_weights(export: Export, tokenizer: Exported) -> list[Output]:
    """Every tensor of the folder, checked against the shapes that the models have.

    Args:
        export: what is to be written.
        tokenizer: of the folder.

    Raises:
        ProjectorWeightsError: the projector's weights are not whole, or another type's.
        ExportError: the LLM's or the tower's are not.
    """
    source = dict(export.checkpoint.weights)
    with torch.device("meta"):
        llm_shapes = shapes_of_llm(export.text_config, export.checkpoint.source)
        tower_shapes = model_shapes(export.tower.config, "AutoModel", export.tower.folder)
        projector = export.resolved.build(export.tower.config["hidden_size"], export.text_config["hidden_size"])
    ours = [key for key in source if key.startswith(weights.PLACE)]
    projector_weights = {key.removeprefix(weights.PLACE): source.pop(key) for key in ours}
    refuse_quantised(projector_weights, f"the projector in {export.checkpoint.source}")
    _check_projector(export, projector, projector_weights)
    tower = tower_weights(export.tower, export.checkpoint, tower_shapes)
    llm = {key: weight for key, weight in source.items() if not key.startswith(OWN)}
    newline = llm.pop(NEWLINE, None)
    return [
        *_stored("model.vision_tower.", tower),
        *_stored("model.multi_modal_projector.", projector_weights),
        *_newline(export, newline),
        *_llm(export.checkpoint, llm, llm_shapes, tokenizer),
    ]


def _stored(prefix: str, found: Mapping[str, Weight]) -> list[Output]:
    return [Output(f"{prefix}{name}", weight.shape, weight.read) for name, weight in found.items()]


def _newline(export: Export, found: Optional[Weight]) -> list[Output]:
    if not export.layout.newline:
        return []
    if found is None:
        raise ExportError(f"{export.checkpoint.source} lacks {NEWLINE}, which its mm_patch_merge_type needs")
    return _stored("", {NEWLINE: found})


def _llm(checkpoint: Checkpoint, found: dict[str, Weight], shapes: weights.Shapes, tokenizer: Exported) -> list[Output]:
    """The LLM's tensors, with a row of embeddings and head for each token: LLaVA's loader cuts off the others."""
    tables = embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    if checkpoint.config.get("tie_word_embeddings") and embeddings in found:
        found[head] = found[embeddings]  # as LLaVA's loader has it, whatever the file holds for the head
    expected = {**shapes, **dict.fromkeys(tables, ())}
    refuse_left_over(found.keys() - expected.keys(), checkpoint.source)
    check_whole(found, expected, str(checkpoint.source))
    rows = -(-tokenizer.count // ROW_MULTIPLE) * ROW_MULTIPLE
    known = tokenizer.image if tokenizer.image == tokenizer.count - 1 else tokenizer.count
    _refuse_other_rows(checkpoint, {key: (found[key].shape[0], shapes[key][0]) for key in tables}, tokenizer.pieces)
    outputs = []
    for key, weight in found.items():
        name = key if key == head else f"model.language_model.{key.removeprefix('model.')}"
        if key in tables:
            outputs.append(Output(name, (rows, weight.shape[1]), _padded(weight, known, rows)))
        else:
            outputs.append(Output(name, weight.shape, weight.read))
    return outputs


def _refuse_other_rows(checkpoint: Checkpoint, rows: Mapping[str, tuple[int, int]], pieces: int) -> None:
    """Raise unless the tables have the rows (found, expected) that LLaVA loads, one at least for each piece of text.

    Some bases name a `<pad>` for which they have no row: LLaVA does without it.
    """
    for key, (found, expected) in rows.items():
        if found != expected:
            raise ExportError(
                f"{checkpoint.llm} has {found} rows in {key}, and the config.json of {checkpoint.source} has "
                f"vocab_size {expected}, with which LLaVA does not load it: copy weights and config from one run"
            )
        if found < pieces:
            raise ExportError(
                f"{checkpoint.llm} has {found} rows in {key}, and its tokenizer has {pieces} pieces of text: copy the "
                "tokenizer that the model was trained with"
            )


def shapes_of_llm(text: Mapping[str, Any], source: Path) -> weights.Shapes:
    """As `model_shapes`, of an LLM: by Llama's class, where the stack may have none of its own."""
    fused = LLMS[text["model_type"]].fused
    if not fused:
        return model_shapes(text, "AutoModelForCausalLM", source)
    shapes = model_shapes({**text, "model_type": "llama", "rope_scaling": None}, "AutoModelForCausalLM", source)
    for name, parts in fused.items():
        for first in [key for key in shapes if f".{parts[0]}." in key]:
            found = [shapes.pop(first.replace(parts[0], part)) for part in parts]
            shapes[first.replace(parts[0], name)] = (sum(rows for rows, _ in found), found[0][1])
    return shapes


def model_shapes(config: Mapping[str, Any], auto_class: str, source: Path) -> weights.Shapes:
    """Parameter name -> shape of a stock model, names without `vision_model.`, which transformers 5 has dropped."""
    import transformers

    try:
        made = transformers.CONFIG_MAPPING[config["model_type"]](**config)
        model = getattr(transformers, auto_class).from_config(made)
    except Exception as error:  # of any kind, from deep within, by a setting of a wrong kind
        raise ExportError(
            f"the config.json of {source} has a setting with which transformers cannot build a {config['model_type']} "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): copy it again"
        ) from error
    return {name.removeprefix(INNER): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_projector(export: Export, projector: Any, found: Mapping[str, Weight]) -> None:
    shapes = {name: weight.shape for name, weight in found.items()}
    wrong = weights.problems(weights.expected_shapes(projector), shapes)
    if wrong:
        raise files.ProjectorWeightsError(
            f"the projector {export.resolved.type_string!r} does not get its weights from {export.checkpoint.source}: "
            f"{wrong}. {weights.likely_cause(projector, shapes, export.checkpoint.weights)}"
        )


def _padded(weight: Weight, known: int, rows: int) -> Callable[[], torch.Tensor]:
    """Rows beyond the `known` tokens are the mean of theirs, whose logit is never the largest."""

    def make() -> torch.Tensor:
        own = weight.read()[:known]
        mean = own.float().mean(0, keepdim=True).to(own.dtype)
        return torch.cat([own, mean.expand(rows - len(own), -1)])

    return make


def folder_config(
    resolved: registry.ResolvedSpec,
    layers: tuple[int, ...],
    tower: Tower,
    text: Mapping[str, Any],
    layout: Layout,
    image_token: int,
    rows: int,
    dtype: str,
) -> dict[str, Any]:
    """An exported `config.json`, but for `auto_map`; see `Export`.

    Args:
        resolved: the projector's type and options.
        layers: the hidden states that it reads, absolute.
        tower: the vision tower.
        text: config of the LLM.
        layout: of a picture.
        image_token: the id of `<image>`.
        rows: of the embeddings.
        dtype: of all weights.
    """
    options = dict(resolved.options)
    if "layers" in options:
        options["layers"] = layers
    return {
        "model_type": "llava",
        "architectures": ["LlavaProjectorsForConditionalGeneration"],
        "mm_projector_type": resolved.type_string,
        "mm_projector_options": {
            name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
        },
        "llava_projectors_version": llava_projectors.__version__,
        "projector_hidden_act": NOT_STOCK,
        "image_token_index": image_token,
        "image_seq_length": layout.positions((1, 1)),
        "image_layout": as_settings(layout),
        "vision_feature_layer": list(layers),
        "vision_feature_select_strategy": "full" if tower.is_siglip else "default",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vision_config": tower.config,
        "text_config": {**text, "vocab_size": rows},
    }


def write_processor(layout: Layout, tower: Tower, target: Path, travels: bool = True) -> None:
    """Write what the processors read: the picture's road into the tower, and how it lies in the LLM's input.

    Args:
        layout: of a picture.
        tower: the vision tower.
        target: folder to write to.
        travels: whether their code lies beside them.
    """
    settings = processor_settings(layout, tower.folder, tower.tile_side, tower.is_siglip)
    processor = {"processor_class": settings["processor_class"], "auto_map": settings["auto_map"]}
    if not travels:
        del settings["auto_map"], processor["auto_map"]
    write_json(target / "preprocessor_config.json", settings)
    write_json(target / "processor_config.json", processor)


def export_checkpoint(
    source: str,
    target: Path,
    base: Optional[str] = None,
    dtype: Optional[str] = None,
    conversation: Optional[str] = None,
    progress: Callable[[Sequence[Output]], Iterable[Output]] = iter,
    shard_bytes: int = SHARD_BYTES,
    vision_tower: Optional[str] = None,
    chat_template: Optional[Path] = None,
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
        vision_tower: folder or hub name of the tower, where the checkpoint's own is not there any more.
        chat_template: a file in Jinja, in the place of `conversation`.

    Raises:
        ExportError: the checkpoint cannot be exported, or the target cannot be written.
        ProjectorWeightsError: the projector's weights are not whole, or a file is missing or cut off.
        ProjectorSpecError: its type string or options are not valid, or a config cannot be read.
    """
    _refuse_old_transformers()
    if target.exists():
        raise ExportError(f"{target} exists already: name another folder, or remove it")
    export = prepare(_located(source, base), dtype, vision_tower)
    llm = export.checkpoint.llm
    with temporary_folder(target) as folder:
        tokenizer = export_tokenizer(llm, folder)
        template = _template(export, tokenizer, folder, conversation, chat_template)
        write_templates(template, tokenizer.adds_start, folder)
        outputs = plan_weights(export, tokenizer)
        check_room(folder, outputs, DTYPES[export.dtype])
        config, travels_not = _write_settings(export, tokenizer.image, outputs, folder)
        card = model_card(config, str(source), base, target.name, template.name, travels_not, spaces_differ(llm))
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_checkpoint(folder, outputs, DTYPES[export.dtype], progress, shard_bytes)
    return replace(export, conversation=template.name)


def _template(
    export: Export, tokenizer: Exported, folder: Path, conversation: Optional[str], file: Optional[Path]
) -> ChatTemplate:
    """The chat template of a folder that has its tokenizer; `conversation` and `file` are the user's."""
    checkpoint = export.checkpoint
    if conversation is None and file is None:
        conversation = by_own_template(checkpoint.config, checkpoint.llm, folder)
    kind = export.text_config["model_type"]
    template = choose(kind, tokenizer.tokens, conversation, file, checkpoint.source)
    if checkpoint.config.get("mm_use_im_start_end"):
        return between_marks(template, tokenizer.tokens, checkpoint.source)
    return template


def _refuse_old_transformers() -> None:
    """Raise where transformers has other auto classes and tokens than LLaVA 1.2 was written for; some forks pin it."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 36):
        raise ExportError(
            f"transformers {transformers.__version__} is too old to export with: run it in an environment with 4.36 or "
            "newer, where nothing of the code that trained is needed"
        )


def _located(source: str, base: Optional[str]) -> Checkpoint:
    folder = local_folder(source, "the checkpoint", "Name the folder that LLaVA's script wrote")
    remedy = "Name the model that was trained on"
    return read_checkpoint(folder, None if base is None else local_folder(base, "--model-base", remedy))


def _write_settings(
    export: Export, image_token: int, outputs: Sequence[Output], folder: Path
) -> tuple[dict[str, Any], Optional[str]]:
    """Write the code and every config; returns `config.json`, and why the code does not travel, or None."""
    rows = next(output.shape[0] for output in outputs if output.key == "lm_head.weight")
    config = folder_config(
        export.resolved,
        export.layers,
        export.tower,
        export.text_config,
        export.layout,
        image_token,
        rows,
        export.dtype,
    )
    try:
        write_code(export.resolved.type_string, folder)
        config["auto_map"] = AUTO_MAP
        travels_not = None
    except DoesNotTravel as reason:
        travels_not = str(reason)
    write_processor(export.layout, export.tower, folder, travels_not is None)
    write_json(folder / "config.json", config)
    checkpoint = export.checkpoint
    generation = generation_config(checkpoint.llm, export.text_config, checkpoint.config, checkpoint.source)
    write_json(folder / "generation_config.json", generation)
    return config, travels_not


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the LLM's last norm, which quantised models keep too."""
    key = "model.norm.weight"
    if key not in checkpoint.weights:
        others = [name for name in checkpoint.weights if name.endswith(f".{key}")]
        hint = f"it has {others[0]!r}: save the weights again with their keys renamed" if others else "copy it again"
        raise ExportError(f"the LLM in {checkpoint.llm} lacks {key}; {hint}")
    dtype = str(checkpoint.weights[key].stored.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"{checkpoint.llm} stores {key} in {dtype}: pass --dtype with one of {', '.join(DTYPES)}")
    return dtype
