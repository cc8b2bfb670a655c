"""LLaVA's own training script, loader and generation, on files proven to be LLaVA's own."""

import base64
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_projectors import ProjectorSpecError
from llava_projectors.commands.demo import ask
from llava_projectors.integration.weights import ProjectorWeightsError
from llava_projectors.tiny.train import TrainingFailed, losses, training_command

OURS = ("saep", "tokenpacker")


def projector_weights(checkpoint):
    """The projector's weights in a checkpoint, by their names in the projector."""
    prefix = "model.mm_projector."
    weights = load_file(checkpoint / "model.safetensors")
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}


def test_the_installed_llava_is_unmodified():
    """Every file of the installed LLaVA has the hash that its wheel's RECORD gives."""
    checked = 0
    for file in importlib.metadata.distribution("llava-torch").files:
        if file.hash is None:  # bytecode, and RECORD itself
            continue
        digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != file.hash.value:
            # pip rewrites these two as it installs
            assert file.name in ("RECORD", "direct_url.json"), file
        checked += file.suffix == ".py"
    assert checked > 40


@pytest.mark.cuda
@pytest.mark.parametrize("projector_type", OURS)
def test_training_learns(trained, projector_type):
    run = trained(projector_type)
    for folder, steps in ((run.adapter, 3), (run.checkpoint, 60)):
        curve = torch.tensor(losses(folder))
        assert len(curve) == steps
        assert curve.isfinite().all()
        assert (curve > 0.0).all()  # LLaVA's loss is exactly 0.0 when it has masked every label
    assert curve[-5:].mean() < curve[0] / 2
    assert "tokenization mismatch" not in run.output
    assert run.output.count(f"llava_projectors: {projector_type}: 144 -> 36 visual tokens per image") == 2


@pytest.mark.parametrize("projector_type", OURS)
def test_pretrained_adapter_is_what_finetuning_starts_from(trained, tiny, projector_type):
    """With a learning rate of 0 the fine-tuned projector is the adapter, bit for bit."""
    adapter = trained(projector_type).adapter / "mm_projector.bin"
    checkpoint, _ = tiny.finetune(f"{projector_type}-frozen", projector_type, adapter, max_steps=1, learning_rate=0.0)
    saved = torch.load(adapter, weights_only=True)
    final = projector_weights(checkpoint)
    assert {f"model.mm_projector.{name}" for name in final} == set(saved)
    for name, value in final.items():
        assert torch.equal(value, saved[f"model.mm_projector.{name}"]), name


@pytest.mark.cuda
@pytest.mark.parametrize("projector_type", OURS)
def test_checkpoint_loads_and_answers(trained, tiny, can_generate, projector_type):
    """`load_pretrained_model` brings back the very weights, and the LLM gets 36 visual tokens."""
    from llava.model import LlavaLlamaForCausalLM

    checkpoint = trained(projector_type).checkpoint
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["mm_projector_type"] == projector_type
    assert config["mm_hidden_size"] == 32
    saved = projector_weights(checkpoint)

    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint)
    in_saved_dtype = model.get_model().mm_projector.state_dict()
    assert set(in_saved_dtype) == set(saved)
    assert all(torch.equal(in_saved_dtype[name], saved[name]) for name in saved)

    answer = ask(checkpoint, tiny.images / "flower.jpg", max_new_tokens=8, device_map="auto")
    assert answer.visual_tokens == 36
    assert answer.text
    # LLaVA's loader asks for half precision.
    assert set(answer.projector) == set(saved)
    assert all(torch.equal(answer.projector[name].cpu(), saved[name].half()) for name in saved)


@pytest.mark.parametrize("projector_type", OURS)
def test_adapter_on_its_base_model_loads(trained, tiny, projector_type):
    """The road of a pretrained projector that was never fine-tuned."""
    from llava.model.builder import load_pretrained_model

    adapter = trained(projector_type).adapter
    _, model, _, _ = load_pretrained_model(str(adapter), str(tiny.llm), "llava", device="cpu", device_map="cpu")
    saved = torch.load(adapter / "mm_projector.bin", weights_only=True)
    loaded = model.get_model().mm_projector.state_dict()
    assert len(loaded) == len(saved)
    assert all(torch.equal(value, saved[f"model.mm_projector.{name}"].half()) for name, value in loaded.items())


