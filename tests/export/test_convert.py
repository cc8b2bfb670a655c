"""The export on LLaVA's stack: every kind of checkpoint, bounded memory, and refusals that leave nothing behind.

What current transformers and vLLM make of the folders: `check_folders.py`, `check_vllm.py`.
"""

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_projectors
from llava_projectors import ProjectorSpecError, ProjectorWeightsError, build_projector
from llava_projectors.commands.cli import main
from llava_projectors.export import compare, folders, verify
from llava_projectors.export.checkpoint import read_checkpoint
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.templates import TEMPLATES
from llava_projectors.export.tokenizer import merges
from llava_projectors.export.tower import OWN
from llava_projectors.projectors import registration
from llava_projectors.serving.travel import DoesNotTravel, travelling_code

OURS = ("saep", "tokenpacker")
LAYERS = {"saep": [4, 7], "tokenpacker": [4, 5, 6, 7]}


@pytest.fixture(scope="module")
def llava_says():
    """(checkpoint, base) -> LLaVA's answers to what `--verify` asks."""

    def ask(source, base=None, dtype=torch.float16):
        return verify.reference(str(source), base and str(base), verify.default_questions(), 4, dtype)

    return ask


def largest_difference(folder, cases):
    return max(result["logits"] for result in verify.compare_on_this_stack(folder, cases))


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_none_are_a_difference(wrong):
    expected = torch.ones(2, 3)
    found = expected.clone()
    found[1, 2] = wrong
    assert compare.largest_difference(found, expected) == math.inf
    assert compare.largest_difference(expected, expected) == 0
    assert compare.largest_difference(expected[:1], expected) == math.inf


@pytest.mark.parametrize("projector_type", OURS)
def test_a_full_checkpoint(trained, tmp_path, llava_says, projector_type):
    source = trained(projector_type).checkpoint
    export_checkpoint(str(source), tmp_path / "out", dtype="float16")
    assert largest_difference(tmp_path / "out", llava_says(source)) < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mm_projector_type"] == projector_type
    assert config["mm_projector_options"]["layers"] == config["vision_feature_layer"] == LAYERS[projector_type]
    assert config["text_config"]["vocab_size"] % 64 == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert weights["lm_head.weight"].shape[0] == config["text_config"]["vocab_size"]


def test_a_projector_and_its_base(trained, tiny, tmp_path, llava_says):
    adapter = trained("saep").adapter
    export_checkpoint(str(adapter), tmp_path / "out", base=str(tiny.llm), dtype="float16")
    assert largest_difference(tmp_path / "out", llava_says(adapter, tiny.llm)) < 1e-5


@pytest.mark.parametrize("road", ["base", "checkpoint"])
def test_lora_is_merged(trained, tiny, tmp_path, llava_says, road):
    run = trained("saep")
    start = {"adapter": run.adapter / "mm_projector.bin"} if road == "base" else {}
    base = tiny.llm if road == "base" else run.checkpoint
    lora = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-3}
    lora |= {"save_strategy": "steps", "save_steps": 4}
    folder, _ = tiny.finetune(f"export-lora-{road}", "saep", **start, model_name_or_path=base, max_steps=4, **lora)
    export_checkpoint(str(folder), tmp_path / "out", base=str(base), dtype="float32")
    assert largest_difference(tmp_path / "out", llava_says(folder, base, None)) < 1e-5

    merged = load_file(tmp_path / "out" / "model.safetensors")["model.language_model.layers.0.self_attn.q_proj.weight"]
    before = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"].float()
    adapter = torch.load(folder / "adapter_model.bin", weights_only=True)
    up, down = (adapter[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"].float() for x in "BA")
    assert up.abs().max() > 0
    torch.testing.assert_close(merged, before + 2 * up @ down)
    projector = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    trained_bias = next(value for key, value in projector.items() if key.endswith("mm_projector.aggregate.bias"))
    exported = load_file(tmp_path / "out" / "model.safetensors")["model.multi_modal_projector.aggregate.bias"]
    assert torch.equal(exported, trained_bias.float())

    export_checkpoint(str(folder / "checkpoint-4"), tmp_path / "last", base=str(base), dtype="float32")
    last, final = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "out"))
    assert last.keys() == final.keys()
    assert all(torch.equal(last[key], final[key]) for key in final)


