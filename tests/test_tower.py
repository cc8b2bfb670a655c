"""The multi-layer tower against LLaVA's own, on a real CLIP."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

import llava_projectors
from llava_projectors import ProjectorSpecError, registry
from llava_projectors.integration.tower import convert_tower, resolve_layers


@pytest.fixture(scope="module")
def towers(tiny):
    """type string, keyword arguments -> a tower from LLaVA's (patched) builder."""
    from llava.model.multimodal_encoder.builder import build_vision_tower

    def make(projector_type, delay_load=False, **settings):
        defaults = {"mm_vision_tower": str(tiny.tower), "mm_vision_select_layer": -2}
        cfg = SimpleNamespace(mm_projector_type=projector_type, **{**defaults, **settings})
        return build_vision_tower(cfg, delay_load=delay_load)

    return make


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 336, 336, generator=torch.Generator().manual_seed(0))


def test_features_are_the_hidden_states_side_by_side(towers, images):
    tower, stock = towers("saep"), towers("mlp2x_gelu")
    assert type(stock).__name__ == "CLIPVisionTower"
    assert isinstance(tower, type(stock))
    features = tower(images)
    assert features.shape == (3, 576, 4 * 32)
    with torch.no_grad():
        hidden_states = stock.vision_tower(images, output_hidden_states=True).hidden_states
    for block, layer in zip(features.split(32, dim=-1), (4, 5, 6, 7)):
        assert torch.equal(block, hidden_states[layer][:, 1:])
    assert torch.equal(features[..., -32:], stock(images))


@pytest.mark.parametrize("select", [-2, -3, -1, 6])
def test_the_last_block_is_what_llava_selects(towers, images, select):
    tower, stock = (towers(t, mm_vision_select_layer=select) for t in ("tokenpacker", "mlp2x_gelu"))
    assert torch.equal(tower(images[:1])[..., -32:], stock(images[:1]))


def test_layers_option(towers, images):
    tower, absolute = towers("saep:layers=-6+-2"), towers("saep:layers=3+7")
    assert tower.projector_layers == absolute.projector_layers == (3, 7)
    assert torch.equal(tower(images[:1]), absolute(images[:1]))


def test_a_list_of_images_goes_one_by_one(towers, images):
    features = towers("saep")(list(images))
    assert [tuple(f.shape) for f in features] == [(1, 576, 128)] * 3
    torch.testing.assert_close(torch.cat(features), towers("saep")(images))


def test_features_have_the_dtype_of_the_images(towers, images):
    tower = towers("saep")
    assert tower(images[:1].to(torch.bfloat16)).dtype == torch.bfloat16
    assert tower.to(torch.bfloat16)(images[:1]).dtype == torch.float32


@pytest.mark.parametrize("delay_load", [False, True])
@pytest.mark.parametrize(
    ("projector_type", "side"), [("saep", 12), ("saep:stride=3", 8), ("tokenpacker:scale_factor=4", 6)]
)
def test_reported_grid_is_after_the_projector(towers, projector_type, side, delay_load):
    tower = towers(projector_type, delay_load=delay_load)
    assert tower.is_loaded is not delay_load
    assert (tower.num_patches_per_side, tower.num_patches) == (side, side**2)
    assert tower.hidden_size == 32  # so that config.mm_hidden_size keeps its meaning


def test_delayed_tower_serves_once_loaded(towers, images):
    tower = towers("saep", delay_load=True)
    tower.load_model()
    assert torch.equal(tower(images[:1]), towers("saep")(images[:1]))
    assert not any(p.requires_grad for p in tower.parameters())


def test_stock_types_get_llavas_own_tower(towers):
    tower = towers("mlp2x_gelu")
    assert type(tower).__mro__[1] is torch.nn.Module
    assert tower.num_patches == 576


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies(towers, images, copied):
    tower = towers("saep:stride=3")
    twin = copied(tower)
    assert type(twin) is type(tower)
    assert twin.num_patches == 64
    assert torch.equal(twin(images[:1]), tower(images[:1]))


@pytest.mark.parametrize(
    ("projector_type", "settings", "message"),
    [
        ("saep:layers=4+30+7", {}, "layer 30 is out of range; the vision tower has 8 layers, hidden states 0 to 8"),
        ("saep:layers=-26+-2", {}, "layer -26 is out of range"),
        ("saep:layers=5+4+7", {}, r"layers=5\+4\+7 must be ascending and without repeats"),
        ("saep:layers=7+-2", {}, r"without repeats \(here 7\+7, counted from 0\)"),
        ("saep:layers=4+5", {}, "must end in hidden state 7.*pass --mm_vision_select_layer 5"),
        ("saep", {"mm_vision_select_layer": -30}, "--mm_vision_select_layer -30 is out of range"),
        (
            "saep",
            {"mm_vision_select_layer": 1},
            r"default layers 1\+1\+0\+1 need a selected layer of at least 6.*layers=1",
        ),
        (
            "tokenpacker",
            {"mm_vision_select_feature": "cls_patch"},
            "--mm_vision_select_feature cls_patch must be patch",
        ),
        ("saep:stride=5", {}, "bad value '5'"),
        ("saep:strde=2", {}, "did you mean 'stride'"),
    ],
)
def test_bad_settings_are_explained_before_weights_are_read(towers, monkeypatch, projector_type, settings, message):
    from transformers import CLIPVisionModel

    def no_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(CLIPVisionModel, "from_pretrained", no_weights)
    with pytest.raises(ProjectorSpecError, match=message):
        towers(projector_type, **settings)


