"""`llava-projectors export --verify`: does the folder say what LLaVA says?

LLaVA's side, the reference, needs LLaVA's stack. The folder's side is computed by current
transformers in another environment (`compare.py`), or else on this stack, from the folder's weights.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Optional
from unittest import mock

import numpy as np
import torch

from llava_projectors.export import compare
from llava_projectors.export.errors import ExportError
from llava_projectors.export.llm import (
    GENERATION_SETTINGS,
    KINDS,
    LLMS,
    SAMPLING,
    end_tokens,
    settings_read,
    with_rotations,
)
from llava_projectors.export.templates import marked
from llava_projectors.export.tokenizer import WORDS, prompts_of
from llava_projectors.files import checkpoint_tensors, read_json
from llava_projectors.integration.loader import load, name_for
from llava_projectors.registry import projector_class
from llava_projectors.serving.image_processing import LlavaProjectorsImageProcessor, seen_whole
from llava_projectors.serving.layout import AnyResolution, Layout, Slices, layout_of, pack_pictures
from llava_projectors.slicing import is_slice, to_tiles, to_whole

Case = dict[str, Any]
TOLERANCE = 1e-4  # of the largest logit, in float32 with weights rounded alike on both sides
PROMPT = "A chat. USER: {images}{question} ASSISTANT:"


class Question(NamedTuple):
    """What both sides are asked.

    Attributes:
        prompt: with `<image>` in it.
        pictures: in PIL's form.
        given_as: `pictures`, as the config says; `pad`, each padded and seen whole; `video`, frames of one.
    """

    prompt: str
    pictures: list[Any]
    given_as: str = "pictures"


def test_pictures() -> list[Any]:
    """Two pictures that are no squares, made of waves."""
    from PIL import Image

    pictures = []
    for width, height in ((320, 200), (150, 333)):  # the second with transparency
        x, y = torch.arange(width) / width, torch.arange(height)[:, None] / height
        waves = [torch.sin(x * 9 + y * k).add(1).mul(127) for k in (3, 7, 11)]
        pictures.append(Image.fromarray(torch.stack(waves, -1).to(torch.uint8).numpy()))
    pictures[1].putalpha(Image.linear_gradient("L").resize(pictures[1].size))
    return pictures


def default_questions(layout: Optional[Layout] = None) -> list[Question]:
    """What `--verify` asks: about each picture, about both in one prompt, and what else the folder's layout has."""
    pictures = test_pictures()
    asked = [Question(PROMPT.format(images="<image>\n", question="What is this?"), [picture]) for picture in pictures]
    both = PROMPT.format(images="<image>\n<image>\n", question="Which one is darker?")
    asked.append(Question(both, pictures))
    video = None if layout is None else layout.video
    if isinstance(layout, AnyResolution) and video is not None:  # LLaVA-NeXT's, which trains them so
        asked.append(Question(both, pictures, "pad"))
    if video is not None:
        asked.append(Question(asked[0].prompt, [picture.resize((320, 200)) for picture in pictures], "video"))
    return asked


class _FullPrecision:
    """Stands in for `torch` in LLaVA's loader, which makes everything float16: there it is float32."""

    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def load_llava(source: str, base: Optional[str], package: str = "llava") -> tuple[Any, Any, Any]:
    """Tokenizer, model and image processor, by LLaVA's own loader, in float32 on the CPU.

    Args:
        source: the checkpoint.
        base: its base, if any.
        package: that LLaVA, or a fork of it, is imported as.

    Raises:
        ExportError: it cannot be imported, or its loader fails.
    """
    try:
        builder = importlib.import_module(f"{package}.model.builder")
    except ImportError as error:
        raise ExportError(
            f"--verify compares with LLaVA, and {package} cannot be imported here: {error}. Export without it, or run "
            "it in the environment that trained"
        ) from error
    name = name_for(source)
    try:
        with mock.patch.object(builder, "torch", _FullPrecision()):
            tokenizer, model, processor = load(source, base, name, "cpu", package)
    except ValueError:
        raise
    except Exception as error:  # of any kind: a loader that chooses another class ends anywhere
        raise ExportError(
            f"--verify compares with LLaVA, and the loader of {package}, given {source} by the name {name!r}, ends in "
            f"{type(error).__name__}: {error}"
        ) from error
    model.float().eval()
    model.get_vision_tower().float().cpu()
    return tokenizer, model, processor


