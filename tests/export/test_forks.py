"""Checkpoints as forks of LLaVA leave them: what the folder would not say as the fork does is refused, and named."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_projectors.commands.cli import main
from llava_projectors.export import verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.tower import OWN

PINPOINTS = [[336, 672], [672, 336]]
FIRST = f"{OWN}vision_model.encoder.layers.0.mlp.fc1.bias"


def add_weights(folder, change=None, **added):
    weights = {**load_file(folder / "model.safetensors"), **{k.replace("__", "."): v for k, v in added.items()}}
    if change:
        weights = {key: change(value) if key.startswith(OWN) else value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_image_size", 448),  # LLaVA-HR, FastVLM: the tower's positions are interpolated
        ("is_multipath_encoder", True),  # LLaVA-HR: a second tower
        ("mm_vision_tower_aux", "openclip-convnext-large-d-320-laion2B"),  # MGM
        ("vision_tower_slow", "convnext_large_mlp.clip_laion2b_ft_320"),  # LLaVA-HR
        ("mm_dense_connector_type", "dci"),  # DenseConnector
        ("mm_image_tower", "openai/clip-vit-large-patch14-336"),  # Video-LLaVA, Vitron
        ("vision_supervision", "one_token"),  # LLaVAction
        ("mm_vision_tower_config", "biomedclip.json"),  # LLaVA-Rad
        ("s2_manner", "token"),  # SparseVLMs
        ("siglip", True),  # LLaVA-MORE
        ("mm_redundant_patches", 3),  # nobody's yet
    ],
)
def test_settings_about_pictures_that_llava_does_not_read_are_refused(checkpoint, refused, name, value):
    refused(checkpoint(**{name: value}), f"has {name} {re.escape(repr(value))}, which LLaVA and LLaVA-NeXT do not read")


def test_settings_that_are_off_or_of_training_alone_are_not(checkpoint, tmp_path):
    folder = checkpoint(
        mm_dense_connector_type="none", is_multipath_encoder=False, vision_supervision="", tune_vision_tower=True,
        freeze_vision=True, vision_tower_lr=2e-6, mm_vision_tower_lr=2e-6, image_crop_resolution=224, mm_hidden_size=32,
        pretrain_mm_mlp_adapter="mm_projector.bin", image_token_index=151646,
        matryoshka_vis_token_scale=[1, 9], unsloth_version="2024.9",
    )  # fmt: skip
    (config := json.loads((folder / "config.json").read_text()))["mm_image_tower"] = None
    (folder / "config.json").write_text(json.dumps(config))
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


def test_the_grid_that_was_trained_on_is_compared(trained, checkpoint, refused):
    """GeoChat's tower makes 504 px of 336: whatever a fork's config says, training saw what its tower returned."""
    config = json.loads((trained("saep").checkpoint / "config.json").read_text())
    assert config["mm_projector_grid"] == 12
    refused(checkpoint(mm_projector_grid=18), "was trained on 18x18 patches .*its vision tower gives 12x12")


@pytest.mark.parametrize("name", ["LlavaLlamaDynamicForCausalLM", "LlavaSearchLlamaForCausalLM"])  # SparseVLMs, vstar
def test_another_class_under_llavas_name_is_refused(checkpoint, refused, name):
    refused(checkpoint(architectures=[name]), f"model_type 'llava_llama', and was written by {name}")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlavaMistralForCausalLM", None])
def test_the_class_of_a_base_is_not(checkpoint, tmp_path, name):
    """A projector's config has its base's."""
    export_checkpoint(str(checkpoint(architectures=name and [name])), tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "model.region_extractor.mlp.weight",  # Vitron
        "model.mm_projector_object.layers.0.weight",  # vstar
        "model.seg_mm_projector.0.weight",  # VCoder
        "model.action_supervision",  # LLaVAction
        "model.vision_tower.prompt",
        "model.vision_tower.slow_vision_tower.stem.weight",  # LLaVA-HR
        f"{OWN}vision_model.encoder.adapter.weight",
        "model.layers.1.mlp.adapter.weight",
    ],
)
def test_weights_that_the_folder_has_no_place_for_are_refused(checkpoint, refused, name):
    folder = checkpoint()
    add_weights(folder, **{name: torch.ones(4)})
    refused(folder, f"has weights that LLaVA's model of .* does not have: {re.escape(name)}. .*serve it with that fork")


def test_a_tower_that_a_fork_trained_under_a_setting_of_its_own_is_refused(checkpoint, refused):
    folder = checkpoint(freeze_vision=False)
    add_weights(folder, lambda weight: weight * 1.05)
    refused(folder, "has a vision tower of its own, other than .*write unfreeze_mm_vision_tower true into config.json")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_frozen_tower_that_was_saved_along_is_not(checkpoint, tmp_path, dtype):
    folder = checkpoint()
    assert FIRST in load_file(folder / "model.safetensors")
    add_weights(folder, lambda weight: weight.to(dtype))
    export_checkpoint(str(folder), tmp_path / "out")


def test_a_tower_in_a_folder_of_the_checkpoint_is_not_passed_over(checkpoint, tiny, tmp_path, refused):
    """ShareGPT4Video and ConvLLaVA save there what they trained."""
    folder = checkpoint()
    shutil.copytree(tiny.coarse_tower, folder / "vision_tower")
    refused(folder, "vision_tower is a vision tower too, .*pass --vision-tower with the one to export")
    export_checkpoint(str(folder), tmp_path / "out", vision_tower=str(folder / "vision_tower"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(folder / "vision_tower")}))
    export_checkpoint(str(folder), tmp_path / "again")


def test_a_siglip_as_other_forks_read_it_is_refused(checkpoint, tiny, tmp_path, refused):
    """ShareGPT4Video and DenseConnector read the last layer, which LLaVA-NeXT deletes."""
    from transformers import SiglipVisionConfig

    SiglipVisionConfig().save_pretrained(tmp_path / "siglip")
    refused(checkpoint(mm_vision_tower=str(tmp_path / "siglip")), "is a SigLIP, and .* has no vision_tower_pretrained")


@pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
def test_tiles_as_llava_more_lays_them_out_are_refused(checkpoint, refused, merge):
    settings = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "model_architecture": "vicuna"}
    refused(checkpoint(mm_patch_merge_type=merge, **settings), f"model_architecture 'vicuna', .*{merge!r}: LLaVA-MORE")


def test_the_rest_of_llava_more_is_not(checkpoint, tmp_path):
    export_checkpoint(str(checkpoint(model_architecture="vicuna")), tmp_path / "out")


@pytest.mark.parametrize(("stride", "is_video"), [(2, True), (None, True), (4, False)])
def test_videos_that_are_pooled_by_more_than_2_are_not_exported(checkpoint, tmp_path, stride, is_video):
    """LongVA pools by `mm_spatial_pool_stride`, LLaVA-NeXT's newer versions by 2 whatever it is."""
    settings = {"mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": stride, "vision_tower_pretrained": ""}
    export_checkpoint(str(checkpoint(**settings)), tmp_path / "out")
    layout = json.loads((tmp_path / "out" / "config.json").read_text())["image_layout"]
    assert (layout["video"] is not None) == is_video