def test_bin_shards_and_safetensors_shards_give_the_same(trained, tmp_path):
    source = trained("saep").checkpoint
    export_checkpoint(str(source), tmp_path / "whole")
    weights = load_file(source / "model.safetensors")
    copy = tmp_path / "llava-bin"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    names = list(weights)
    half = {name: f"pytorch_model-0000{1 + (n > 20)}-of-00002.bin" for n, name in enumerate(names)}
    for shard in set(half.values()):
        torch.save({name: weights[name] for name in names if half[name] == shard}, copy / shard)
    (copy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": half}))
    export_checkpoint(str(copy), tmp_path / "shards", shard_bytes=400_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    found = {}
    for shard in shards:
        part = load_file(tmp_path / "shards" / shard)
        assert sum(v.nbytes for v in part.values()) <= 400_000
        assert {index["weight_map"][name] for name in part} == {shard}
        found.update(part)
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in found.values())


def test_memory_does_not_grow_with_the_checkpoint(trained, tmp_path):
    """600 MB of weights, no tensor above 16 MB, are exported within 100 MB."""
    source, big = trained("saep").checkpoint, tmp_path / "llava-big"
    shutil.copytree(source, big, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((big / "config.json").read_text())
    config |= {"hidden_size": 1280, "intermediate_size": 3200, "num_hidden_layers": 16, "num_attention_heads": 32}
    config["num_key_value_heads"] = 32
    config.pop("mm_projector_options")  # its readout is as wide as the small LLM
    (big / "config.json").write_text(json.dumps(config))
    shapes = {f"layers.{n}.{name}": shape for n in range(16) for name, shape in {
        **{f"self_attn.{x}_proj.weight": (1280, 1280) for x in "qkvo"},
        **{f"mlp.{x}_proj.weight": (3200, 1280) for x in ("gate", "up")},
        "mlp.down_proj.weight": (1280, 3200), "input_layernorm.weight": (1280,),
        "post_attention_layernorm.weight": (1280,),
    }.items()}  # fmt: skip
    shapes |= {"norm.weight": (1280,), "embed_tokens.weight": (480, 1280)}
    weights = {f"model.{name}": torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    weights["lm_head.weight"] = torch.zeros(480, 1280, dtype=torch.float16)
    projector = build_projector("saep", config["mm_hidden_size"], 1280).state_dict()
    weights |= {f"model.mm_projector.{name}": value.half() for name, value in projector.items()}
    save_file(weights, big / "model.safetensors", metadata={"format": "pt"})
    size = (big / "model.safetensors").stat().st_size
    assert size > 600e6
    del weights
    program = """
        import sys
        from pathlib import Path
        import transformers.models.llama.modeling_llama, transformers.models.clip.modeling_clip
        from llava_projectors.export.convert import export_checkpoint
        def peak():  # of this process alone; `resource` begins with that of the one that started it
            (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
            return int(line.split()[1])
        export_checkpoint(sys.argv[1], Path(sys.argv[2]))  # imports what it needs
        before = peak()
        export_checkpoint(sys.argv[3], Path(sys.argv[4]), dtype="bfloat16")
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), source, tmp_path / "small", big, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 100e6
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 600e6


def test_verify_prints_the_difference(trained, tmp_path, capsys):
    status = main(["export", str(trained("saep").checkpoint), str(tmp_path / "out"), "--dtype", "float16", "--verify"])
    out = capsys.readouterr().out
    assert status == 0
    assert f"saep: 144 -> 36 visual tokens, written to {tmp_path / 'out'}" in out
    assert "as a part of the largest logit: " in out
    assert out.endswith("equal\n")


def test_verify_sees_a_wrong_weight(trained, tmp_path, llava_says):
    source = trained("tokenpacker").checkpoint
    export_checkpoint(str(source), tmp_path / "out", dtype="float16")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["model.multi_modal_projector.mlp.2.bias"] += 1
    save_file(weights, tmp_path / "out" / "model.safetensors")
    assert largest_difference(tmp_path / "out", llava_says(source)) > 100 * verify.TOLERANCE


def test_the_card_says_what_it_is(trained, tmp_path):
    export_checkpoint(str(trained("tokenpacker").checkpoint), tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    for part in (
        "`tokenpacker`", "36 visual tokens per picture instead of 144", "4, 5, 6, 7 of 8", "scale_factor=2", "licence",
        "vllm serve packed --trust-remote-code --chat-template packed/chat_template_vllm.jinja",
        f"llava-projectors {llava_projectors.__version__}", "vicuna_v1",
        'AutoProcessor.from_pretrained("packed", trust_remote_code=True)',
    ):  # fmt: skip
        assert part in card
    assert "legacy" not in card


def test_the_card_says_where_tokens_differ(trained, tmp_path):
    """As Vicuna's own tokenizer is saved."""
    source = tmp_path / "llava-vicuna"
    shutil.copytree(trained("saep").checkpoint, source)
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "legacy": False}))
    export_checkpoint(str(source), tmp_path / "out")
    assert "saved with `legacy: false`" in (tmp_path / "out" / "README.md").read_text()


