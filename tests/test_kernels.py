"""The fused kernel against the plain code: on a GPU, elsewhere in Triton's interpreter."""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only, and nothing requires it")

from llava_projectors import build_projector
from llava_projectors.projectors import kernels, tokenpacker
from llava_projectors.projectors.kernels.region_attention import FusedAttend

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("stride", "height", "width", "heads", "channels"),
    [(2, 4, 4, 2, 32), (3, 6, 6, 1, 20), (4, 8, 4, 3, 72), (2, 5, 3, 2, 16), (3, 7, 8, 8, 130)],
)
def test_values_and_gradients_are_those_of_the_plain_code(device, stride, height, width, heads, channels, dtype):
    against_the_plain_code(device, stride, height, width, heads, channels, dtype)


@pytest.mark.cuda
def test_in_float16_of_a_grid_that_lies_otherwise_in_memory(device):
    """Keys and values that are views of a larger tensor, on a grid that the stride does not divide."""
    against_the_plain_code(device, 4, 5, 6, 2, 24, torch.float16, lay_out=lambda grid: grid.mT.contiguous().mT)


def against_the_plain_code(device, stride, height, width, heads, channels, dtype, lay_out=lambda grid: grid):
    generator = torch.Generator().manual_seed(0)
    regions = 2 * -(-height // stride) * -(-width // stride)
    grid, projection = (2, height, width, channels), (heads, 3, channels)
    shapes = [(regions, heads, 3), grid, grid, projection, projection]
    inputs = [(torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype) for shape in shapes]
    inputs[1:3] = map(lay_out, inputs[1:3])
    loss_weight = torch.randn(regions, heads, 3, generator=generator, dtype=torch.float64)

    def run(attend, tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out, weights = attend(*leaves, tokenpacker.region_patches(leaves[1], stride), stride)
        (out * loss_weight.to(out)).sum().backward()
        return [out, weights, *(leaf.grad for leaf in leaves)]

    expected = run(tokenpacker._attend, [tensor.double() for tensor in inputs])
    for ours, theirs in zip(run(FusedAttend.apply, [tensor.to(device) for tensor in inputs]), expected):
        assert ours.dtype == dtype
        assert (ours.cpu().double() - theirs).abs().max() < TOLERANCES[dtype] * theirs.abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("scale_factor", [2, 3, 4])
def test_a_projector_uses_it_when_switched_on(monkeypatch, device, scale_factor):
    width, side = {"cpu": (32, 5), "cuda": (1024, 25)}[device]
    projector = build_projector(f"tokenpacker:scale_factor={scale_factor}", width, 16).to(device)
    features = torch.randn(1, side**2, 4 * width, device=device)
    plain = projector(features)
    monkeypatch.setattr(kernels, "are_wanted", lambda tensor: True)
    calls = []
    monkeypatch.setattr(FusedAttend, "apply", lambda *a, apply=FusedAttend.apply: calls.append(1) or apply(*a))
    torch.testing.assert_close(projector(features), plain, rtol=1e-4, atol=1e-5)
    assert calls == [1]


@pytest.mark.cuda
def test_a_second_derivative_is_an_error(device):
    q, k_weight = torch.randn(1, 1, 3, device=device), torch.randn(1, 3, 4, device=device)
    grid = torch.randn(1, 2, 2, 4, device=device, requires_grad=True)
    out, _ = FusedAttend.apply(q, grid, grid, k_weight, k_weight, None, 2)
    with pytest.raises(NotImplementedError, match="no second derivative .*: unset LLAVA_PROJECTORS_TRITON"):
        torch.autograd.grad(out.sum(), grid, create_graph=True)


def test_it_is_off_by_default_and_on_a_cpu(monkeypatch):
    on_a_gpu = SimpleNamespace(is_cuda=True)  # of the tensor, that is what is looked at
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    assert not kernels.are_wanted(on_a_gpu)
    monkeypatch.setenv(kernels.VARIABLE, "0")
    assert not kernels.are_wanted(on_a_gpu)
    monkeypatch.setenv(kernels.VARIABLE, "1")
    assert kernels.are_wanted(on_a_gpu)
    assert not kernels.are_wanted(torch.zeros(1))


def test_the_benchmark_switches_it_on_for_its_own_candidate(monkeypatch):
    from benchmarks.speed import suites
    from benchmarks.speed.candidates import EAGER, TRITON, Subject

    switched = []
    monkeypatch.setattr(kernels, "are_wanted", lambda _: switched.append(os.environ.get(kernels.VARIABLE)) or False)
    for implementation in (TRITON, EAGER):
        suites.make_projector(Subject("tokenpacker", implementation), 32, 16)(torch.randn(1, 36, 128))
    assert switched == ["1", "0"]
