"""Tiny checkpoints and data in the formats LLaVA reads, made offline from seeds.

A CLIP vision tower with ViT-L/14-336's grid, a Vicuna-shaped LLM with its tokenizer,
and image-question-answer sets of photographs and drawn scenes. Weights are random: what is
real are the formats, the shapes and the code that reads them.
"""

from __future__ import annotations

import importlib.util
import io
import json
import random
import string
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")
PLACES = {"left": 0.25, "middle": 0.5, "right": 0.75}
PHOTOGRAPHS = {"china.jpg": "an old temple in the mountains", "flower.jpg": "a pink flower with green leaves"}
QUESTION = "What does the picture show?"


def make_vision_tower(
    path: Path, hidden_size: int = 32, num_layers: int = 8, image_size: int = 336, patch_size: int = 14
) -> Path:
    """Write a CLIP vision checkpoint with random weights and its image processor."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 32),
        image_size=image_size,
        patch_size=patch_size,
    )
    CLIPVisionModel(config).save_pretrained(path)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(path)
    return path


def make_llm(path: Path, hidden_size: int = 80, num_layers: int = 2, head_width: int = 40) -> Path:
    """Write a Llama checkpoint with random weights and a tokenizer that covers all of ASCII.

    `hidden_size` is a multiple of `head_width`. vLLM takes heads of 32, ZeRO a hidden size whose
    square is a multiple of 10.
    """
    torch.manual_seed(1)
    tokenizer = _make_tokenizer(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // head_width,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.unk_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def _make_tokenizer(path: Path) -> LlamaTokenizer:
    """A sentencepiece BPE tokenizer with Llama's settings.

    LLaVA drops every label of a sample in which one character is unknown; the byte fallback
    and the printable characters in the training text see to it that none is.
    """
    import sentencepiece

    path.mkdir(parents=True, exist_ok=True)
    sentences = [caption for _, caption in _all_scenes()] + list(PHOTOGRAPHS.values()) + [QUESTION]
    sentences += [" ".join(string.printable.split()), " ".join(string.ascii_letters)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,  # as in Llama's own model
        minloglevel=2,
    )
    vocabulary = path / "tokenizer.model"
    vocabulary.write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer(str(vocabulary), legacy=True, model_max_length=2048)
    tokenizer.save_pretrained(path)
    return tokenizer


def _all_scenes() -> list[tuple[tuple[str, str, str], str]]:
    return [
        ((colour, shape, place), f"a {colour} {shape} on the {place}")
        for colour in COLOURS
        for shape in SHAPES
        for place in PLACES
    ]


def draw_scene(colour: str, shape: str, place: str, size: int = 336) -> Image.Image:
    """One coloured shape on grey."""
    image = Image.new("RGB", (size, size), "lightgrey")
    x, y, radius = PLACES[place] * size, size / 2, size / 6
    box = (x - radius, y - radius, x + radius, y + radius)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    return image


def make_images(folder: Path, num_scenes: int = 6) -> dict[str, str]:
    """Write photographs and drawn scenes; returns file name -> caption.

    The photographs are those that scikit-learn ships (both under CC BY licences).
    """
    folder.mkdir(parents=True, exist_ok=True)
    captions = dict(PHOTOGRAPHS)
    for name in PHOTOGRAPHS:
        with Image.open(photographs() / name) as image:
            image.convert("RGB").save(folder / name)
    for number, (scene, caption) in enumerate(random.Random(0).sample(_all_scenes(), num_scenes)):
        name = f"scene{number}.png"
        draw_scene(*scene).save(folder / name)
        captions[name] = caption
    return captions


def photographs() -> Path:
    """Folder of the photographs of scikit-learn, which is not imported for it: that takes a second, and SciPy.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the photographs come with scikit-learn", name="sklearn")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "images"


def conversation(image: str | None, question: str, answer: str) -> dict[str, Any]:
    """One sample in LLaVA's format; without an image, a text-only one."""
    prompt = question if image is None else f"<image>\n{question}"
    sample: dict[str, Any] = {
        "id": f"{image}-{question}",
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}],
    }
    return sample if image is None else {**sample, "image": image}


def make_dataset(folder: Path, num_scenes: int = 6) -> tuple[Path, Path]:
    """Write images, and the JSON files of both stages: captions to pretrain, questions to fine-tune."""
    captions = make_images(folder / "images", num_scenes)
    pretrain, finetune = folder / "pretrain.json", folder / "finetune.json"
    pretrain.write_text(json.dumps([conversation(i, "", c) for i, c in captions.items()]))
    finetune.write_text(json.dumps([conversation(i, QUESTION, c) for i, c in captions.items()]))
    return pretrain, finetune