# Tokenizer and templates


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_are_llavas(trained, tmp_path, legacy):
    """1,000 prompts of one turn with pictures, spaces, line breaks and characters beyond the vocabulary."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import tokenizer_image_token
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    source = trained("saep").checkpoint
    export_checkpoint(str(source), tmp_path / "out")
    ours, llavas = (
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "out"),
        LlamaTokenizer.from_pretrained(source, legacy=legacy),
    )
    image = ours.convert_tokens_to_ids("<image>")
    words = [
        "the",
        "what",
        "picture",
        "show?",
        "<image>",
        "\n",
        "  ",
        "USER:",
        "ASSISTANT:",
        "höhe",
        "日本",
        "🙂",
        ",a",
    ]
    generator = torch.Generator().manual_seed(0)
    different = []
    for _ in range(1000):
        picked = torch.randint(len(words), (12,), generator=generator).tolist()
        prompt = "A chat. USER: " + "".join(words[n] + " " * (n % 3 == 0) for n in picked)
        expected = [image if t == IMAGE_TOKEN_INDEX else t for t in tokenizer_image_token(prompt, llavas)]
        if ours(prompt).input_ids != expected:
            different.append(prompt)
    assert different == []


def test_merges_go_by_score_and_then_by_the_ids_of_their_parts():
    """Of a model whose ids are not in the order of its scores."""
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -2.0, "bc": -1.0, "abc": -3.0}
    pieces = list(scores)
    model = SimpleNamespace(
        **dict.fromkeys(("is_control", "is_unknown", "is_byte"), lambda number: False),
        get_piece_size=lambda: len(pieces),
        get_score=lambda number: scores[pieces[number]],
    )
    assert merges(pieces, model) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_tokens_behind_an_image_token_of_ones_own_keep_their_rows(trained, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "llava-own"
    shutil.copytree(trained("saep").checkpoint, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    tokenizer.add_tokens(["<image>", "<mine>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    mine = len(tokenizer) - 1
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        known = weights[key][:mine]
        weights[key] = torch.cat([known, torch.full((1 + mine - len(known), known.shape[1]), 7.0)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": mine + 1}))
    export_checkpoint(str(folder), tmp_path / "out", dtype="float32")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for key in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert (exported[key][mine] == 7).all()


def test_tokenizer_settings(trained, tmp_path):
    export_checkpoint(str(trained("saep").checkpoint), tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert settings["padding_side"] == "left"


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1", "mistral_instruct"])
def test_templates_are_llavas_conversations(trained, tmp_path, name):
    from llava.conversation import conv_templates
    from transformers import PreTrainedTokenizerFast

    export_checkpoint(str(trained("saep").checkpoint), tmp_path / "out", conversation=name)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    tokenizer.chat_template = (tmp_path / "out" / "chat_template.jinja").read_text()
    picture, first, second = {"type": "image"}, "What is this?", "Why?"
    for pictures in (1, 2):
        conversation = conv_templates[name].copy()
        conversation.append_message(conversation.roles[0], "<image>\n" * pictures + first)
        messages = [{"role": "user", "content": [*[picture] * pictures, {"type": "text", "text": first}]}]
        for answer in (None, "A cat."):
            if answer:
                conversation.messages[-1][1] = answer
                conversation.append_message(conversation.roles[0], second)
                messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": second}]
            conversation.append_message(conversation.roles[1], None)
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert text == conversation.get_prompt()
    tokenizer.chat_template = (tmp_path / "out" / "chat_template_vllm.jinja").read_text()
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == f"<s>{text}"


def test_the_system_message_of_mistrals_conversation(trained, tmp_path):
    from llava.conversation import conv_templates
    from transformers import PreTrainedTokenizerFast

    export_checkpoint(str(trained("saep").checkpoint), tmp_path / "out", conversation="mistral_instruct")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    tokenizer.chat_template = (tmp_path / "out" / "chat_template.jinja").read_text()
    conversation = conv_templates["mistral_instruct"].copy()
    conversation.system = "Answer in French."
    conversation.append_message(conversation.roles[0], "What is this?")
    conversation.append_message(conversation.roles[1], None)
    messages = [{"role": "system", "content": conversation.system}, {"role": "user", "content": "What is this?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == conversation.get_prompt()
    with pytest.raises(jinja2.TemplateError, match="has no tool"):
        tokenizer.apply_chat_template([*messages, {"role": "tool", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_no_system_message_is_lost(tiny, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.llm, use_fast=False)
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "system", "user")]
    with pytest.raises(jinja2.TemplateError, match="has no system at this place"):
        tokenizer.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False)
    text = tokenizer.apply_chat_template(messages[:2], chat_template=TEMPLATES[name], tokenize=False)
    assert text.count("x") >= 2


@pytest.mark.parametrize(("text", "said"), [("", "is empty"), ("{{% for", "is no Jinja template: line 1")])
def test_a_template_that_is_none(trained, tmp_path, text, said):
    file = tmp_path / "mine.jinja"
    file.write_text(text)
    with pytest.raises(ExportError, match=said):
        export_checkpoint(str(trained("saep").checkpoint), tmp_path / "out", chat_template=file)


# Other towers and LLMs


def test_a_siglip_tower(tiny, trained, tmp_path):
    """LLaVA-NeXT drops SigLIP's last layer and reads the last hidden state of what is left."""
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=1, image_size=112, patch_size=14,
    )).eval()  # fmt: skip
    tower.save_pretrained(tmp_path / "siglip")
    SiglipImageProcessor(size={"height": 112, "width": 112}).save_pretrained(tmp_path / "siglip")
    source = tmp_path / "llava-siglip"
    shutil.copytree(trained("saep").checkpoint, source)
    config = json.loads((source / "config.json").read_text())
    of_next = {"mm_vision_tower": str(tmp_path / "siglip"), "vision_tower_pretrained": ""}
    (source / "config.json").write_text(json.dumps({**config, "mm_projector_grid": 8, **of_next}))
    kept = {k: v for k, v in load_file(source / "model.safetensors").items() if not k.startswith(OWN)}
    save_file(kept, source / "model.safetensors", {"format": "pt"})

    export_checkpoint(str(source), tmp_path / "out", dtype="float32")
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["vision_feature_layer"] == [4, 7]  # of 8, counted from 0: the 8th layer is not read
    assert exported["vision_feature_select_strategy"] == "full"
    assert exported["image_seq_length"] == 16
    assert exported["vision_config"]["num_hidden_layers"] == 7
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in stored if ("layers.7" in name and "vision" in name) or ".head." in name]
    with torch.no_grad():
        model = verify.assemble(tmp_path / "out")
        picture = verify.test_pictures()[0]
        pixels = model.image_processor(picture, return_tensors="pt")["pixel_values"]
        embeddings = model.embeddings({"prompt": "<image>", "images": [picture]})
        logits = model.llm(inputs_embeds=embeddings).logits[0]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        projector = build_projector("saep", 32, config["hidden_size"])
        weights = load_file(source / "model.safetensors")
        projector.load_state_dict(
            {k.split("mm_projector.")[1]: v.float() for k, v in weights.items() if "mm_proj" in k}
        )
        tokens = projector(torch.cat([states[n] for n in (4, 7)], -1))
        from transformers import LlamaForCausalLM

        llm = LlamaForCausalLM.from_pretrained(source).float()
        start = llm.model.embed_tokens(torch.tensor([[1]]))
        expected = llm(inputs_embeds=torch.cat([start, tokens], 1)).logits[0]
    torch.testing.assert_close(logits[:, : expected.shape[1]], expected, rtol=1e-4, atol=1e-5)


