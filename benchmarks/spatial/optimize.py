"""The one way in which the study trains: AdamW, gradients clipped to norm 1, warm-up, then a cosine to zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional

import torch
from tqdm import tqdm


def minimize(
    losses: Iterable[torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    description: Optional[str] = None,
) -> list[float]:
    """Take a step for each loss, which is computed when it is its turn; returns their values.

    With a description, progress is shown under that name.
    """
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps)
    values = []
    progress = tqdm(losses, desc=description, unit=" step", total=steps, disable=description is None)
    for loss in progress:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        values.append(loss.item())
        progress.set_postfix_str(f"loss {values[-1]:.3f}", refresh=False)
    return values
