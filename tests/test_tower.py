"""The multi-layer tower against LLaVA's own, on a real CLIP."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import transformers

import llava_projectors
from llava_projectors import ProjectorSpecError, registry
from llava_projectors.integration.tower import convert_tower, resolve_layers, see_real_grid
from llava_projectors.integration.truncated_encoder import keeping


@pytest.fixture(scope="module")
def towers(tiny):
    """type string, keyword arguments -> a tower from LLaVA's (patched) builder."""
    from llava.model.multimodal_encoder import builder

    def make(projector_type, delay_load=False, **settings):
        defaults = {"mm_vision_tower": str(tiny.tower), "mm_vision_select_layer": -2}
        cfg = SimpleNamespace(mm_projector_type=projector_type, **{**defaults, **settings})
        return builder.build_vision_tower(cfg, delay_load=delay_load)  # a test here patches it anew

    return make


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 336, 336, generator=torch.Generator().manual_seed(0))


def test_features_are_the_hidden_states_side_by_side(towers, images):
    tower, stock = towers("saep"), towers("mlp2x_gelu")
    assert type(stock).__name__ == "CLIPVisionTower"
    assert isinstance(tower, type(stock))
    features = tower(images)
    assert features.shape == (3, 576, 2 * 32)
    with torch.no_grad():
        hidden_states = stock.vision_tower(images, output_hidden_states=True).hidden_states
    for block, layer in zip(features.split(32, dim=-1), (4, 7)):
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
    assert [tuple(f.shape) for f in features] == [(1, 576, 64)] * 3
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
        (
            "saep:layers=4+30+7",
            {},
            "layer 30 is out of range; the vision tower has 8 layers, hidden states 0 to 8 or -9 to -1",
        ),
        ("saep:layers=-26+-2", {}, "layer -26 is out of range"),
        ("saep:layers=5+4+7", {}, r"layers=5\+4\+7 must be ascending and without repeats"),
        ("saep:layers=7+-2", {}, r"without repeats \(here 7\+7, counted from 0\)"),
        ("saep:layers=4+5", {}, "must end in hidden state 7.*pass --mm_vision_select_layer 5"),
        ("saep", {"mm_vision_select_layer": -30}, "--mm_vision_select_layer -30 is out of range"),
        (
            "saep",
            {"mm_vision_select_layer": 1},
            r"default layers need a deeper tower: with --mm_vision_select_layer 1 they would be 1\+1; .*layers=1",
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
    """A partial region counts as a whole one: 5 patches with stride 2 give 3 tokens per side."""
    from llava_projectors.tiny.assets import make_vision_tower

    small = str(make_vision_tower(tmp_path / "clip", num_layers=8, image_size=70))
    assert towers("saep:stride=2", mm_vision_tower=small).num_patches == 9
    tiny = str(make_vision_tower(tmp_path / "clip3", num_layers=8, image_size=42))
    with pytest.raises(ProjectorSpecError, match="'tokenpacker': scale_factor=4 must be 1 to 3, the side of the patch"):
        towers("tokenpacker", mm_vision_tower=tiny, scale_factor=4)


def test_multi_scale_towers_are_refused(towers, monkeypatch):
    """An S2 tower concatenates channels of several scales; the released LLaVA has none yet."""
    from llava.model.multimodal_encoder import clip_encoder

    monkeypatch.setattr(clip_encoder.CLIPVisionTower, "s2_scales", "336,672", raising=False)
    with pytest.raises(ProjectorSpecError, match="multi-scale vision tower CLIPVisionTower, which joins"):
        towers("saep")


def test_a_tower_that_joins_layers_itself_gives_ours_instead(towers, images, monkeypatch):
    """As ViP-LLaVA's `clip_4layers_336`: `feature_select` joins five hidden states, `hidden_size` says so."""
    from llava.model.multimodal_encoder import clip_encoder

    monkeypatch.setattr(clip_encoder.CLIPVisionTower, "hidden_size", property(lambda self: 5 * 32))
    monkeypatch.setattr(
        clip_encoder.CLIPVisionTower,
        "feature_select",
        lambda self, outs: torch.cat([outs.hidden_states[layer] for layer in (1, 2, 3, 4, 5)], dim=-1),
    )
    tower = towers("saep")
    assert tower.hidden_size == 32
    assert tower(images[:1]).shape == (1, 576, 2 * 32)


def test_the_grid_is_what_the_tower_returns(towers, images, capsys):
    """As GeoChat: the position embedding is stretched to 504 px after loading, the config still says 336."""
    tower = towers("saep")
    embeddings = tower.vision_tower.vision_model.embeddings
    embeddings.position_embedding = torch.nn.Embedding(36**2 + 1, 32)
    embeddings.position_ids = torch.arange(36**2 + 1).expand((1, -1))
    large = torch.randn(1, 3, 504, 504)
    features = tower(large)
    assert features.shape == (1, 36**2, 2 * 32)
    assert (tower.num_patches_per_side, tower.num_patches) == (18, 324)
    hidden_states = tower.vision_tower(large, output_hidden_states=True).hidden_states
    assert torch.equal(features[..., -32:], hidden_states[tower.projector_layers[-1]][:, 1:])


def test_more_positions_than_a_grid_and_a_cls_token_are_an_error(towers):
    """As a vision model with four register tokens."""
    tower = towers("saep")
    state = torch.zeros(1, 576 + 5, 32)
    with pytest.raises(ProjectorSpecError, match="returned 581 positions, not the 24x24 = 576 patches and one CLS"):
        tower.feature_select(SimpleNamespace(hidden_states=dict.fromkeys(tower.projector_layers, state)))


def test_a_hidden_state_that_was_not_kept_says_so(towers, images):
    """As DenseConnector and LLaVA-PruMerge ask for hidden states of their own choice."""
    tower = towers("saep")
    with keeping(tower.projector_layers):
        outs = tower.vision_tower(images[:1], output_hidden_states=True)
    with pytest.raises(ProjectorSpecError, match=r"hidden state 3 of the vision tower was not kept: only .* 4\+7 were"):
        outs.hidden_states[-6][:, 1:]


def test_a_tower_of_fewer_layers_than_its_config_says(towers, images):
    tower = towers("saep")
    del tower.vision_tower.vision_model.encoder.layers[5:]
    with pytest.raises(
        ProjectorSpecError, match="state 7 does not exist: the vision tower that was loaded has 5 layers"
    ):
        tower(images[:1])


def test_what_a_forward_writes_on_the_tower_stays(tiny, images):
    """As forks count calls, or keep what a later method reads."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    class Counting(CLIPVisionTower):
        calls = 0

        def forward(self, images):
            self.calls += 1
            return super().forward(images)

    tower = Counting(str(tiny.tower), SimpleNamespace(mm_vision_select_layer=-2))
    convert_tower(tower, registry.resolve("saep"))
    assert torch.equal(tower(images[:1]), tower(images[:1]))
    assert tower.calls == 2


def test_a_compiled_tower_is_one_graph(towers, images):
    """As LLaVA's own is; the projector belongs to it."""
    tower = towers("saep")
    projector = llava_projectors.build_projector("saep", 32, 16)
    with torch.no_grad():
        expected = projector(tower(images))
        run = torch.compile(lambda x: projector(tower(x)), fullgraph=True, backend="eager")
        assert torch.equal(run(images), expected)


def test_a_setting_by_which_a_fork_joins_layers_is_refused(towers):
    with pytest.raises(ProjectorSpecError, match="--mm_dense_connector_type dci exclude .*_type none"):
        towers("saep", mm_dense_connector_type="dci")
    assert towers("saep", mm_dense_connector_type="none").projector_layers == (4, 7)


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
    ("projector_type", "layers", "side"),
    [("saep:stride=3", (13, 26), 9), ("tokenpacker:scale_factor=3", (13, 18, 25, 26), 9), ("saep", (13, 26), 14)],
)
def test_towers_without_cls_token_and_feature_select(siglip, projector_type, layers, side):
    images = torch.randn(2, 3, 384, 384)
    stock, tower = siglip(), siglip()
    stock.load_model()
    convert_tower(tower, registry.resolve(projector_type))
    tower.load_model()
    assert tower.projector_layers == layers
    with torch.no_grad():
        features, hidden_states = tower(images), stock.vision_tower(images, output_hidden_states=True).hidden_states
        assert torch.equal(features[..., -32:], stock(images))
        assert torch.equal(features[..., :32], hidden_states[13])
        assert [tuple(f.shape) for f in tower(list(images))] == [(1, 729, 32 * len(layers))] * 2
        projector = llava_projectors.build_projector(projector_type, 32, 16)
        assert projector(features).shape == (2, side**2, 16)
    assert (tower.num_patches_per_side, tower.num_patches) == (side, side**2)


