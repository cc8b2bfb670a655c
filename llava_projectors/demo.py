"""The demo: LLaVA's own training and loading, with each projector, in one table."""

from __future__ import annotations

import contextlib
import io
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image

from llava_projectors.columns import print_columns
from llava_projectors.tiny.assets import QUESTION, make_dataset, make_llm, make_vision_tower
from llava_projectors.tiny.train import (
    TrainingFailed,
    finetune_arguments,
    losses,
    pretrain_arguments,
    run,
    seconds_per_step,
    training_command,
)

TYPES = ("mlp2x_gelu", "saep", "tokenpacker", "tokenpacker:scale_factor=3")
PRETRAIN_STEPS = 8
HEADER = ("projector type", "visual tokens", "LLM sequence", "s/step", "first loss", "last loss", "answer")


@dataclass
class Answer:
    """What a checkpoint said, and how long its LLM's input was.

    Attributes:
        text: the decoded answer.
        sequence_length: positions that the first layer of the LLM received.
        visual_tokens: those of them that are no text.
        projector: the loaded projector's weights, in the dtype they were loaded in.
    """

    text: str
    sequence_length: int
    visual_tokens: int
    projector: dict[str, torch.Tensor]


def ask(checkpoint: Path, image: Path, question: str = QUESTION, max_new_tokens: int = 24) -> Answer:
    """Load a checkpoint with LLaVA's `load_pretrained_model` and let it answer a question about an image."""
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), None, checkpoint.name, device=device, device_map=device
    )
    projector = {name: value.clone() for name, value in model.get_model().mm_projector.state_dict().items()}
    if device == "cpu":  # half precision is slow or missing there
        model.float()
        model.get_vision_tower().float()
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conversation.append_message(conversation.roles[1], None)
    input_ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
    with Image.open(image) as opened:
        images = process_images([opened.convert("RGB")], processor, model.config)
    lengths: list[int] = []
    hook = model.get_model().layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    with torch.inference_mode():
        output = model.generate(
            input_ids[None].to(device),
            images=images.to(device, model.dtype),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )
    hook.remove()
    text = tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip()
    num_text_tokens = int((input_ids != IMAGE_TOKEN_INDEX).sum())
    return Answer(text, lengths[0], lengths[0] - num_text_tokens, projector)


def demo(output: Path, steps: int) -> int:
    """Run the whole demo below `output`; returns the exit status."""
    started = time.monotonic()
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    transformers.logging.set_verbosity_error()  # the loader lists every key of the vision tower

    # On several GPUs, the trainer would split batches among them; one is enough.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = {"CUDA_VISIBLE_DEVICES": visible} if torch.cuda.is_available() else {}

    def say(message: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {message}", flush=True)

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    say(f"tiny CLIP, LLM and data in {output} ({where})")
    tower = make_vision_tower(output / "clip")
    llm = make_llm(output / "vicuna", hidden_size=160, num_layers=2)
    pretrain_data, finetune_data = make_dataset(output / "data")
    images = output / "data" / "images"
    rows = []
    for number, projector_type in enumerate(TYPES, 1):
        folder = output / projector_type.replace(":", "-").replace("=", "-")
        say(f"{number}/{len(TYPES)} {projector_type}: python -m llava.train.train, pretraining, {PRETRAIN_STEPS} steps")
        adapter, checkpoint = folder / "llava-pretrain", folder / "llava"
        try:
            arguments = pretrain_arguments(pretrain_data, images, max_steps=PRETRAIN_STEPS)
            run(
                training_command(adapter, llm, tower, projector_type, **arguments), folder / "pretrain.log", environment
            )
            say(f"{number}/{len(TYPES)} {projector_type}: python -m llava.train.train, fine-tuning, {steps} steps")
            arguments = finetune_arguments(finetune_data, images, adapter / "mm_projector.bin", max_steps=steps)
            run(
                training_command(checkpoint, llm, tower, projector_type, **arguments),
                folder / "finetune.log",
                environment,
            )
        except TrainingFailed as failure:
            say(f"{projector_type} failed: {failure}")
            return 1
        say(f"{number}/{len(TYPES)} {projector_type}: load_pretrained_model, generate")
        with contextlib.redirect_stdout(io.StringIO()):
            answer = ask(checkpoint, images / "flower.jpg")
        curve = losses(checkpoint)
        rows.append(
            (
                projector_type,
                str(answer.visual_tokens),
                str(answer.sequence_length),
                f"{seconds_per_step(checkpoint):.3f}",
                f"{curve[0]:.3f}",
                f"{curve[-1]:.3f}",
                answer.text,
            )
        )
    say(f'done; the question was "{QUESTION}", about flower.jpg\n')
    rule = tuple("-" * max(map(len, column)) for column in zip(HEADER, *rows))
    print_columns([HEADER, rule, *rows])
    return 0