def test_a_mistral_llm(trained, tmp_path):
    from transformers import MistralConfig

    source = tmp_path / "llava-mistral"
    shutil.copytree(trained("saep").checkpoint, source)
    config = json.loads((source / "config.json").read_text())
    for window in (4096, None):  # None is no window at all, and not the class's default
        config |= {"model_type": "llava_mistral", "sliding_window": window}
        (source / "config.json").write_text(json.dumps(config))
        out = tmp_path / f"out-{window}"
        export_checkpoint(str(source), out)
        exported = json.loads((out / "config.json").read_text())["text_config"]
        assert MistralConfig(**exported).sliding_window == window
        assert exported["model_type"] == "mistral"
        assert exported["architectures"] == ["MistralForCausalLM"]
        assert "[INST]" in (out / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("setting", "is_own"),
    [
        ({"unfreeze_mm_vision_tower": True}, True),
        ({"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter", "vision_tower_pretrained": ""}, True),  # LLaVA-NeXT's
        ({"mm_tunable_parts": "mm_mlp_adapter,mm_language_model", "vision_tower_pretrained": ""}, False),
        ({"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}, False),  # LLaVA does not read it
    ],
)
def test_a_tower_that_was_trained_is_the_checkpoints(checkpoint, tiny, tmp_path, refused, setting, is_own):
    from transformers import CLIPVisionModel

    folder = checkpoint(**setting)
    weights = CLIPVisionModel.from_pretrained(tiny.coarse_tower).state_dict()
    own = {f"{OWN}{name}": value.half() + 1 for name, value in weights.items() if "position_ids" not in name}
    save_file({**load_file(folder / "model.safetensors"), **own}, folder / "model.safetensors")
    if not is_own:  # LLaVA takes the folder's, a fork that trained it may not
        refused(folder, "has a vision tower of its own, other than .*config.json does not say that it was trained")
        return
    export_checkpoint(str(folder), tmp_path / "out", dtype="float32")
    name = "vision_model.encoder.layers.3.mlp.fc1.bias"
    exported = load_file(tmp_path / "out" / "model.safetensors")[f"model.vision_tower.{name}"]
    torch.testing.assert_close(exported, own[OWN + name].float())


def test_an_exported_folder_is_not_exported_again(checkpoint, tmp_path, refused):
    export_checkpoint(str(checkpoint()), tmp_path / "first")
    refused(tmp_path / "first", "first is an exported folder already")


def test_a_trained_tower_that_the_checkpoint_lacks_is_not_replaced(checkpoint, refused):
    """By the tower that it was trained from."""
    folder = checkpoint(unfreeze_mm_vision_tower=True)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith(OWN)}, folder / "model.safetensors")
    refused(folder, "lacks the weights of its vision tower, which was trained by its config.json")