class ShortenedSigLip(getattr(transformers, "SiglipVisionModel", object)):
    """As DenseConnector's and TinyLLaVABench's: the model itself deletes its last layer."""

    def __init__(self, config):
        super().__init__(config)
        del self.vision_model.encoder.layers[-1:]


def test_a_vision_model_that_deletes_its_last_layer_itself(siglip):
    class Tower(siglip):
        def load_model(self):
            self.vision_tower = ShortenedSigLip(self.config)
            self.is_loaded = True

    tower = Tower()
    convert_tower(tower, registry.resolve("saep:stride=3"))
    tower.load_model()
    assert tower.projector_layers == (13, 26)
    images = torch.randn(1, 3, 384, 384)
    with torch.no_grad():
        states = tower.vision_tower(images, output_hidden_states=True).hidden_states
        assert torch.equal(tower(images), torch.cat([states[13], states[26]], dim=-1))


@pytest.fixture
def dino(tmp_path):
    """A DINOv2 of 16 channels on the same 27x27 grid."""
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=378, patch_size=14
    )
    torch.manual_seed(1)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def joined_in_forward(siglip, dino):
    class Joined(siglip):
        def load_model(self):
            super().load_model()
            self.dino = transformers.Dinov2Model.from_pretrained(dino)

        def forward(self, images):
            further = self.dino(images).last_hidden_state[:, 1:]
            return torch.cat([super().forward(images), further], dim=-1)

        hidden_size = property(lambda self: self.config.hidden_size + 16)
        num_patches = 27**2

    return Joined()


