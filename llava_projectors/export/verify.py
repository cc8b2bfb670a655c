"""`llava-projectors export --verify`: does the folder say what LLaVA says?

LLaVA's side, the reference, needs LLaVA's stack. The folder's side is computed by current
transformers in another environment (`compare.py`), or else on this stack, from the folder's weights.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch

from llava_projectors import files
from llava_projectors.export import compare
from llava_projectors.export.errors import ExportError
from llava_projectors.integration.loader import load, name_for
from llava_projectors.registry import projector_class

Case = dict[str, Any]
TOLERANCE = 1e-4  # of the largest logit, with weights of the same dtype on both sides
LOOSE = 2e-2  # LLaVA's loader makes everything float16, so weights of another dtype differ by its rounding
PROMPT = "A chat. USER: {images}{question} ASSISTANT:"


def test_pictures() -> list[Any]:
    """Two pictures that are no squares, made of waves."""
    from PIL import Image

    pictures = []
    for width, height in ((320, 200), (150, 333)):
        x, y = torch.arange(width) / width, torch.arange(height)[:, None] / height
        waves = [torch.sin(x * 9 + y * k).add(1).mul(127) for k in (3, 7, 11)]
        pictures.append(Image.fromarray(torch.stack(waves, -1).to(torch.uint8).numpy()))
    return pictures


def default_questions() -> list[tuple[str, list[Any]]]:
    """Prompt and pictures of what `--verify` asks: each picture, and both in one prompt."""
    pictures = test_pictures()
    singles = [(PROMPT.format(images="<image>\n", question="What is this?"), [picture]) for picture in pictures]
    both = PROMPT.format(images="<image>\n<image>\n", question="Which one is darker?")
    return [*singles, (both, pictures)]


def load_llava(source: str, base: Optional[str]) -> tuple[Any, Any, Any]:
    """Tokenizer, model and image processor, by LLaVA's own loader, in float32 on the CPU.

    Raises:
        ExportError: LLaVA is not installed.
    """
    try:
        tokenizer, model, processor = load(source, base, name_for(source), "cpu")
    except ImportError as error:
        raise ExportError(
            f"--verify compares with LLaVA, which cannot be imported here: {error}. Export without it, or run it in "
            "LLaVA's environment"
        ) from error
    model.float().eval()
    model.get_vision_tower().float()
    for module in model.modules():
        # Loading in float16 rounded the rotations, and float() does not bring them back.
        if hasattr(module, "_set_cos_sin_cache"):
            exponents = torch.arange(0, module.dim, 2).float() / module.dim
            module.inv_freq = 1.0 / module.base**exponents
            module._set_cos_sin_cache(module.max_position_embeddings, torch.device("cpu"), torch.float32)
    return tokenizer, model, processor


@torch.no_grad()
def reference(
    source: str, base: Optional[str], questions: Sequence[tuple[str, list[Any]]], max_new_tokens: int = 24
) -> list[Case]:
    """What LLaVA says: prompts, pictures, pixels, token ids, logits of every position and the greedy answer.

    Args:
        source: the checkpoint.
        base: its base, if any.
        questions: prompts with `<image>` in them, and their pictures.
        max_new_tokens: of the answers.
    """
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, processor = load_llava(source, base)
    cases = []
    for prompt, pictures in questions:
        ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        pixels = process_images([picture.convert("RGB") for picture in pictures], processor, model.config).float()
        logits = model(input_ids=ids, images=pixels).logits[0]
        output = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=max_new_tokens)
        cases.append({
            "prompt": prompt,
            "images": pictures,
            "pixel_values": pixels,
            "input_ids": ids[0].tolist(),
            "logits": logits,
            "answer_ids": output[0, 1:].tolist(),  # the start token, which transformers 4.37 puts first, is no answer
            "text": tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip(),
            "max_new_tokens": max_new_tokens,
        })  # fmt: skip
    return cases


@torch.no_grad()
def logits_on_this_stack(folder: Path, cases: Sequence[Case]) -> list[torch.Tensor]:
    """Logits from the folder's own weights, put together here: tower, projector and LLM of this stack's transformers.

    Takes pixels from the reference; token ids from the folder's tokenizer.
    """
    import transformers

    config = files.read_config(folder)
    weights = {name: stored.read().float() for name, stored in files.checkpoint_tensors(folder).items()}

    def part(model: Any, prefix: str, also: tuple[str, ...] = ()) -> Any:
        own = {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        model.load_state_dict({**own, **{name: weights[name] for name in also}})
        return model.float().eval()

    mapping = transformers.CONFIG_MAPPING
    tower_config = mapping[config["vision_config"]["model_type"]](**config["vision_config"])
    tower = part(transformers.AutoModel.from_config(tower_config), "model.vision_tower.")
    widths = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    cls: Any = projector_class(config["mm_projector_type"])
    options = cls.options_from_record(config["mm_projector_options"])
    projector = part(cls(*widths, **options), "model.multi_modal_projector.")
    llm_config = mapping[config["text_config"]["model_type"]](**config["text_config"])
    llm = transformers.AutoModelForCausalLM.from_config(llm_config)
    part(llm.model, "model.language_model.")
    llm.lm_head.weight.data = weights["lm_head.weight"]
    llm.float().eval()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2

    found = []
    for case in cases:
        states = tower(case["pixel_values"], output_hidden_states=True).hidden_states
        tokens = projector(torch.cat([states[layer][:, -patches:] for layer in config["vision_feature_layer"]], -1))
        pieces: list[torch.Tensor] = []
        images = iter(tokens)
        for token in tokenizer(case["prompt"], return_tensors="pt").input_ids[0]:
            is_image = int(token) == config["image_token_index"]
            pieces.append(next(images) if is_image else llm.model.embed_tokens(token)[None])
        found.append(llm(inputs_embeds=torch.cat(pieces)[None]).logits[0])
    return found


def verify(folder: Path, source: str, base: Optional[str], python: Optional[str] = None) -> float:
    """Print the largest difference between LLaVA and the folder; returns it, as a part of the largest logit.

    Args:
        folder: exported.
        source: from this checkpoint.
        base: its base, if any.
        python: interpreter of an environment with current transformers; default: this stack.

    Raises:
        ExportError: LLaVA is not here, or the other environment fails.
    """
    cases = reference(source, base, default_questions())
    if python is None:
        where = "weights, features and embeddings put together on this stack"
        found = logits_on_this_stack(folder, cases)
        results = [
            compare.largest_difference(ours[:, : case["logits"].shape[1]], case["logits"])
            for ours, case in zip(found, cases)
        ]
    else:
        where = f"transformers of {python}"
        results = [result["logits"] for result in compare_elsewhere(folder, cases, python)]
    largest = max(results)
    print(f"largest difference of logits to LLaVA, as a part of the largest logit: {largest:.1e} ({where})")
    return largest


def compare_elsewhere(folder: Path, cases: Sequence[Case], python: str) -> list[dict[str, Any]]:
    """Run `compare.py` by another interpreter; one result for each case."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "reference.pt"
        compare.save_cases(cases, path)
        command = [python, "-I", compare.__file__, str(folder), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
    if done.returncode:
        raise ExportError(f"{python} cannot load {folder}:\n{done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
