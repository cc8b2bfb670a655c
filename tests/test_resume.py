"""Runs that are started again: with the projector of their `checkpoint-N`, bit for bit, or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_projectors import ProjectorSpecError, ProjectorWeightsError
from llava_projectors.tiny.train import losses, pretrain_arguments

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "mm_projector_lr": 1e-2}
PREFIX = "base_model.model.model.mm_projector."
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(autouse=True)
def can_resume(monkeypatch):
    # The trainer's random-number state is no plain tensor file, which newer torch refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def lora_run(tiny, trained, name, **arguments):
    adapter = trained("saep").adapter / "mm_projector.bin"
    return tiny.finetune(name, "saep", adapter, **{**LORA, **SAVING, **arguments})


@pytest.fixture(scope="module")
def whole(tiny, trained):
    """The folder of a LoRA run of 4 steps that saved after 2."""
    folder, _ = lora_run(tiny, trained, "lora-whole")
    return folder


def trained_weights(folder):
    files = ("non_lora_trainables.bin", "adapter_model.bin")
    return {k: v for name in files for k, v in torch.load(folder / name, weights_only=True).items()}


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_lora_run_that_is_started_again_ends_as_if_it_had_not_stopped(tiny, trained, whole, safetensors):
    name = f"lora-again-{safetensors}"
    folder = tiny.output(name)
    shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
    if not safetensors:
        lora = load_file(folder / "checkpoint-2" / "adapter_model.safetensors")
        (folder / "checkpoint-2" / "adapter_model.safetensors").unlink()
        torch.save(lora, folder / "checkpoint-2" / "adapter_model.bin")
    _, output = lora_run(tiny, trained, name, save_safetensors=safetensors, save_total_limit=1)
    assert f"llava_projectors: going on from {folder / 'checkpoint-2'}, with its projector" in output
    assert losses(folder) == losses(whole)
    expected, found = trained_weights(whole), trained_weights(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    start = torch.load(trained("saep").adapter / "mm_projector.bin", weights_only=True)
    saved = torch.load(folder / "checkpoint-4" / "non_lora_trainables.bin", weights_only=True)
    for name, value in start.items():
        assert torch.equal(saved[f"base_model.model.{name}"], expected[f"base_model.model.{name}"])
        assert not torch.equal(value, expected[f"base_model.model.{name}"])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_lora_run_with_no_step_left_keeps_its_projector(tiny, trained, whole):
    folder = tiny.output("lora-ended")
    shutil.copytree(whole / "checkpoint-4", folder / "checkpoint-4")
    lora_run(tiny, trained, "lora-ended")
    expected, found = trained_weights(whole), trained_weights(folder)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_checkpoint_of_a_lora_run_loads(whole, tiny):
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    path = str(whole / "checkpoint-2")
    name = get_model_name_from_path(path)
    model = load_pretrained_model(path, str(tiny.llm), name, device="cpu", device_map="cpu")[1]
    saved = torch.load(whole / "checkpoint-2" / "non_lora_trainables.bin", weights_only=True)
    for name, value in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(value, saved[f"{PREFIX}{name}"].half())


def test_a_lora_folder_says_what_it_lacks(whole, tiny, tmp_path):
    from llava.model.builder import load_pretrained_model

    folder = tmp_path / "llava-lora"
    shutil.copytree(whole / "checkpoint-2", folder)
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(
        ProjectorWeightsError, match="has a LoRA adapter but no non_lora_trainables.bin, which holds the"
    ):
        load_pretrained_model(str(folder), str(tiny.llm), "llava-lora", device="cpu", device_map="cpu")


@pytest.fixture
def interrupted(llava_train, trained, whole, tmp_path):
    """Go on in this process from a copy of `checkpoint-2` that may be changed; for what comes before the first step."""

    def run(projector_type="saep", change=lambda folder: None, **arguments):
        folder = tmp_path / "llava-x" / "checkpoint-2"
        shutil.copytree(whole / "checkpoint-2", folder)
        change(folder)
        adapter = trained("saep").adapter / "mm_projector.bin" if projector_type == "saep" else None
        if adapter is not None:
            arguments.setdefault("pretrain_mm_mlp_adapter", adapter)
        llava_train(projector_type, **{**LORA, "save_strategy": "steps", **arguments})

    return run


def lose_projector(folder):
    (folder / "non_lora_trainables.bin").unlink()


def lose_half(folder):
    state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    torch.save(dict(list(state.items())[:9]), folder / "non_lora_trainables.bin")


def lose_config_too(folder):
    """As the Trainer alone saves it."""
    lose_projector(folder)
    (folder / "config.json").unlink()


@pytest.mark.parametrize("change", [lose_projector, lose_half, lose_config_too])
def test_a_checkpoint_without_its_projector_is_not_gone_on_from(interrupted, change):
    with pytest.raises(ProjectorWeightsError, match="cannot go on from .*checkpoint-2: it lacks weights .*lost .miss"):
        interrupted(change=change)


@pytest.mark.parametrize(
    ("projector_type", "arguments", "message"),
    [
        (
            "saep:stride=3",
            {},
            "trained as 'saep', but --mm_projector_type is 'saep:stride=3'. Pass --mm_proj",
        ),
        ("tokenpacker", {}, "trained as 'saep', but --mm_projector_type is 'tokenpacker'"),
        ("saep:layers=5+7", {}, "trained as 'saep', but --mm_projector_type is 'saep:layers=5"),
        ("saep:layers=3+6", {"mm_vision_select_layer": -3}, "trained as 'saep', but"),
        ("saep", {"image_aspect_ratio": "square"}, "--image_aspect_ratio pad, but --image_aspect_ratio is square"),
    ],
)
def test_a_run_is_not_gone_on_with_under_other_options(interrupted, projector_type, arguments, message):
    with pytest.raises(ProjectorSpecError, match=f"cannot go on from .*checkpoint-2: it was .*{message}"):
        interrupted(projector_type, **arguments)


def test_another_tower_is_not_gone_on_with(interrupted, tiny, tmp_path):
    other = tmp_path / "other-clip"
    shutil.copytree(tiny.coarse_tower, other)
    with pytest.raises(ProjectorSpecError, match=f"trained with --vision_tower .*, but --vision_tower is {other}"):
        interrupted(vision_tower=other)


def test_the_record_of_another_layer_is_compared(interrupted):
    """A type of one layer has the same weights for every --mm_vision_select_layer."""

    def of_another_layer(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "mm_vision_select_layer": -3}))

    with pytest.raises(ProjectorSpecError, match="--mm_vision_select_layer -3, but --mm_vision_select_layer is -2"):
        interrupted(change=of_another_layer)


def test_a_full_checkpoint_without_projector_is_not_gone_on_from(llava_train, trained, tmp_path):
    """The Trainer loads it with `strict=False`, so the projector would stay the one of the start."""
    folder = tmp_path / "llava-x" / "checkpoint-2"
    shutil.copytree(trained("saep").checkpoint, folder)
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "mm_projector" not in k}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ProjectorWeightsError, match="cannot go on from .*checkpoint-2: it lacks weights of the pro"):
        llava_train("saep")


def test_stage_1_says_that_llava_cannot_go_on(tiny, llava_train, trained, tmp_path):
    """Of it, LLaVA saves the projector alone; the Trainer would ask for a "valid checkpoint"."""
    folder, _ = tiny.pretrain("stage-1", "saep", save_strategy="steps", save_steps=2)
    checkpoint = folder / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["config.json", "mm_projector.bin"]
    shutil.copytree(checkpoint, tmp_path / "llava-x" / "checkpoint-2")
    message = "cannot go on from .*: of a run with --tune_mm_mlp_adapter, LLaVA saves the projector alone, .*Start anew"
    with pytest.raises(ProjectorWeightsError, match=message):
        llava_train("saep", **pretrain_arguments(tiny.pretrain_data, tiny.images))


def test_the_best_checkpoint_comes_back_with_its_projector(llava_train, trained, tmp_path, monkeypatch):
    """LLaVA's script evaluates nothing; forks do."""
    from llava.train import train as script

    make = script.make_supervised_data_module

    def with_evaluation(*args, **kwargs):
        module = make(*args, **kwargs)
        return {**module, "eval_dataset": module["train_dataset"]}

    monkeypatch.setattr(script, "make_supervised_data_module", with_evaluation)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    llava_train(
        "saep",
        pretrain_mm_mlp_adapter=trained("saep").adapter / "mm_projector.bin",
        evaluation_strategy="steps",
        eval_steps=1,
        **{**LORA, **best, "save_strategy": "steps", "save_steps": 1, "max_steps": 3},
    )
    folder = tmp_path / "llava-x"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-1")  # the loss falls
    final = trained_weights(folder)
    first, last = (
        torch.load(folder / f"checkpoint-{n}" / "non_lora_trainables.bin", weights_only=True) for n in (1, 3)
    )
    assert all(torch.equal(final[key], value) for key, value in first.items())
    assert not all(torch.equal(first[key], value) for key, value in last.items())


