"""The vision tower with fused attention and activation: values and gradients of the stock one; off by default."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.table import read_rows
from benchmarks.tower import RESULTS
from llava_projectors import ProjectorSpecError
from llava_projectors.integration import fast_tower
from llava_projectors.integration.fast_tower import VARIABLE, slow_down, speed_up

siglip = pytest.importorskip("transformers.models.siglip", reason="transformers knows SigLIP from 4.37 on")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
PICTURE = {"image_size": 56, "patch_size": 14}


def make(name):
    torch.manual_seed(0)
    if name == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**SIZES, **PICTURE))
    else:
        model = siglip.SiglipVisionModel(siglip.SiglipVisionConfig(**SIZES, **PICTURE, vision_use_head=False))
    with torch.no_grad():
        for parameter in model.parameters():  # initial weights make attention almost uniform
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def run(model, dtype, checkpointing=False):
    """Every hidden state, and the gradient of every weight but the keys' bias, which is zero save for rounding."""
    model = model.to(dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)).to(dtype)
    states = model(images, output_hidden_states=True).hidden_states
    states[-1].float().square().sum().backward()
    gradients = [p.grad for name, p in model.named_parameters() if p.grad is not None and "k_proj.bias" not in name]
    assert len(gradients) > 3 * 14
    return [torch.cat([tensor.detach().double().flatten() for tensor in part]) for part in (states, gradients)]


def errors(ours, exact):
    return [((one - other).norm() / other.norm()).item() for one, other in zip(ours, exact)]


@pytest.mark.parametrize("choice", ["sdpa", pytest.param("fused", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_float32_is_eager_but_for_rounding(name, choice, checkpointing):
    model = make(name)
    exact = run(copy.deepcopy(model), torch.float32)
    assert speed_up(model, choice) == 3 + 3 * (choice == "fused" and name == "clip")
    assert 0 < max(errors(run(model, torch.float32, checkpointing), exact)) < 1e-5


@pytest.mark.parametrize("choice", ["sdpa", pytest.param("fused", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_bfloat16_is_as_exact_as_eager(name, choice):
    model = make(name).to(torch.bfloat16)
    exact = run(copy.deepcopy(model), torch.float64)
    eager = run(copy.deepcopy(model), torch.bfloat16)
    speed_up(model, choice)
    for ours, stock in zip(errors(run(model, torch.bfloat16), exact), errors(eager, exact)):
        assert ours < 1.2 * stock < 0.1


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_it_is_reversible_and_travels(name):
    model = make(name)
    exact = run(model, torch.float32)
    speed_up(model, "sdpa")
    assert speed_up(model, "sdpa") == 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert max(errors(run(twin, torch.float32), exact)) < 1e-5
        attention = twin.vision_model.encoder.layers[0].self_attn
        assert attention.forward.args == (attention,)
    slow_down(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(map(torch.equal, run(model, torch.float32), exact))


def test_who_asks_for_weights_or_masks_gets_them():
    model = make("clip").eval()
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        exact = model(images, output_attentions=True).attentions
        speed_up(model, "sdpa")
        assert all(map(torch.equal, model(images, output_attentions=True).attentions, exact))
        assert model(images).last_hidden_state.isfinite().all()


def test_other_peoples_forwards_and_other_attention_are_left_alone():
    model = make("clip")
    model.vision_model.encoder.layers[0].self_attn.forward = lambda *_, **__: None
    assert speed_up(model, "sdpa") == 2
    model = make("clip")
    model._supports_sdpa = True  # as in newer transformers
    assert speed_up(model, "sdpa") == 0
    assert speed_up(nn.Sequential(nn.GELU(), nn.MultiheadAttention(8, 2)), "fused") == 0


def test_layers_are_called_never_read():
    """LoRA, quantised layers and ZeRO-3's hooks stand in the way of a weight that is read."""
    model = make("clip")
    speed_up(model, "sdpa")
    calls = []
    for layer in model.vision_model.encoder.layers:
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            getattr(layer.self_attn, name).register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(1, 3, 56, 56))
    assert len(calls) == 12


@pytest.mark.parametrize("choice", ["", "stock", "sdpa"])
def test_the_environment_asks_for_it(monkeypatch, build_model, messages, choice):
    from llava_projectors.integration.tower import find_tower

    monkeypatch.setenv(VARIABLE, choice)
    ours, stock = build_model("saep"), build_model("mlp2x_gelu")
    changed = [[m for m in find_tower(model).modules() if "forward" in vars(m)] for model in (ours, stock)]
    depth = find_tower(ours).config.num_hidden_layers
    assert [len(modules) for modules in changed] == [depth * (choice == "sdpa"), 0]
    assert any(VARIABLE in line for line in messages) == (choice == "sdpa")
    images = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    features = find_tower(ours)(images)
    slow_down(find_tower(ours).vision_tower)
    exact = find_tower(ours)(images)
    assert torch.equal(features, exact) != (choice == "sdpa")
    torch.testing.assert_close(features, exact, rtol=1e-4, atol=1e-4)


def test_a_choice_that_is_none_is_explained(monkeypatch, build_model):
    monkeypatch.setenv(VARIABLE, "flash")
    with pytest.raises(ProjectorSpecError, match="LLAVA_PROJECTORS_TOWER=flash must be one of stock, sdpa, fused"):
        build_model("saep")
    assert fast_tower.CHOICES[0] == "stock"
    build_model("mlp2x_gelu")


def test_the_times_in_the_documents_are_those_that_were_measured():
    text = (RESULTS.parents[1] / "docs" / "training.md").read_text()
    rows = [row for row in read_rows(RESULTS / "tower-cpu.csv", "choice") if row["choice"] != "stock"]
    assert len(rows) == 6
    for row in rows:
        low, middle, high = (f"{float(row[name]):.2f}" for name in ("ratio_q1", "ratio", "ratio_q3"))
        (line,) = (one for one in text.splitlines() if one.startswith(f"| {row['model']} | {row['dtype']} |"))
        assert f"{middle} ({low} to {high})" in line.split("|")[3 if row["choice"] == "sdpa" else 4]
