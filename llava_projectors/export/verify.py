"""`llava-projectors export --verify`: does the folder say what LLaVA says?

LLaVA's side, the reference, needs LLaVA's stack. The folder's side is computed by current
transformers in another environment (`compare.py`), or else on this stack, from the folder's weights.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional
from unittest import mock

import torch

from llava_projectors.export import compare
from llava_projectors.export.errors import ExportError
from llava_projectors.export.llm import LLMS, end_tokens
from llava_projectors.files import checkpoint_tensors, read_json
from llava_projectors.integration.loader import load, name_for
from llava_projectors.registry import projector_class
from llava_projectors.serving.image_processing import LlavaProjectorsImageProcessor
from llava_projectors.serving.layout import Slices, layout_of, pack_pictures
from llava_projectors.slicing import is_slice, to_tiles

Case = dict[str, Any]
TOLERANCE = 1e-4  # of the largest logit, in float32 with weights rounded alike on both sides
# Of the prompts that tokenizers are compared on.
WORDS = (
    "the", "what", "picture", "show?", "<image>", "<image>\n", "\n", "\n\n", "  ", "\t", "USER:", "ASSISTANT:", "höhe",
    "日本", "🙂", ",a", "123", "4567.8", "don't", "I'LL", "e\u0301", "#!", "_x",
)  # fmt: skip
PROMPT = "A chat. USER: {images}{question} ASSISTANT:"


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


def default_questions() -> list[tuple[str, list[Any]]]:
    """Prompt and pictures of what `--verify` asks: each picture, and both in one prompt."""
    pictures = test_pictures()
    singles = [(PROMPT.format(images="<image>\n", question="What is this?"), [picture]) for picture in pictures]
    both = PROMPT.format(images="<image>\n<image>\n", question="Which one is darker?")
    return [*singles, (both, pictures)]


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
        ExportError: it cannot be imported.
    """
    try:
        builder = importlib.import_module(f"{package}.model.builder")
    except ImportError as error:
        raise ExportError(
            f"--verify compares with LLaVA, and {package} cannot be imported here: {error}. Export without it, or run "
            "it in the environment that trained"
        ) from error
    with mock.patch.object(builder, "torch", _FullPrecision()):
        tokenizer, model, processor = load(source, base, name_for(source), "cpu", package)
    model.float().eval()
    model.get_vision_tower().float().cpu()
    return tokenizer, model, processor


@torch.no_grad()
def reference(
    source: str,
    base: Optional[str],
    questions: Sequence[tuple[str, list[Any]]],
    max_new_tokens: int = 24,
    dtype: Optional[torch.dtype] = None,
    package: str = "llava",
) -> list[Case]:
    """What LLaVA says: prompts, pictures, pixels, token ids, logits of every position and the greedy answer.

    Args:
        source: the checkpoint.
        base: its base, if any.
        questions: prompts with `<image>` in them, and their pictures.
        max_new_tokens: of the answers.
        dtype: that all weights are rounded to, as an export's are.
        package: that LLaVA, or a fork of it, is imported as.
    """
    tokenizer, model, processor = load_llava(source, base, package)
    if dtype is not None:
        round_weights(model, dtype)
    known = known_tokens(source)
    return [ask(tokenizer, model, processor, *question, max_new_tokens, package, known) for question in questions]


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
    prompt: str,
    pictures: list[Any],
    max_new_tokens: int,
    package: str,
    known: Optional[int],
) -> Case:
    """One prompt, as LLaVA's scripts ask it; see `reference` and `known_tokens`."""
    tools = importlib.import_module(f"{package}.mm_utils")
    image_token = importlib.import_module(f"{package}.constants").IMAGE_TOKEN_INDEX
    ids = tools.tokenizer_image_token(prompt, tokenizer, image_token, return_tensors="pt")[None]
    pixels = tools.process_images([picture.convert("RGB") for picture in pictures], processor, model.config)
    given: dict[str, Any] = {"images": pixels, "image_sizes": [picture.size for picture in pictures]}
    taken = inspect.signature(model.forward).parameters
    if "modalities" in taken:  # LLaVA-NeXT's scripts give a list
        given = {**given, "images": list(pixels), "modalities": ["image"] * len(pictures)}
    given = {name: value for name, value in given.items() if name in taken}
    logits = model(input_ids=ids, **given).logits[0, :, :known]
    settings = {} if tokenizer.pad_token_id is None else {"pad_token_id": tokenizer.pad_token_id}
    output = model.generate(ids, **given, do_sample=False, max_new_tokens=max_new_tokens, **settings)
    answer = output[0].tolist()
    if answer[:1] == [model.generation_config.bos_token_id]:  # transformers 4.37 puts it first; it is no answer
        answer = answer[1:]
    return {
        "prompt": prompt,
        "images": pictures,
        "pixel_values": as_tiles(pixels, model.config, model.get_vision_tower().config.image_size),
        "input_ids": ids[0].tolist(),
        "logits": logits,
        "answer_ids": answer,
        "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "max_new_tokens": max_new_tokens,
    }


