"""A folder of transformers' own LLaVA with a new projector of ours, to be trained in today's stack from stage 1.

For models like `llava-hf/llava-1.5-7b-hf`: LLM and tower stay, their projector goes. Nothing of LLaVA's stack
takes part, so settings are what transformers reads.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_projectors import registry
from llava_projectors.export.card import model_card
from llava_projectors.export.checkpoint import Weight
from llava_projectors.export.convert import DTYPES, folder_config, model_shapes, write_processor
from llava_projectors.export.errors import ExportError
from llava_projectors.export.folders import check_room, local_folder, temporary_folder, write_json
from llava_projectors.export.tensors import Output, write_checkpoint
from llava_projectors.export.tower import Tower, check_whole
from llava_projectors.files import checkpoint_tensors, read_config
from llava_projectors.integration.tower import resolve_layers
from llava_projectors.integration.weights import Shapes
from llava_projectors.serving.layout import OneTile
from llava_projectors.serving.travel import AUTO_MAP, write_code

# Files that go along as they are.
KEPT = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template*")
# Names of transformers 4.51 and older -> later ones.
RENAMED = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    (r"^model\.vision_tower\.(?!vision_model\.)", "model.vision_tower.vision_model."),
)


def start(
    source: str,
    target: Path,
    type_string: str,
    pads: bool = True,
    seed: int = 0,
    progress: Callable[[Sequence[Output]], Iterable[Output]] = iter,
) -> None:
    """Write the folder.

    Args:
        source: folder or hub name of a model of `LlavaForConditionalGeneration`.
        target: folder to make; must not exist.
        type_string: of the new projector.
        pads: whether pictures are padded to squares, as LLaVA-1.5 does; else their middle is cut out.
        seed: of the projector's weights.
        progress: wraps the tensors as they are written.

    Raises:
        ExportError: the source is another model, or the target cannot be written.
        ProjectorSpecError: no valid type, or not for this tower.
    """
    if target.exists():
        raise ExportError(f"{target} exists already: name another folder, or remove it")
    folder = local_folder(source, "the model", "Name a folder or a hub name like llava-hf/llava-1.5-7b-hf")
    config = _llava_config(folder, source)
    resolved = registry.resolve(type_string)
    tower, text = _parts(folder, config)
    layers = resolve_layers(resolved, tower.config["num_hidden_layers"], tower.select_layer)
    layout = OneTile(resolved.output_side(tower.patch_side), pads)
    outputs, dtype = _outputs(folder, resolved, tower, text, seed)
    image = config.get("image_token_index", config.get("image_token_id", 32000))
    written = folder_config(resolved, layers, tower, text, layout, image, text["vocab_size"], dtype)
    with temporary_folder(target) as made:
        check_room(made, outputs, DTYPES[dtype])
        write_code(type_string, made)
        _copy_files(folder, made)
        write_json(made / "config.json", {**written, "auto_map": AUTO_MAP})
        write_processor(layout, tower, made)
        card = model_card(written, source, None, target.name, None, None, False)
        (made / "README.md").write_text(card, encoding="utf-8")
        write_checkpoint(made, outputs, DTYPES[dtype], progress)


def _llava_config(folder: Path, source: str) -> dict[str, Any]:
    """The config of a model of transformers' LLaVA; another is refused."""
    config = read_config(folder)
    if config.get("model_type") != "llava" or "mm_projector_type" in config:
        raise ExportError(
            f"{source} is no model of transformers' LlavaForConditionalGeneration: its config.json has model_type "
            f"{config.get('model_type')!r}. A new projector is put into models like llava-hf/llava-1.5-7b-hf"
        )
    return config


def _copy_files(source: Path, target: Path) -> None:
    for pattern in KEPT:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def _parts(folder: Path, config: Mapping[str, Any]) -> tuple[Tower, dict[str, Any]]:
    """Tower and LLM, every setting of them as transformers reads it here."""
    from transformers import CONFIG_MAPPING

    def whole(name: str, usual: str) -> dict[str, Any]:
        given = config.get(name) or {}
        kind = given.get("model_type", usual)
        made: dict[str, Any] = {**CONFIG_MAPPING[kind](**given).to_dict(), "model_type": kind}
        return {key: value for key, value in made.items() if not key.startswith("_")}

    vision, text = whole("vision_config", "clip_vision_model"), whole("text_config", "llama")
    layer: Any = config.get("vision_feature_layer", -2)
    return Tower(folder, vision, layer if isinstance(layer, int) else layer[-1]), {
        **text,
        "architectures": text.get("architectures") or [f"{text['model_type'].capitalize()}ForCausalLM"],
        "tie_word_embeddings": False,
    }


def _outputs(
    folder: Path, resolved: registry.ResolvedSpec, tower: Tower, text: Mapping[str, Any], seed: int
) -> tuple[list[Output], str]:
    """Every tensor of the folder, and the dtype that the LLM is stored in."""
    stored = {_new_name(key): tensor for key, tensor in checkpoint_tensors(folder).items()}
    stored = {key: tensor for key, tensor in stored.items() if ".multi_modal_projector." not in key}
    stored.setdefault("lm_head.weight", stored["model.language_model.embed_tokens.weight"])
    check_whole({key: Weight(tensor) for key, tensor in stored.items()}, _expected(tower, text), str(folder))
    dtype = next((name for name, kind in DTYPES.items() if kind == stored["lm_head.weight"].dtype), None)
    if dtype is None:
        raise ExportError(f"{folder} stores the LLM in no dtype of {', '.join(DTYPES)}: take one that is not quantised")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        projector = resolved.build(tower.config["hidden_size"], text["hidden_size"])
    outputs = [Output(key, tensor.shape, tensor.read) for key, tensor in stored.items()]
    for name, parameter in projector.named_parameters():
        key = f"model.multi_modal_projector.{name}"
        outputs.append(Output(key, tuple(parameter.shape), parameter.detach))
    return outputs, dtype


def _new_name(key: str) -> str:
    for pattern, name in RENAMED:
        key = re.sub(pattern, name, key)
    return key


def _expected(tower: Tower, text: Mapping[str, Any]) -> Shapes:
    with torch.device("meta"):
        llm = model_shapes(text, "AutoModelForCausalLM", tower.folder)
        vision = model_shapes(tower.config, "AutoModel", tower.folder)
    return {
        **{f"model.vision_tower.vision_model.{key}": shape for key, shape in vision.items()},
        **{re.sub(r"^model\.", "model.language_model.", key): shape for key, shape in llm.items()},
    }
