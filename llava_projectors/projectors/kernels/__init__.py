"""Fused kernels for CUDA, in Triton, which need not be installed: what they replace is the default.

They are tested in Triton's interpreter. Whether one beats the eager code is for
`python -m benchmarks.speed` to show on the GPU at hand; until then it has to be switched on.
"""

from __future__ import annotations

import importlib.util
import os

import torch

VARIABLE = "LLAVA_PROJECTORS_TRITON"


def are_wanted(tensor: torch.Tensor) -> bool:
    """Whether kernels are switched on (`LLAVA_PROJECTORS_TRITON=1`), and there are any for this device."""
    return os.environ.get(VARIABLE) == "1" and tensor.is_cuda and importlib.util.find_spec("triton") is not None