def as_tiles(pixels: Any, config: Any, tile_side: int) -> torch.Tensor:
    """What LLaVA's `process_images` returns, as the tiles that its tower sees, [T, 3, side, side]."""
    tiles: list[torch.Tensor] = []
    for picture in pixels:
        if is_slice(getattr(config, "image_aspect_ratio", None)):
            tiles.extend(to_tiles(picture, tile_side))
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

    def embeddings(self, case: Case) -> torch.Tensor:
        """The input of the LLM for one case of the reference, [1, positions, D]."""
        data = self.image_processor(case["images"], return_tensors="pt")
        states = self.tower(data["pixel_values"], output_hidden_states=True).hidden_states
        has_cls = self.config["vision_feature_select_strategy"] == "default"
        layers = self.config["vision_feature_layer"]
        tokens = self.projector(torch.cat([states[layer][:, int(has_cls) :] for layer in layers], -1))
        layout, embed = layout_of(self.config["image_layout"]), self.llm.get_input_embeddings()
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
    llm = transformers.AutoModelForCausalLM.from_config(made(config["text_config"]))
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
        answer = output[0].tolist()
        if answer[:1] == [model.llm.generation_config.bos_token_id]:
            answer = answer[1:]
        pixels = model.image_processor(case["images"], return_tensors="pt")["pixel_values"]
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
        ExportError: LLaVA is not here, or the other environment fails.
    """
    config = read_json(folder / "config.json")
    dtype = getattr(torch, config["torch_dtype"])
    tokenizer, model, processor = load_llava(source, base, package)
    round_weights(model, dtype)
    known = known_tokens(source)
    cases = [ask(tokenizer, model, processor, *question, 24, package, known) for question in default_questions()]
    differences = [
        *different_settings(config["text_config"], model.config),
        *different_ends(folder, model.generation_config),
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


def different_settings(text_config: dict[str, Any], trained: Any) -> Iterator[str]:
    """Settings of the exported LLM that are not what LLaVA's own model has, or that it does not read."""
    known = LLMS[text_config["model_type"]].fields
    ours = {"model_type", "architectures", "vocab_size", "tie_word_embeddings"}
    for name in text_config.keys() - ours:
        if name not in known:
            yield f"text_config has {name} {text_config[name]!r}, which LLaVA's model does not read"
        elif text_config[name] != getattr(trained, name, known[name]):
            yield f"text_config has {name} {text_config[name]!r}, LLaVA's model {getattr(trained, name, None)!r}"


def different_ends(folder: Path, trained: Any) -> Iterator[str]:
    """End tokens that are not those of LLaVA's own model."""
    exported, own = (end_tokens(ids) for ids in (
        read_json(folder / "generation_config.json").get("eos_token_id"), trained.eos_token_id
    ))  # fmt: skip
    if exported != own:
        yield f"answers end in the tokens {sorted(exported)}, LLaVA's in {sorted(own)}"


def different_tokens(folder: Path, tokenizer: Any, package: str, count: int = 1000) -> Iterator[str]:
    """The first of `count` random prompts that the folder's tokenizer splits otherwise than LLaVA's."""
    from transformers import PreTrainedTokenizerFast

    tools = importlib.import_module(f"{package}.mm_utils")
    exported = PreTrainedTokenizerFast.from_pretrained(folder)
    image = exported.convert_tokens_to_ids("<image>")
    generator = random.Random(0)
    # The exported tokenizer knows one rule for what follows a special token; the card says where LLaVA's is another.
    has_other_rule = getattr(tokenizer, "legacy", None) is False
    words = WORDS if has_other_rule else [*WORDS, *tokenizer.all_special_tokens]
    for _ in range(count):
        picked = generator.choices(words, k=12)
        prompt = "A chat. USER: " + "".join(word + " " * generator.randrange(2) for word in picked)
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