def test_an_environment_of_an_old_fork_is_named(checkpoint, monkeypatch, refused):
    """Half of the forks pin 4.31, whose tokens and auto classes are others."""
    folder = checkpoint()
    monkeypatch.setattr("transformers.__version__", "4.31.0")
    refused(folder, "transformers 4.31.0 is too old to export with: run it in an environment with 4.36")


@pytest.mark.parametrize(("given", "is_said"), [([], True), (["--conv-mode", "llava_v1"], False)])
def test_the_conversation_that_was_guessed_is_named(checkpoint, tmp_path, capsys, given, is_said):
    """DenseConnector trains Llama 3 in another than Open-LLaVA-NeXT."""
    assert main(["export", str(checkpoint()), str(tmp_path / "out"), *given]) == 0
    assert ("chat template is vicuna_v1, chosen by LLM" in capsys.readouterr().out) == is_said


def test_lora_below_a_frozen_tower_is_not_dropped(trained, checkpoint, tmp_path, refused):
    """Forks whose scripts do not leave the tower out of LoRA's targets."""
    folder, name = tmp_path / "llava-lora", f"{OWN}vision_model.encoder.layers.0.self_attn.q_proj"
    shutil.copytree(trained("saep").adapter, folder)
    (folder / "mm_projector.bin").rename(folder / "non_lora_trainables.bin")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shapes = {"A": (4, 32), "B": (32, 4)}
    weights = {f"base_model.model.{name}.lora_{part}.weight": torch.ones(shape) for part, shape in shapes.items()}
    torch.save(weights, folder / "adapter_model.bin")
    refused(folder, f"has a vision tower of its own, other than .*{re.escape(name)}", base=str(checkpoint()))
