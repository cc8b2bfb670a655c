"""The tower that stops early: the stock model's bits, without its wasted layers and hidden states."""

import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from copy import deepcopy
from functools import partial

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import CLIPVisionModel

from llava_projectors import ProjectorSpecError
from llava_projectors.integration.truncated_encoder import can_keep, keeping

LAYERS = (2, 4, 6, 7)
pytestmark = pytest.mark.cuda


@pytest.fixture
def stock(tiny, device):
    return CLIPVisionModel.from_pretrained(tiny.coarse_tower).to(device)


@pytest.fixture
def model(stock):
    model = deepcopy(stock)
    can_keep(model)
    return model


def kept(model, images, layers=LAYERS):
    """The hidden states of a tower's run."""
    with keeping(layers):
        return model(images, output_hidden_states=True).hidden_states


@pytest.fixture(scope="module")
def images(device):
    return torch.randn(2, 3, 336, 336, generator=torch.Generator().manual_seed(0)).to(device)


def watch(model, stack, record):
    """Call record(index, output) whenever a layer has run."""
    for index, layer in enumerate(model.vision_model.encoder.layers):
        hook = layer.register_forward_hook(lambda _, __, out, index=index: record(index, out[0]))
        stack.callback(hook.remove)


def check(model, stock, images, layers=LAYERS):
    """The bits are the stock model's."""
    with torch.no_grad():
        expected = stock(images, output_hidden_states=True).hidden_states
        ours = kept(model, images, layers)
    assert all(torch.equal(ours[layer], expected[layer]) for layer in layers)


@pytest.mark.parametrize("layers", [LAYERS, (0, 3), (8,), (5,), (0,), (0, 8), tuple(range(9))])
def test_the_same_bits(model, stock, images, layers):
    check(model, stock, images, layers)
    assert not model._runs_whole  # which would give them too


def test_layers_above_the_highest_do_not_run(model, images):
    ran = []
    with ExitStack() as stack, torch.no_grad():
        watch(model, stack, lambda index, _: ran.append(index))
        kept(model, images)
    assert ran == list(range(7))


def test_only_what_is_asked_for_is_kept(model, images):
    outputs = {}
    with ExitStack() as stack, torch.no_grad():
        watch(model, stack, lambda index, out: outputs.update({index + 1: weakref.ref(out)}))
        hidden_states = kept(model, images)
        gc.collect()
        assert tuple(layer for layer, ref in outputs.items() if ref() is not None) == LAYERS
    for other in {*range(9)} - {*LAYERS}:
        with pytest.raises(ProjectorSpecError, match=f"hidden state {other} .* not kept: only hidden states 2.4.6.7"):
            hidden_states[other][:, 1:]
        with pytest.raises(AttributeError, match=f"hidden state {other} of the vision tower was not kept"):
            hidden_states[other].mean()


def test_what_the_shortened_run_does_not_know_is_not_given(model, images):
    with torch.no_grad(), keeping(LAYERS):
        outputs = model(images, output_hidden_states=True)
    with pytest.raises(AttributeError, match="last_hidden_state of the vision tower was not kept"):
        outputs.last_hidden_state.mean()
    for name in ("pooler_output", "attentions"):
        with pytest.raises(ProjectorSpecError, match=f"{name} of the vision tower was not kept"):
            outputs[name][0]


def test_layers_that_return_attentions_too(model, stock, images):
    """By the config, as LLaVA-PruMerge sets it."""
    for each in (model, stock):
        each.config.output_attentions = True
    check(model, stock, images)


@pytest.mark.parametrize("options", [{}, {"output_attentions": True}, {"output_hidden_states": False}])
def test_who_asks_for_something_else_gets_the_stock_outputs(model, stock, images, options):
    with torch.no_grad():
        expected, found = stock(images, **options), model(images, **options)
        with keeping(LAYERS):
            within = model(images, **options)
    for outputs in (found, within):
        assert outputs.keys() == expected.keys()
        assert torch.equal(outputs.pooler_output, expected.pooler_output)


