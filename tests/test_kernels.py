"""The fused kernel, in Triton's interpreter, against the plain code."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only, and nothing requires it")

from llava_projectors import build_projector
from llava_projectors.projectors import kernels, tokenpacker
from llava_projectors.projectors.kernels.region_attention import FusedAttend


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("stride", "height", "width", "heads", "channels"),
    [(2, 4, 4, 2, 32), (3, 6, 6, 1, 20), (4, 8, 4, 3, 72), (2, 5, 3, 2, 16), (3, 7, 8, 8, 130)],
)
def test_values_and_gradients_are_those_of_the_plain_code(stride, height, width, heads, channels, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    regions = 2 * -(-height // stride) * -(-width // stride)
    grid, projection = (2, height, width, channels), (heads, 3, channels)
    shapes = [(regions, heads, 3), grid, grid, projection, projection]
    inputs = [(torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype) for shape in shapes]
    loss_weight = torch.randn(regions, heads, 3, generator=generator, dtype=torch.float64)
    patches = tokenpacker.region_patches(inputs[1], stride)

    def run(attend, tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out, weights = attend(*leaves, patches, stride)
        (out * loss_weight.to(out.dtype)).sum().backward()
        return [out, weights, *(leaf.grad for leaf in leaves)]

    expected = run(tokenpacker._attend, [tensor.double() for tensor in inputs])
    for ours, theirs in zip(run(FusedAttend.apply, inputs), expected):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() < tolerance * theirs.abs().max()


def test_a_projector_uses_it_when_switched_on(monkeypatch):
    projector = build_projector("tokenpacker", 32, 16)
    features = torch.randn(1, 36, 128)
    plain = projector(features)
    monkeypatch.setattr(kernels, "are_wanted", lambda tensor: True)
    calls = []
    monkeypatch.setattr(FusedAttend, "apply", lambda *a, apply=FusedAttend.apply: calls.append(1) or apply(*a))
    torch.testing.assert_close(projector(features), plain)
    assert calls == [1]


def test_it_is_off_by_default_and_on_a_cpu(monkeypatch):
    assert not kernels.are_wanted(torch.zeros(1))
    monkeypatch.setenv(kernels.VARIABLE, "1")
    assert not kernels.are_wanted(torch.zeros(1))


def test_the_benchmark_switches_it_on_for_its_own_candidate(monkeypatch):
    from benchmarks.speed import suites
    from benchmarks.speed.candidates import EAGER, TRITON, Subject

    switched = []
    monkeypatch.setattr(kernels, "are_wanted", lambda _: switched.append(os.environ.get(kernels.VARIABLE)) or False)
    for implementation in (TRITON, EAGER):
        suites.make_projector(Subject("tokenpacker", implementation), 32, 16)(torch.randn(1, 36, 128))
    assert switched == ["1", "0"]