def joined_by_helpers(siglip, dino):
    """The parts in a list, loaded and run by methods of their own; features chosen in `feature_select`."""

    class Joined(siglip):
        def load_model(self):
            super().load_model()
            self.load_others()

        def load_others(self):
            self.others = torch.nn.ModuleList([transformers.Dinov2Model.from_pretrained(dino)])

        def feature_select(self, outs):
            return outs.hidden_states[-1][:, -(27**2) :]

        def run_others(self, images):
            return [self.feature_select(other(images, output_hidden_states=True)) for other in self.others]

        def forward(self, images):
            first = self.feature_select(self.vision_tower(images, output_hidden_states=True))
            return torch.cat([first, *self.run_others(images)], dim=-1)

        hidden_size = property(lambda self: self.config.hidden_size + 16)
        num_patches = 27**2

    return Joined()


def joined_with_a_list(siglip, dino):
    """The second model in a list, by which forks keep its weights out of their checkpoints."""

    class Joined(siglip):
        def load_model(self):
            super().load_model()
            self.frozen = [transformers.Dinov2Model.from_pretrained(dino)]

        def forward(self, images):
            further = [model(images).last_hidden_state[:, 1:] for model in self.frozen]
            return torch.cat([super().forward(images), *further], dim=-1)

        hidden_size = property(lambda self: self.config.hidden_size + 16)
        num_patches = 27**2

    return Joined()