def test_training_goes_on_from_a_finetuned_checkpoint(trained, tiny):
    """`--model_name_or_path` is a LLaVA with our projector; the type may be written out in full."""
    checkpoint = trained("saep").checkpoint
    further, _ = tiny.finetune(
        "saep-further", "saep:stride=2", max_steps=1, learning_rate=0.0, model_name_or_path=checkpoint
    )
    before, after = projector_weights(checkpoint), projector_weights(further)
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_stock_projector_trains_bit_for_bit_as_without_the_plugin(tiny):
    adapter, _ = tiny.pretrain("stock-pretrain", "mlp2x_gelu")
    runs = []
    for name, disabled in (("on", "0"), ("off", "1")):
        environment = {"LLAVA_PROJECTORS_DISABLE": disabled}
        folder, output = tiny.finetune(f"stock-{name}", "mlp2x_gelu", adapter / "mm_projector.bin", environment)
        assert "llava_projectors" not in output.replace(sys.prefix, "")  # which a checkout may have given that name
        runs.append((losses(folder), load_file(folder / "model.safetensors")))
    (losses_on, weights_on), (losses_off, weights_off) = runs
    assert losses_on == losses_off
    assert losses_on[0] > 0.0
    assert set(weights_on) == set(weights_off)
    for name, value in weights_on.items():
        assert torch.equal(value, weights_off[name]), name


def test_without_the_plugin_our_types_are_unknown(tiny):
    """So the tests above cannot pass by accident."""
    with pytest.raises(TrainingFailed, match="Unknown projector type: saep"):
        tiny.pretrain("disabled", "saep", {"LLAVA_PROJECTORS_DISABLE": "1"})


def test_no_folder_makes_an_mpt_of_the_llm(tmp_path):
    """As a random name of `tempfile` did: /tmp/tmpt8a1mkfq."""
    script = importlib.metadata.distribution("llava-torch").locate_file("llava/train/train.py")
    assert "if 'mpt' in model_args.model_name_or_path" in Path(script).read_text()
    with pytest.raises(ValueError, match="takes /tmp/prompts/vicuna for an MPT"):
        training_command(tmp_path, Path("/tmp/prompts/vicuna"), tmp_path, "saep")


def test_a_type_of_another_distribution_trains(tiny, installed_distribution):
    """A user's own projector, brought by an entry point, through the unmodified script."""
    source = """
        from torch import nn
        import llava_projectors

        @llava_projectors.register_projector("corner")
        class Corner(llava_projectors.Projector):
            '''The first patch of every region.'''

            def __init__(self, mm_hidden_size, hidden_size, *, stride: int = 4, norm: bool = True):
                super().__init__(mm_hidden_size, hidden_size, None, stride)
                self.norm = nn.LayerNorm(mm_hidden_size) if norm else nn.Identity()
                self.to_llm = nn.Linear(mm_hidden_size, hidden_size)

            def forward(self, features):
                return self.to_llm(self.norm(self.to_grid(features)[:, :: self.stride, :: self.stride].flatten(1, 2)))
        """
    path = installed_distribution("corner", "corner", source, "corner = corner")
    environment = {"PYTHONPATH": str(path)}
    folder, output = tiny.pretrain("corner", "corner:stride=6", environment)
    assert "llava_projectors: corner:stride=6: 144 -> 4 visual tokens per image (12x12 -> 2x2)" in output
    saved = torch.load(folder / "mm_projector.bin", weights_only=True)
    names = {f"model.mm_projector.{part}.{kind}" for part in ("norm", "to_llm") for kind in ("weight", "bias")}
    assert set(saved) == names
    adapter = folder / "mm_projector.bin"
    checkpoint, _ = tiny.finetune("corner-tuned", "corner:stride=6", adapter, environment, max_steps=1)
    # It has no `layers` to record, and no value where its module has the name of an option.
    record = json.loads((checkpoint / "config.json").read_text())["mm_projector_options"]
    assert record == {"stride": 6, "norm": True}
    _, output = tiny.finetune(
        "corner-further", "corner:stride=6", None, environment, max_steps=1, model_name_or_path=checkpoint
    )
    assert "llava_projectors: corner:stride=6: 144 -> 4 visual tokens" in output


@pytest.mark.parametrize(
    ("projector_type", "arguments", "message"),
    [
        ("seap", {}, r"unknown projector type 'seap'.*did you mean 'saep'\?"),
        ("saep:kernal_size=3", {}, r"unknown option 'kernal_size'.*did you mean 'kernel_size'\?"),
        ("saep:stride=7", {}, "bad value '7' for option 'stride'.*valid values are 2, 3, 4"),
        ("tokenpacker:layers=4+99", {}, "layer 99 is out of range; the vision tower has 8 layers"),
        ("saep", {"mm_vision_select_feature": "cls_patch"}, "--mm_vision_select_feature cls_patch must be patch"),
    ],
)
def test_bad_input_stops_training_before_it_starts(llava_train, projector_type, arguments, message):
    with pytest.raises(ProjectorSpecError, match=message):
        llava_train(projector_type, **arguments)


