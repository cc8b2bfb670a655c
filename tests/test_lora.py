"""LoRA through LLaVA's own script and loader, from a base LLM and on a checkpoint that has our projector."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava_projectors import ProjectorWeightsError
from llava_projectors.integration.weights import awaited_weights
from llava_projectors.tiny.train import losses

OURS = ("saep", "tokenpacker")
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
IMAGE = -200


@pytest.fixture(scope="module")
def lora_runs(tiny, trained):
    """(type, road) -> folder of a LoRA run and the folder of its base model; run once."""
    done = {}

    def get(projector_type, road):
        if (projector_type, road) not in done:
            run = trained(projector_type)
            start = {"adapter": run.adapter / "mm_projector.bin"} if road == "base" else {}
            base = tiny.llm if road == "base" else run.checkpoint
            folder, _ = tiny.finetune(
                f"lora-{road}-{projector_type}",
                projector_type,
                **start,
                model_name_or_path=base,
                max_steps=4,
                mm_projector_lr=1e-3,
                **LORA,
            )
            done[projector_type, road] = folder, base
        return done[projector_type, road]

    return get


def saved_projector(folder):
    state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return {key.split("mm_projector.")[1]: value for key, value in state.items() if "mm_projector." in key}


def load(folder, base):
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(folder), str(base), "llava-lora", device="cpu", device_map="cpu")[1]


def unmerged(folder, base):
    """The steps of LLaVA's loader in float32, up to the merge."""
    from llava.model import LlavaLlamaForCausalLM
    from peft import PeftModel
    from transformers import AutoConfig

    model = LlavaLlamaForCausalLM.from_pretrained(base, config=AutoConfig.from_pretrained(folder))
    state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    state = {key.replace("base_model.model.", "", 1): value for key, value in state.items()}
    model.load_state_dict(state, strict=False)
    model.get_vision_tower().load_model()
    return PeftModel.from_pretrained(model, folder).eval()


def round_to_half(model):
    """As LLaVA's loader does with all weights before the merge, but for LoRA's, and `save_pretrained` after it.

    A comparison without these roundings has no bound: TokenPacker's last norm may amplify one of a token that is
    almost zero.
    """
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "vision_tower" not in name:
            parameter.data = parameter.data.half().float()
    return model


def picture():
    return torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))


def logits(model):
    return model(input_ids=torch.tensor([[1, 5, IMAGE, 6, 7]]), images=picture()).logits


def visual_tokens(model):
    return model.encode_images(picture())