def test_a_tokenizer_that_tells_no_conversation(checkpoint, tmp_path, refused):
    """Neither Llama 2's nor Llama 3's."""
    from tokenizers import Tokenizer, models

    folder = checkpoint()
    (folder / "tokenizer.model").unlink()
    words = {word: number for number, word in enumerate(["<|begin_of_text|>", "<|end|>", "a"])}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(folder, "a tokenizer without a '</s>', '<|eot_id|>' by which.*pass --conv-mode .* or --chat-template")
    assert main(["export", str(folder), str(tmp_path / "out"), "--conv-mode", "llava_v1"]) == 0
    assert "human's questions" in (tmp_path / "out" / "chat_template.jinja").read_text()
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages[0]['content'] }}<|end|>")
    assert main(["export", str(folder), str(tmp_path / "mine"), "--chat-template", str(mine)]) == 0
    assert (tmp_path / "mine" / "chat_template.jinja").read_text() == mine.read_text()
    assert "conversation | `mine.jinja`" in (tmp_path / "mine" / "README.md").read_text()
    refused(folder, "--chat-template .*none.jinja cannot be read", chat_template=tmp_path / "none.jinja")


@pytest.mark.parametrize("setting", [{"add_bos_token": False}, {"add_eos_token": True}])
def test_tokenizer_settings_that_the_export_does_not_know(checkpoint, tmp_path, setting, refused):
    folder = checkpoint()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **setting}))
    ((name, value),) = setting.items()
    refused(folder, f"tokenizer_config.json has {name} {value}, and its tokenizer .*: only {not value} can be")


# What is refused, and what is left behind then


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"mm_projector_type": None}, "has no projector: its config.json has no mm_projector_type"),
        ({"mm_projector_type": "mlp2x_gelu"}, "LLaVA's own projector 'mlp2x_gelu': for it use transformers'"),
        (
            {"image_aspect_ratio": "slice:patch_num=9"},
            "image_aspect_ratio 'slice:patch_num=9' and no slice_separator_ids",
        ),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints None: anyres needs pairs of multiples of .* 336 px"),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[300, 336]]},
            r"image_grid_pinpoints \[\[300, 336\]\]",
        ),
        (
            {"image_aspect_ratio": "highres"},
            "image_aspect_ratio 'highres': pad, square, slice and anyres",
        ),
        (
            {"image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": [[336, 672]]},
            "'anyres_max_9': .*anyres_max_N of LLaVA-NeXT, which alone knows it",
        ),
        ({"mm_vision_select_layer": [-2, -5]}, r"mm_vision_select_layer \[-2, -5\]: one layer can be exported"),
        ({"mm_resampler_type": "spatial_pool"}, "has mm_resampler_type 'spatial_pool'"),
        (
            {"model_type": "llava_gemma"},
            "'llava_gemma': .*LLaVA-NeXT's script does not import its Gemma, and LLaVA-MORE's",
        ),
        ({"model_type": "llava_phi"}, "'llava_phi': .*LLaVA-MORE trains Phi-4-mini by it, which the transformers 4.45"),
        ({"model_type": "bunny-phi3"}, "LLM of model_type 'bunny-phi3': llava_llama, .* can be exported$"),
        ({"mm_patch_merge_type": "spatial_maxpool2x2"}, "mm_patch_merge_type 'spatial_maxpool2x2': flat, spatial,"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch', not 'patch'"),
        ({"mm_vision_tower": None}, "names no vision tower"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end and a tokenizer without <im_start> and <im_end>: copy"),
        ({"s2": True}, "has s2 True: one tower at one scale"),
        ({"mm_vision_tower": "/no/such/tower"}, "mm_vision_tower in .*no folder '/no/such/tower'.*Pass --vision-tower"),
        ({"model_type": "llava_mpt"}, "LLM of model_type 'llava_mpt': llava_llama"),
        ({"mm_projector_type": ["saep"]}, r"mm_projector_type \['saep'\], which is no type string"),
        ({"mm_vision_tower": ["a"]}, r"mm_vision_tower \['a'\], not a name; pass --vision-tower"),
        ({"hidden_size": -80}, "cannot build a llama .*negative"),
        ({"hidden_size": "80"}, "has hidden_size '80', not a number"),
        ({"hidden_size": 80.0}, "cannot build a llama"),
        ({"hidden_size": 10**30}, "cannot build a llama"),
        ({"hidden_act": "gelux"}, "cannot build a llama .*gelux"),
        ({"num_hidden_layers": 3}, "not whole or of another model: missing: model.layers.2"),
    ],
)
def test_configs_that_are_refused(checkpoint, edit, match, refused):
    refused(checkpoint(**edit), match)