def test_a_stride_larger_than_the_grid_stops_training(llava_train, tmp_path):
    from llava_projectors.tiny.assets import make_vision_tower

    tower = make_vision_tower(tmp_path / "clip", num_layers=8, image_size=42)
    with pytest.raises(ProjectorSpecError, match="stride=4 must be 1 to 3, the side of the patch grid"):
        llava_train("saep:stride=4", vision_tower=tower)


def test_a_grid_that_the_stride_does_not_divide_trains(tiny, tmp_path):
    from llava_projectors.tiny.assets import make_vision_tower

    tower = make_vision_tower(tmp_path / "clip", num_layers=8, image_size=70)
    folder, output = tiny.pretrain("padded", "tokenpacker", vision_tower=tower)
    assert "tokenpacker: 25 -> 9 visual tokens per image (5x5 -> 3x3)" in output
    assert all(0.0 < value < 20 for value in losses(folder))


@pytest.mark.parametrize(("existing", "requested"), [("saep", "tokenpacker"), ("saep", "saep:stride=3")])
def test_another_type_than_the_checkpoints_is_refused(llava_train, trained, existing, requested):
    message = (
        f"the checkpoint has a projector of type '{existing}', but --mm_projector_type is '{requested}'.*"
        f"pass --mm_projector_type {existing}. To train a '{requested}' projector, start from the base LLM"
    )
    with pytest.raises(ProjectorSpecError, match=message):
        llava_train(requested, llm=trained(existing).checkpoint)


def test_stock_checkpoint_and_our_type_and_the_other_way_round(llava_train, tiny, trained):
    stock, _ = tiny.finetune("stock-checkpoint", "mlp2x_gelu", max_steps=1)
    with pytest.raises(ProjectorSpecError, match="the checkpoint has a projector of type 'mlp2x_gelu'"):
        llava_train("saep", llm=stock)
    # `linear` is the default of LLaVA's script: what one gets by forgetting the flag.
    with pytest.raises(ProjectorSpecError, match="type 'saep', but --mm_projector_type is 'linear'"):
        llava_train("linear", llm=trained("saep").checkpoint)


def save_adapter(path, weights):
    torch.save({f"model.mm_projector.{name}": value for name, value in weights.items()}, path)
    return path


def test_adapters_of_another_type_are_named(llava_train, tiny, trained, tmp_path):
    from llava_projectors import build_projector

    stock = {"0.weight": torch.zeros(80, 32), "0.bias": torch.zeros(80)}
    stock |= {"2.weight": torch.zeros(80, 80), "2.bias": torch.zeros(80)}
    cases = [
        ("saep", stock, "missing: aggregate.weight.*unexpected: 0.bias, 0.weight.*look like 'mlp2x_gelu'"),
        (
            "saep",
            build_projector("tokenpacker", 32, 80).state_dict(),
            "look like 'tokenpacker': they were trained as that type, or without this plugin",
        ),
        ("tokenpacker", build_projector("saep", 32, 80).state_dict(), "look like 'saep'"),
        ("tokenpacker", {"weight": torch.zeros(80, 32), "bias": torch.zeros(80)}, "look like 'linear'"),
        ("saep", {}, "missing: aggregate.weight, .* and 36 more. There are no projector weights at all"),
        (
            "saep",
            build_projector("saep:layers=4+5+6+7", 32, 80).state_dict(),
            r"wrong shape: aggregate.weight is \[32, 128\], not \[32, 64\].*type is right but the sizes differ",
        ),
    ]
    for number, (projector_type, weights, message) in enumerate(cases):
        path = save_adapter(tmp_path / f"{number}.bin", weights)
        with pytest.raises(ProjectorWeightsError, match=message) as caught:
            llava_train(projector_type, pretrain_mm_mlp_adapter=path)
        assert str(caught.value).startswith(f"--pretrain_mm_mlp_adapter {path} does not fit --mm_projector_type")


def test_an_adapter_beside_its_config_is_named_by_it(llava_train, trained):
    adapter = trained("tokenpacker").adapter / "mm_projector.bin"
    with pytest.raises(ProjectorWeightsError, match="config.json beside it says it was trained as 'tokenpacker'"):
        llava_train("saep", pretrain_mm_mlp_adapter=adapter)


def test_an_adapter_of_another_stride_fits_and_is_mentioned(tiny, trained):
    """TokenPacker's weights do not depend on the scale factor, so going on with another one may be meant."""
    adapter = trained("tokenpacker").adapter / "mm_projector.bin"
    _, output = tiny.finetune("other-stride", "tokenpacker:scale_factor=3", adapter, max_steps=1)
    assert f"WARNING: {adapter} was trained with scale_factor=2 (now 3); its weights fit and go on" in output
    assert "144 -> 16 visual tokens" in output