@pytest.mark.parametrize("road", [pytest.param("base", marks=pytest.mark.cuda), "checkpoint"])
@pytest.mark.parametrize("projector_type", OURS)
def test_round_trip(lora_runs, tmp_path, projector_type, road):
    folder, base = lora_runs(projector_type, road)
    assert all(0.0 < value < 20 for value in losses(folder))
    assert json.loads((folder / "config.json").read_text())["mm_projector_type"] == projector_type
    saved = saved_projector(folder)

    model = load(folder, base)
    loaded = model.get_model().mm_projector.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(value, saved[name].half()) for name, value in loaded.items())

    by_hand = unmerged(folder, base)
    expected = logits(by_hand)
    assert expected.shape[1] == 4 + 36
    torch.testing.assert_close(logits(by_hand.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
    rounded = round_to_half(round_to_half(unmerged(folder, base)).merge_and_unload())

    # What LLaVA's merge_lora_weights.py does: load, save as a full checkpoint.
    model.save_pretrained(tmp_path / "llava-merged")
    from llava.model import LlavaLlamaForCausalLM

    merged = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "llava-merged", torch_dtype=torch.float32)
    merged.get_vision_tower().load_model()
    assert torch.equal(logits(merged), logits(rounded))


@pytest.mark.parametrize("projector_type", OURS)
def test_lora_touches_the_llm_alone(lora_runs, projector_type):
    """peft picks targets by the end of a name; none of our layers ends like one of Llama's."""
    folder, _ = lora_runs(projector_type, "checkpoint")
    keys = torch.load(folder / "adapter_model.bin", weights_only=True)
    assert any("self_attn.q_proj" in key for key in keys)
    assert not any("mm_projector" in key for key in keys)


@pytest.mark.parametrize("projector_type", OURS)
def test_projector_has_its_own_learning_rate(tiny, trained, projector_type):
    """With a rate of 0 for everything else, every projector weight moves and no LoRA weight does."""
    start = trained(projector_type).checkpoint
    folder, _ = tiny.finetune(
        f"lora-lr-{projector_type}",
        projector_type,
        model_name_or_path=start,
        max_steps=2,
        learning_rate=0.0,
        mm_projector_lr=1e-2,
        **LORA,
    )
    before = load_file(start / "model.safetensors")
    for name, value in saved_projector(folder).items():
        if name != "ln_k_1.bias":
            assert not torch.equal(value, before[f"model.mm_projector.{name}"]), name
    lora = torch.load(folder / "adapter_model.bin", weights_only=True)
    assert all(value.abs().max() == 0 for key, value in lora.items() if "lora_B" in key)


def test_lora_without_projector_weights_is_an_error(lora_runs, tmp_path):
    import shutil

    folder, base = lora_runs("saep", "base")
    broken = tmp_path / "llava-lora"
    shutil.copytree(folder, broken)
    torch.save({}, broken / "non_lora_trainables.bin")
    with pytest.raises(ProjectorWeightsError, match="got no weights from .*llava-lora: missing: after.0"):
        load(broken, base)


def test_lora_of_another_type_than_its_base_is_an_error(lora_runs, trained, tmp_path):
    """A saep LoRA on a tokenpacker checkpoint: named before a weight of either is used."""
    folder, _ = lora_runs("saep", "checkpoint")
    with pytest.raises(ProjectorWeightsError, match="'saep' does not get its weights.*look like 'tokenpacker'"):
        load(folder, trained("tokenpacker").checkpoint)


def tiny_llm(kind):
    """LLaVA's classes on other LLMs, as the installed LLaVA builds them."""
    if kind == "mistral":
        from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM

        config = LlavaMistralConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        return LlavaMistralForCausalLM(config)
    from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM

    return LlavaMptForCausalLM(LlavaMptConfig(vocab_size=64, d_model=64, n_heads=4, n_layers=2, expansion_ratio=2))


@pytest.mark.parametrize("projector_type", OURS)
@pytest.mark.parametrize("kind", ["mistral", "mpt"])
def test_other_llms(model_args, tmp_path, kind, projector_type):
    """MPT has an `out_proj`, and so has TokenPacker: LoRA wraps it, and the round trip must hold all the same.

    The forward of the installed LLaVA's MPT class fails with any projector (it calls
    `prepare_inputs_labels_for_multimodal` without `position_ids`), so MPT is followed up to the LLM's input.
    """
    from llava.train.train import find_all_linear_names, get_peft_state_non_lora_maybe_zero_3
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model = tiny_llm(kind)
    model.get_model().initialize_vision_modules(model_args(projector_type))
    model.save_pretrained(tmp_path / "base")

    model = type(model).from_pretrained(tmp_path / "base")
    assert not awaited_weights(model.get_model().mm_projector)
    model.get_vision_tower().load_model()
    peft_model = get_peft_model(model, LoraConfig(target_modules=find_all_linear_names(model), task_type="CAUSAL_LM"))
    wraps_projector = any("mm_projector" in name and "lora_" in name for name, _ in peft_model.named_parameters())
    assert wraps_projector is (kind == "mpt" and projector_type == "tokenpacker")
    for parameter in model.get_model().mm_projector.parameters():  # as initialize_vision_modules does
        parameter.requires_grad = True
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], 0.1)
    outputs = visual_tokens if kind == "mpt" else logits
    target = torch.zeros_like(outputs(peft_model))
    for _ in range(3):
        loss = torch.nn.functional.mse_loss(outputs(peft_model), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert loss > 0.0
    peft_model.save_pretrained(tmp_path / "lora")
    trainables = get_peft_state_non_lora_maybe_zero_3(peft_model.named_parameters())
    expected = outputs(peft_model.eval())

    again = type(model).from_pretrained(tmp_path / "base")
    again.get_vision_tower().load_model()
    again.load_state_dict({k.replace("base_model.model.", "", 1): v for k, v in trainables.items()}, strict=False)
    again = PeftModel.from_pretrained(again, tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(again), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(again.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
