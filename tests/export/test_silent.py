"""What would make an exported folder another model without a word: refused or equal, and seen by `--verify`."""

import inspect
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_projectors import ProjectorSpecError
from llava_projectors.commands.cli import main
from llava_projectors.export import verify
from llava_projectors.export.convert import NEWLINE, export_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.llm import LLMS, text_config
from llava_projectors.export.tokenizer import export_tokenizer
from llava_projectors.files import ProjectorWeightsError
from llava_projectors.integration.llm_settings import contradictions, refuse_contradictions


def settings_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, **changes):
    weights = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        key = next(key for key in weights if key.endswith(name.replace("__", ".")))
        weights[key] = change(weights[key])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A folder that is what LLaVA says, and the checkpoint that it was made from."""
    source = trained("saep").checkpoint
    folder = tmp_path_factory.mktemp("exported") / "out"
    export_checkpoint(str(source), folder)
    assert verify.verify(folder, str(source), None) == []
    return folder, source


@pytest.fixture
def broken(exported, tmp_path):
    """A copy of the folder to break; `seen` is what `--verify` says then."""
    folder = tmp_path / "broken"
    shutil.copytree(exported[0], folder)
    return SimpleNamespace(folder=folder, seen=lambda: "; ".join(verify.verify(folder, str(exported[1]), None)))


# Settings that the training stack never read

LATER = {
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "head_dim": 128,
    "mlp_bias": True,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("name", LATER)
def test_a_setting_that_training_did_not_read_is_refused(checkpoint, refused, name):
    refused(checkpoint(**{name: LATER[name]}), f"has {name} .*training used .*Remove it from config.json")


def test_one_that_says_the_same_is_not_handed_on(checkpoint, tmp_path):
    folder = checkpoint(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"}, head_dim=40, sliding_window=8)
    export_checkpoint(str(folder), tmp_path / "out")
    text = settings_of(tmp_path / "out")["text_config"]
    assert not {"rope_parameters", "head_dim", "sliding_window"} & text.keys()
    assert text["rope_theta"] == 10000.0


def test_rotations_that_follow_the_length_are_refused(checkpoint, refused):
    """They stay what the longest sequence made them: LLaVA answers a short prompt otherwise after a long one."""
    scaling = {"type": "dynamic", "factor": 2.0}
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=32, rope_scaling=scaling,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.arange(60)[None]
    with torch.no_grad():
        before, _, after = (model(ids[:, :length]).logits for length in (20, 60, 20))
    assert not torch.equal(before, after)
    refused(checkpoint(rope_scaling=scaling), "rope_scaling .*'dynamic'.*depend on the longest sequence before")


def test_a_version_that_reads_it_trained_with_it():
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}
    assert contradictions({**rope, **newer}, ["rope_theta", "rope_scaling"]) == []
    assert contradictions({**rope, **newer}, ["rope_theta"]) != []
    assert contradictions({"rope_parameters": {"rope_theta": 5e5}}, ["rope_parameters"]) == []
    assert contradictions({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}, ["rope_theta"]) == []


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_the_table_of_settings_is_what_the_class_reads(kind):
    """All but what changes no answer, with the class's own defaults."""
    parameters = inspect.signature(transformers.CONFIG_MAPPING[kind].__init__).parameters
    idle = {"self", "kwargs", "use_cache", "pretraining_tp", "tie_word_embeddings"}
    assert {*parameters} - idle <= {*LLMS[kind].fields}
    for name, usual in LLMS[kind].fields.items():
        assert usual == (parameters[name].default if name in parameters else None), name


def test_every_setting_is_written(exported):
    text = settings_of(exported[0])["text_config"]
    assert LLMS["llama"].fields.keys() <= text.keys()


def test_training_does_not_begin(tiny, llava_train, tmp_path):
    llm = tmp_path / "vicuna"
    shutil.copytree(tiny.llm, llm)
    edit(llm / "config.json", rope_parameters=LATER["rope_parameters"])
    with pytest.raises(
        ProjectorSpecError, match=r"rope_parameters .*training used .*10000.*would be another one there"
    ):
        llava_train("saep", llm=llm)


