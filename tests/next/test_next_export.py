"""Exports of this family's checkpoints, compared with what its own classes say: layouts, towers, conversations."""

import json

import family
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from llava_projectors.export import verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.templates import TEMPLATES
from llava_projectors.serving.layout import layout_of

UNPAD = {"mm_patch_merge_type": "spatial_unpad"}
VIDEO = {"image_aspect_ratio": "pad", **UNPAD}
SETTINGS = {
    "pad": {"image_aspect_ratio": "pad", **UNPAD},
    "anyres": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"},
    "anyres-max": {"image_aspect_ratio": "anyres_max_2", **UNPAD},
    "slice": {"image_aspect_ratio": "slice:patch_num=9", "mm_patch_merge_type": "flat"},
    "video-grid": {**VIDEO, "mm_newline_position": "grid", "mm_spatial_pool_mode": "average"},
    "video-frame": {**VIDEO, "mm_newline_position": "frame", "mm_spatial_pool_mode": "max"},
    "trained-tower": {"image_aspect_ratio": "pad", "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"},
}


@pytest.fixture
def tower(root):
    (folder,) = (root / "hub").glob(f"models--{family.TOWER.replace('/', '--')}/snapshots/*")
    return folder


@pytest.fixture
def export(tower, build, tmp_path):
    """settings -> a checkpoint as the script would have saved it, with large weights in its LLM, and its export."""

    def make(projector_type="saep", **settings):
        # As real ones have it; the class's default is shorter than the sequences.
        built = build(projector_type, sliding_window=8192, **settings)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in built.model.named_parameters():
                if parameter.ndim == 2 and "vision_tower" not in name:
                    parameter.normal_(std=2 / parameter.shape[-1] ** 0.5)
                if "vision_tower" in name and "mm_tunable_parts" in settings:
                    parameter.mul_(1.5)
        source = tmp_path / "llava-qwen"
        built.model.save_pretrained(source)
        built.tokenizer.save_pretrained(source)
        export_checkpoint(str(source), tmp_path / "out", vision_tower=str(tower))
        return source, tmp_path / "out"

    return make


@pytest.mark.parametrize("name", SETTINGS)
def test_it_is_what_the_family_says(export, name):
    """Settings, tokens, pixels, positions, logits, answers and their ends, of pictures, several of them, a video."""
    source, folder = export(**SETTINGS[name])
    layout = layout_of(json.loads((folder / "config.json").read_text())["image_layout"])
    asked = [question.given_as for question in verify.default_questions(layout)]
    assert asked == ["pictures"] * 3 + (["pad"] if "anyres" in name else []) + ["video"]
    assert verify.verify(folder, str(source), None, package=family.PACKAGE) == []
    # Where vLLM's transformers backend does not start without being told how pictures are seen.
    told = """--limit-mm-per-prompt '{"image": 1}' --mm-processor-kwargs '{"image_aspect_ratio": "slice"}'\n```"""
    assert (told in (folder / "README.md").read_text()) == ("slice" in name)


def test_verify_sees_a_lost_newline(export):
    source, folder = export(**SETTINGS["pad"])
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((folder / name).read_text())
        settings["image_layout"]["newline"] = False
        (folder / name).write_text(json.dumps(settings))
    found = verify.verify(folder, str(source), None, package=family.PACKAGE)
    assert "the LLM gets -1 positions more than LLaVA's" in "; ".join(found)


def test_a_trained_tower_is_the_checkpoints_and_has_its_layers(export):
    source, folder = export(**SETTINGS["trained-tower"])
    trained, exported = (load_file(path / "model.safetensors") for path in (source, folder))
    prefix = "model.vision_tower.vision_tower."
    for name in (name for name in exported if name.startswith("model.vision_tower.")):
        assert torch.equal(exported[name], trained[prefix + name.removeprefix("model.vision_tower.")])
    depth = family.TOWER_SIZES["num_hidden_layers"]
    assert json.loads((folder / "config.json").read_text())["vision_config"]["num_hidden_layers"] == depth - 1


def test_a_tokenizer_without_its_fast_form(export, tower, tmp_path):
    source, folder = export(**SETTINGS["pad"])
    (source / "tokenizer.json").unlink()
    export_checkpoint(str(source), tmp_path / "again", vision_tower=str(tower))
    first, again = (PreTrainedTokenizerFast.from_pretrained(path) for path in (folder, tmp_path / "again"))
    text = "<|im_start|>user\n<image>\nWhat is e\u0301?<|im_end|>"
    assert first(text).input_ids == again(text).input_ids


@pytest.mark.parametrize("name", ["qwen_1_5", "qwen_2_5"])
def test_conversations_are_the_familys(export, tmp_path, name):
    conversations = family.module("conversation").conv_templates
    if name not in conversations:
        pytest.skip(f"{family.PACKAGE} has no {name}")
    conversation = conversations[name].copy()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export(**SETTINGS["pad"])[1])
    tokenizer.chat_template = TEMPLATES[name]
    first = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    chat = [{"role": "user", "content": first}, {"role": "assistant", "content": "A cat."}]
    chat.append({"role": "user", "content": "Why?"})
    texts = ["<image>\nWhat is this?", "A cat.", "Why?", None]
    for number, text in enumerate(texts):
        conversation.append_message(conversation.roles[number % 2], text)
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == conversation.get_prompt()
