"""The tower that stops early: the stock model's bits, without its wasted layers and hidden states."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from transformers import CLIPVisionModel

from llava_projectors.integration.truncated_encoder import TruncatedVisionModel

LAYERS = (2, 4, 6, 7)
pytestmark = pytest.mark.cuda


@pytest.fixture
def model(tiny, device):
    return CLIPVisionModel.from_pretrained(tiny.tower).to(device)


@pytest.fixture(scope="module")
def images(device):
    return torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0)).to(device)


def watch(model, stack, record):
    """Call record(index, output) whenever a layer has run."""
    for index, layer in enumerate(model.vision_model.encoder.layers):
        hook = layer.register_forward_hook(lambda _, __, out, index=index: record(index, out[0]))
        stack.callback(hook.remove)


@pytest.mark.parametrize("layers", [LAYERS, (0, 3), (8,), (5,), (0,)])
def test_the_same_bits(model, images, layers):
    with torch.no_grad():
        stock = model(images, output_hidden_states=True).hidden_states
        ours = TruncatedVisionModel(model, layers)(images, output_hidden_states=True).hidden_states
    assert tuple(ours) == layers
    assert all(torch.equal(ours[layer], stock[layer]) for layer in layers)


def test_layers_above_the_highest_do_not_run(model, images):
    ran = []
    with ExitStack() as stack, torch.no_grad():
        watch(model, stack, lambda index, _: ran.append(index))
        TruncatedVisionModel(model, LAYERS)(images)
    assert ran == list(range(7))


def test_only_what_is_asked_for_is_kept(model, images):
    outputs = {}
    with ExitStack() as stack, torch.no_grad():
        watch(model, stack, lambda index, out: outputs.update({index + 1: weakref.ref(out)}))
        hidden_states = TruncatedVisionModel(model, LAYERS)(images).hidden_states
        gc.collect()
        assert tuple(layer for layer, ref in outputs.items() if ref() is not None) == LAYERS == tuple(hidden_states)


def test_the_model_is_as_before(model, images):
    before = {name: id(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    with torch.no_grad():
        TruncatedVisionModel(model, LAYERS)(images)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    assert len(model.vision_model.encoder.layers) == 8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_unfrozen_tower_gets_the_stock_gradients(model, images, checkpointing, monkeypatch):
    """Forks train the tower; the layers above the selected one get no gradient there either."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # or no two backward passes are alike on a GPU
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.vision_model.embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_())
    gradients = []
    for run in (model, TruncatedVisionModel(model, LAYERS)):
        model.zero_grad(set_to_none=True)
        hidden_states = run(images, output_hidden_states=True).hidden_states
        sum(hidden_states[layer].square().mean() for layer in LAYERS).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    stock, ours = gradients
    missing = {name for name, gradient in ours.items() if gradient is None}
    assert missing == {name for name, gradient in stock.items() if gradient is None}
    assert any(".layers.7." in name for name in missing)
    assert not any(".layers.6." in name for name in missing)
    assert all(torch.equal(ours[name], stock[name]) for name in set(ours) - missing)


def test_threads_do_not_meet(model):
    """LLaVA's worker serves several requests from threads."""
    inputs = [torch.randn(1, 3, 336, 336, device=model.device) for _ in range(8)]
    towers = [TruncatedVisionModel(model, layers) for layers in ((4,), (3, 7))] * 4

    def run(tower, x):
        with torch.no_grad():
            return tower(x).hidden_states

    alone = [run(*pair) for pair in zip(towers, inputs)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, towers, inputs))
    for a, b in zip(alone, together):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[layer], b[layer]) for layer in a)


def test_a_model_spread_over_devices_runs_whole(model, images):
    """accelerate's hooks bind the forward to the original modules, so there is nothing to shorten."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    with torch.no_grad():
        stock = model(images, output_hidden_states=True).hidden_states
        for module in model.modules():
            add_hook_to_module(module, AlignDevicesHook(model.device))
        ours = TruncatedVisionModel(model, LAYERS)(images, output_hidden_states=True).hidden_states
    assert all(torch.equal(ours[layer], stock[layer]) for layer in LAYERS)


def test_a_model_built_otherwise_runs_whole(images):
    class Other(torch.nn.Module):
        def forward(self, images, output_hidden_states):
            assert output_hidden_states
            return [images]

    assert TruncatedVisionModel(Other(), LAYERS)(images, output_hidden_states=True) == [images]


def test_everything_else_is_the_models_own(model):
    assert TruncatedVisionModel(model, LAYERS).config is model.config
    assert TruncatedVisionModel(model, LAYERS).dtype == torch.float32
