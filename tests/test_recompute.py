"""Tensors made again in the backward pass: the same gradients, and really not kept."""

import pytest
import torch
from torch import nn

from llava_projectors.projectors.layers import TwoLayerMLP
from llava_projectors.projectors.recompute import recomputed, remember


def gradients(module, x, autocast):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = module(x)
    out.float().square().sum().backward()
    result = [x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad(set_to_none=True)
    return result


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_gradients_as_a_plain_sequential(dtype, autocast):
    torch.manual_seed(0)
    ours = TwoLayerMLP(8, 16).to(dtype)
    plain = nn.Sequential(*ours)
    x = torch.randn(2, 5, 8, dtype=dtype)
    for a, b in zip(gradients(ours, x, autocast), gradients(plain, x, autocast)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("noted", [False, True])
def test_what_is_noted_is_not_kept(noted):
    hidden = torch.randn(4, 8, requires_grad=True)
    activate, mix = nn.GELU(), nn.Linear(8, 8)
    activated, made = remember(activate, hidden)
    with recomputed(made if noted else []):
        out = mix(activated)
    saved = out.grad_fn._saved_mat1
    assert torch.equal(saved, activated)
    assert (saved.data_ptr() == activated.data_ptr()) is not noted


def test_nothing_is_held_without_gradients():
    hidden = torch.randn(4, 8)
    with torch.no_grad():
        _, made = remember(nn.GELU(), hidden)
    assert made == []