def test_lora_with_a_frozen_projector_saves_it(tiny, trained):
    """LLaVA's script saves what requires a gradient: without more, the folder could never be loaded."""
    from llava.model.builder import load_pretrained_model

    folder, _ = lora_run(tiny, trained, "lora-frozen", freeze_mm_mlp_adapter=True, save_strategy="no", max_steps=2)
    start = torch.load(trained("saep").adapter / "mm_projector.bin", weights_only=True)
    model = load_pretrained_model(str(folder), str(tiny.llm), "llava-lora", device="cpu", device_map="cpu")[1]
    for name, value in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(value, start[f"model.mm_projector.{name}"].half()), name


def test_a_stock_run_saves_what_it_did_without_the_plugin(tiny):
    """The Trainer is replaced for models of our types alone."""
    adapter, _ = tiny.pretrain("stock-resume-pretrain", "mlp2x_gelu")
    arguments = {**LORA, **SAVING}
    folder, output = tiny.finetune("stock-lora", "mlp2x_gelu", adapter / "mm_projector.bin", **arguments)
    assert not (folder / "checkpoint-2" / "non_lora_trainables.bin").exists()
    assert not (folder / "checkpoint-2" / "config.json").exists()
    assert "llava_projectors: " not in output


# A run that cannot end well