def test_a_tower_that_is_not_whole_is_named(checkpoint, tiny, tmp_path, refused):
    tower = tmp_path / "tower"
    shutil.copytree(tiny.coarse_tower, tower)
    (tower / "preprocessor_config.json").unlink()
    match = "cannot read .*tower/preprocessor_config.json: there is no such file"
    refused(checkpoint(mm_vision_tower=str(tower)), match, ProjectorSpecError)


@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", "4"), ("patch_size", 0), ("image_size", [336, 336])])
def test_a_towers_setting_that_is_no_number_is_named(checkpoint, tiny, tmp_path, refused, name, value):
    tower = tmp_path / "tower"
    shutil.copytree(tiny.coarse_tower, tower)
    config = json.loads((tower / "config.json").read_text())
    (tower / "config.json").write_text(json.dumps({**config, name: value}))
    refused(checkpoint(mm_vision_tower=str(tower)), f"has {name} {re.escape(repr(value))}: copy the tower again")


def test_an_unknown_type_is_refused(checkpoint, tmp_path, refused):
    refused(checkpoint(mm_projector_type="seap"), "did you mean 'saep'", ProjectorSpecError)


def test_another_types_weights_are_refused(checkpoint, tmp_path, refused):
    folder = checkpoint(mm_projector_type="tokenpacker", mm_projector_options=None)
    refused(folder, "The weights look like 'saep'", ProjectorWeightsError)


def test_half_checkpoints_are_refused(checkpoint, refused):
    folder = checkpoint()
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(folder, "cannot read .*model.safetensors: it is truncated", ProjectorWeightsError)
    file.unlink()
    refused(folder, "has no weights: neither model.safetensors nor pytorch_model", ProjectorWeightsError)


@pytest.mark.parametrize(
    "lost", ["model.mm_projector.readout.2.bias", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
)
def test_a_lost_weight_is_named(checkpoint, tmp_path, lost, refused):
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors")
    name = lost.removeprefix("model.mm_projector.")
    refused(folder, f"missing: {name}", ValueError)


def test_base_models_missing_and_superfluous(trained, tiny, checkpoint, tmp_path, refused):
    refused(trained("saep").adapter, "holds mm_projector.bin and no LLM: pass --model-base")
    refused(checkpoint(), "is a full checkpoint: leave --model-base", base=str(tiny.llm))
    refused(tmp_path / "in", "cannot read .*/in/config.json: there is no such file", ProjectorSpecError)


def test_an_adapter_that_does_not_fit_is_refused(trained, tiny, tmp_path, refused):
    folder = tmp_path / "llava-lora"
    shutil.copytree(trained("saep").adapter, folder)
    (folder / "mm_projector.bin").rename(folder / "non_lora_trainables.bin")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    key = "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"
    torch.save({key: torch.zeros(4, 80)}, folder / "adapter_model.bin")
    refused(folder, "does not fit its base: model.layers.9.self_attn.q_proj.weight", base=str(tiny.llm))
    for name, value in (("use_dora", True), ("init_lora_weights", "pissa"), ("target_parameters", ["a"])):
        (folder / "adapter_config.json").write_text(json.dumps({**settings, name: value}))
        refused(folder, rf"asks for {name}={re.escape(str(value))}", base=str(tiny.llm))


def test_a_full_checkpoint_beside_an_adapter_is_refused(checkpoint, refused):
    """By its adapter_config.json transformers loads another base than the weights in the folder."""
    folder = checkpoint()
    (folder / "non_lora_trainables.bin").touch()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "another"}))
    refused(folder, "holds a full checkpoint and adapter_config.json")


