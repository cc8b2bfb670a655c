"""Phi-3, which ViP-LLaVA trains by a class of its own: what can be seen without it.

The rest is `make check-export PHI3=…`.
"""

import json
import shutil

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llava_projectors.export import verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.llm import LLMS, text_config
from llava_projectors.export.templates import TEMPLATES
from llava_projectors.export.tokenizer import WORDS, export_tokenizer, prompts_of
from llava_projectors.integration.loader import name_for

# What ViP-LLaVA's script writes of Phi-3-mini-4k-instruct, and of the one for 128k where it differs.
MINI_4K = {
    "model_type": "llava_phi3", "architectures": ["LlavaPhi3ForCausalLM"], "transformers_version": "4.37.2",
    "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "sliding_window": 2047, "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000, "tokenizer_model_max_length": 2048,
}  # fmt: skip
FACTORS = {"short_factor": [1.05] * 48, "long_factor": [1.3] * 48}
MINI_128K = {
    **MINI_4K, "max_position_embeddings": 131072, "sliding_window": 262144, "rope_scaling": {"type": "su", **FACTORS}
}  # fmt: skip
PROMPT = (
    "<|system|>\nYou are a helpful language and vision assistant. You are able to understand the visual content that "
    "the user provides, and assist the user with a variety of tasks using natural language.<|end|>\n"
    "<|user|>\n<image>\nWhat is this?<|end|>\n<|assistant|>\nA cat.<|end|>\n<|user|>\nWhy?<|end|>\n<|assistant|>\n"
)


@pytest.fixture
def phi3(trained, tmp_path):
    """A Llama that was trained by LLaVA, its weights and tokenizer in Phi-3's form; `edit` changes its config."""

    def make(**edit):
        folder = tmp_path / "llava-phi"
        shutil.copytree(trained("saep").checkpoint, folder)
        weights = load_file(folder / "model.safetensors")
        for name, parts in LLMS["phi3"].fused.items():
            for first in [key for key in weights if f".{parts[0]}." in key and "vision" not in key]:
                found = [weights.pop(first.replace(parts[0], part)) for part in parts]
                weights[first.replace(parts[0], name)] = torch.cat(found)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        ends = families.phi3_tokenizer(folder)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[key] = torch.nn.functional.pad(weights[key], (0, 0, 0, 20))
            config["vocab_size"] = len(weights[key])
        config |= {"model_type": "llava_phi3", "eos_token_id": ends[0], "pad_token_id": ends[0], **edit}
        path.write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def test_a_checkpoint_is_exported(phi3, tmp_path):
    """By a stack whose transformers has no Phi-3, and without ViP-LLaVA."""
    source = phi3()
    export_checkpoint(str(source), tmp_path / "out")
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["model_type"], text["architectures"]) == ("phi3", ["Phi3ForCausalLM"])
    stored, own = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        key = f"layers.1.{name}.weight"
        assert torch.equal(stored[f"model.language_model.{key}"], own[f"model.{key}"])
    assert not [key for key in stored if "q_proj" in key and "vision" not in key]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "conversation | `llava_phi_3`" in card
    assert "ViP-LLaVA's loader, whose fast tokenizer gives a space behind each special token" in card
    with pytest.raises(ExportError, match="has no phi3: pass --verify-python"):
        verify.assemble(tmp_path / "out")


@pytest.mark.parametrize("lost", ["qkv_proj", "gate_up_proj"])
def test_a_lost_weight_is_named(phi3, refused, lost):
    source = phi3()
    weights = load_file(source / "model.safetensors")
    key = next(key for key in weights if lost in key)
    del weights[key]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    refused(source, f"missing: {key}")