def joined_towers(siglip, dino):
    """Two towers in one, each of which loads itself."""

    class Dino(torch.nn.Module):
        def load_model(self):
            self.model = transformers.Dinov2Model.from_pretrained(dino)

        def forward(self, images):
            return self.model(images).last_hidden_state[:, 1:]

    class Joined(torch.nn.Module):
        is_loaded, hidden_size, num_patches = False, 32 + 16, 27**2

        def __init__(self):
            super().__init__()
            self.towers = torch.nn.ModuleList([siglip(), Dino()])
            self.config = self.towers[0].config

        def load_model(self):
            for tower in self.towers:
                tower.load_model()
            self.is_loaded = True

        def forward(self, images):
            return torch.cat([tower(images) for tower in self.towers], dim=-1)

    return Joined()


@pytest.mark.parametrize("loads_first", [False, True])
@pytest.mark.parametrize("make", [joined_in_forward, joined_by_helpers, joined_with_a_list, joined_towers])
def test_a_tower_that_joins_two_models_serves_its_own_features_to_types_of_one_layer(siglip, dino, make, loads_first):
    """As forks of LLaVA-NeXT join SigLIP and DINOv2. Hidden states of the first alone would leave the second out."""
    images, stock = torch.randn(1, 3, 384, 384), make(siglip, dino)
    stock.load_model()
    message = "reads 2 layers of the vision tower Joined, which [^\n]*: pass saep:layers=-1, or a type of one layer$"
    for type_string, is_refused in (("saep", True), ("saep:layers=-1", False), ("avg_pool", False)):
        tower = make(siglip, dino)
        if loads_first:
            tower.load_model()
        if is_refused:
            with pytest.raises(ProjectorSpecError, match=message):
                convert_tower(tower, registry.resolve(type_string))
            continue
        convert_tower(tower, registry.resolve(type_string))
        assert tower.hidden_size == 32 + 16
        if not loads_first:
            tower.load_model()
        with torch.no_grad():
            assert torch.equal(tower(images), stock(images))
            assert stock(images).shape == (1, 27**2, 32 + 16)
        assert tower.num_patches == 14**2


def test_a_list_of_models_as_vision_tower_is_refused_before_training(siglip, dino):
    class Joined(siglip):
        image_processor = SimpleNamespace(size={"height": 384})

        def load_model(self):
            super().load_model()
            self.vision_tower = torch.nn.ModuleList([self.vision_tower, transformers.Dinov2Model.from_pretrained(dino)])

        def forward(self, images):
            states = [model(images, output_hidden_states=True).hidden_states[-1] for model in self.vision_tower]
            return torch.cat([state[:, -(27**2) :] for state in states], dim=-1)

    tower = Joined()
    convert_tower(tower, registry.resolve("saep"))
    tower.load_model()
    with pytest.raises(ProjectorSpecError, match="cannot use the vision tower Joined: its forward ends in [^\n]*$"):
        see_real_grid(tower)


def test_a_forward_that_prunes_by_itself_is_passed_over(siglip):
    """As LLaVA-PruMerge: its forward indexes hidden states and prunes; ours selects from the vision model instead."""

    class Pruning(siglip):
        def forward(self, images):
            return self.prune(images)

        def prune(self, images):
            return self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, ::4]

        def feature_select(self, outs):
            raise AssertionError

    tower = Pruning()
    convert_tower(tower, registry.resolve("saep:stride=3"))
    tower.load_model()
    assert tower(torch.zeros(1, 3, 384, 384)).shape == (1, 729, 64)


def test_a_forward_that_returns_the_models_outputs_too(siglip):
    """As DenseConnector's SigLIP, which deletes no layer: its caller unpacks a pair."""

    class Pair(siglip):
        def load_model(self):
            self.vision_tower = transformers.SiglipVisionModel(self.config)
            self.is_loaded = True

        def forward(self, images):
            outs = self.vision_tower(images, output_hidden_states=True)
            return outs.hidden_states[-1], outs

    tower = Pair()
    convert_tower(tower, registry.resolve("saep:stride=3"))
    tower.load_model()
    features, outs = tower(torch.zeros(1, 3, 384, 384))
    assert tower.projector_layers == (14, 27)
    assert features.shape == (1, 729, 64)
    assert torch.equal(outs.hidden_states[27], features[..., -32:])