@pytest.fixture
def llm(tiny, tmp_path):
    """vicuna-7b-v1.5 as it once was: temperature and top_p without do_sample."""
    folder = tmp_path / "vicuna"
    shutil.copytree(tiny.llm, folder)
    config = {"_from_model_config": True, "temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


def warnings_in(messages):
    return [line for line in messages if "would lose its model" in line]


def test_a_save_that_will_fail_is_said_before_the_first_step(llava_train, llm, messages):
    with pytest.raises(ValueError, match="generation config instance is invalid"):
        llava_train("saep", llm=llm)
    (warning,) = warnings_in(messages)
    assert f'set "do_sample": true in the generation_config.json of {llm}' in warning
    assert "\n" not in warning


def test_its_remedy_helps(llava_train, llm, messages, tmp_path):
    file = llm / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": True}))
    llava_train("saep", llm=llm)
    assert warnings_in(messages) == []
    assert (tmp_path / "llava-x" / "model.safetensors").exists()


@pytest.mark.parametrize("arguments", [LORA, {"tune_mm_mlp_adapter": True}])
def test_a_run_that_saves_no_llm_is_not_warned(llava_train, llm, messages, arguments):
    llava_train("saep", llm=llm, **arguments)
    assert warnings_in(messages) == []


def test_a_stock_run_is_not_warned(llava_train, llm, messages):
    with pytest.raises(ValueError, match="generation config instance is invalid"):
        llava_train("mlp2x_gelu", llm=llm)
    assert messages == []
