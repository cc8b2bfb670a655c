"""Where this package is installed, exported folders load without `trust_remote_code`; `make check-export` runs it.

`EXPORTED=… pytest --noconftest check_installed.py`, with current transformers and this package in the environment.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llava_projectors
from llava_projectors.export import compare
from llava_projectors.serving import hook

EXPORTED = Path(os.environ["EXPORTED"])
FOLDER = EXPORTED / "tokenpacker"


@pytest.fixture(scope="module")
def cases():
    return compare.load_cases(FOLDER.with_suffix(".pt"))


def run(source):
    done = subprocess.run([sys.executable, "-c", source, FOLDER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("loader", ["AutoModelForImageTextToText", "LlavaForConditionalGeneration"])
def test_without_an_import_of_ours(loader):
    """The start-up file is enough, and stock classes give way."""
    out = run(
        f"import sys; from transformers import {loader}\n"
        f"model = {loader}.from_pretrained(pretrained_model_name_or_path=sys.argv[1])\n"
        "print(type(model).__module__, type(model.model.multi_modal_projector).__name__)"
    )
    assert out.split() == ["llava_projectors.serving.modeling", "TokenPacker"]


def test_it_says_what_llava_says(cases):
    model, processor = compare.load(str(FOLDER), trust_remote_code=False)
    assert type(model).__module__ == "llava_projectors.serving.modeling"
    results = [compare.compare(model, processor, case) for case in cases]
    assert all(result["same_text"] and result["logits"] < 1e-4 for result in results)


def test_saved_again_it_stands_alone(cases, tmp_path):
    model, processor = compare.load(str(FOLDER), trust_remote_code=False)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    for trust in (True, False):
        result = compare.compare(*compare.load(str(tmp_path / "again"), trust), cases[0])
        assert result["same_text"]
        assert result["logits"] < 1e-4


def test_from_config():
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.from_pretrained(FOLDER))
    assert isinstance(model.multi_modal_projector, llava_projectors.Projector)


def test_taken_out_it_fails_and_says_why():
    from transformers.models.llava import modeling_llava

    hook.uninstall(modeling_llava)
    try:
        with pytest.raises(KeyError, match=r"trust_remote_code=True, or install llava-projectors"):
            modeling_llava.LlavaForConditionalGeneration.from_pretrained(FOLDER)
    finally:
        hook.install(modeling_llava)
    assert modeling_llava.LlavaForConditionalGeneration.from_pretrained(FOLDER) is not None


def test_stock_models_are_as_they_were(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1)
    llm = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, vocab_size=64)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=llm))
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert type(again) is LlavaForConditionalGeneration
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