def test_settings_that_a_class_reads_are_its_own():
    """Phi reads part of its rotation by itself."""
    config = transformers.PhiConfig(partial_rotary_factor=0.5)
    refuse_contradictions(config)
    with pytest.raises(ProjectorSpecError, match="partial_rotary_factor 0.5, training used 1.0"):
        refuse_contradictions(transformers.LlamaConfig(partial_rotary_factor=0.5))


@pytest.mark.parametrize("change", [{"rope_parameters": LATER["rope_parameters"]}, {"rope_theta": 500000.0}])
def test_verify_sees_another_setting(broken, change):
    config = settings_of(broken.folder)
    config["text_config"].update(change)
    (broken.folder / "config.json").write_text(json.dumps(config))
    assert f"text_config has {next(iter(change))}" in broken.seen()


@pytest.mark.parametrize(("version", "seen"), [("4.37.2", "does not read"), ("4.45.2", "LLaVA's model False")])
def test_what_a_later_version_reads_is_compared(monkeypatch, version, seen):
    """LLaVA-MORE runs on 4.45."""
    monkeypatch.setattr("transformers.__version__", version)
    trained = transformers.LlamaConfig(mlp_bias=False)
    found = [*verify.different_settings({"model_type": "llama", "mlp_bias": False}, trained)]
    assert len(found) == (version == "4.37.2")
    assert seen in "; ".join(verify.different_settings({"model_type": "llama", "mlp_bias": True}, trained))


def test_verify_takes_an_answer_from_behind_the_prompt():
    """Forks of before LLaVA 1.2 (VCoder, quilt-llava) generate the prompt too, in which a picture has no token."""
    assert verify.without_prompt([1, -200, 5, 7, 2], [1, -200, 5]) == [7, 2]
    assert verify.without_prompt([1, 7, 2], [1, -200, 5]) == [1, 7, 2]


# What stands behind a picture


def test_the_newline_of_llava_next_is_exported(checkpoint, tmp_path, refused):
    next_s = {"mm_patch_merge_type": "spatial_unpad", "vision_tower_pretrained": ""}
    folder = checkpoint(**next_s)
    refused(folder, f"lacks {NEWLINE}")
    weights = load_file(folder / "model.safetensors")
    newline = torch.randn(weights["model.norm.weight"].shape)
    save_file({**weights, NEWLINE: newline}, folder / "model.safetensors", {"format": "pt"})
    export_checkpoint(str(folder), tmp_path / "out", dtype="float32")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[NEWLINE], newline)
    model = verify.assemble(tmp_path / "out")
    with torch.no_grad():
        embeddings = model.embeddings({"prompt": "<image>", "images": verify.test_pictures()[:1]})
    assert embeddings.shape[1] == 1 + 36 + 1
    assert torch.equal(embeddings[0, -1], newline)
    assert settings_of(tmp_path / "out")["image_seq_length"] == 37


def test_llava_stacks_padded_pictures_and_puts_none(checkpoint, tmp_path):
    folder = checkpoint(mm_patch_merge_type="spatial_unpad")
    weights = load_file(folder / "model.safetensors")
    newline = torch.ones(weights["model.norm.weight"].shape)
    save_file({**weights, NEWLINE: newline}, folder / "model.safetensors", {"format": "pt"})
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


def test_verify_sees_another_number_of_positions(broken):
    for name in ("config.json", "preprocessor_config.json"):
        layout = {**settings_of(broken.folder, name)["image_layout"], "newline": True}
        edit(broken.folder / name, image_layout=layout)
    edit_weights(broken.folder)
    weights = load_file(broken.folder / "model.safetensors")
    weights[NEWLINE] = torch.ones(80, dtype=torch.float16)
    save_file(weights, broken.folder / "model.safetensors", {"format": "pt"})
    assert "the LLM gets 1 positions more than LLaVA's" in broken.seen()


# Where answers end