class Convolutional(torch.nn.Module):
    """As FastVLM's MobileCLIP and Bunny's EVA: no hidden states, a config of its own kind, features [B, N, C]."""

    hidden_size, is_loaded = 8, True

    def __init__(self, patches=64):
        super().__init__()
        self.config = {"image_cfg": {"image_size": 64}}
        self.convolution = torch.nn.Conv2d(3, 8, 8, 8)
        self.patches = patches

    def forward(self, images):
        return self.convolution(images).flatten(2).transpose(1, 2)[:, : self.patches]


def test_a_tower_without_hidden_states_serves_types_of_one_layer():
    images, tower, stock = torch.randn(2, 3, 64, 64), Convolutional(), Convolutional()
    stock.load_state_dict(tower.state_dict())
    with pytest.raises(ProjectorSpecError, match="reads 2 layers .* Convolutional, which gives no hidden states: pass"):
        convert_tower(tower, registry.resolve("saep"))
    for type_string in ("avg_pool:stride=4", "saep:layers=-1,stride=4"):
        tower = Convolutional()
        tower.load_state_dict(stock.state_dict())
        convert_tower(tower, registry.resolve(type_string))
        assert torch.equal(tower(images), stock(images))
        assert (tower.num_patches_per_side, tower.num_patches) == (2, 4)
        assert llava_projectors.build_projector(type_string, 8, 16)(tower(images)).shape == (2, 4, 16)
        assert torch.equal(copy.deepcopy(tower)(images), stock(images))


def test_a_tower_without_hidden_states_and_without_a_square_is_refused():
    tower = Convolutional(patches=63)
    convert_tower(tower, registry.resolve("avg_pool"))
    with pytest.raises(ProjectorSpecError, match="Convolutional returned 63 positions"):
        tower(torch.zeros(1, 3, 64, 64))


def test_a_tower_that_returns_a_grid_of_two_dimensions_is_refused():
    """Its second dimension is a square number, so that it could be taken for patches."""

    class Unflattened(Convolutional):
        def forward(self, images):
            return super().forward(images).unflatten(1, (4, 16))

    tower = Unflattened()
    convert_tower(tower, registry.resolve("avg_pool"))
    with pytest.raises(ProjectorSpecError, match=r"features \[images, patches, channels\] .* returned \[1, 4, 16, 8\]"):
        tower(torch.zeros(1, 3, 64, 64))


def test_a_second_tower_takes_single_layer_types(towers, images):
    """MGM's auxiliary tower attends from the first tower's features, of the width of one layer."""
    with pytest.raises(ProjectorSpecError, match="reads 2 layers .*--mm_vision_tower_aux .*pass saep:layers=7"):
        towers("saep", mm_vision_tower_aux="convnext")
    tower = towers("saep:layers=7", mm_vision_tower_aux="convnext")
    assert torch.equal(tower(images[:1]), towers("mlp2x_gelu")(images[:1]))


@pytest.mark.parametrize(
    ("name", "depth", "layers"),
    [
        ("saep", 24, (12, 23)),
        ("saep", 8, (4, 7)),
        ("tokenpacker", 24, (12, 16, 22, 23)),
        ("tokenpacker", 8, (4, 5, 6, 7)),
    ],
)
def test_default_layers_scale_with_the_depth(name, depth, layers):
    assert resolve_layers(registry.resolve(name), depth, -2) == layers


def test_a_patched_tower_outlives_unpatch(towers, images):
    tower = towers("saep")
    expected = tower(images[:1])
    try:
        llava_projectors.unpatch()
        assert torch.equal(tower(images[:1]), expected)
    finally:
        llava_projectors.patch()


def test_a_tower_that_cannot_be_tried_waits_for_its_first_forward():
    """As one whose kernels are CUDA's alone, with position embeddings that are none of CLIP's."""

    class Rotary(torch.nn.Module):
        image_processor = SimpleNamespace(crop_size={"height": 56})
        patch_side, shapes = 24, ()

        def __init__(self):
            super().__init__()
            self.vision_tower = torch.nn.Linear(2, 2)

        def forward(self, images):
            self.shapes += (tuple(images.shape),)
            raise RuntimeError("no kernel for a CPU")

    tower = Rotary()
    see_real_grid(tower)
    assert (tower.shapes, tower.patch_side) == (((1, 3, 56, 56),), 24)