def test_an_existing_output_is_left_alone(checkpoint, tmp_path, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    assert main(["export", str(checkpoint()), str(kept)]) == 1
    assert f"{kept} exists already: name another folder" in capsys.readouterr().err
    assert [path.name for path in kept.iterdir()] == ["file"]


def test_no_space_left(checkpoint, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(checkpoint(), r"takes \d+\.\d MB and .*outputs has 0.0 MB free: make room")


def test_a_disk_that_fills_up_while_writing(checkpoint, tmp_path):
    """The system's limit on the size of a file stands in for the full disk."""
    program = f"""
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        from llava_projectors.commands.cli import main
        sys.exit(main(["export", {str(checkpoint())!r}, {str(tmp_path / "outputs" / "out")!r}]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert "File too large. Nothing of it is left behind" in done.stderr
    assert list((tmp_path / "outputs").iterdir()) == []


def test_an_interrupted_export_leaves_nothing(checkpoint, tmp_path, refused):
    def interrupt(outputs):
        yield outputs[0]
        raise KeyboardInterrupt

    refused(checkpoint(), "^$", KeyboardInterrupt, progress=interrupt)


# The code that travels


def user_type(tmp_path, monkeypatch, source):
    monkeypatch.setattr(registration, "classes", dict(registration.classes))
    monkeypatch.setattr(registration, "options", dict(registration.options))
    (tmp_path / "my_corner.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_corner", raising=False)
    return __import__("my_corner")


CORNER = """
    {imports}
    import llava_projectors
    from torch import nn

    @llava_projectors.register_projector("corner")
    class Corner(llava_projectors.Projector):
        def __init__(self, mm_hidden_size, hidden_size, *, stride: int = 4):
            super().__init__(mm_hidden_size, hidden_size, layers=None, stride=stride)
            self.to_llm = nn.Linear(mm_hidden_size, hidden_size)

        def forward(self, features):
            return self.to_llm(self.to_grid(features)[:, :: self.stride, :: self.stride].flatten(1, 2))
"""


@pytest.mark.parametrize("projector_type", llava_projectors.list_projectors())
def test_travelling_code_needs_nothing_installed(projector_type):
    for name, source in travelling_code(projector_type).items():
        for node in ast.walk(ast.parse(source, name)):
            if isinstance(node, ast.Import):
                assert "llava_projectors" not in {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] != "llava_projectors"


def test_a_type_of_ones_own_travels(tmp_path, monkeypatch):
    user_type(tmp_path, monkeypatch, CORNER.format(imports="import math"))
    code = travelling_code("corner:stride=3")
    assert "from . import registry_corner as llava_projectors" in code["my_corner.py"]
    assert "from .my_corner import Corner" in code["registry_corner.py"]


def test_a_type_whose_file_is_named_as_ours_does_not_travel(tmp_path, monkeypatch):
    """Both would be `base.py` in the folder."""
    user_type(tmp_path, monkeypatch, "")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "base.py").write_text(textwrap.dedent(CORNER.format(imports="import math")))
    __import__("mine.base")
    message = r"mine.base and llava_projectors.projectors.base would be one file, base.py; rename yours"
    with pytest.raises(DoesNotTravel, match=message):
        travelling_code("corner")


def test_a_type_that_needs_other_packages_does_not_travel(checkpoint, tmp_path, monkeypatch):
    user_type(tmp_path, monkeypatch, CORNER.format(imports="import numpy"))
    with pytest.raises(DoesNotTravel, match="my_corner imports numpy"):
        travelling_code("corner")
    folder = checkpoint(mm_projector_type="corner", mm_projector_options=None)
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "mm_projector" not in k}
    weights |= {
        "model.mm_projector.to_llm.weight": torch.zeros(80, 32),
        "model.mm_projector.to_llm.bias": torch.zeros(80),
    }
    save_file(weights, folder / "model.safetensors")
    export_checkpoint(str(folder), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "does not travel: my_corner imports numpy" in card
    assert "trust_remote_code=False" in card


# transformers' own LLaVA


def test_old_transformers_says_what_it_needs(trained, tmp_path):
    from transformers import LlavaForConditionalGeneration

    export_checkpoint(str(trained("saep").checkpoint), tmp_path / "out")
    with pytest.raises(ImportError, match=r"needs transformers 4.57 or newer, this is 4\."):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_transformers_is_not_touched_before_its_llava_is_imported():
    program = (
        "import sys, llava_projectors, transformers; print([m for m in sys.modules if m.startswith('llava_proj')])"
    )
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    light = {"llava_projectors", "llava_projectors.autoload", "llava_projectors.seam_names"}
    assert set(ast.literal_eval(done.stdout)) <= light


def test_checkpoints_are_read_by_their_headers(trained):
    """A weight's shape is known before it is read."""
    weight = read_checkpoint(trained("saep").checkpoint).weights["model.mm_projector.aggregate.weight"]
    assert weight.shape == weight.read().shape == (32, 64)


# What people really pass


def test_what_a_folder_lacks_is_named(checkpoint, refused, tmp_path):
    folder = checkpoint()
    (folder / "config.json").write_text("[1, 2]")
    refused(folder, "cannot read .*config.json: it holds a list", ProjectorSpecError)
    folder = tmp_path / "llava-zero"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"mm_projector_type": "saep"}))
    (folder / "zero_to_fp32.py").write_text("")
    (folder / "global_step3").mkdir()
    refused(folder, "parts that DeepSpeed resumes from.*python zero_to_fp32.py")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": [1]}))
    refused(folder, "model.safetensors.index.json has no weight_map of names", ProjectorWeightsError)


def test_what_peft_saves_within_a_run_is_explained(tiny, refused, tmp_path):
    folder = tmp_path / "llava-lora" / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "no non_lora_trainables.bin, in which the projector is.*into the folder above", base=str(tiny.llm))


def test_a_broken_tokenizer_is_named(checkpoint, refused):
    folder = checkpoint()
    (folder / "tokenizer.model").write_bytes(b"none")
    refused(folder, "cannot read the tokenizer of .*llava-copy: .*Copy it there from the base LLM")
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "cannot read the tokenizer of")


