"""Every projector in every dtype, values and gradients, on the device, against float64 on a CPU."""

import copy
from functools import cache

import pytest
import torch

from llava_projectors import build_projector, list_projectors

pytestmark = pytest.mark.cuda

STRIDES = [f"{name}={stride}" for name in ("saep:stride", "tokenpacker:scale_factor") for stride in (3, 4)]
TYPES = [*list_projectors(), *STRIDES, "saep:shortcut=average"]
# Of the norm. Half precision rounds every intermediate value.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.1, torch.float16: 0.01}
# Where two patches of a region are as large in half precision, the gradient goes to another than in float64.
OF_A_MAXIMUM = {torch.float32: 2e-5, torch.bfloat16: 0.3, torch.float16: 0.2}
# Channels of a hidden state, width of the LLM, sides of the patch grid: one that strides divide, one that none does.
SIZES = {"cpu": (32, 16, (12, 7)), "cuda": (256, 256, (24, 23))}


@cache
def reference(projector_type, dtype, device, side):
    """A projector whose weights are of the dtype, features, and its tokens and gradients in float64."""
    width, hidden, _ = SIZES[device]
    torch.manual_seed(0)
    projector = build_projector(projector_type, width, hidden).to(dtype)
    features = torch.randn(2, side * side, projector.num_levels * width).to(dtype)
    return projector, features, tokens_and_gradients(copy.deepcopy(projector).double(), features.double())


def tokens_and_gradients(projector, features):
    features = features.clone().requires_grad_()
    tokens = projector(features)
    weight = torch.linspace(0, 1, tokens.numel(), dtype=torch.float64).view(tokens.shape)
    (tokens * weight.to(tokens)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in projector.named_parameters()}
    return {"tokens": tokens, "features": features.grad, **gradients}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("projector_type", TYPES)
def test_values_and_gradients(device, projector_type, dtype):
    for side in SIZES[device][2]:
        projector, features, expected = reference(projector_type, dtype, device, side)
        found = tokens_and_gradients(copy.deepcopy(projector).to(device), features.to(device))
        of_gradients = OF_A_MAXIMUM if getattr(projector, "shortcut", None) == "max" else TOLERANCES
        largest = max(value.norm() for name, value in expected.items() if name not in ("tokens", "features"))
        for name, value in expected.items():
            assert found[name].dtype == dtype, (side, name)
            # A gradient that cancels, as that of the keys' bias, is only as exact as the others.
            scale = max(value.norm(), 0.05 * largest)
            tolerance = (TOLERANCES if name == "tokens" else of_gradients)[dtype]
            assert (found[name].cpu().double() - value).norm() < tolerance * scale, (side, name)
