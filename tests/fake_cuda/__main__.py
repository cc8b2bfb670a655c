"""Forward and backward of every type on fake CUDA tensors; prints what was wrong in each case, as JSON.

Fake tensors have a device, a dtype and a shape, and no numbers. Whatever asks for a number raises; an operation
whose result is not on the device is told here.
"""

import itertools
import json
import sys
import warnings
from functools import partial
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from llava_projectors import build_projector

TYPES = (
    "saep",
    "saep:order=depthwise_first,shortcut=average",
    "saep:stride=3,level_norm=none",
    "tokenpacker",
    "tokenpacker:scale_factor=3",
    "avg_pool",
    "pixel_shuffle:stride=3",
    "ldpv2",
    "c_abstractor",
    "resampler:num_queries=36",
    "stf:layers=3+7",
    "delta",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
AUTOCAST = (None, torch.bfloat16)
SIDES = (12, 13)  # 13 is divided by no stride
WIDTH, HIDDEN = 32, 16


class OnTheDevice(TorchDispatchMode):
    """Raises for an operation that makes a tensor elsewhere, or waits for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.lstrip("_") in [word.lstrip("_") for word in self.WAITING]:
            raise RuntimeError(f"{function} waits for the device")
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cuda":
                raise RuntimeError(f"{function} makes a tensor on {tensor.device}")
        return result


def on_cuda(module, dtype):
    """Fresh parameters on the fake device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda", dtype=dtype))
    return module


def check(module, dtype, autocast, side, checkpointing):
    """One forward and one backward pass of a module, whose parameters are replaced.

    Raises:
        Exception: what would go wrong on a GPU.
    """
    with FakeTensorMode():
        projector = on_cuda(module, dtype)
        channels = projector.num_levels * projector.mm_hidden_size
        features = torch.empty(2, side * side, channels, device="cuda", dtype=dtype, requires_grad=True)
        with OnTheDevice():
            with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
                run = partial(checkpoint, projector, use_reentrant=False) if checkpointing else projector
                tokens = run(features)
            tokens.backward(torch.empty_like(tokens))
    assert tokens.device.type == "cuda"
    assert tokens.dtype in ((torch.float32, autocast) if autocast else (dtype,))
    for tensor in (features, *projector.parameters()):
        assert tensor.grad.device.type == "cuda"
        assert tensor.grad.dtype == dtype


def problem(*case):
    """What `check` raised, or ""."""
    try:
        check(*case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Asking(nn.Module):
    """A projector that does what none may do."""

    num_levels, mm_hidden_size = 1, WIDTH

    def __init__(self, question):
        super().__init__()
        self.question = question
        self.layer = nn.Linear(WIDTH, HIDDEN)

    def forward(self, features):
        return self.layer(features) * self.question(features)


WRONG = {
    "item": lambda x: x.amax().item(),
    "nonzero": lambda x: len(x.nonzero()),
    "comparison": lambda x: 2 if x.sum() > 0 else 1,
    "to the host": lambda x: x.mean().cpu().to(x.device),
    "made elsewhere": lambda x: torch.arange(HIDDEN).to(x.device),
}


def main():
    """Every case, and the wrong ones."""
    warnings.simplefilter("ignore")
    found = {}
    for case in itertools.product(TYPES, DTYPES, AUTOCAST, SIDES, (False, True)):
        name, *rest = case
        found[" ".join(map(str, case))] = problem(build_projector(name, WIDTH, HIDDEN), *rest)
    for name, question in WRONG.items():
        found[name] = problem(Asking(question), torch.float32, None, 12, False)
    json.dump(found, sys.stdout)


# torch.autocast("cuda") turns itself off where there is no GPU, and asks it for bfloat16.
with (
    mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
    mock.patch("torch.cuda.is_bf16_supported", return_value=True),
):
    main()
