"""`device_map="auto"` over several devices: a projector of ours is on one of them, whatever their sizes."""

import pytest
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import compute_module_sizes
from llava.model import LlavaLlamaForCausalLM

TYPES = ("saep", "tokenpacker", "avg_pool", "ldpv2", "c_abstractor", "resampler:num_queries=36", "delta")


@pytest.fixture(scope="module")
def empty_model(build_model, tiny):
    """A projector type -> a model as `from_pretrained` builds it from a config, without weights."""

    def make(projector_type):
        config = build_model(projector_type).config
        with init_empty_weights():
            return LlavaLlamaForCausalLM(config)

    return make


def devices_of_projector(model, first):
    """Where its parts go, on two devices of which the first holds so many bytes."""
    whole = model._get_no_split_modules("auto")
    placed = infer_auto_device_map(model, {0: first, 1: 10**12}, no_split_module_classes=whole)
    projector = "model.mm_projector"
    # A name in the map stands for all below it.
    return {device for name, device in placed.items() if projector.startswith(name) or name.startswith(projector)}


def first_devices(model):
    """Sizes of a first device that ends before, in and behind the projector."""
    sizes = compute_module_sizes(model)
    # accelerate leaves room for the largest layer on the first device.
    return range(0, 3 * sizes[""], max(1, sizes["model.mm_projector"] // 3))


@pytest.mark.parametrize("projector_type", TYPES)
def test_a_projector_is_never_split(empty_model, projector_type):
    model = empty_model(projector_type)
    seen = [devices_of_projector(model, size) for size in first_devices(model)]
    assert {tuple(devices) for devices in seen} == {(0,), (1,)}


def test_other_types_are_split_as_before(empty_model):
    model = empty_model("mlp2x_gelu")
    assert "_no_split_modules" not in vars(model.model)
    assert {0, 1} in [devices_of_projector(model, size) for size in first_devices(model)]
