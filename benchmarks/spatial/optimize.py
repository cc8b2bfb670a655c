"""The one way in which the study trains: AdamW, gradients clipped to norm 1, warm-up, then a cosine to zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch


def minimize(
    losses: Iterable[torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
) -> Iterator[float]:
    """Take a step for each loss, which is computed when it is asked for; yields their values."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps)
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()