def test_settings_are_written_as_they_were_trained(tmp_path):
    """The window is one less than the longest sequence, of which the last token predicts nothing."""
    assert text_config(MINI_128K, tmp_path)["rope_scaling"] == {
        "type": "longrope",
        **FACTORS,
    }  # as 4.57 and 5.24 know it
    for config in (MINI_4K, {**MINI_128K, "rope_scaling": None}):
        text = text_config(config, tmp_path)
        ours = {"model_type", "architectures", "transformers_version", "tokenizer_model_max_length"}
        assert {**text, **{name: config[name] for name in config.keys() - ours}} == text
        assert (text["model_type"], text["tie_word_embeddings"]) == ("phi3", False)


@pytest.mark.parametrize(
    ("config", "change", "match"),
    [
        (MINI_4K, {"tokenizer_model_max_length": 4096}, "sliding_window 2047, and sequences of up to 4096 tokens"),
        (MINI_4K, {"tokenizer_model_max_length": 2049}, "sliding_window 2047, and sequences of up to 2049 tokens"),
        (MINI_128K, {"rope_scaling": {"type": "yarn", **FACTORS}}, "type 'yarn': of Phi-3's, only 'su'"),
        (MINI_128K, {"rope_scaling": {"type": "longrope", **FACTORS}}, "type 'longrope': of Phi-3's, only 'su'"),
        (MINI_128K, {"tokenizer_model_max_length": 4097}, "up to 4097 tokens, more than .* 4096: .*the first sequence"),
        (MINI_128K, {"tokenizer_model_max_length": None}, "up to 131072 tokens, more than"),
        # Phi-4-mini
        (MINI_4K, {"partial_rotary_factor": 0.75}, "has partial_rotary_factor 0.75, training used 1.0"),
        (MINI_4K, {"head_dim": 128}, "has head_dim 128, training used 96"),
    ],
)
def test_settings_that_are_refused(tmp_path, config, change, match):
    with pytest.raises(ExportError, match=match):
        text_config({**config, **change}, tmp_path)


@pytest.mark.parametrize("strips", [True, False])
def test_tokens_are_those_of_the_forks_loader(tiny, tmp_path, strips):
    """Its fast tokenizer, as transformers 4.37 makes it; with all special tokens between words."""
    from llava.mm_utils import tokenizer_image_token

    folder = tmp_path / "phi-3"
    shutil.copytree(tiny.llm, folder)
    families.phi3_tokenizer(folder, strips)
    (tmp_path / "out").mkdir()
    export_tokenizer(folder, tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True)
    ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "<|endoftext|>", "<|endoftext|>")
    image = ours.convert_tokens_to_ids("<image>")
    for prompt in [PROMPT, *prompts_of([*WORDS, "</s>", *families.PHI3_TOKENS], 1000)]:
        assert ours(prompt).input_ids == tokenizer_image_token(prompt, loaded, image)


def test_the_conversation_is_the_forks(tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.llm, use_fast=False)
    tokenizer.chat_template = TEMPLATES["llava_phi_3"]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
    ]

    def prompt(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert prompt(messages) == PROMPT
    turns = PROMPT[PROMPT.index("<|user|>") :]
    assert prompt([{"role": "system", "content": "Be brief."}, *messages]) == f"<|system|>\nBe brief.<|end|>\n{turns}"
    assert prompt([{"role": "system", "content": ""}, *messages]) == turns


def test_the_name_by_which_the_forks_loader_chooses_its_class(phi3):
    assert name_for(str(phi3())) == "llava_phi-3"


def test_verify_sees_that_a_loader_takes_another_class(phi3, tmp_path):
    """LLaVA's own makes a Llama of it, with weights drawn at random."""
    source = str(phi3())
    export_checkpoint(source, tmp_path / "out")
    with pytest.raises(
        ExportError, match=r"loader of llava makes a LlavaLlamaForCausalLM of .*without a place for .*_proj"
    ):
        verify.verify(tmp_path / "out", source, None)


def test_verify_says_where_a_loader_fails(phi3):
    """ViP-LLaVA's does where Phi-3 is the base of an adapter; here, the file of weights is cut off."""
    source = phi3()
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"given .*llava-phi by the name 'llava_phi-3', ends in SafetensorError: "):
        verify.load_llava(str(source), None)