def test_the_model_is_as_before(model, stock, images):
    with torch.no_grad():
        kept(model, images)
        whole = model(images, output_hidden_states=True).hidden_states
        expected = stock(images, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True))
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [(name, type(m).__name__) for name, m in model.named_modules()] == [
        (name, type(m).__name__) for name, m in stock.named_modules()
    ]
    assert isinstance(model, CLIPVisionModel)


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, stock, images, copied):
    twin = copied(model)
    assert twin.vision_model.encoder.layers[0] is not model.vision_model.encoder.layers[0]
    check(twin, stock, images)


def encoder_of(model):
    return model.vision_model.encoder


def bind(module):
    """As Liger binds its forwards."""
    module.forward = type(module).forward.__get__(module)


class Forwarding(torch.nn.Module):
    """A wrapper that answers for what it wraps, as FSDP, peft and a dozen others."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.wrapped, name)

    def forward(self, *args, **kwargs):
        return self.wrapped(*args, **kwargs)


class Replaced(torch.nn.Module):
    """In the place of a layer, as BetterTransformer's."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return type(self.layer).forward(self.layer, *args, **kwargs)


def wrap_encoder(wrapper):
    def wrap(model):
        model.vision_model.encoder = wrapper(encoder_of(model))

    return wrap


def wrap_layers(wrapper):
    def wrap(model):
        layers = encoder_of(model).layers
        for place, layer in enumerate(layers):
            layers[place] = wrapper(layer)

    return wrap


def wrap_vision_model(wrapper):
    def wrap(model):
        model.vision_model = wrapper(model.vision_model)

    return wrap


def hook_all(model):
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(next(model.parameters()).device))


def lora(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))


compiled = partial(torch.compile, backend="eager")
reentrant = partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT)
# What is done to a model -> how many of the 8 layers then run; 7 are enough.
WRAPPED = {
    "checkpoint_wrapper": (wrap_encoder(checkpoint_wrapper), 7),
    "checkpoint_wrapper, reentrant": (wrap_encoder(reentrant), 7),
    "checkpoint_wrapper of the layers": (wrap_layers(checkpoint_wrapper), 7),
    "a forward bound to the encoder": (lambda model: bind(encoder_of(model)), 7),
    "a forward bound to the vision model": (lambda model: bind(model.vision_model), 7),
    "a forward bound to the model": (bind, 7),
    "a forward bound to the layers": (lambda model: [bind(layer) for layer in encoder_of(model).layers], 7),
    "a partial": (lambda model: setattr(model.vision_model, "forward", partial(model.vision_model.forward)), 7),
    "accelerate's hook on the encoder": (
        lambda model: add_hook_to_module(encoder_of(model), AlignDevicesHook(model.device)),
        7,
    ),
    "accelerate's hooks": (hook_all, 7),
    "a forwarding encoder": (wrap_encoder(Forwarding), 7),
    "a forwarding vision model": (wrap_vision_model(Forwarding), 7),
    "forwarding layers": (wrap_layers(Forwarding), 7),
    "LoRA": (lora, 7),
    "layers of another class": (wrap_layers(Replaced), 8),
}
COMPILED = {
    "an encoder": wrap_encoder(compiled),
    "an encoder, in its place": lambda model: encoder_of(model).compile(backend="eager"),
    "layers": wrap_layers(compiled),
    "layers, in their place": lambda model: [layer.compile(backend="eager") for layer in encoder_of(model).layers],
}


@pytest.mark.parametrize(("wrap", "num_layers"), WRAPPED.values(), ids=WRAPPED)
def test_wrapped_models(model, stock, images, wrap, num_layers):
    """They answer for what they wrap, so nothing about them is to be taken from their attributes."""
    mlps = [layer.mlp for layer in encoder_of(model).layers]
    wrap(model)
    check(model, stock, images)
    check(model, stock, images[:1])
    ran = []
    for place, mlp in enumerate(mlps):
        mlp.register_forward_hook(lambda *_, place=place: ran.append(place))
    with torch.no_grad():
        kept(model, images)
    assert ran == list(range(num_layers))


@pytest.mark.parametrize("wrap", COMPILED.values(), ids=COMPILED)
def test_parts_that_were_compiled(model, stock, images, wrap):
    wrap(model)
    check(model, stock, images)


