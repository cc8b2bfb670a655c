"""Tests that drive real code of the LLaVA-NeXT family, in an environment of its own: `make test-next`."""

import sys
from types import SimpleNamespace

import family
import pytest
import torch
import transformers

from llava_projectors import autoload

transformers.utils.import_utils.is_torchvision_available()  # False; a stand-in would be taken for the real one
if family.PACKAGE == "llavaction":
    sys.meta_path.append(family.StandIns())


@pytest.fixture(scope="session", autouse=True)
def hook():
    """The start-up file has armed the hook: nothing here patches the package."""
    assert family.PACKAGE in autoload.armed_packages(), "run `make test-next`"


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with tiny models and data, from which the hub's client takes the towers."""
    folder = tmp_path_factory.mktemp("next")
    transformers.utils.hub.TRANSFORMERS_CACHE = str(folder / "hub")
    family.prepare_process()
    family.make_siglip(folder / "hub")
    family.make_clip(folder / "hub")
    family.make_llm(folder / "qwen-tiny")
    family.make_mixture(folder / "data")
    return folder


@pytest.fixture(scope="session")
def build(root):
    """projector type, settings -> a model as the script sets it up, in float32, and the tokenizer."""

    def make(projector_type, tower=family.TOWER, **settings):
        torch.manual_seed(0)
        llm = root / "qwen-tiny"
        tokenizer = transformers.AutoTokenizer.from_pretrained(llm, model_max_length=8192)
        model = family.module("model").LlavaQwenForCausalLM.from_pretrained(llm, attn_implementation="eager")
        script = family.module("train.train")
        arguments = script.ModelArguments(
            model_name_or_path=str(llm),
            vision_tower=tower,
            mm_projector_type=projector_type,
            mm_vision_select_layer=-2,
            mm_use_im_patch_token=False,
            mm_patch_merge_type=settings.get("mm_patch_merge_type", "flat"),
        )
        model.get_model().initialize_vision_modules(arguments)
        defaults = {
            "image_aspect_ratio": "square",
            "image_grid_pinpoints": family.PINPOINTS,
            "mm_spatial_pool_mode": "bilinear",
            "mm_newline_position": "one_token",
            "add_faster_video": False,
            "tokenizer_model_max_length": 8192,
        }
        for name, value in {**defaults, **settings}.items():
            setattr(model.config, name, value)
        model.initialize_vision_tokenizer(arguments, tokenizer=tokenizer)
        return SimpleNamespace(model=model.float().eval(), tokenizer=tokenizer)

    return make
