"""The demo: LLaVA's own training and loading, with each projector, in one table."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError

from llava_projectors.commands.arguments import at_least, file_path
from llava_projectors.commands.columns import print_columns
from llava_projectors.tiny.assets import QUESTION, make_dataset, make_llm, make_vision_tower, photographs
from llava_projectors.tiny.train import (
    TrainingFailed,
    check_llm_path,
    finetune_arguments,
    losses,
    pretrain_arguments,
    seconds_per_step,
    training_command,
)
from llava_projectors.tiny.train import run as run_command

DESCRIPTION = (
    "Makes tiny checkpoints and data offline, runs LLaVA's own pretraining and fine-tuning on each type, loads the "
    "checkpoints with LLaVA's own loader, asks a question, and prints one table. Needs LLaVA. Uses CUDA when there is "
    "one."
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


def ask(
    checkpoint: Path,
    image: Path,
    question: str = QUESTION,
    max_new_tokens: int = 24,
    device_map: str | None = None,
) -> Answer:
    """Load a checkpoint with LLaVA's `load_pretrained_model` and let it answer a question about an image.

    With no `device_map` the model is on the GPU, or on the CPU where there is none.
    """
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), None, checkpoint.name, device=device, device_map=device_map or device
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


@dataclass(frozen=True)
class Assets:
    """What every run of the demo starts from: folders and files that LLaVA's script reads."""

    tower: Path
    llm: Path
    pretrain_data: Path
    finetune_data: Path
    images: Path

    @classmethod
    def make(cls, folder: Path) -> Assets:
        """Write tiny models and data below the folder.

        The tower has 12x12 patches, a quarter of CLIP-L's: LLaVA's script holds it in float16, which
        many CPUs only emulate.

        Raises:
            ValueError: see `check_llm_path`; nothing is written.
        """
        llm = folder / "vicuna"
        check_llm_path(llm)
        pretrain_data, finetune_data = make_dataset(folder / "data")
        # LLaVA writes the tower's path into each checkpoint, and the LLM's path nowhere that is read.
        tower = make_vision_tower(folder.absolute() / "clip", patch_size=28)
        make_llm(llm, hidden_size=160, num_layers=2)
        return cls(tower, llm, pretrain_data, finetune_data, folder / "data" / "images")


def train(
    projector_type: str,
    folder: Path,
    assets: Assets,
    steps: int,
    say: Callable[[str], None],
    stop: threading.Event | None = None,
) -> Path:
    """Both of LLaVA's stages, by its own script, until `stop` is set; returns the checkpoint.

    Raises:
        TrainingFailed: the script did not end well.
    """
    environment = _environment()
    adapter, checkpoint = folder / "llava-pretrain", folder / "llava"
    say(f"{projector_type}: python -m llava.train.train, pretraining, {PRETRAIN_STEPS} steps")
    options = pretrain_arguments(assets.pretrain_data, assets.images, max_steps=PRETRAIN_STEPS)
    command = training_command(adapter, assets.llm, assets.tower, projector_type, **options)
    run_command(command, folder / "pretrain.log", environment, stop)
    say(f"{projector_type}: python -m llava.train.train, fine-tuning, {steps} steps")
    options = finetune_arguments(assets.finetune_data, assets.images, adapter / "mm_projector.bin", max_steps=steps)
    command = training_command(checkpoint, assets.llm, assets.tower, projector_type, **options)
    run_command(command, folder / "finetune.log", environment, stop)
    return checkpoint


def _workers() -> int:
    """Runs at a time: starting LLaVA's script keeps one core busy, whatever the others do."""
    return 1 if torch.cuda.is_available() else min(len(TYPES), os.cpu_count() or 1, 2)


def _environment() -> dict[str, str]:
    if torch.cuda.is_available():
        # On several GPUs, the trainer would split batches among them; one is enough.
        return {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // _workers()))}


def _train_all(output: Path, assets: Assets, steps: int, say: Callable[[str], None]) -> dict[str, Path]:
    """Every type's checkpoint. The first failure stops the other runs, and so does Ctrl-C.

    Raises:
        TrainingFailed: says of which type.
    """
    folders = {name: output / name.replace(":", "-").replace("=", "-") for name in TYPES}
    stop = threading.Event()
    pool = ThreadPoolExecutor(_workers())
    try:
        runs = {name: pool.submit(train, name, folder, assets, steps, say, stop) for name, folder in folders.items()}
        ended = _until_the_first_failure(list(runs.values()))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    for name, run in runs.items():
        error = run.exception() if run in ended else None
        if isinstance(error, (OSError, TrainingFailed)):
            raise TrainingFailed(f"{name} failed: {error}") from error
    return {name: run.result() for name, run in runs.items()}


def _until_the_first_failure(runs: list[Future[Path]]) -> set[Future[Path]]:
    """The runs that have ended, when all have or one has failed.

    The wait is cut in pieces: Python handles a signal that arrives just as a wait begins only after that wait.
    """
    while True:
        ended, going = wait(runs, timeout=0.2, return_when=FIRST_EXCEPTION)
        if not going or any(run.exception() for run in ended):
            return ended


def demo(output: Path, steps: int) -> int:
    """Run the whole demo below `output`; returns the exit status."""
    started = time.monotonic()
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    transformers.logging.set_verbosity_error()  # the loader lists every key of the vision tower

    def say(message: str) -> None:
        # One write per line, because several threads print.
        print(f"[{time.monotonic() - started:4.0f} s] {message}\n", end="", flush=True)

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {_workers()} types at a time"
    say(f"tiny CLIP, LLM and data in {output} ({where})")
    try:
        assets = Assets.make(output)
    except (OSError, SafetensorError, ValueError) as error:
        print(f"cannot run the demo: {error}", file=sys.stderr)
        return 1
    try:
        checkpoints = _train_all(output, assets, steps, say)
    except TrainingFailed as failure:
        say(str(failure))
        return 1
    rows = []
    for name, checkpoint in checkpoints.items():
        say(f"{name}: load_pretrained_model, generate")
        with contextlib.redirect_stdout(io.StringIO()):
            answer = ask(checkpoint, assets.images / "flower.jpg")
        rows.append((name, *_measured(checkpoint, answer)))
    say(f'done; the question was "{QUESTION}", about flower.jpg\n')
    rule = tuple("-" * max(map(len, column)) for column in zip(HEADER, *rows))
    print_columns([HEADER, rule, *rows])
    return 0


def _measured(checkpoint: Path, answer: Answer) -> tuple[str, ...]:
    curve = losses(checkpoint)
    return (
        str(answer.visual_tokens),
        str(answer.sequence_length),
        f"{seconds_per_step(checkpoint):.3f}",
        f"{curve[0]:.3f}",
        f"{curve[-1]:.3f}",
        answer.text,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors demo`."""
    parser.add_argument(
        "--output", type=file_path, default=Path("runs/demo"), help="folder for checkpoints and logs (%(default)s)"
    )
    parser.add_argument("--steps", type=at_least(1), default=80, help="fine-tuning steps of each type (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; what it lacks is said before anything is written."""
    photographs()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the runs as Ctrl-C does
    try:
        return demo(arguments.output, arguments.steps)
    finally:
        signal.signal(signal.SIGTERM, before)
