"""A checkpoint in the format of the released TokenPacker models loads with stock LLaVA and this plugin."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_projectors import GOLDEN, naive_tokenpacker, published_weights, relative_error
from test_slice_model import picture, reference_tiles

from llava_projectors.tiny import assets


@pytest.fixture(scope="module", params=[2, 3, 4])
def released(request, tmp_path_factory):
    """`mm_projector_type: tokenpacker` and `scale_factor` in the config, published names, features of 1024 channels."""
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.language_model.llava_llama import LlavaConfig
    from transformers import CLIPVisionConfig, CLIPVisionModel

    root = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    tower = root / "clip"
    assets.make_vision_tower(tower)  # for the image processor
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=64, num_hidden_layers=24, num_attention_heads=8, image_size=336,
        patch_size=14,
    )  # fmt: skip
    CLIPVisionModel(config).half().save_pretrained(tower)
    llm = assets.make_llm(root / "vicuna", hidden_size=520)
    config = LlavaConfig.from_pretrained(llm)
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 512, 4, 4
    model = LlavaLlamaForCausalLM(config)
    checkpoint = root / "llava-tokenpacker"
    model.save_pretrained(checkpoint, safe_serialization=False)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(llm / name, checkpoint / name)
    written = json.loads((checkpoint / "config.json").read_text())
    written.update({
        "mm_projector_type": "tokenpacker", "scale_factor": request.param, "mm_vision_tower": str(tower),
        "mm_hidden_size": 1024, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "use_mm_proj": True, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
    })  # fmt: skip
    (checkpoint / "config.json").write_text(json.dumps(written))
    state = torch.load(checkpoint / "pytorch_model.bin", weights_only=True)
    state.update({f"model.mm_projector.{name}": value for name, value in published_weights().items()})
    torch.save(state, checkpoint / "pytorch_model.bin")
    return checkpoint, request.param


def test_loads_and_equals_the_published_projector(released):
    from llava.model import LlavaLlamaForCausalLM

    checkpoint, scale_factor = released
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint)
    projector = model.get_model().mm_projector
    levels = torch.from_numpy(np.random.RandomState(7).standard_normal((4, 2, 576, 1024)).astype(np.float32))
    with torch.no_grad():
        out = projector(torch.cat(list(levels), dim=-1))
    golden = np.load(GOLDEN)
    assert relative_error(out[..., :64], torch.from_numpy(golden[f"s{scale_factor}_out"])) < 1e-5

    # From pixels to logits: the tower's features through an independent projector, then the LLM.
    tower = model.get_vision_tower()
    tower.load_model()
    tower.float()
    images = torch.randn(1, 3, 336, 336)
    ids = torch.tensor([[1, 5, -200, 6, 7]])
    with torch.no_grad():
        features = tower(images)
        assert features.shape == (1, 576, 4096)
        visual = naive_tokenpacker(projector.double(), features.double()).float()
        embed = model.get_model().embed_tokens
        embeddings = torch.cat([embed(ids[:, :2]), visual, embed(ids[:, 3:])], dim=1)
        expected = model(input_ids=None, inputs_embeds=embeddings).logits
        projector.float()
        logits = model(input_ids=ids, images=images).logits
    assert logits.shape[1] == 4 + (24 // scale_factor) ** 2
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


def test_llavas_loader_takes_it(released):
    from llava.model.builder import load_pretrained_model

    checkpoint, scale_factor = released
    _, model, _, _ = load_pretrained_model(str(checkpoint), None, "llava", device="cpu", device_map="cpu")
    assert model.get_vision_tower().num_patches == (24 // scale_factor) ** 2
    loaded = model.get_model().mm_projector.state_dict()
    published = published_weights()
    assert loaded.keys() == published.keys()
    assert all(torch.equal(value, published[name].half()) for name, value in loaded.items())


@pytest.fixture
def released_hd(released, tmp_path):
    """The high-resolution format: two more settings, `patch_num` as text, nothing about separators."""
    checkpoint, scale_factor = released
    folder = tmp_path / "llava-tokenpacker-hd"
    shutil.copytree(checkpoint, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    config = json.loads((checkpoint / "config.json").read_text())
    config.update({"image_aspect_ratio": "slice", "patch_num": "16"})
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder, scale_factor


@pytest.mark.slow
@pytest.mark.parametrize("released", [3], indirect=True)
def test_high_resolution_gives_the_references_logits(released_hd):
    """From a picture to logits, through tiles cut here and an independent projector, one tile at a time."""
    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    checkpoint, scale_factor = released_hd
    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), None, "llava", device="cpu", device_map="cpu"
    )
    model.float()
    tower, projector = model.get_vision_tower().float(), model.get_model().mm_projector
    image = picture((1, 2))
    images = process_images([image], processor, model.config)
    assert images.shape == (1, 3, 672, 672)
    comma = tokenizer.convert_tokens_to_ids(",")
    ids = torch.tensor([[1, 5, -200, 6, 7]])
    with torch.no_grad():
        features = tower(reference_tiles(image, 336))
        visual = naive_tokenpacker(copy.deepcopy(projector).double(), features.double()).float()
        embed = model.get_model().embed_tokens.weight
        newline = embed[0]  # the unknown token's, as the released models were trained
        sequence = torch.cat([
            embed[[1, 5]], visual[0], embed[comma][None], visual[1], newline[None], visual[2], newline[None],
            embed[[6, 7]],
        ])  # fmt: skip
        expected = model(input_ids=None, inputs_embeds=sequence[None]).logits
        logits = model(input_ids=ids, images=images).logits
    assert logits.shape[1] == 4 + 3 * ((24 // scale_factor) ** 2 + 1)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