def test_all_end_tokens_are_exported(checkpoint, tmp_path):
    folder = checkpoint()
    ends = {"eos_token_id": [2, 5], "temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    edit(folder / "generation_config.json", **ends)
    export_checkpoint(str(folder), tmp_path / "out")
    written = settings_of(tmp_path / "out", "generation_config.json")
    assert written["eos_token_id"] == [2, 5]
    assert written["max_length"] == 4096
    assert (
        not {"temperature", "top_p", "transformers_version"} & written.keys()
    )  # without effect, for it does not sample
    assert verify.verify(tmp_path / "out", str(folder), None) == []


def test_settings_of_a_model_that_samples_are_kept(checkpoint, tmp_path):
    folder = checkpoint()
    edit(folder / "generation_config.json", do_sample=True, temperature=0.6)
    export_checkpoint(str(folder), tmp_path / "out")
    written = settings_of(tmp_path / "out", "generation_config.json")
    assert (written["do_sample"], written["temperature"]) == (True, 0.6)


def test_verify_sees_a_lost_end_token(broken):
    edit(broken.folder / "generation_config.json", eos_token_id=7)
    assert "answers end in the tokens [7], LLaVA's in [2]" in broken.seen()


def test_the_penalty_of_qwen2s_models_is_kept(checkpoint, tmp_path, capsys):
    """`tests/export/check_folders.py` asks models with one, where the folder's class runs."""
    folder = checkpoint()
    edit(folder / "generation_config.json", do_sample=True, repetition_penalty=1.05)
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    assert "repetition_penalty 1.05 of its generation_config.json acts on the answer alone" in capsys.readouterr().err
    assert settings_of(tmp_path / "out", "generation_config.json")["repetition_penalty"] == 1.05
    assert verify.verify(tmp_path / "out", str(folder), None) == []


@pytest.mark.parametrize(
    ("name", "value", "idle"),
    [
        ("encoder_repetition_penalty", 1.05, 1.0),
        ("no_repeat_ngram_size", 3, 0),
        ("min_length", 40, 0),
        ("max_length", 30, 4096),
        ("forced_bos_token_id", 77, None),
        ("begin_suppress_tokens", [287], None),
        ("guidance_scale", 1.5, 1.0),
        ("penalty_alpha", 0.6, 0.0),
        ("num_beam_groups", 2, 1),
        ("bad_words_ids", [[29, 30]], [[29]]),
        ("sequence_bias", [[[29, 30], -10.0]], None),
        ("force_words_ids", [[29]], None),
    ],
)
def test_settings_that_would_see_the_prompt_are_refused(checkpoint, refused, tmp_path, name, value, idle):
    """LLaVA generates from embeddings: there they see the answer alone."""
    folder = checkpoint()
    edit(folder / "generation_config.json", **{name: value})
    refused(folder, f"generation_config.json has {name} {re.escape(str(value))}: LLaVA generates from embeddings")
    edit(folder / "generation_config.json", **{name: idle})
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


def test_settings_that_only_later_versions_read_are_left_out(checkpoint, tmp_path):
    """Of a base of today: LLaVA answers without them."""
    folder = checkpoint()
    later = {"stop_strings": ["a"], "dola_layers": "high", "min_p": 0.2, "top_h": 0.4, "token_healing": True}
    edit(folder / "generation_config.json", do_sample=True, temperature=0.7, **later)
    export_checkpoint(str(folder), tmp_path / "out")
    written = settings_of(tmp_path / "out", "generation_config.json")
    assert {*written} == {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature"}
    assert verify.verify(tmp_path / "out", str(folder), None) == []
    edit(folder / "config.json", transformers_version="4.41.2")
    export_checkpoint(str(folder), tmp_path / "next")
    assert settings_of(tmp_path / "next", "generation_config.json")["min_p"] == 0.2


def test_settings_of_generation_in_the_models_config(checkpoint, refused, tmp_path):
    """Transformers takes them from there where there is no generation_config.json."""
    folder = checkpoint(repetition_penalty=1.5, suppress_tokens=[2, 300], max_length=4096, no_repeat_ngram_size=2)
    refuses = "has no_repeat_ngram_size 2: LLaVA generates from embeddings"
    edit(folder / "config.json", no_repeat_ngram_size=2)
    (folder / "generation_config.json").unlink()
    refused(folder, f"llava-copy.config.json {refuses}")
    edit(folder / "config.json", no_repeat_ngram_size=0)
    export_checkpoint(str(folder), tmp_path / "out")
    written = settings_of(tmp_path / "out", "generation_config.json")
    assert (written["repetition_penalty"], written["suppress_tokens"]) == (1.5, [2, 300])
    assert verify.verify(tmp_path / "out", str(folder), None) == []


@pytest.mark.parametrize("change", [{"repetition_penalty": 1.3}, {"max_length": 7}])
def test_verify_sees_another_setting_of_generation(broken, change):
    edit(broken.folder / "generation_config.json", **change)
    ((name, value),) = change.items()
    assert f"generation_config.json has {name} {value}" in broken.seen()


# Rows of the embeddings


def test_rows_that_no_token_has_are_cut_off(checkpoint, tmp_path):
    """As LLaVA's loader does. Qwen2's table is longer than its tokenizer."""
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for key in tables:
        weights[key] = torch.cat([weights[key], torch.randn(200, weights[key].shape[1]).to(weights[key].dtype)])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", vocab_size=len(weights["lm_head.weight"]))
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


def test_a_head_that_is_the_embeddings(checkpoint, tmp_path):
    """LLaVA's loader ties them, whatever the file holds for the head."""
    folder = checkpoint(tie_word_embeddings=True)
    export_checkpoint(str(folder), tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(exported["lm_head.weight"], exported["model.language_model.embed_tokens.weight"])
    assert verify.verify(tmp_path / "out", str(folder), None) == []


# Tokens that were added


def word_level(folder, added):
    """A tokenizer of three words in `tokenizer.json`, and tokens that were added after it was written."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    words = {word: number for number, word in enumerate(["a", "b", "<|end|>"])}
    Tokenizer(models.WordLevel(words, unk_token="a")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def test_tokens_newer_than_tokenizer_json_keep_their_ids(tmp_path):
    (tmp_path / "out").mkdir()
    exported = export_tokenizer(word_level(tmp_path / "in", {"<mine>": 3}), tmp_path / "out")
    assert (exported.image, exported.count) == (4, 5)
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert loaded("<mine><image>").input_ids == [3, 4]


def test_added_tokens_whose_ids_are_taken_are_refused(tmp_path):
    with pytest.raises(ExportError, match="gives the added token '<mine>' the id 1, which is not free"):
        export_tokenizer(word_level(tmp_path / "in", {"<mine>": 1}), tmp_path)


def test_another_start_token_than_the_sentencepiece_models_is_refused(checkpoint, refused):
    folder = checkpoint()
    edit(folder / "tokenizer_config.json", bos_token="</s>")
    refused(folder, "has add_bos_token True, and its tokenizer puts none there")


@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
def test_a_fast_tokenizer_that_its_settings_contradict_is_refused(tmp_path, name):
    folder = word_level(tmp_path / "in", {})
    edit(folder / "tokenizer_config.json", **{name: True})
    with pytest.raises(ExportError, match=f"has {name} True, and its tokenizer puts none there: only False"):
        export_tokenizer(folder, tmp_path)


# Tokenizers that LLaVA's stack reads otherwise


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram"},
        {"user_defined_symbols": ["<|mine|>"]},
        {"control_symbols": ["<|mine|>"]},
        {"normalization_rule_name": "nmt_nfkc"},
        {"normalization_rule_name": "nfkc_cf"},
    ],
    ids=str,
)
def test_sentencepiece_models_of_other_rules_are_refused(checkpoint, refused, settings):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = checkpoint()
    usual = {
        "model_type": "bpe", "vocab_size": 470, "character_coverage": 1.0, "byte_fallback": True, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "hard_vocab_limit": False,
    }  # fmt: skip
    text = inspect.getsource(verify).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), **{**usual, **settings}
    )
    refused(folder, "otherwise than its pieces do by the BPE|the token '<|mine|>', which LLaVA's gives the id None")


def test_added_tokens_that_llava_ignores_are_not_exported(checkpoint, tmp_path):
    """`added_tokens_decoder` goes before the file."""
    folder = checkpoint()
    (folder / "added_tokens.json").write_text(json.dumps({"<|mine|>": 480}))
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


@pytest.mark.parametrize(
    ("file", "change", "token"),
    [
        ("tokenizer_config.json", {"pad_token": "[PAD]"}, "[PAD]"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|extra|>"]}, "<|extra|>"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|extra|>"]}, "<|extra|>"),
        ("tokenizer_config.json", {"tokenizer_class": "CodeLlamaTokenizer"}, ""),
        ("tokenizer_config.json", {"sp_model_kwargs": {"enable_sampling": True, "nbest_size": -1, "alpha": 0.5}}, ""),
    ],
)
def test_tokens_that_llavas_tokenizer_adds_by_itself_are_refused(checkpoint, refused, file, change, token):
    folder = checkpoint()
    if file == "special_tokens_map.json":  # else the other file goes before it
        settings = settings_of(folder, "tokenizer_config.json")
        for name in ("added_tokens_decoder", *change):
            settings.pop(name, None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(folder / file, **change)
    refused(folder, f"has the token '{re.escape(token)}'" if token else "has the token '|LLaVA splits")


def test_an_end_token_that_only_llavas_tokenizer_has_is_refused(checkpoint, refused):
    folder = checkpoint()
    settings = settings_of(folder, "tokenizer_config.json")
    for name in ("added_tokens_decoder", "eos_token"):
        del settings[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(folder / "special_tokens_map.json", eos_token="<|im_end|>")
    refused(folder, "has eos_token '<|im_end|>' in LLaVA, and '</s>' by its tokenizer_config.json".replace("|", "[|]"))


@pytest.mark.parametrize("says", [True, None])
def test_verify_leaves_out_the_token_that_llavas_loader_adds(checkpoint, tmp_path, says):
    """`<im_patch>`, which no prompt has."""
    folder = checkpoint(mm_use_im_patch_token=says)
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


# Numbers that are none


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(checkpoint, refused, wrong):
    folder = checkpoint()
    edit_weights(folder, aggregate__bias=lambda weight: weight.fill_(wrong))
    refused(folder, "multi_modal_projector.aggregate.bias holds NaN or infinity: its training diverged")


def test_a_weight_too_large_for_the_dtype_is_refused(checkpoint, refused, tmp_path):
    folder = checkpoint()
    edit_weights(folder, aggregate__bias=lambda weight: weight.float() + 7e4)
    match = "aggregate.bias holds 7e[+]04, which is infinity in float16: pass --dtype bfloat16 or float32"
    refused(folder, match, dtype="float16")
    export_checkpoint(str(folder), tmp_path / "out", dtype="bfloat16")


def test_verify_sees_nan(broken):
    edit_weights(broken.folder, aggregate__bias=lambda weight: weight.fill_(math.nan))
    assert "logits differ by inf" in broken.seen()


# Pixels


def pictures():
    """Of every mode, with and without transparency, of odd sizes."""
    picture = verify.test_pictures()[0]
    transparent = picture.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(picture.size))
    palette = picture.quantize(16)
    palette.info["transparency"] = 3
    modes = [picture.convert(mode) for mode in ("RGB", "L", "CMYK", "1", "LA")]
    sizes = [picture.resize(size) for size in ((31, 470), (336, 336), (337, 335), (1, 9), (1000, 701))]
    return [*modes, transparent, palette, *sizes]


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pixels_are_llavas(checkpoint, tmp_path, aspect):
    from llava.mm_utils import process_images
    from transformers import CLIPImageProcessor

    from llava_projectors.serving.image_processing import LlavaProjectorsImageProcessor

    folder = checkpoint(image_aspect_ratio=aspect)
    export_checkpoint(str(folder), tmp_path / "out")
    ours = LlavaProjectorsImageProcessor.from_pretrained(tmp_path / "out")
    llavas = CLIPImageProcessor.from_pretrained(settings_of(folder)["mm_vision_tower"])
    for picture in pictures():
        config = SimpleNamespace(image_aspect_ratio=aspect)
        expected = process_images([picture.convert("RGB")], llavas, config)
        assert torch.equal(ours(picture, return_tensors="pt")["pixel_values"], expected), (picture.mode, picture.size)


def test_newer_settings_of_the_towers_processor_are_not_handed_on(checkpoint, tiny, tmp_path, refused):
    """CLIP's processor of LLaVA's time does not read them."""
    tower = tmp_path / "tower"
    shutil.copytree(tiny.coarse_tower, tower)
    edit(tower / "preprocessor_config.json", do_pad=True, pad_size={"height": 9, "width": 9}, size_divisor=32)
    folder = checkpoint(mm_vision_tower=str(tower))
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []
    edit(tower / "preprocessor_config.json", rescale_factor=0.5)
    refused(folder, "preprocessor_config.json has rescale_factor 0.5, not 1/255")


@pytest.mark.parametrize("name", ["do_resize", "do_rescale", "do_normalize"])
def test_a_step_that_the_towers_processor_does_not_name_is_done(checkpoint, tiny, tmp_path, refused, name):
    tower = tmp_path / "tower"
    shutil.copytree(tiny.coarse_tower, tower)
    file = tower / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    del settings[name]
    file.write_text(json.dumps(settings))
    folder = checkpoint(mm_vision_tower=str(tower))
    export_checkpoint(str(folder), tmp_path / "out")
    edit(file, **{name: False})
    refused(folder, f"preprocessor_config.json has {name} False")


def test_a_tower_whose_pictures_are_larger_than_its_tiles(checkpoint, tiny, tmp_path):
    """LLaVA's `anyres` squeezes the picture to the side that the tower's processor resizes to, not to the tile's."""
    tower = tmp_path / "tower"
    shutil.copytree(tiny.coarse_tower, tower)
    edit(tower / "preprocessor_config.json", size={"shortest_edge": 400})
    pinpoints = [[336, 672], [672, 336]]
    folder = checkpoint(mm_vision_tower=str(tower), image_aspect_ratio="anyres", image_grid_pinpoints=pinpoints)
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


def test_verify_sees_other_pixels(broken):
    edit(broken.folder / "preprocessor_config.json", image_std=[0.3, 0.3, 0.3])
    assert "normalised pixels differ" in broken.seen()


def test_another_image_processor_stops(exported):
    """It would take the settings, and do something else."""
    with pytest.raises(ValueError, match="trust_remote_code=True, or install llava-projectors"):
        transformers.CLIPImageProcessor.from_pretrained(exported[0])


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        ({"model_type": "llava_qwen", "use_sliding_window": False, "sliding_window": 4096}, False),
        ({"model_type": "llava_qwen", "use_sliding_window": False, "sliding_window": 1024}, True),
        ({"model_type": "llava_qwen", "use_sliding_window": True, "sliding_window": 4096}, True),
        ({"model_type": "llava_mistral", "sliding_window": 4096}, False),
        ({"model_type": "llava_mistral", "sliding_window": 1024}, True),
        ({"model_type": "llava_mistral", "sliding_window": None}, False),
        ({"model_type": "llava_llama", "sliding_window": 1024}, False),  # a Mistral base, trained as a Llama
    ],
)
def test_windows_of_attention(change, is_refused, tmp_path):
    """Versions apply them in different ways, where sequences reach them."""
    config = {"max_position_embeddings": 8192, "tokenizer_model_max_length": 4096, **change}
    if not is_refused:
        assert text_config(config, tmp_path)["max_position_embeddings"] == 8192
        return
    with pytest.raises(ExportError, match="and sequences of up to 4096 tokens.*tokenizer_model_max_length"):
        text_config(config, tmp_path)


# Weights that LLaVA would load otherwise, or not at all


@pytest.fixture
def adapter(trained, tiny, tmp_path):
    """A LoRA adapter of one matrix of 80 x 80, its config changed by `edit`."""

    def make(down=(4, 80), up=(80, 4), **edit):
        folder = tmp_path / "llava-lora"
        shutil.copytree(trained("saep").adapter, folder)
        (folder / "mm_projector.bin").rename(folder / "non_lora_trainables.bin")
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **edit}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
        weights = {key.format("A"): torch.ones(down), key.format("B"): torch.ones(up)} if down else {}
        torch.save(weights, folder / "adapter_model.bin")
        return folder

    return make


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 2}, r"shapes .*\(4, 80\).* and r 2 of adapter_config.json need .*\(2, 80\)"),
        ({"down": (2, 80), "up": (80, 2)}, "and r 4 of adapter_config.json need"),
        ({"down": (2, 80)}, "shapes"),
        ({"down": (4, 160)}, "shapes"),
        ({"up": (1, 4)}, "shapes"),
        ({"down": ()}, "adapter_model.bin holds no LoRA weights"),
        ({"target_modules": ["k_proj"]}, r"has target_modules \['k_proj'\], and the adapter has weights for model"),
        ({"target_modules": None}, "has target_modules None, not the names of modules"),
        ({"layers_to_transform": 0}, "asks for layers_to_transform=0"),
        ({"peft_type": "DORA"}, "asks for DORA, which LLaVA's scripts do not train; merge it"),  # the fork DoRA
        ({"r": 0}, "has r 0 and lora_alpha 8"),
        ({"r": None}, "has r None and lora_alpha 8"),
        ({"lora_alpha": "64"}, "has r 4 and lora_alpha '64'"),
        ({"lora_alpha": None}, "has r 4 and lora_alpha None"),
    ],
)
def test_an_adapter_that_its_settings_contradict_is_refused(adapter, tiny, refused, change, match):
    refused(adapter(**change), match, base=str(tiny.llm))


