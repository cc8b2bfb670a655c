"""Tensors made again in the backward pass: the same gradients, and really not kept."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from llava_projectors import build_projector, list_projectors
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


@pytest.mark.parametrize("view", [lambda x: x[:2], torch.t], ids=["fewer rows", "transposed"])
def test_a_view_of_what_is_noted_is_kept(view):
    """It begins at the same address, and is another tensor."""
    gradients = []
    for noted in (True, False):
        hidden = torch.linspace(-2, 2, 32).view(4, 8).requires_grad_()
        activated, made = remember(nn.GELU(), hidden)
        with recomputed(made if noted else []):
            loss = (view(activated).square() * torch.arange(view(activated).numel()).view_as(view(activated))).sum()
        loss.backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


def test_nothing_is_held_without_gradients():
    hidden = torch.randn(4, 8)
    with torch.no_grad():
        _, made = remember(nn.GELU(), hidden)
    assert made == []


# torch has no second derivative of its fused attention on a CPU, and says so.
ATTENTION = {"delta", "resampler"}


@pytest.fixture(params=list_projectors())
def projector(request):
    torch.manual_seed(0)
    projector = build_projector(request.param, 16, 8).double()
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.3)
    return projector


@pytest.fixture
def features(projector):
    return torch.randn(1, 16, 16 * projector.num_levels, dtype=torch.float64)


def penalty(projector, features, of):
    """The squared norm of the loss's gradients by the features, or by the parameters; differentiable."""
    inputs = {"features": [features], "parameters": [*projector.parameters()]}[of]
    gradients = torch.autograd.grad(
        projector(features).square().mean(), inputs, create_graph=True, materialize_grads=True
    )
    return sum(gradient.square().sum() for gradient in gradients)


@pytest.mark.parametrize("of", ["features", "parameters"])
@sdpa_kernel(SDPBackend.MATH)
def test_second_derivatives(projector, features, of):
    """Against differences of first derivatives, which are tested elsewhere; by `grad` and by `backward`."""
    features.requires_grad_()
    (ours,) = torch.autograd.grad(penalty(projector, features, of), features)
    penalty(projector, features, of).backward()
    torch.testing.assert_close(features.grad, ours)
    direction, step = torch.randn_like(features), 1e-5
    above, below = (
        penalty(projector, (features.detach() + sign * step * direction).requires_grad_(), of) for sign in (1, -1)
    )
    torch.testing.assert_close((ours * direction).sum(), (above - below).detach() / (2 * step), rtol=1e-5, atol=1e-8)


def test_what_torch_cannot_differentiate_twice_is_an_error(projector, features):
    features.requires_grad_()
    if projector.name in ATTENTION:
        with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_flash_attention_for_cpu"):
            torch.autograd.grad(penalty(projector, features, "features"), features)


@sdpa_kernel(SDPBackend.MATH)
def test_transforms_of_torch_func(projector, features):
    def loss(x):
        return projector(x).square().mean()

    x = features.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(features), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(features[None])[0], expected)
    tangent = torch.randn_like(features)
    _, slope = torch.func.jvp(loss, (features,), (tangent,))
    torch.testing.assert_close(slope, (expected * tangent).sum())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(features, tangent)))
        torch.testing.assert_close(dual.tangent, slope)
    parameters = dict(projector.named_parameters())
    gradients = torch.func.grad(
        lambda values: torch.func.functional_call(projector, values, (features,)).square().mean()
    )(parameters)
    loss(features).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad)