@torch.no_grad()
def reference(
    source: str,
    base: Optional[str],
    questions: Sequence[tuple[Any, ...]],
    max_new_tokens: int = 24,
    dtype: Optional[torch.dtype] = None,
    package: str = "llava",
) -> list[Case]:
    """What LLaVA says: prompts, pictures, pixels, token ids, logits of every position and the greedy answer.

    Args:
        source: the checkpoint.
        base: its base, if any.
        questions: to ask, as `Question` has them.
        max_new_tokens: of the answers.
        dtype: that all weights are rounded to, as an export's are.
        package: that LLaVA, or a fork of it, is imported as.
    """
    tokenizer, model, processor = load_llava(source, base, package)
    if dtype is not None:
        round_weights(model, dtype)
    known = known_tokens(source)
    return [ask(tokenizer, model, processor, Question(*asked), max_new_tokens, package, known) for asked in questions]


def known_tokens(source: str) -> Optional[int]:
    """Rows of a checkpoint's own head: LLaVA's loader may add tokens, whose rows are random."""
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(source)
    count: Optional[int] = config.get("vocab_size")
    return count


def round_weights(model: Any, dtype: torch.dtype) -> None:
    """Round as an export of this dtype does; the buffers, in which rotations are, stay as they are."""
    for parameter in [*model.parameters(), *model.get_vision_tower().parameters()]:
        parameter.data = parameter.data.to(dtype).float()


