"""The package's own script on a mixture of pictures, videos and text: both stages, LoRA, a trained tower; loading."""

import math

import family
import pytest
import torch
from safetensors.torch import load_file

import llava_projectors

ALL_PARTS = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
TYPES = ["saep", "tokenpacker:scale_factor=3"]


@pytest.fixture(scope="module")
def adapter(root):
    """projector type -> the folder of its first stage, trained once."""
    made = {}

    def get(projector_type):
        if projector_type not in made:
            output = root / f"llava-qwen-pretrain-{len(made)}"
            made[projector_type] = family.train(root, output, projector_type, mm_tunable_parts="mm_mlp_adapter")
        return made[projector_type]

    return get


@pytest.fixture(scope="module")
def checkpoint(root, adapter):
    """The folder of `saep` after both stages."""
    weights = adapter("saep") / "mm_projector.bin"
    return family.train(root, root / "llava-qwen-saep", "saep", pretrain_mm_mlp_adapter=weights)


def projector_of(tensors):
    return {name.split("mm_projector.")[1]: tensor for name, tensor in tensors.items() if "mm_projector." in name}


def assert_trained(output):
    assert all(math.isfinite(loss) and loss > 0 for loss in family.losses(output))


def load(folder, base=None):
    """By the package's own loader, as evaluation calls it where there is no flash attention."""
    loader = family.module("model.builder").load_pretrained_model
    return loader(str(folder), base, folder.name, device_map="auto", attn_implementation="sdpa")


def answer(tokenizer, model, processor):
    """Ids that the model answers with about a picture and about a video."""
    model.float()
    model.get_vision_tower().float()
    prompt = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    ids = family.module("mm_utils").tokenizer_image_token(prompt, tokenizer, family.IMAGE_TOKEN, return_tensors="pt")
    picture = family.module("mm_utils").process_images([family.picture(*family.WIDE)], processor, model.config)[0]
    video = processor.preprocess(family.video(2), return_tensors="pt")["pixel_values"]
    return [
        model.generate(
            ids[None],
            images=[pixels.float()],
            image_sizes=[family.WIDE],
            modalities=[kind],
            do_sample=False,
            max_new_tokens=4,
        ).tolist()
        for pixels, kind in ((picture, "image"), (video, "video"))
    ]


@pytest.mark.parametrize("projector_type", TYPES)
def test_the_first_stage_trains_the_projector_alone(adapter, projector_type):
    output = adapter(projector_type)
    assert_trained(output)
    saved = torch.load(output / "mm_projector.bin", weights_only=True)
    expected = llava_projectors.build_projector(projector_type, 32, 80).state_dict()
    assert {name: value.shape for name, value in projector_of(saved).items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_the_second_stage_starts_from_the_first_and_describes_itself(adapter, checkpoint):
    assert_trained(checkpoint)
    config = family.module("model.language_model.llava_qwen").LlavaQwenConfig.from_pretrained(checkpoint)
    assert (config.mm_projector_type, config.mm_projector_options["layers"]) == ("saep", [4, 7])
    before = projector_of(torch.load(adapter("saep") / "mm_projector.bin", weights_only=True))
    after = projector_of(load_file(checkpoint / "model.safetensors"))
    assert before.keys() == after.keys()
    for name, value in after.items():
        # Two steps at a rate of 0.001 and then 0: Adam moves a number by 0.001 at most, bfloat16 rounds it.
        assert (value - before[name]).abs().max() < 3e-3 + 0.01 * value.abs().max()


def test_a_checkpoint_is_loaded_to_the_same_bits_and_answers(checkpoint):
    saved = load_file(checkpoint / "model.safetensors")
    tokenizer, model, processor, _ = load(checkpoint)
    loaded = model.state_dict()
    for name, value in saved.items():
        assert torch.equal(loaded[name], value.half()), name
    assert model.get_vision_tower().num_patches_per_side == 14
    first = answer(tokenizer, model, processor)
    assert first == answer(*load(checkpoint)[:3])
    assert all(len(ids[0]) > 0 for ids in first)


def test_a_later_stage_goes_on_from_a_checkpoint(root, checkpoint, tmp_path):
    """As the stages of OneVision do: the projector is the checkpoint's, without an adapter."""
    output = family.train(root, tmp_path / "llava-qwen-ov", "saep", model_name_or_path=checkpoint)
    assert_trained(output)
    assert family.losses(output)[0] < family.losses(checkpoint)[0]


def test_lora(root, adapter, tmp_path):
    weights = adapter("saep") / "mm_projector.bin"
    output = family.train(
        root,
        tmp_path / "llava-qwen-lora",
        "saep",
        pretrain_mm_mlp_adapter=weights,
        mm_tunable_parts=None,
        lora_enable=True,
        lora_r=4,
    )
    assert_trained(output)
    trained = projector_of(torch.load(output / "non_lora_trainables.bin", weights_only=True))
    if family.PACKAGE == "llava":
        pytest.skip("LLaVA-NeXT's loader knows no LoRA of Qwen2")
    tokenizer, model, processor, _ = load(output, str(root / "qwen-tiny"))
    for name, value in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(value, trained[name].half()), name
    assert answer(tokenizer, model, processor)


def test_a_trained_tower_is_loaded_from_the_checkpoint(root, tmp_path):
    output = family.train(root, tmp_path / "llava-qwen-tower", "tokenpacker", mm_tunable_parts=ALL_PARTS)
    assert_trained(output)
    saved = load_file(output / "model.safetensors")
    loaded = load(output)[1].state_dict()
    towers = [name for name in saved if "vision_tower" in name]
    assert towers
    assert all(torch.equal(loaded[name], saved[name].half()) for name in towers)


def test_its_own_type_is_the_same_bits_with_the_plugin_on_and_off(root, tmp_path):
    on = family.train(root, tmp_path / "llava-qwen-on", "mlp2x_gelu", mm_tunable_parts=ALL_PARTS)
    llava_projectors.unpatch(family.PACKAGE)
    try:
        off = family.train(root, tmp_path / "llava-qwen-off", "mlp2x_gelu", mm_tunable_parts=ALL_PARTS)
    finally:
        llava_projectors.patch(family.PACKAGE)
    assert_trained(on)
    assert family.losses(on) == family.losses(off)
    with_plugin, without = (load_file(folder / "model.safetensors") for folder in (on, off))
    assert with_plugin.keys() == without.keys()
    assert all(torch.equal(with_plugin[name], without[name]) for name in without)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("mm_tunable_parts", ALL_PARTS), ("unfreeze_mm_vision_tower", True), ("mm_tunable_parts", None)],
)
def test_a_tower_is_loaded_once_also_where_an_adapter_is_looked_at_first(root, adapter, monkeypatch, setting, value):
    weights = adapter("saep") / "mm_projector.bin"
    cls = family.module("model.multimodal_encoder.siglip_encoder").SigLipVisionModel
    own, loads = cls.from_pretrained.__func__, []
    monkeypatch.setattr(
        cls, "from_pretrained", classmethod(lambda *args, **named: (loads.append(1), own(*args, **named))[1])
    )
    script, llm = family.module("train.train"), root / "qwen-tiny"
    model = family.module("model").LlavaQwenForCausalLM.from_pretrained(llm)
    arguments = script.ModelArguments(
        model_name_or_path=str(llm),
        vision_tower=family.TOWER,
        mm_projector_type="saep",
        pretrain_mm_mlp_adapter=str(weights),
        **{setting: value},
    )
    model.get_model().initialize_vision_modules(arguments)
    assert len(loads) == 1
    assert model.get_vision_tower().is_loaded
