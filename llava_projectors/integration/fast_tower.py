"""The vision model's attention and activation in fewer passes over memory, where a user asks for it.

In the transformers that LLaVA needs, CLIP and SigLIP have eager attention only, and QuickGELU takes three kernels. By
the bytes counted, most of a tower's time on a GPU goes into writing and reading what lies between them.
`LLAVA_PROJECTORS_TOWER` says what runs instead, for models of our types alone:

    stock   (default) what transformers has: LLaVA's bits
    sdpa    `torch.nn.functional.scaled_dot_product_attention`
    fused   this, and QuickGELU compiled into one kernel, which needs what torch.compile needs

Each replaces the forward of single module instances. A call with a mask, or one that asks for attention weights, runs
the stock forward; a module whose forward somebody else has replaced keeps it. Where a model of transformers has
`scaled_dot_product_attention` itself, its attention is left alone.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import nn

from llava_projectors.projectors.recompute import is_compiling
from llava_projectors.spec import ProjectorSpecError

VARIABLE = "LLAVA_PROJECTORS_TOWER"
CHOICES = ("stock", "sdpa", "fused")
# Classes of transformers and, the last one, of LLaVA-NeXT, whose forward is softmax(q k) v in the plainest form.
EAGER_ATTENTION = ("CLIPAttention", "SiglipAttention", "SigLipAttention")
QUICK_GELU = "QuickGELUActivation"


def wanted() -> str:
    """What the environment asks for.

    Raises:
        ProjectorSpecError: it is none of `CHOICES`.
    """
    choice = os.environ.get(VARIABLE, "").strip() or CHOICES[0]
    if choice not in CHOICES:
        raise ProjectorSpecError(f"{VARIABLE}={choice} must be one of {', '.join(CHOICES)}")
    return choice


def speed_up(vision_model: nn.Module, choice: str) -> int:
    """Replace what the choice replaces, in place.

    Returns:
        How many modules run another forward than before.
    """
    has_sdpa = getattr(vision_model, "_supports_sdpa", False)
    count = 0
    for module in vision_model.modules():
        name = type(module).__name__
        forward: Optional[Callable[..., Any]] = None
        if choice != "stock" and name in EAGER_ATTENTION and not has_sdpa:
            forward = partial(_attend, module)
        elif choice == "fused" and name == QUICK_GELU:
            forward = _quick_gelu
        if forward is not None and "forward" not in vars(module):
            module.forward = forward
            count += 1
    return count


def slow_down(vision_model: nn.Module) -> None:
    """Undo `speed_up`: every module runs the forward of its class again."""
    for module in vision_model.modules():
        forward = vars(module).get("forward")
        if getattr(forward, "func", forward) in (_attend, _quick_gelu):
            del module.forward


def _attend(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """For the forward of an attention module: [B, N, C] -> the same, and no weights."""
    if any(value is not None and value is not False for value in (*args, *kwargs.values())):
        return type(module).forward(module, hidden_states, *args, **kwargs)
    query, key, value = (
        layer(hidden_states).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    dropout = module.dropout if module.training else 0.0
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return module.out_proj(out.transpose(1, 2).flatten(2)), None


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """For the forward of QuickGELU: any shape -> the same."""
    return _plain_quick_gelu(x) if is_compiling() else _compiled_quick_gelu()(x)


def _plain_quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@cache
def _compiled_quick_gelu() -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(_plain_quick_gelu, dynamic=True)