def test_a_grid_that_the_stride_does_not_divide(towers, tmp_path):
    """A partial region counts as a whole one: 5 patches with stride 2 give 3 tokens a side."""
    from llava_projectors.tiny.assets import make_vision_tower

    small = str(make_vision_tower(tmp_path / "clip", num_layers=8, image_size=70))
    assert towers("saep:stride=2", mm_vision_tower=small).num_patches == 9
    tiny = str(make_vision_tower(tmp_path / "clip3", num_layers=8, image_size=42))
    with pytest.raises(ProjectorSpecError, match="'tokenpacker': scale_factor=4 must be 1 to 3, the side of the patch"):
        towers("tokenpacker", mm_vision_tower=tiny, scale_factor=4)


def test_towers_that_are_no_single_grid_are_refused(towers, monkeypatch):
    """A multi-scale tower (S2) concatenates channels of several scales; the released LLaVA has none yet."""
    from llava.model.multimodal_encoder import clip_encoder

    monkeypatch.setattr(clip_encoder.CLIPVisionTower, "hidden_size", property(lambda self: 96))
    with pytest.raises(ProjectorSpecError, match="multi-scale vision tower CLIPVisionTower: it returns 96 channels"):
        towers("saep")


@pytest.fixture
def siglip(tmp_path):
    """A tower as LLaVA-NeXT's SigLIP: no CLS token, no `feature_select`, the last layer deleted, a 27x27 grid."""
    transformers = pytest.importorskip("transformers", "4.37", reason="SigLIP came with transformers 4.37")
    SiglipVisionConfig, SiglipVisionModel = transformers.SiglipVisionConfig, transformers.SiglipVisionModel
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=27, num_attention_heads=2, image_size=384, patch_size=14
    )
    torch.manual_seed(0)
    SiglipVisionModel(config).save_pretrained(tmp_path)

    class SigLipVisionTower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = config
            self.is_loaded = False

        def load_model(self):
            self.vision_tower = SiglipVisionModel.from_pretrained(tmp_path)
            del self.vision_tower.vision_model.encoder.layers[-1:]
            self.is_loaded = True

        def forward(self, images):
            return self.vision_tower(images, output_hidden_states=True).hidden_states[-1]

        dtype = property(lambda self: torch.float32)
        device = property(lambda self: torch.device("cpu"))
        hidden_size = property(lambda self: self.config.hidden_size)

    return SigLipVisionTower


@pytest.mark.parametrize(
    ("projector_type", "side"), [("saep:stride=3", 9), ("tokenpacker:scale_factor=3", 9), ("saep", 14)]
)
def test_towers_without_cls_token_and_feature_select(siglip, projector_type, side):
    images = torch.randn(2, 3, 384, 384)
    stock, tower = siglip(), siglip()
    stock.load_model()
    convert_tower(tower, registry.resolve(projector_type))
    tower.load_model()
    assert tower.projector_layers == (13, 18, 25, 26)
    with torch.no_grad():
        features, hidden_states = tower(images), stock.vision_tower(images, output_hidden_states=True).hidden_states
        assert torch.equal(features[..., -32:], stock(images))
        assert torch.equal(features[..., :32], hidden_states[13])
        assert [tuple(f.shape) for f in tower(list(images))] == [(1, 729, 128)] * 2
        projector = llava_projectors.build_projector(projector_type, 32, 16)
        assert projector(features).shape == (2, side**2, 16)
    assert (tower.num_patches_per_side, tower.num_patches) == (side, side**2)


def test_unknown_towers_are_refused(siglip):
    tower = siglip()
    type(tower).__name__ = "SomeTower"
    with pytest.raises(ProjectorSpecError, match="cannot use the vision tower SomeTower"):
        convert_tower(tower, registry.resolve("saep:stride=3"))


def test_a_second_tower_takes_single_layer_types(towers, images):
    """MGM's auxiliary tower attends from the first tower's features, of the width of one layer."""
    with pytest.raises(ProjectorSpecError, match="reads 4 layers, .* --mm_vision_tower_aux takes.*pass saep:layers=7"):
        towers("saep", mm_vision_tower_aux="convnext")
    tower = towers("saep:layers=7", mm_vision_tower_aux="convnext")
    assert torch.equal(tower(images[:1]), towers("mlp2x_gelu")(images[:1]))


@pytest.mark.parametrize(("depth", "select", "layers"), [(24, -2, (12, 16, 22, 23)), (8, -2, (4, 5, 6, 7))])
def test_default_layers_scale_with_the_depth(depth, select, layers):
    assert resolve_layers(registry.resolve("saep"), depth, select) == layers


def test_a_patched_tower_outlives_unpatch(towers, images):
    tower = towers("saep")
    expected = tower(images[:1])
    try:
        llava_projectors.unpatch()
        assert torch.equal(tower(images[:1]), expected)
    finally:
        llava_projectors.patch()