def clip_tower(tiny, **methods):
    """LLaVA's CLIP tower with methods of a fork, before it has weights."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    cls = type("ForksTower", (CLIPVisionTower,), {"__module__": __name__, **methods})
    return cls(str(tiny.tower), SimpleNamespace(mm_vision_select_layer=-2), delay_load=True)


def several_features(self, outs):
    return outs.hidden_states[-2], outs.hidden_states[4]


def pictures_and_texts(self, images, texts=None):
    return self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:] * texts


REFUSED = {
    "feature_select returns several, as TokenPacker's, LLaVA-STF's and TRIM's": (
        {"feature_select": several_features}, "needs one tensor of features: feature_select of .* ForksTower returns"),
    "it selects from pictures and texts by itself": (
        {"forward": pictures_and_texts}, "the forward of .* ForksTower takes texts beside the images and chooses"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_towers_of_another_shape_are_refused_before_their_weights_are_read(tiny, name):
    methods, message = REFUSED[name]
    with pytest.raises(ProjectorSpecError, match=message):
        convert_tower(clip_tower(tiny, **methods), registry.resolve("saep"))


def test_a_forward_with_further_arguments_gets_them(tiny, images):
    """As TRIM's, which is called with pictures and texts."""

    def forward(self, images, texts):
        outs = self.vision_tower(images, output_hidden_states=True)
        return self.feature_select(outs) * len(texts)

    tower = clip_tower(tiny, forward=forward)
    convert_tower(tower, registry.resolve("saep"))
    tower.load_model()
    assert torch.equal(tower(images[:1], "ab"), 2 * tower(images[:1], texts="a"))


def test_the_forward_that_counts_is_the_last_of_its_classes(tiny, images):
    """The base's chooses hidden states by itself, the class's own does not, and does not call it."""

    def doubling(self, images):
        return 2 * self.feature_select(self.vision_tower(images, output_hidden_states=True))

    base, plain = clip_tower(tiny, forward=lambda self, images: self.hidden_states), clip_tower(tiny)
    cls = type("Doubling", (type(base),), {"__module__": __name__, "forward": doubling})
    tower = cls(str(tiny.tower), SimpleNamespace(mm_vision_select_layer=-2), delay_load=True)
    for one in (tower, plain):
        convert_tower(one, registry.resolve("saep"))
        one.load_model()
    assert torch.equal(tower(images[:1]), 2 * plain(images[:1]))


def test_a_tower_that_has_its_model_from_the_start(tiny, towers, images):
    """Without `load_model`."""

    class Whole(torch.nn.Module):
        is_loaded, dtype, device = True, torch.float32, torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.vision_tower = transformers.CLIPVisionModel.from_pretrained(tiny.tower)
            self.config = self.vision_tower.config

        def forward(self, images):
            return self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]

    tower = Whole()
    convert_tower(tower, registry.resolve("saep:layers=4+8"))
    assert torch.equal(tower(images[:1]), towers("saep:layers=4+8", mm_vision_select_layer=-1)(images[:1]))


def embedding_too(self, images):
    outs = self.vision_tower(images, output_hidden_states=True)
    return outs.a_field_that_is_not_there, self.feature_select(outs)


def two_values(self, images):
    features, _ = self.feature_select(self.vision_tower(images, output_hidden_states=True))
    return features


def one_by_one(self, images):
    return list(self.feature_select(self.vision_tower(images, output_hidden_states=True)))


