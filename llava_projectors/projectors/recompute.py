"""Less memory in training: what is cheap to make again is not kept for the backward pass.

A GELU or LayerNorm and the layer after it each keep a tensor of the full grid: the first its
input, the second its input, which is the first's output. One follows from the other in a single
elementwise pass, so only the first is kept. Both modules are called, never looked into, so that
ZeRO-3 may hold their weights elsewhere and a quantised layer may stand in for a Linear.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

Made = tuple[torch.Tensor, nn.Module, torch.Tensor]  # output, module, input

_thread = threading.local()  # the backward pass of a checkpoint may run in another thread than its forward


@contextlib.contextmanager
def inside_checkpoint() -> Iterator[None]:
    """Within it, nothing is noted: `torch.utils.checkpoint` cannot drop what `recomputed` holds."""
    before = getattr(_thread, "inside_checkpoint", False)
    _thread.inside_checkpoint = True
    try:
        yield
    finally:
        _thread.inside_checkpoint = before


def remember(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[Made]]:
    """module(x), and a note for `recomputed`; no note, so that x can go, where there will be no backward pass."""
    output = module(x)
    if not torch.is_grad_enabled() or is_transforming():
        return output, []
    if getattr(_thread, "inside_checkpoint", False):
        return output, []
    return output, [(output, module, x.detach())]


def recomputed(made: Sequence[Made]) -> contextlib.AbstractContextManager[Any]:
    """Within it, a tensor saved for the backward pass is dropped if it is one of those noted.

    Second derivatives are right: autograd puts the history of the tensor that was saved on the one made again.

    Args:
        made: notes of `remember`. The caller holds them until the context ends, so that the
            address of an output is not another tensor's; nothing here may hold an output longer.
    """
    if not made:
        return contextlib.nullcontext()
    inputs = {output.data_ptr(): (output.numel(), module, x) for output, module, x in made}

    def pack(tensor: torch.Tensor) -> Any:
        numel, module, kept = inputs.get(tensor.data_ptr(), (0, None, None))
        if module is None or tensor.numel() != numel or not tensor.is_contiguous():
            return tensor
        return module, kept, tensor.shape, tensor.dtype

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        module, kept, shape, dtype = packed
        with torch.no_grad():
            return module(kept).to(dtype).view(shape)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def is_transforming() -> bool:
    """Whether torch.compile, torch.func or forward-mode AD runs this: they save tensors in their own way."""
    if is_compiling():
        return True
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)  # as torch.autograd.Function asks
    return (transforms is not None and bool(transforms())) or torch.autograd.forward_ad._current_level >= 0


def is_compiling() -> bool:
    """Whether torch.compile is tracing this."""
    check = getattr(getattr(torch, "compiler", None), "is_compiling", None)  # torch 2.0 has none
    return check is not None and bool(check())
