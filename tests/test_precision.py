"""Half precision on features like CLIP's, compilation, gradient checkpointing, opaque linear layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from llava_projectors import build_projector

TYPES = ("saep", "saep:order=depthwise_first", "saep:stride=3", "tokenpacker", "tokenpacker:scale_factor=3")
BASELINES = (
    "avg_pool",
    "pixel_shuffle",
    "ldpv2",
    "c_abstractor",
    "resampler:num_queries=36",
    "stf:layers=3+7",
    "delta",
)
OPTIONS = ("saep:readout_size=24", "saep:level_norm=none,stride=3")


def outlier_features(projector, dtype, batch=2, side=12):
    """Unit noise with a few channels near 1e3, as CLIP has them, the same in every patch and level."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, side * side, projector.num_levels, projector.mm_hidden_size, generator=generator)
    x[..., 3] += 1000
    x[..., 11] -= 700
    return x.flatten(2).to(dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("projector_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_half_precision_is_finite_on_outliers(device, projector_type, dtype):
    """As DeepSpeed runs bf16 and fp16: weights, activations and gradients in the low precision."""
    torch.manual_seed(0)
    projector = build_projector(projector_type, 256, 64)
    expected = projector(outlier_features(projector, torch.float32))
    projector.to(device, dtype)
    out = projector(outlier_features(projector, dtype).to(device))
    (out.float() ** 2).mean().backward()
    assert out.isfinite().all()
    assert (out.float().cpu() - expected).norm() < 0.05 * expected.norm()
    for name, parameter in projector.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.cuda
@pytest.mark.parametrize("projector_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_training_is_finite_on_outliers(device, projector_type, dtype):
    """As the trainer runs without DeepSpeed: autocast over float32 weights."""
    torch.manual_seed(0)
    projector = build_projector(projector_type, 256, 64).to(device)
    optimizer = torch.optim.AdamW(projector.parameters(), 1e-3)
    x = outlier_features(projector, dtype).to(device)
    target = torch.randn(2, (12 // projector.stride) ** 2, 64).to(device)
    values = []
    for _ in range(20):
        with torch.autocast(device, dtype):
            loss = F.mse_loss(projector(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert all(p.isfinite().all() for p in projector.parameters())
    assert values[-1] < values[0]


class AutocastOfCuda(TorchFunctionMode):
    """CUDA's autocast makes float32 of what these take, and its LayerNorm takes one dtype; a CPU's do neither.

    https://docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to float32".
    """

    IN_FLOAT32 = frozenset(
        ["softmax", "log_softmax", "layer_norm", "group_norm", "sum", "prod", "cumsum", "pow", "exp", "rsqrt", "norm"]
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.IN_FLOAT32:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
            elif function.__name__ == "layer_norm":
                dtypes = {value.dtype for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
                assert len(dtypes) == 1, dtypes
        return function(*args, **kwargs)


@pytest.mark.parametrize("projector_type", [*TYPES, *BASELINES, *OPTIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision_as_on_cuda(projector_type, dtype, features_dtype):
    """The backward pass runs outside autocast, on whatever dtypes the forward pass has left."""
    torch.manual_seed(0)
    projector = build_projector(projector_type, 32, 16)
    x = torch.randn(2, 144, 32 * projector.num_levels, dtype=features_dtype)
    with AutocastOfCuda():
        with torch.autocast("cpu", dtype):
            out = projector(x)
        out.float().square().sum().backward()
    plain = build_projector(projector_type, 32, 16)
    plain.load_state_dict(projector.state_dict())
    plain(x.float()).square().sum().backward()
    ours, exact = (torch.cat([p.grad.flatten() for p in module.parameters()]) for module in (projector, plain))
    assert (ours - exact).norm() < 0.1 * exact.norm()


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize(("projector_type", "heads"), [("saep", None), ("tokenpacker", 1), ("tokenpacker", 8)])
def test_compiles_as_one_graph(device, projector_type, heads):
    """On a GPU the mode records CUDA graphs in the second run, and replays them in the third."""
    torch.manual_seed(0)
    projector = build_projector(projector_type, 32, 16)
    if heads:
        projector.clip_attn.num_heads = heads
    projector.to(device)
    compiled = torch.compile(copy.deepcopy(projector), fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        x = torch.randn(2, 144, 32 * projector.num_levels, device=device, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        out, expected = compiled(x), projector(twin)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-3, atol=1e-5)


class Opaque(nn.Module):
    """A linear layer without `weight`, as a quantised one has none that can be read; and that takes rows only."""

    def __init__(self, linear):
        super().__init__()
        self.run = [linear]

    def forward(self, x):
        assert x.ndim == 2, f"called on {list(x.shape)}, not on [rows, channels]"
        return self.run[0](x)


@pytest.mark.parametrize("projector_type", [*TYPES, *BASELINES, *OPTIONS])
def test_linear_layers_are_called_on_rows_never_read(projector_type):
    """8- and 4-bit loading puts other modules in the place of `nn.Linear`."""
    projector = build_projector(projector_type, 32, 16)
    x = torch.randn(1, 144, projector.num_levels * 32)
    expected = projector(x)
    for parent in list(projector.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Opaque(child))
    assert torch.equal(projector(x), expected)
    assert not any(isinstance(module, nn.Linear) for module in projector.modules())


@pytest.mark.parametrize("projector_type", ["saep", "tokenpacker"])
def test_gradient_checkpointing_changes_no_gradient(build_model, projector_type):
    model = build_model(projector_type).train()
    inputs = {
        "input_ids": torch.tensor([[1, 5, -200, 6, 7]]),
        "labels": torch.tensor([[1, 5, -100, 6, 7]]),
        "images": torch.randn(1, 3, 336, 336),
    }
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(**inputs, use_cache=False).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any("mm_projector" in name for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6)