def ask(
    tokenizer: Any,
    model: Any,
    processor: Any,
    question: Question,
    max_new_tokens: int,
    package: str,
    known: Optional[int],
) -> Case:
    """One prompt, as LLaVA's scripts ask it; see `reference` and `known_tokens`."""
    tools = importlib.import_module(f"{package}.mm_utils")
    image_token = importlib.import_module(f"{package}.constants").IMAGE_TOKEN_INDEX
    ids = tools.tokenizer_image_token(question.prompt, tokenizer, image_token, return_tensors="pt")[None]
    pixels = pixels_of(question, processor, model.config, tools)
    given = visual_arguments(question, pixels, inspect.signature(model.forward).parameters)
    logits = model(input_ids=ids, **given).logits[0, :, :known]
    settings = {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
    output = model.generate(ids, **given, do_sample=False, max_new_tokens=max_new_tokens, **settings)
    answer = without_start(without_prompt(output[0].tolist(), ids[0].tolist()), model.generation_config)
    return {
        "prompt": question.prompt,
        "images": question.pictures,
        "given_as": question.given_as,
        "pixel_values": as_tiles(pixels, model),
        "input_ids": ids[0].tolist(),
        "logits": logits,
        "answer_ids": answer,
        "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "max_new_tokens": max_new_tokens,
    }


def pixels_of(question: Question, processor: Any, config: Any, tools: ModuleType) -> Any:
    """What LLaVA's code makes of a question's pictures; of a video [1, frames, 3, side, side].

    Args:
        question: to ask.
        processor: of LLaVA's tower.
        config: of LLaVA's model.
        tools: LLaVA's `mm_utils`.
    """
    pictures = [picture.convert("RGB") for picture in question.pictures]
    if question.given_as == "video":
        frames = np.stack([np.asarray(picture) for picture in pictures])
        return processor.preprocess(frames, return_tensors="pt")["pixel_values"][None]
    if question.given_as == "pad":  # as LLaVA-NeXT's dataset does with several pictures of a sample
        config = copy.copy(config)
        config.image_aspect_ratio = "pad"
    return tools.process_images(pictures, processor, config)


def visual_arguments(question: Question, pixels: Any, taken: Collection[str]) -> dict[str, Any]:
    """The arguments of LLaVA's model for pictures, of those that it takes."""
    is_video = question.given_as == "video"
    sizes = [picture.size for picture in question.pictures][: len(pixels)]
    given: dict[str, Any] = {"images": pixels, "image_sizes": sizes}
    if "modalities" in taken:  # LLaVA-NeXT's scripts give a list
        given.update(images=list(pixels), modalities=["video" if is_video else "image"] * len(pixels))
    return {name: value for name, value in given.items() if name in taken}


def without_prompt(output: list[int], prompt: list[int]) -> list[int]:
    """What follows the prompt, where a model's `generate` gives that too, as before LLaVA 1.2."""
    return output[len(prompt) :] if output[: len(prompt)] == prompt else output


def without_start(answer: list[int], settings: Any) -> list[int]:
    """An answer without the start token that transformers 4.37 puts in front."""
    return answer[1:] if answer[:1] == [settings.bos_token_id] else answer


def as_tiles(pixels: Any, model: Any) -> torch.Tensor:
    """What `pixels_of` returns, as the tiles that LLaVA's tower sees, [T, 3, side, side]."""
    side = model.get_vision_tower().config.image_size
    tiles: list[torch.Tensor] = []
    for picture in pixels:
        if is_slice(getattr(model.config, "image_aspect_ratio", None)) and picture.ndim == 3:
            # LLaVA-NeXT, whose models take `modalities`, sees several pictures whole.
            is_whole = len(pixels) > 1 and "modalities" in inspect.signature(model.forward).parameters
            tiles.extend([to_whole(picture, side)] if is_whole else to_tiles(picture, side))
        else:
            tiles.extend(picture if picture.ndim == 4 else [picture])
    return torch.stack(tiles).float()


@dataclass(frozen=True)
class Assembled:
    """An exported folder, put together from its own weights on this stack.

    Attributes:
        config: the folder's.
        tower: of this stack's transformers.
        projector: of this package.
        llm: of this stack's transformers.
        tokenizer: the folder's.
        image_processor: the folder's.
        newline: its `image_newline`, if it has one.
    """

    config: dict[str, Any]
    tower: Any
    projector: Any
    llm: Any
    tokenizer: Any
    image_processor: Any
    newline: Optional[torch.Tensor]

    def pixels(self, case: Case) -> Any:
        """The image processor's output for one case of the reference."""
        given = compare.visual_inputs(case)
        places = [0 if given["images"] is None else len(given["images"])]
        whole = seen_whole(self.image_processor.layout, places, given.get("image_aspect_ratio"))
        return self.image_processor(**given, whole=whole, return_tensors="pt")

    def embeddings(self, case: Case) -> torch.Tensor:
        """The input of the LLM for one case of the reference, [1, positions, D]."""
        layout, embed = layout_of(self.config["image_layout"]), self.llm.get_input_embeddings()
        data = self.pixels(case)
        states = self.tower(data["pixel_values"], output_hidden_states=True).hidden_states
        has_cls = self.config["vision_feature_select_strategy"] == "default"
        layers = self.config["vision_feature_layer"]
        tokens = self.projector(torch.cat([states[layer][:, int(has_cls) :] for layer in layers], -1))
        extra = self.newline if layout.newline else None
        if isinstance(layout, Slices):
            extra = embed(torch.tensor(layout.separators))
        pictures = iter(pack_pictures(layout, list(tokens), data.get("image_sizes"), extra))
        ids = self.tokenizer(case["prompt"], return_tensors="pt").input_ids[0]
        image = self.config["image_token_index"]
        pieces = [next(pictures) if int(token) == image else embed(token)[None] for token in ids]
        return torch.cat(pieces)[None]


def assemble(folder: Path) -> Assembled:
    """Put an exported folder together, in float32."""
    import transformers

    config = read_json(folder / "config.json")
    weights = {name: stored.read().float() for name, stored in checkpoint_tensors(folder).items()}

    def part(model: Any, prefix: str) -> Any:
        own = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        missing, left_over = model.load_state_dict(own, strict=False)
        # Older stock models of SigLIP have its head in any case; nothing here reads it.
        missing = [name for name in missing if not name.startswith("vision_model.head.")]
        if missing or left_over:
            raise ExportError(f"{folder} is not whole: {', '.join([*missing, *left_over])}")
        return model.float().eval()

    def made(settings: dict[str, Any]) -> Any:
        return transformers.CONFIG_MAPPING[settings["model_type"]](**settings)

    tower = transformers.AutoModel.from_config(made(config["vision_config"]))
    cls: Any = projector_class(config["mm_projector_type"])
    options = cls.options_from_record(config["mm_projector_options"])
    projector = cls(config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"], **options)
    llm = llm_of(config["text_config"])
    part(llm.model, "model.language_model.")
    llm.lm_head.weight.data = weights["lm_head.weight"]
    llm.generation_config = transformers.GenerationConfig(**read_json(folder / "generation_config.json"))
    return Assembled(
        config,
        part(tower, "model.vision_tower."),
        part(projector, "model.multi_modal_projector."),
        llm.float().eval(),
        transformers.PreTrainedTokenizerFast.from_pretrained(folder),
        LlavaProjectorsImageProcessor.from_pretrained(folder),
        weights.get("model.image_newline"),
    )


def llm_of(settings: Mapping[str, Any]) -> Any:
    """A model by the stack's own class; where transformers has none, by that of the fork, once it was imported."""
    import transformers

    kind = settings["model_type"]
    names = [kind, *(name for name, of in KINDS.items() if of == kind)]
    config = next((transformers.CONFIG_MAPPING[name] for name in names if name in transformers.CONFIG_MAPPING), None)
    if config is None:
        raise ExportError(f"transformers {transformers.__version__} has no {kind}: pass --verify-python")
    found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[config]
    # A fork's class is a LLaVA; what it is made from is the LLM.
    cls: Any = next(cls for cls in found.__mro__ if cls.__name__ == LLMS[kind].architecture)
    return cls(
        config(**(settings if kind in transformers.CONFIG_MAPPING else with_rotations(settings, "longrope", "su")))
    )


@torch.no_grad()
def compare_on_this_stack(folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """One result for each case, as `compare.compare` gives it elsewhere."""
    model = assemble(folder)
    results = []
    for case in cases:
        embeddings = model.embeddings(case)
        logits = model.llm(inputs_embeds=embeddings).logits[0, :, : case["logits"].shape[-1]]
        output = model.llm.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=case["max_new_tokens"],
        )
        answer = without_start(output[0].tolist(), model.llm.generation_config)
        pixels = model.pixels(case)["pixel_values"]
        image = model.config["image_token_index"]
        ids = [token for token in model.tokenizer(case["prompt"]).input_ids if token != image]
        text = model.tokenizer.decode(answer, skip_special_tokens=True).strip()
        results.append(compare.result(case, logits, pixels, ids, answer, text))
    return results


def verify(
    folder: Path, source: str, base: Optional[str], python: Optional[str] = None, package: str = "llava"
) -> list[str]:
    """Compare LLaVA with the folder, print the largest difference of logits, and return every difference found.

    Args:
        folder: exported.
        source: from this checkpoint.
        base: its base, if any.
        python: interpreter of an environment with current transformers; default: this stack.
        package: that LLaVA, or a fork of it, is imported as.

    Raises:
        ExportError: LLaVA is not here, its loader takes another class, or the other environment fails.
    """
    config = read_json(folder / "config.json")
    dtype = getattr(torch, config["torch_dtype"])
    tokenizer, model, processor = load_llava(source, base, package)
    _refuse_another_class(folder, model, source, package)
    round_weights(model, dtype)
    known = known_tokens(source)
    asked = default_questions(layout_of(config["image_layout"]))
    if getattr(model.config, "mm_use_im_start_end", False):
        asked = [one._replace(prompt=one.prompt.replace("<image>", marked("<image>"))) for one in asked]
    cases = [ask(tokenizer, model, processor, question, 24, package, known) for question in asked]
    differences = [
        *different_settings(config["text_config"], model.config),
        *different_generation(folder, model.generation_config),
        *different_tokens(folder, tokenizer, package),
    ]
    if python is None:
        where = "weights, features and embeddings put together on this stack"
        results = compare_on_this_stack(folder, cases)
    else:
        where = f"transformers of {python}"
        results = compare_elsewhere(folder, cases, python)
    largest = max(result["logits"] for result in results)
    print(f"largest difference of logits to LLaVA, as a part of the largest logit: {largest:.1e} ({where})")
    differences += [line for case, result in zip(cases, results) for line in different_answers(case, result)]
    return differences


def _refuse_another_class(folder: Path, model: Any, source: str, package: str) -> None:
    """Raise where LLaVA's loader, which goes by names, has made a model that lacks weights of the LLM."""
    own, prefix = {name for name, _ in model.named_parameters()}, "model.language_model."
    names = [name.replace(prefix, "model.", 1) for name in checkpoint_tensors(folder) if name.startswith(prefix)]
    lacking = [name for name in names if name not in own]
    if lacking:
        raise ExportError(
            f"the loader of {package} makes a {type(model).__name__} of {source}, without a place for {lacking[0]}: "
            "what it says is not what was trained. Pass --package with the one that trained it"
        )


def different_settings(text_config: dict[str, Any], trained: Any) -> Iterator[str]:
    """Settings of the exported LLM that are not what LLaVA's own model has, or that it does not read."""
    import transformers

    kind = text_config["model_type"]
    ours = {"model_type", "architectures", "vocab_size", "tie_word_embeddings"}
    read = settings_read(kind, transformers.__version__)
    used = {name: getattr(trained, name, LLMS[kind].fields.get(name)) for name in read}
    used = with_rotations(used, "su", "longrope")
    for name in text_config.keys() - ours:
        if name not in used:
            yield f"text_config has {name} {text_config[name]!r}, which LLaVA's model does not read"
        elif text_config[name] != used[name]:
            yield f"text_config has {name} {text_config[name]!r}, LLaVA's model {getattr(trained, name, None)!r}"


def different_generation(folder: Path, trained: Any) -> Iterator[str]:
    """End tokens and settings of generation that are not those of LLaVA's own model."""
    settings = read_json(folder / "generation_config.json")
    exported, own = (end_tokens(ids) for ids in (settings.pop("eos_token_id", None), trained.eos_token_id))
    if exported != own:
        yield f"answers end in the tokens {sorted(exported)}, LLaVA's in {sorted(own)}"
    idle = () if trained.do_sample else SAMPLING
    of_llava = (trained.to_diff_dict().keys() & GENERATION_SETTINGS) - {"eos_token_id", *idle}
    for name in sorted(settings.keys() | of_llava):
        if settings.get(name) != getattr(trained, name, None):
            yield f"generation_config.json has {name} {settings.get(name)!r}, LLaVA's {getattr(trained, name, None)!r}"


def different_tokens(folder: Path, tokenizer: Any, package: str, count: int = 1000) -> Iterator[str]:
    """The first of `count` random prompts that the folder's tokenizer splits otherwise than LLaVA's."""
    from transformers import PreTrainedTokenizerFast

    tools = importlib.import_module(f"{package}.mm_utils")
    exported = PreTrainedTokenizerFast.from_pretrained(folder)
    image = exported.convert_tokens_to_ids("<image>")
    # The exported tokenizer knows one rule for what follows a special token; the card says where LLaVA's is another.
    has_other_rule = getattr(tokenizer, "legacy", None) is False
    # LLaVA's loader adds `<im_patch>`, with a random row, to a checkpoint that does not say whether it has one.
    added = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    added -= {"<im_patch>"} - exported.get_vocab().keys()
    words = WORDS if has_other_rule else [*WORDS, *sorted(added)]
    for prompt in prompts_of(words, count):
        expected = tools.tokenizer_image_token(prompt, tokenizer, image)
        if exported(prompt).input_ids != expected:
            yield f"the prompt {prompt!r} is other tokens in the folder than in LLaVA"
            return


def different_answers(case: Case, result: dict[str, Any]) -> Iterator[str]:
    """What differs in one case."""
    asked = f"for {case['prompt']!r}"
    if result["positions"]:
        yield f"{asked} the LLM gets {result['positions']} positions more than LLaVA's"
    elif not result["logits"] <= TOLERANCE:
        yield f"{asked} logits differ by {result['logits']:.1e} of the largest, more than {TOLERANCE:.0e}"
    if not result["pixels"] <= 1e-5:
        yield f"{asked} normalised pixels differ by up to {result['pixels']:.1e}"
    if not result["same_ids"]:
        yield f"{asked} the tokens differ"
    if not result["same_answer"]:
        yield f"{asked} the answer is {result['text']!r}, LLaVA's {case['text']!r}"


def compare_elsewhere(folder: Path, cases: Sequence[Case], python: str) -> list[dict[str, Any]]:
    """Run `compare.py` by another interpreter; one result for each case."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "reference.pt"
        compare.save_cases(cases, path)
        # Not resolved: the interpreter of a virtual environment is a link out of it.
        command = [os.path.abspath(python), "-I", compare.__file__, str(folder.absolute()), str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
        except OSError as error:
            raise ExportError(f"--verify-python {python} cannot be run: {error}") from error
    if done.returncode:
        raise ExportError(f"{python} cannot load {folder}:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