@pytest.mark.parametrize(("wrap", "_"), WRAPPED.values(), ids=WRAPPED)
def test_models_that_were_wrapped_before(stock, images, wrap, _):
    model = deepcopy(stock)
    wrap(model)
    can_keep(model)
    check(model, stock, images)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("least", [1_000, 20_000, 1_000_000])
def test_fsdp(model, stock, images, alone, least, device):
    """Wrapped by size: layers, the encoder, or the model alone."""
    if device != "cpu":
        pytest.skip("gloo shards on a CPU")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    policy = partial(fsdp.wrap.size_based_auto_wrap_policy, min_num_params=least)
    model = fsdp.FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    check(model, stock, images)


def test_hooks_on_the_encoder_run_once(model, stock, images):
    """One that changes what goes in changes it once."""

    def double(module, args, kwargs):
        return args, {**kwargs, "inputs_embeds": 2 * kwargs["inputs_embeds"]}

    for each in (model, stock):
        encoder_of(each).register_forward_pre_hook(double, with_kwargs=True)
    check(model, stock, images)


def test_layers_that_do_not_run_one_after_the_other(model, stock, images):
    """As an encoder that runs a layer twice, or leaves one out: the states are those that transformers counts."""
    for each in (model, stock):
        layers = encoder_of(each).layers
        encoder_of(each).layers = torch.nn.ModuleList([*layers[:2], layers[1], *layers[4:], layers[3]])
    check(model, stock, images)


@pytest.mark.parametrize("layers", [LAYERS, (3, 8)])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_an_unfrozen_tower_gets_the_stock_gradients(model, stock, images, layers, checkpointing, monkeypatch):
    """Forks train the tower; the layers above the selected one get no gradient there either."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # or no two backward passes are alike on a GPU
    gradients = []
    for each, run in (
        (stock, lambda: stock(images, output_hidden_states=True).hidden_states),
        (model, lambda: kept(model, images, layers)),
    ):
        each.train()
        if checkpointing is not None:
            each.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            each.vision_model.embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_())
        each.zero_grad(set_to_none=True)
        hidden_states = run()
        sum(hidden_states[layer].square().mean() for layer in layers).backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    expected, ours = gradients
    missing = {name for name, gradient in ours.items() if gradient is None}
    assert missing == {name for name, gradient in expected.items() if gradient is None}
    assert any(".layers.7." in name for name in missing) is (layers == LAYERS)
    assert not any(".layers.6." in name for name in missing)
    assert all(torch.equal(ours[name], expected[name]) for name in set(ours) - missing)


def test_an_encoder_in_a_checkpoint_gets_the_stock_gradients(model, stock, images):
    expected, ours = [], []
    for each, found in ((stock, expected), (model, ours)):
        if each is model:
            wrap_encoder(checkpoint_wrapper)(each)
        each.zero_grad(set_to_none=True)
        states = kept(each, images) if each is model else each(images, output_hidden_states=True).hidden_states
        sum(states[layer].square().mean() for layer in LAYERS).backward()
        found.extend(p.grad for p in each.parameters())
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_threads_do_not_meet(model):
    """LLaVA's worker serves several requests from threads."""
    inputs = [torch.randn(1, 3, 336, 336, device=model.device) for _ in range(8)]
    choices = [(4,), (3, 7)] * 4

    def run(layers, x):
        with torch.no_grad():
            states = kept(model, x, layers)
        return [states[layer] for layer in layers]

    alone = [run(*pair) for pair in zip(choices, inputs)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, choices, inputs))
    for a, b in zip(alone, together, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_error_leaves_nothing_behind(model, stock, images):
    with torch.no_grad(), pytest.raises(RuntimeError):
        kept(model, images[:, :, :100, :7])
    check(model, stock, images)


def test_a_model_built_otherwise_runs_whole(images):
    class Other(torch.nn.Module):
        def forward(self, images, output_hidden_states):
            assert output_hidden_states
            return [images]

    other = Other()
    can_keep(other)
    assert type(other) is Other
    with keeping(LAYERS):
        assert other(images, output_hidden_states=True) == [images]
