"""What stands beside training, on this family: `doctor`, `check`, `show`, and the loading behind `export --verify`."""

import importlib
import sys

import family
import pytest
import torch
from drive import llm_input
from PIL import Image

from llava_projectors.commands import cli
from llava_projectors.commands.check import check
from llava_projectors.commands.trial import WORKS, run_trial
from llava_projectors.export.verify import load_llava


@pytest.fixture
def as_llava(monkeypatch):
    """The package under the name that LLaVA-NeXT's own has."""
    names = ("", ".mm_utils", ".model", ".model.builder", ".constants")
    modules = {f"llava{name}": importlib.import_module(f"{family.PACKAGE}{name}") for name in names}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def checkpoint(build, tmp_path):
    """What the script would have saved, on random weights."""
    # The script's default layer is the last; its SigLIP does not ask.
    built = build("saep", **family.ANYRES, mm_vision_select_layer=-1)
    folder = tmp_path / "llava-qwen"
    built.model.half().save_pretrained(folder)
    built.tokenizer.save_pretrained(folder)
    return folder


def test_show_draws_a_checkpoint_without_flash_attention_and_without_cuda(as_llava, checkpoint, tmp_path):
    picture, drawn = tmp_path / "picture.png", tmp_path / "tokens.png"
    family.picture(*family.WIDE).save(picture)
    assert cli.main(["show", str(picture), "--model-path", str(checkpoint), "--output", str(drawn)]) == 0
    assert Image.open(drawn).size[0] > family.SIDE


def test_what_verify_compares_with_is_the_checkpoint_by_its_own_loader(as_llava, checkpoint):
    _, model, processor = load_llava(str(checkpoint), None)
    assert type(model).__name__ == "LlavaQwenForCausalLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    pixels = processor.preprocess(family.picture(*family.SQUARE), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[5, family.IMAGE_TOKEN, 6]])
    assert llm_input(model, input_ids=ids, images=pixels).shape[1] == 2 + 14**2


def test_check_reads_siglip_as_this_family_does(checkpoint):
    lines = check(None, str(checkpoint))
    assert f"tower: {family.TOWER}, 27x27 -> 14x14, 729 -> 196 visual tokens, hidden states 4+7" in lines
    assert f"checkpoint: {checkpoint}, every weight of the projector is there" in lines


def test_doctor_tries_siglip_and_clip(tmp_path):
    expected = {"LlavaQwenForCausalLM with SigLIP": "729 -> 196", "LlavaQwenForCausalLM": "576 -> 144"}
    report = run_trial(family.PACKAGE, "saep", {}, str(tmp_path), models=list(expected))
    assert [trial.model for trial in report.trials] == list(expected)
    for trial in report.trials:
        assert trial.verdict == WORKS
        assert trial.reason.startswith(expected[trial.model])