def test_a_tower_that_was_moved(checkpoint, tiny, tmp_path, capsys):
    folder = checkpoint(mm_vision_tower="/gone/clip")
    command = ["export", str(folder), str(tmp_path / "out")]
    assert main(command) == 1
    assert "--vision-tower with the folder that it is in now" in capsys.readouterr().err
    assert main([*command, "--vision-tower", str(tiny.coarse_tower)]) == 0


def test_the_card_tells_no_paths(checkpoint, tmp_path):
    folder = checkpoint()
    export_checkpoint(str(folder), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "made from | `llava-copy`" in card
    code = card.split("```python\n")[1].split("```")[0]
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert used <= made | imported | {"print"}


def test_old_bin_files_are_read_once(trained, tmp_path, monkeypatch):
    source, copy = trained("saep").checkpoint, tmp_path / "llava-old"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(source / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **settings: [loaded.append(path), load(path, **settings)][1])
    export_checkpoint(str(copy), tmp_path / "out")
    assert loaded == [copy / "pytorch_model.bin"] * 2  # for the shapes, and for the numbers
    export_checkpoint(str(source), tmp_path / "expected")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_killed(checkpoint, tmp_path, number, capsys):
    """The first leaves nothing behind, the second a folder that the next run names."""
    target = tmp_path / "outputs" / "out"
    program = f"""
        import os
        from pathlib import Path
        from llava_projectors.export.convert import export_checkpoint

        def kill(outputs):
            yield outputs[0]
            os.kill(os.getpid(), {int(number)})
            yield from outputs[1:]

        export_checkpoint({str(checkpoint())!r}, Path({str(target)!r}), progress=kill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
    left = list(target.parent.iterdir())
    if number == signal.SIGTERM:
        assert (done.returncode, left) == (128 + signal.SIGTERM, [])
        return
    assert main(["export", str(tmp_path / "in" / "llava-copy"), str(target)]) == 0
    assert f"{left[0]} is of an export that was killed, or that still runs" in capsys.readouterr().err


def test_bfloat16_and_a_relative_interpreter(trained, tmp_path, monkeypatch):
    """Both sides are rounded alike, and both paths hold in the folder that the other interpreter runs in."""
    source = trained("saep").checkpoint
    export_checkpoint(str(source), tmp_path / "out", dtype="bfloat16")
    assert verify.verify(tmp_path / "out", str(source), None) == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").mkdir()
    script = '#!/bin/sh\nshift 2\necho "$1" >&2\ntest -d "$1" && exit 3\n'
    (tmp_path / "env" / "python").write_text(script)
    (tmp_path / "env" / "python").chmod(0o755)
    with pytest.raises(ExportError, match=f"env/python cannot load out:\n{tmp_path}/out"):
        verify.compare_elsewhere(Path("out"), [], "env/python")


def test_a_folder_that_could_not_be_compared_is_there(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(checkpoint()), str(out), "--verify-python", "/no/python"]) == 1
    assert f"{out} is written, and was not compared: --verify-python /no/python cannot be" in capsys.readouterr().err
    assert (out / "config.json").is_file()


# From transformers' side


@pytest.fixture
def stock(tiny, tmp_path):
    """A model of transformers' own LLaVA, as version 4.37 saves it."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=1, image_size=336, patch_size=28
    )
    llm = LlamaConfig(hidden_size=80, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, vocab_size=512)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=llm, image_token_index=480))
    model.save_pretrained(tmp_path / "stock")
    for file in [*tiny.llm.glob("*token*"), tiny.coarse_tower / "preprocessor_config.json"]:
        shutil.copyfile(file, tmp_path / "stock" / file.name)
    return SimpleNamespace(folder=tmp_path / "stock", weights=model.state_dict())


def test_a_new_projector_for_transformers_own_llava(stock, tmp_path, capsys):
    command = ["export", str(stock.folder), str(tmp_path / "out"), "--new-projector", "saep:layers=2+3"]
    assert main(command) == 0
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("embed_tokens.weight", "layers.0.mlp.up_proj.weight"):
        assert torch.equal(weights[f"model.language_model.{name}"], stock.weights[f"language_model.model.{name}"])
    tower = [name for name in weights if name.startswith("model.vision_tower.")]
    assert all(torch.equal(weights[name], stock.weights[name.removeprefix("model.")]) for name in tower)
    projector = {k.split("projector.")[1]: v for k, v in weights.items() if "multi_modal_projector" in k}
    build_projector("saep:layers=2+3", 32, 80).load_state_dict(projector)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_feature_layer"] == [2, 3]
    assert config["image_token_index"] == 480
    assert (tmp_path / "out" / "modeling_llava_projectors.py").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve out --trust-remote-code\n" in card  # it has no second template
    assert "conversation | the source's own |" in card
    assert main(command) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "again"), "--new-projector", "saep"]) == 1
    assert "is no model of transformers' LlavaForConditionalGeneration" in capsys.readouterr().err
