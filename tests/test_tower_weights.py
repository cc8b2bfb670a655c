"""A vision tower whose weights are not there is an error before training and at load."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, PreTrainedModel

from llava_projectors import ProjectorSpecError, registry
from llava_projectors.commands.check import check
from llava_projectors.integration.tower import convert_tower
from llava_projectors.integration.weights import ProjectorWeightsError

FROM_PRETRAINED = vars(PreTrainedModel)["from_pretrained"]


@pytest.fixture
def build(tiny):
    from llava.model.multimodal_encoder.builder import build_vision_tower

    def make(folder, projector_type="saep", delay_load=False, mm_vision_select_layer=-2, **settings):
        cfg = SimpleNamespace(
            mm_projector_type=projector_type,
            mm_vision_tower=str(folder),
            mm_vision_select_layer=mm_vision_select_layer,
            **settings,
        )
        return build_vision_tower(cfg, delay_load=delay_load)

    yield make
    assert vars(PreTrainedModel)["from_pretrained"] is FROM_PRETRAINED


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tower, and a way to change its weights."""
    copy = tmp_path / "clip"
    shutil.copytree(tiny.coarse_tower, copy)

    def change(edit):
        weights = load_file(copy / "model.safetensors")
        edit(weights)
        save_file(weights, copy / "model.safetensors", {"format": "pt"})
        return copy

    return change


@pytest.fixture(params=["Dinov2", "ViT"])
def other(request, tiny, tmp_path):
    """A folder of another kind, which LLaVA makes a CLIP of."""
    config, model = (getattr(transformers, f"{request.param}{end}") for end in ("Config", "Model"))
    folder = tmp_path / request.param.lower()
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    model(config(**sizes)).save_pretrained(folder)
    shutil.copy(tiny.tower / "preprocessor_config.json", folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"delay_load": True}, {"unfreeze_mm_vision_tower": True}])
def test_a_folder_of_another_kind(build, other, settings):
    def load():
        tower = build(other, **settings)
        if not tower.is_loaded:
            tower.load_model()

    with pytest.raises(ProjectorWeightsError) as error:
        load()
    message = str(error.value)
    kind = json.loads((other / "config.json").read_text())["model_type"]
    assert f"{other} was loaded as a CLIPVisionModel" in message
    assert f"says model_type {kind!r}. Pass a --vision_tower that is whole" in message
    assert "\n" not in message


def test_training_stops_before_it_starts(llava_train, other):
    with pytest.raises(ProjectorWeightsError, match="would see with random weights"):
        llava_train("saep", vision_tower=str(other))


def test_a_stock_type_is_as_it_was(build, other):
    assert type(build(other, "mlp2x_gelu")).__name__ == "CLIPVisionTower"


def test_one_weight_of_a_layer_that_is_read(build, folder):
    name = "vision_model.encoder.layers.6.mlp.fc1.weight"
    with pytest.raises(ProjectorWeightsError, match=f"and 1 of its weights .* of another shape: vision_tower.{name}"):
        build(folder(lambda weights: weights.pop(name)))


def test_what_the_features_do_not_pass_through_may_be_missing(build, folder):
    """The layers above the one that is read, the last norm: published towers come without a head."""

    def cut(weights):
        for name in [name for name in weights if "layers.7." in name or "post_layernorm" in name]:
            del weights[name]

    tower = build(folder(cut))
    assert tower(torch.zeros(1, 3, 336, 336)).shape == (1, 144, 64)
    with pytest.raises(ProjectorWeightsError, match="16 of its weights are missing"):
        build(folder(cut), mm_vision_select_layer=-1)


def test_a_weight_of_another_shape(build, folder):
    """Where a fork's tower passes `ignore_mismatched_sizes`, transformers draws new numbers."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    class Tolerant(CLIPVisionTower):
        def load_model(self):
            self.vision_tower = CLIPVisionModel.from_pretrained(self.vision_tower_name, ignore_mismatched_sizes=True)
            self.is_loaded = True

    name = "vision_model.embeddings.position_embedding.weight"
    path = folder(lambda weights: weights.update({name: torch.zeros(5, 32)}))
    tower = Tolerant(str(path), SimpleNamespace(mm_vision_select_layer=-2), delay_load=True)
    convert_tower(tower, registry.resolve("saep"))
    with pytest.raises(ProjectorWeightsError, match=f"of another shape: vision_tower.{name}"):
        tower.load_model()


def test_check_says_which_builder_takes_a_folder(tiny, other, tmp_path, folder):
    assert "tower's builder: the CLIP tower of LLaVA and LLaVA-NeXT" in check("saep", vision_tower=str(tiny.tower))
    with pytest.raises(ProjectorSpecError, match="none of its .* would make a CLIP of it, with random weights"):
        check("saep", vision_tower=str(other))

    for path in other.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ProjectorSpecError, match="is a '.*': LLaVA and LLaVA-NeXT make a CLIP of a folder"):
        check("saep", vision_tower=str(other))

    def rename(weights):
        for name in list(weights):
            weights[f"model.{name}"] = weights.pop(name)

    with pytest.raises(ProjectorSpecError, match="none of its .* weights is named vision_model.encoder.layers.0"):
        check("saep", vision_tower=str(folder(rename)))


def test_check_goes_by_a_name_as_llava_next_does(tmp_path):
    config = transformers.SiglipVisionConfig(num_hidden_layers=8, image_size=56, patch_size=14)
    for name in ("google-siglip", "so400m"):
        config.save_pretrained(tmp_path / name)
    lines = check("saep", vision_tower=str(tmp_path / "google-siglip"))
    assert "tower's builder: LLaVA-NeXT's SigLIP tower; LLaVA has none" in lines
    with pytest.raises(ProjectorSpecError, match="unless the name of the folder says siglip"):
        check("saep", vision_tower=str(tmp_path / "so400m"))


def test_other_threads_load_as_ever(build, other, tiny):
    """A tower of ours that loads in one thread is not another thread's concern."""
    from concurrent.futures import ThreadPoolExecutor

    from llava_projectors.integration.tower_weights import watched

    with watched() as reports, ThreadPoolExecutor(1) as pool:
        model = pool.submit(CLIPVisionModel.from_pretrained, other).result()
        assert isinstance(model, CLIPVisionModel)
        _, info = CLIPVisionModel.from_pretrained(tiny.tower, output_loading_info=True)
        assert info["missing_keys"] == []
    assert reports == []
