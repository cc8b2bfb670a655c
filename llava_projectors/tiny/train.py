"""Command lines for LLaVA's own training script, and what its runs leave behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any


def training_command(output: Path, llm: Path, tower: Path, projector_type: str, **arguments: Any) -> list[str]:
    """`python -m llava.train.train ...` for small runs; `arguments` add to and override the defaults.

    Raises:
        ValueError: see `check_llm_path`.
    """
    import torch

    check_llm_path(llm)
    options: dict[str, Any] = {
        "model_name_or_path": llm,
        "vision_tower": tower,
        "mm_projector_type": projector_type,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        # The trainer would log a loss of NaN as 0.0.
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "model_max_length": 2048,
        "lazy_preprocess": True,
        "report_to": "none",
        "disable_tqdm": True,
        **({"bf16": True} if torch.cuda.is_available() else {"no_cuda": True}),
        **arguments,
    }
    pairs = ([f"--{name}", str(value)] for name, value in options.items())
    return [sys.executable, "-m", "llava.train.train", *(word for pair in pairs for word in pair)]


def check_llm_path(llm: Path) -> None:
    """Raise ValueError if LLaVA's script would take the LLM for an MPT, which it tells by the whole path."""
    if "mpt" in str(llm):
        raise ValueError(
            f"LLaVA's script takes {llm} for an MPT, because its path contains 'mpt' (as in 'prompt'): "
            "choose another folder"
        )


def pretrain_arguments(data: Path, images: Path, **arguments: Any) -> dict[str, Any]:
    """Stage 1: captions, only the projector learns."""
    return {
        "version": "plain",
        "data_path": data,
        "image_folder": images,
        "tune_mm_mlp_adapter": True,
        **arguments,
    }


def finetune_arguments(data: Path, images: Path, adapter: Path | None, **arguments: Any) -> dict[str, Any]:
    """Stage 2: questions and answers, projector and LLM learn."""
    from_adapter = {} if adapter is None else {"pretrain_mm_mlp_adapter": adapter}
    return {"version": "v1", "data_path": data, "image_folder": images, **from_adapter, **arguments}


class TrainingFailed(RuntimeError):
    """LLaVA's script ended with an error; the message holds the end of its output."""


def run(
    command: list[str], log: Path, environment: dict[str, str] | None = None, stop: threading.Event | None = None
) -> str:
    """Run a command to its end, keep its output in `log`, and return it.

    Args:
        command: program and arguments.
        log: file for what it prints; folders are made.
        environment: variables beside those of this process.
        stop: ends the command when it is set. Ctrl-C reaches the main thread only, so that has to tell the others.

    Raises:
        TrainingFailed: a non-zero exit status, or it was stopped.
    """
    stop = stop or threading.Event()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TRANSFORMERS_OFFLINE": "1", **(environment or {})},
        )
        try:
            while process.poll() is None and not stop.wait(0.1):
                pass
        finally:
            process.kill()  # does nothing when it has ended
            process.wait()
    return output_of(log, process.returncode)


def output_of(log: Path, status: int) -> str:
    """What a command that ended with this status has written.

    Raises:
        TrainingFailed: a non-zero exit status.
    """
    output = log.read_text()
    if status and (full := os.strerror(errno.ENOSPC)) in output:
        raise TrainingFailed(f"{full}: {log.parent}; the whole output is in {log}")
    if status:
        lines = output.splitlines()
        # A launcher of ranks writes a report of its own below the error of a rank.
        errors = [line for line in lines if "Error: " in line][:1]
        end = "\n".join([*errors, "...", *lines[-15:]] if errors and errors[0] not in lines[-15:] else lines[-15:])
        raise TrainingFailed(f"exit status {status}, the whole output is in {log}, it ends in:\n{end}")
    return output


def losses(output: Path) -> list[float]:
    """The loss of every step, from the trainer's own record."""
    return [entry["loss"] for entry in _log_history(output) if "loss" in entry]


def seconds_per_step(output: Path) -> float:
    """Mean time of a step, from the trainer's own record."""
    last = _log_history(output)[-1]
    return float(last["train_runtime"]) / float(last["step"])


def _log_history(output: Path) -> list[dict[str, Any]]:
    state: dict[str, Any] = json.loads((output / "trainer_state.json").read_text())
    history: list[dict[str, Any]] = state["log_history"]
    return history