@pytest.mark.parametrize(
    ("forward", "cause"),
    [
        (embedding_too, "ends in AttributeError: .*a_field"),
        (two_values, "ends in ValueError: not enough values"),
        (one_by_one, r"returns \[576, 64\], not features"),
    ],
)
def test_a_forward_that_wants_more_than_hidden_states_is_refused_before_training(tiny, forward, cause):
    """As HiDe-LLaVA's, which reads the embedding of the whole picture."""
    tower = clip_tower(tiny, forward=forward)
    convert_tower(tower, registry.resolve("saep"))
    tower.load_model()
    message = f"^projector type 'saep' cannot use the vision tower ForksTower: its forward {cause}[^\n]*$"
    with pytest.raises(ProjectorSpecError, match=message):
        see_real_grid(tower)


def test_a_picture_of_another_size_than_the_processors_is_no_reason_to_refuse(tiny):
    """Newer transformers raise a ValueError there, older ones a RuntimeError."""

    def forward(self, images):
        if images.shape[-1] != 224:
            raise ValueError("Input image size (336*336) doesn't match model (224*224).")
        return self.feature_select(self.vision_tower(images, output_hidden_states=True))

    tower = clip_tower(tiny, forward=forward)
    convert_tower(tower, registry.resolve("saep"))
    tower.load_model()
    see_real_grid(tower)
    assert tower.patch_side == 24


def test_a_vision_model_under_another_name(tiny):
    """As CuMo's, which is called `vision_model` and whose tower is loaded when it is made."""

    class Renamed(torch.nn.Module):
        is_loaded, num_patches, select_feature = True, 576, "patch"

        def __init__(self):
            super().__init__()
            self.vision_model = transformers.CLIPVisionModel.from_pretrained(tiny.tower)
            self.config = self.vision_model.config
            self.hidden_size = self.config.hidden_size

        def forward(self, images):
            return self.vision_model(images, output_hidden_states=True).hidden_states[-2][:, 1:]

    message = (
        "reads 2 layers of the vision tower Renamed, whose vision model is not its `vision_tower`: pass saep:layers"
    )
    with pytest.raises(ProjectorSpecError, match=message):
        convert_tower(Renamed(), registry.resolve("saep"))

    class Several(Renamed):
        def forward(self, images):
            return super().forward(images), None

    with pytest.raises(ProjectorSpecError, match="one tensor of features: the forward of .* Several returns several$"):
        convert_tower(Several(), registry.resolve("saep"))
    tower = Renamed()
    convert_tower(tower, registry.resolve("saep:layers=-1"))
    assert tower(torch.zeros(1, 3, 336, 336)).shape == (1, 576, 32)


def test_a_builder_that_knows_no_delay(monkeypatch):
    """As VideoLLaMA2's, whose towers load when they are made."""
    from llava_projectors.integration import wrappers

    def build(cfg, load_pretrained=False):
        return Convolutional() if load_pretrained else None

    monkeypatch.delattr(Convolutional, "is_loaded")
    package, cfg = SimpleNamespace(check_patched=lambda: None), SimpleNamespace(mm_projector_type="avg_pool:stride=4")
    tower = wrappers.build_tower(build, package, cfg, load_pretrained=True)
    assert (tower(torch.zeros(1, 3, 64, 64)).shape, tower.num_patches) == ((1, 64, 8), 4)


def test_a_forward_that_somebody_replaces_later(towers, images, monkeypatch):
    """VisionZip's selects by itself, and was passed over without a word; one that uses feature_select is used."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    tower = towers("saep")
    before = tower(images[:1])

    def doubling(self, images):
        return 2 * self.feature_select(self.vision_tower(images, output_hidden_states=True))

    def selecting(self, images):
        return self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, :64], None

    monkeypatch.setattr(CLIPVisionTower, "forward", doubling)
    assert torch.equal(tower(images[:1]), 2 * before)
    monkeypatch.setattr(CLIPVisionTower, "forward", selecting)
    for _ in range(2):
        with pytest.raises(
            ProjectorSpecError, match="the forward of .* CLIPVisionTower was replaced by test_tower, which"
        ):
            tower(images[:1])
    with pytest.raises(ProjectorSpecError, match="was replaced by test_tower"):
        towers("saep")(images[:1])
    assert towers("mlp2x_gelu")(images[:1])[0].shape == (1, 64, 32)
    monkeypatch.undo()
    assert torch.equal(tower(images[:1]), before)
