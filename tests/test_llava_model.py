"""Models of the real LLaVA in this process: what the LLM receives, batches, padding, generation, isolation."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from drive import llm_input, pad_rows

import llava_projectors
from llava_projectors import ProjectorSpecError
from llava_projectors.projectors import registration

IMAGE, IGNORE = -200, -100
COUNTS = {
    "mlp2x_gelu": 576,
    "saep": 144,
    "saep:stride=3": 64,
    "saep:stride=4": 36,
    "tokenpacker": 144,
    "tokenpacker:scale_factor=3": 64,
    "tokenpacker:scale_factor=4": 36,
    "avg_pool": 144,
    "pixel_shuffle:stride=4": 36,
    "ldpv2:stride=3": 64,
    "c_abstractor": 144,
    "resampler:num_queries=49": 49,
    "stf:stride=3,layers=1+4+7": 64,
    "delta": 144,
}
OURS = [name for name in COUNTS if name != "mlp2x_gelu"]


@pytest.fixture(scope="module")
def models(build_model):
    made = {}

    def get(projector_type):
        if projector_type not in made:
            made[projector_type] = build_model(projector_type)
        return made[projector_type]

    return get


def pictures(count, seed=0):
    return torch.randn(count, 3, 336, 336, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("projector_type", COUNTS)
def test_the_llm_receives_exactly_the_visual_tokens(models, projector_type):
    model, expected = models(projector_type), COUNTS[projector_type]
    ids = torch.tensor([[1, 5, IMAGE, 6, 7]])
    hidden_states = llm_input(model, input_ids=ids, images=pictures(1))
    assert hidden_states.shape[1] == 4 + expected
    visual = model.encode_images(pictures(1))[0]
    assert torch.equal(hidden_states[0, 2 : 2 + expected], visual)
    assert torch.equal(hidden_states[0, [0, 1, -2, -1]], model.get_model().embed_tokens(ids[0, [0, 1, 3, 4]]))
    assert model.get_vision_tower().num_patches == expected


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("projector_type", OURS)
def test_mixed_batches_train(models, monkeypatch, projector_type, side):
    """One image, two images, text only, in one padded batch; each row gets the logits it gets alone."""
    model, count = models(projector_type), COUNTS[projector_type]
    monkeypatch.setattr(model.config, "tokenizer_padding_side", side, raising=False)
    rows = [[1, IMAGE, 5, 6], [1, IMAGE, 7, IMAGE, 8, 9], [1, 9, 8, 7, 6]]
    ids, mask = pad_rows(rows)
    images = [*pictures(3).split(1), torch.zeros(1, 3, 336, 336)]  # LLaVA sends zeros along with text
    images_of_row = (images[:1], images[1:3], images[3:])
    labels = torch.where(mask & (ids != IMAGE), ids, IGNORE)

    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, images=images, labels=labels)
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.loss > 0.0
    gradients = {name: p.grad for name, p in model.get_model().mm_projector.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    assert all(g.abs().max() > 0 for name, g in gradients.items() if name != "ln_k_1.bias")

    lengths = [len(row) + row.count(IMAGE) * (count - 1) for row in rows]
    assert out.logits.shape[1] == max(lengths)
    for row, own_images, length, logits in zip(rows, images_of_row, lengths, out.logits):
        alone = model(input_ids=torch.tensor([row]), images=own_images).logits[0]
        padded = logits[:length] if side == "right" else logits[-length:]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("projector_type", OURS)
def test_a_text_only_batch_gives_the_projector_zero_gradients(models, projector_type):
    """ZeRO and DDP hang when a parameter takes no part in the backward pass."""
    model = models(projector_type)
    model.zero_grad()
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids, images=torch.zeros(1, 3, 336, 336), labels=ids).loss.backward()
    for name, parameter in model.get_model().mm_projector.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("projector_type", ["saep", "tokenpacker"])
def test_generation_with_the_kv_cache_equals_generation_without(models, can_generate, projector_type):
    model = models(projector_type)
    ids = torch.tensor([[1, IMAGE, 5, 6, 7]])
    kwargs = {"images": pictures(1), "do_sample": False, "max_new_tokens": 12, "eos_token_id": -1}
    cached, full = (model.generate(ids, use_cache=cache, **kwargs) for cache in (True, False))
    assert cached.shape == (1, 1 + 12)  # LLaVA's transformers puts the start token first
    assert torch.equal(cached, full)


def test_one_line_says_what_was_built(build_model, messages):
    build_model("mlp2x_gelu")
    assert messages == []
    model = build_model("tokenpacker:scale_factor=3")
    parameters = sum(p.numel() for p in model.get_model().mm_projector.parameters())
    assert messages == [
        "tokenpacker:scale_factor=3: 576 -> 64 visual tokens per image (24x24 -> 8x8), "
        f"hidden states 4+5+6+7, {parameters / 1e6:.2f}M parameters"
    ]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model(models, copied):
    model = models("tokenpacker")
    ids = torch.tensor([[1, IMAGE, 5]])
    twin = copied(model)
    assert torch.equal(twin(input_ids=ids, images=pictures(1)).logits, model(input_ids=ids, images=pictures(1)).logits)
    twin.get_model().mm_projector.mlp[2].bias.data += 1  # a copy, not the same weights
    assert not torch.equal(twin.encode_images(pictures(1)), model.encode_images(pictures(1)))


def test_two_models_in_one_process(models):
    ours, stock = models("saep"), models("mlp2x_gelu")
    ids = torch.tensor([[1, IMAGE, 5]])
    before = stock(input_ids=ids, images=pictures(1)).logits
    assert ours(input_ids=ids, images=pictures(1)).logits.shape[1] == 2 + 144
    assert torch.equal(stock(input_ids=ids, images=pictures(1)).logits, before)


def test_a_stock_model_does_not_change_with_the_patch(build_model):
    ids = torch.tensor([[1, IMAGE, 5]])
    patched = build_model("mlp2x_gelu")
    try:
        llava_projectors.unpatch()
        stock = build_model("mlp2x_gelu")
    finally:
        llava_projectors.patch()
    for (name, a), b in zip(patched.state_dict().items(), stock.state_dict().values()):
        assert torch.equal(a, b), name
    logits = [model(input_ids=ids, images=pictures(1)).logits for model in (patched, stock)]
    assert torch.equal(*logits)


def test_scale_factor_of_the_config(build_model, tiny, tmp_path):
    """Released checkpoints say `mm_projector_type: tokenpacker` and `scale_factor`."""
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_llama import LlavaConfig

    config = LlavaConfig.from_pretrained(tiny.llm)
    config.update({
        "mm_projector_type": "tokenpacker", "scale_factor": 3, "mm_vision_tower": str(tiny.tower),
        "mm_hidden_size": 32, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
    })  # fmt: skip
    model = LlavaLlamaForCausalLM(config)
    assert model.get_vision_tower().num_patches == 64
    model.get_vision_tower().load_model()
    assert model.encode_images(pictures(1)).shape == (1, 64, 80)


def test_a_registered_type_works_like_a_built_in_one(build_model, monkeypatch):
    monkeypatch.setattr(registration, "classes", dict(registration.classes))
    monkeypatch.setattr(registration, "options", dict(registration.options))

    @llava_projectors.register_projector("first_patches")
    class FirstPatches(llava_projectors.Projector):
        stride_option = "stride"

        def __init__(self, mm_hidden_size, hidden_size, *, stride: int = 6):
            super().__init__(mm_hidden_size, hidden_size, None, stride)
            self.to_llm = torch.nn.Linear(mm_hidden_size, hidden_size)

        def forward(self, features):
            return self.to_llm(self.to_grid(features)[:, :: self.stride, :: self.stride].flatten(1, 2))

    model = build_model("first_patches:stride=8")
    hidden_states = llm_input(model, input_ids=torch.tensor([[1, IMAGE]]), images=pictures(1))
    assert hidden_states.shape[1] == 1 + 9
    assert model.config.mm_projector_type == "first_patches:stride=8"


def test_llavas_own_errors_gain_a_suggestion():
    from llava.model.multimodal_projector.builder import build_vision_projector

    config = SimpleNamespace(mm_projector_type="seap:stride=3", mm_hidden_size=4, hidden_size=8)
    with pytest.raises(ProjectorSpecError, match="unknown projector type 'seap:stride=3'.*did you mean 'saep'"):
        build_vision_projector(config)


@pytest.mark.parametrize("projector_type", ["mlp3x_gelu", "identity", "linear"])
def test_llavas_own_types_are_llavas(projector_type):
    from llava.model.multimodal_projector.builder import build_vision_projector

    config = SimpleNamespace(mm_projector_type=projector_type, mm_hidden_size=4, hidden_size=8)
    torch.manual_seed(0)
    patched = build_vision_projector(config)
    torch.manual_seed(0)
    stock = build_vision_projector.__wrapped__(config)
    assert type(patched) is type(stock)
    assert all(torch.equal(a, b) for a, b in zip(patched.parameters(), stock.parameters()))


def test_a_projector_that_breaks_the_token_contract_is_told_before_training(build_model, monkeypatch):
    """`output_side` rounds up, this forward rounds down: on a grid of 24 it differs at stride 5."""
    monkeypatch.setattr(registration, "classes", dict(registration.classes))
    monkeypatch.setattr(registration, "options", dict(registration.options))

    @llava_projectors.register_projector("rounding_down")
    class RoundingDown(llava_projectors.Projector):
        def __init__(self, mm_hidden_size, hidden_size, *, stride: int = 5):
            super().__init__(mm_hidden_size, hidden_size, layers=None, stride=stride)
            self.to_llm = torch.nn.Linear(mm_hidden_size, hidden_size)

        def forward(self, features):
            grid = self.to_grid(features).permute(0, 3, 1, 2)
            return self.to_llm(torch.nn.functional.max_pool2d(grid, self.stride).flatten(2).transpose(1, 2))

    build_model("rounding_down:stride=4")
    with pytest.raises(ProjectorSpecError, match=r"24x24 patches: .* \[1, 25, 80\], its .*\[1, 16, 80\]"):
        build_model("rounding_down")


def test_a_projector_that_looks_at_numbers_works(build_model, model_args, monkeypatch, tmp_path):
    """Its constructor and its forward cannot run on the meta device; its contract is checked all the same."""
    monkeypatch.setattr(registration, "classes", dict(registration.classes))
    monkeypatch.setattr(registration, "options", dict(registration.options))

    @llava_projectors.register_projector("masked")
    class Masked(llava_projectors.Projector):
        def __init__(self, mm_hidden_size, hidden_size, *, stride: int = 2, kept: int = 1):
            super().__init__(mm_hidden_size, hidden_size, layers=None, stride=stride)
            self.kept = int(torch.ones(kept).sum())
            self.to_llm = torch.nn.Linear(mm_hidden_size, hidden_size)

        def forward(self, features):
            rows = torch.arange(features.shape[1], device=features.device)
            side = int(len(rows) ** 0.5)
            mask = (rows // side % self.stride < self.kept) & (rows % self.stride == 0)
            return self.to_llm(features[:, mask])

    model = build_model("masked")
    assert llm_input(model, input_ids=torch.tensor([[1, IMAGE]]), images=pictures(1)).shape[1] == 1 + 144
    path = tmp_path / "mm_projector.bin"
    weights = model.get_model().mm_projector.state_dict()
    torch.save({f"model.mm_projector.{name}": value for name, value in weights.items()}, path)
    model.get_model().initialize_vision_modules(model_args("masked", pretrain_mm_mlp_adapter=str(path)))
    with pytest.raises(ProjectorSpecError, match=r"24x24 patches: .* \[1, 144, 80\], its .*\[1, 288, 80\]"):
        build_model("masked:kept=2")


def test_the_config_keeps_the_type_string_in_its_plainest_form(build_model):
    assert build_model(" saep : stride = +3 ").config.mm_projector_type == "saep:stride=3"
