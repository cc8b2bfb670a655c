"""The one way in which the study trains: AdamW, gradients clipped to norm 1, warm-up, then a cosine to zero."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Callable, Optional

import torch
from tqdm import tqdm

from benchmarks import measure

SAVE_EVERY = 120.0  # seconds; what a killed process loses at most


class TimeIsUp(Exception):
    """The deadline has come; what is unfinished goes on in another run."""


@dataclass(frozen=True)
class Pause:
    """How a training that a deadline stops, or that is killed, goes on as if it had not been stopped.

    Attributes:
        path: where its state waits meanwhile.
        rng: what the losses draw from, beside torch's own generator of the CPU.
        deadline: in `time.time()`.
    """

    path: Path
    rng: random.Random
    deadline: float = math.inf


def mixed_precision(device: torch.device) -> torch.autocast:
    """The precision of pre-training: matrix products in bfloat16 where the device has instructions for them."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_has_bfloat16(device))


@cache
def _has_bfloat16(device: torch.device) -> bool:
    kept, _ = measure.without_slow_dtypes([torch.bfloat16], device)
    return bool(kept)


def minimize(
    loss_of: Callable[[int], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    description: Optional[str] = None,
    pause: Optional[Pause] = None,
) -> list[float]:
    """Take a step for the loss of each number of a step; returns their values.

    With a description, progress is shown under that name.

    Raises:
        TimeIsUp: at the deadline of `pause`, after one step at least; another call goes on.
    """
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps)
    values: list[float] = []
    if pause is not None and pause.path.exists():
        values = _restore(pause, parameters, optimizer, schedule)
    first, saved_at = len(values), time.time()
    progress = tqdm(
        range(first, steps), desc=description, unit=" step", initial=first, total=steps, disable=description is None
    )
    for step in progress:
        if pause is not None and step > first:
            is_up = time.time() > pause.deadline
            if is_up or time.time() - saved_at > SAVE_EVERY:
                _save(pause, parameters, optimizer, schedule, values)
                saved_at = time.time()
            if is_up:
                raise TimeIsUp(f"{description}: {step} of {steps} steps are done")
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        values.append(loss.item())
        progress.set_postfix_str(f"loss {values[-1]:.3f}", refresh=False)
    if pause is not None:
        pause.path.unlink(missing_ok=True)
    return values


def _save(pause: Pause, parameters: Sequence[torch.nn.Parameter], optimizer: Any, schedule: Any, values: Any) -> None:
    state = {
        "parameters": [parameter.detach() for parameter in parameters],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "values": values,
        "python": pause.rng.getstate(),
        "torch": torch.get_rng_state(),
    }
    unfinished = pause.path.with_suffix(".part")
    torch.save(state, unfinished)
    unfinished.rename(pause.path)


def _restore(pause: Pause, parameters: Sequence[torch.nn.Parameter], optimizer: Any, schedule: Any) -> list[float]:
    state = torch.load(pause.path, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(parameters, state["parameters"]):
            parameter.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    pause.rng.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    values: list[float] = state["values"]
    return values
