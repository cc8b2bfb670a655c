"""The benchmark's fused kernel against the plain code: on a GPU, elsewhere in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only, and nothing requires it")

from benchmarks.speed import suites
from benchmarks.speed.candidates import TRITON, Subject
from benchmarks.speed.region_attention import FusedAttend
from llava_projectors.projectors import tokenpacker

ROOT = Path(__file__).parents[1]
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
def test_the_benchmarks_candidate_is_tokenpacker_with_the_kernel(monkeypatch, device, scale_factor):
    width, side = {"cpu": (32, 5), "cuda": (1024, 25)}[device]
    projector = suites.make_projector(Subject(f"tokenpacker:scale_factor={scale_factor}", TRITON), width, 16).to(device)
    features = torch.randn(1, side**2, 4 * width, device=device)
    plain = projector.projector(features)
    calls = []
    monkeypatch.setattr(FusedAttend, "apply", lambda *a, apply=FusedAttend.apply: calls.append(1) or apply(*a))
    torch.testing.assert_close(projector(features), plain, rtol=1e-4, atol=1e-5)
    projector.projector(features)
    assert calls == [1]


@pytest.mark.cuda
def test_a_second_derivative_is_an_error(device):
    q, k_weight = torch.randn(1, 1, 3, device=device), torch.randn(1, 3, 4, device=device)
    grid = torch.randn(1, 2, 2, 4, device=device, requires_grad=True)
    out, _ = FusedAttend.apply(q, grid, grid, k_weight, k_weight, None, 2)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), grid, create_graph=True)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "stride"), [(1024, 2), (1152, 2)])
def test_it_compiles_for_gpus_without_spilling_registers(tmp_path, width, stride):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(width), str(stride)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines == [f"{name} {sm} 0" for name in ("_forward", "_backward") for sm in (80, 90, 100)]