def test_an_adapter_of_one_matrix_is_exported(adapter, tiny, tmp_path):
    export_checkpoint(str(adapter()), tmp_path / "out", base=str(tiny.llm), dtype="float32")


def test_of_two_shards_that_hold_a_tensor_the_last_counts(checkpoint, tmp_path):
    """LLaVA loads shards whole, whatever the index says."""
    folder = checkpoint()
    weights, key = load_file(folder / "model.safetensors"), "model.norm.weight"
    (folder / "model.safetensors").unlink()
    shards = {
        "a.safetensors": weights,
        "b.safetensors": {key: weights[key] * 3, "lm_head.weight": weights.pop("lm_head.weight")},
    }
    for name, shard in shards.items():
        save_file(shard, folder / f"model-{name}", {"format": "pt"})
    index = dict.fromkeys(weights, "model-a.safetensors") | {"lm_head.weight": "model-b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_a_projector_under_another_name_is_refused(checkpoint, refused, prefix):
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    weights = {f"{prefix if 'mm_projector' in key else ''}{key}": value for key, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"begin with '{prefix}model.mm_projector.'", ProjectorWeightsError)


@pytest.mark.parametrize(
    ("vocab_size", "rows", "match"),
    [
        (9999, None, "has [0-9]+ rows in model.embed_tokens.weight, and the config.json .* vocab_size 9999"),
        (None, (100, None), "has 100 rows in model.embed_tokens.weight, and the config.json"),
        (100, (100, 100), "has 100 rows in model.embed_tokens.weight, and its tokenizer has [0-9]+ pieces"),
    ],
)
def test_rows_that_do_not_fit_are_refused(checkpoint, refused, vocab_size, rows, match):
    folder = checkpoint()
    if vocab_size:
        edit(folder / "config.json", vocab_size=vocab_size)
    for key, count in zip(("embed_tokens.weight", "lm_head.weight"), rows or ()):
        edit_weights(folder, **{key: lambda weight, count=count: weight[:count].clone()})
    refused(folder, match)


def test_a_pad_token_without_a_row_is_no_error(checkpoint, tmp_path):
    """Some copies of Llama 2 name one; no prompt has it."""
    folder = checkpoint()
    settings = settings_of(folder, "tokenizer_config.json")
    rows = settings_of(folder, "config.json")["vocab_size"]
    token = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {**settings["added_tokens_decoder"], str(rows): {**token, "special": True}}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    export_checkpoint(str(folder), tmp_path / "out")
    assert verify.verify(tmp_path / "out", str(folder), None) == []


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_a_checkpoint_under_another_name_is_refused(checkpoint, refused, prefix):
    folder = checkpoint()
    weights = {f"{prefix}{key}": value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"lacks model.norm.weight; it has '{prefix}model.norm.weight'")


def test_a_dtype_that_cannot_be_written_is_named(checkpoint, refused):
    folder = checkpoint()
    edit_weights(folder, model__norm__weight=lambda weight: weight.double())
    refused(folder, "stores model.norm.weight in float64: pass --dtype")


def test_integers_are_a_quantised_models(checkpoint, refused):
    folder = checkpoint()
    edit_weights(folder, mlp__up_proj__weight=lambda weight: (weight * 100).to(torch.int8))
    refused(folder, "up_proj.weight in torch.int8: a quantised checkpoint")
