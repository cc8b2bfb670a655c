"""Every load path of LLaVA with good and bad checkpoints: whole projector weights, or an error that names them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_projectors
from llava_projectors import ProjectorWeightsError, build_projector, files
from llava_projectors.commands.check import check
from llava_projectors.integration import weights

PREFIX = "model.mm_projector."


@pytest.fixture(scope="module")
def load():
    """LLaVA's own loader, on the CPU."""
    from llava.model.builder import load_pretrained_model

    def run(path, base=None, name="llava"):
        base = None if base is None else str(base)
        return load_pretrained_model(str(path), base, name, device="cpu", device_map="cpu")[1]

    return run


@pytest.fixture
def checkpoint(trained, tmp_path):
    """type string -> a copy of its checkpoint whose weights can be edited."""

    def make(projector_type):
        folder = tmp_path / "llava-edited"
        shutil.copytree(trained(projector_type).checkpoint, folder)
        return folder

    return make


def edit(folder, change, form="safetensors"):
    """Rewrite a checkpoint's weights, as one file of safetensors, one .bin, or shards of either."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    state = change(state)
    save, stem = (save_file, "model.safetensors") if "safetensors" in form else (torch.save, "pytorch_model.bin")
    keep = {"metadata": {"format": "pt"}} if save is save_file else {}
    if "sharded" not in form:
        save(state, folder / stem, **keep)
        return
    root, extension = stem.split(".")
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[0::2], names[1::2]), 1):  # so that both shards hold projector weights
        shard = f"{root}-{number:05d}-of-00002.{extension}"
        save({name: state[name] for name in part}, folder / shard, **keep)
        weight_map.update(dict.fromkeys(part, shard))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.index.json").write_text(json.dumps(index))


FORMS = ["safetensors", "bin", "sharded safetensors", "sharded bin"]


def same(state):
    return state


def without_projector(state):
    return {name: value for name, value in state.items() if not name.startswith(PREFIX)}


def without_norm(state):
    return {name: value for name, value in state.items() if not name.startswith(f"{PREFIX}norm")}


def with_projector(type_string):
    def change(state):
        other = build_projector(type_string, 32, 80).state_dict()
        return {**without_projector(state), **{f"{PREFIX}{name}": value for name, value in other.items()}}

    return change


def with_stock(state):
    stock = {"0.weight": torch.zeros(80, 32), "0.bias": torch.zeros(80)}
    stock |= {"2.weight": torch.zeros(80, 80), "2.bias": torch.zeros(80)}
    return {**without_projector(state), **{f"{PREFIX}{name}": value for name, value in stock.items()}}


@pytest.mark.parametrize("form", FORMS)
def test_good_checkpoints_load_whole(load, checkpoint, trained, form):
    folder = checkpoint("saep")
    edit(folder, same, form)
    loaded = load(folder).get_model().mm_projector
    saved = load_file(trained("saep").checkpoint / "model.safetensors")
    assert not weights.awaited_weights(loaded)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, saved[PREFIX + name].half()), name
    found = weights.find_in_folder(str(folder)).shapes
    assert found == {name: tuple(value.shape) for name, value in loaded.state_dict().items()}


def test_further_projectors_of_a_fork_are_not_ours(checkpoint):
    """As VCoder's, in one file or in shards, and behind a prefix of peft."""
    further = {"model.seg_mm_projector.0.weight": torch.zeros(80, 32), "seg_mm_projector.2.bias": torch.zeros(80)}
    ours = {"mm_projector.a.weight": "a.weight", "base_model.model.model.mm_projector.b.bias": "b.bias"}
    assert files.projector_keys([*further, *ours]) == {name: key for key, name in ours.items()}
    folder = checkpoint("saep")
    before = weights.find_in_folder(str(folder)).shapes
    edit(folder, lambda state: {**state, **further}, "sharded safetensors")
    assert weights.find_in_folder(str(folder)).shapes == before


BAD = [
    (
        without_projector,
        "got no weights from .*: missing: after.0.*and 36 more. There are no projector weights",
    ),
    (without_norm, "does not get its weights from .*: missing: norm.weight, norm.bias"),
    (with_stock, "unexpected: 0.bias, 0.weight, 2.bias, 2.weight.* look like 'mlp2x_gelu': they were trained as that"),
    (with_projector("tokenpacker"), "look like 'tokenpacker'"),
    (
        with_projector("saep:layers=4+5+6+7"),
        r"wrong shape: aggregate.weight is \[32, 128\], not \[32, 64\].*type is right but the sizes differ",
    ),
    (with_projector("saep:stride=4"), r"wrong shape: depthwise.weight is \[32, 1, 7, 7\], not \[32, 1, 5, 5\]"),
]


@pytest.mark.parametrize("form", ["safetensors", "sharded bin"])
@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_checkpoints_are_errors(load, checkpoint, change, message, form):
    folder = checkpoint("saep")
    edit(folder, change, form)
    with pytest.raises(ProjectorWeightsError, match=message):
        load(folder)


@pytest.mark.parametrize(("change", "message"), BAD[1:])
def test_bad_checkpoints_are_errors_without_low_cpu_mem_usage(checkpoint, change, message):
    """As the training script loads a checkpoint to go on from."""
    from llava.model import LlavaLlamaForCausalLM

    folder = checkpoint("saep")
    edit(folder, change)
    for arguments in ({}, {"config": str(folder)}):  # transformers takes a folder as a config too
        with pytest.raises(ProjectorWeightsError, match=message.split(" from .*: ")[-1]):
            LlavaLlamaForCausalLM.from_pretrained(folder, **arguments)


def test_a_download_is_looked_up_as_the_caller_says(checkpoint, tmp_path):
    """By a name on the hub, in a folder and at a revision of the caller's: no other call would find this config."""
    from llava.model import LlavaLlamaForCausalLM

    folder = checkpoint("saep")
    edit(folder, without_norm)
    kept, commit = tmp_path / "hub" / "models--someone--llava-edited", "0" * 40
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "epoch-2").write_text(commit)
    shutil.copytree(folder, kept / "snapshots" / commit)
    with pytest.raises(ProjectorWeightsError, match="missing: norm.weight"):
        LlavaLlamaForCausalLM.from_pretrained("someone/llava-edited", cache_dir=tmp_path / "hub", revision="epoch-2")


def test_a_model_without_projector_weights_neither_answers_nor_is_saved(checkpoint, tmp_path):
    """`from_pretrained` alone cannot know whether an adapter follows; the first forward can."""
    from llava.model import LlavaLlamaForCausalLM

    folder = checkpoint("saep")
    edit(folder, without_projector)
    model = LlavaLlamaForCausalLM.from_pretrained(folder)
    projector = model.get_model().mm_projector
    with pytest.raises(ProjectorWeightsError, match="'saep' has random weights, no checkpoint has provided: after"):
        projector(torch.zeros(1, 576, 64))
    with pytest.raises(ProjectorWeightsError, match="'saep' has random weights, no checkpoint has provided: after"):
        model.save_pretrained(tmp_path / "saved")  # where they would be taken for trained ones
    assert not files.has_weights(tmp_path / "saved")
    good = build_projector("saep", 32, 80).state_dict()
    model.load_state_dict({f"{PREFIX}{name}": value for name, value in good.items()}, strict=False)
    assert projector(torch.zeros(1, 576, 64)).shape == (1, 144, 80)
    model.save_pretrained(tmp_path / "saved")
    assert weights.find_in_folder(tmp_path / "saved").shapes.keys() == good.keys()


def by_accelerate(projector, good):
    from accelerate.utils import set_module_tensor_to_device

    for name, value in good.items():
        set_module_tensor_to_device(projector, name, "cpu", value=value)


def by_copying(projector, good):
    with torch.no_grad():
        for name, parameter in projector.named_parameters():
            parameter.copy_(good[name])


def by_data(projector, good):
    for name, parameter in projector.named_parameters():
        parameter.data = good[name].clone()


@pytest.mark.parametrize("provide", [by_accelerate, by_copying, by_data])
def test_weights_may_come_by_any_way(tiny, trained, provide):
    """And moving the random ones, or half of the good ones, is no way."""
    from llava.model import LlavaLlamaForCausalLM

    config = LlavaLlamaForCausalLM.config_class.from_pretrained(trained("saep").checkpoint)
    projector = LlavaLlamaForCausalLM.from_pretrained(tiny.llm, config=config).get_model().mm_projector
    features = torch.zeros(1, 144, 64)
    for move in (lambda: projector.half(), lambda: projector.to(torch.bfloat16), lambda: projector.float()):
        move()
        with pytest.raises(ProjectorWeightsError, match="has random weights"):
            projector(features)
    good = build_projector("saep", 32, 80).state_dict()
    half = {name: value for name, value in good.items() if name.startswith(("aggregate", "readout"))}
    by_data(projector, {**dict(projector.named_parameters()), **half})
    assert weights.awaited_weights(projector) == good.keys() - half.keys()
    with pytest.raises(ProjectorWeightsError, match="has random weights, no checkpoint has provided: "):
        projector(features)
    provide(projector, good)
    assert projector(features).shape == (1, 36, 80)
    assert not weights.awaited_weights(projector)


@pytest.fixture
def adapter(trained, tmp_path):
    def make(change=dict):
        folder = tmp_path / "llava-adapter"
        shutil.copytree(trained("saep").adapter, folder)
        state = torch.load(folder / "mm_projector.bin", weights_only=True)
        torch.save(change(state), folder / "mm_projector.bin")
        return folder

    return make


def test_adapter_and_base(load, adapter, tiny):
    folder = adapter()
    saved = torch.load(folder / "mm_projector.bin", weights_only=True)
    loaded = load(folder, tiny.llm).get_model().mm_projector
    assert not weights.awaited_weights(loaded)
    assert all(torch.equal(value, saved[PREFIX + name].half()) for name, value in loaded.state_dict().items())


WRAPPERS = (
    "module.model.",
    "base_model.model.model.",
    "module.base_model.model.model.",
    "_orig_mod.model.",
    "teacher.model.",
    "model.",
)


def renamed(prefix):
    return lambda state: {f"{prefix}{name[len(PREFIX) :]}": value for name, value in state.items()}


@pytest.mark.parametrize("file", ["mm_projector.bin", "non_lora_trainables.bin"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_adapters_of_wrapped_models_are_taken_at_every_door(
    load, adapter, tiny, trained, model_args, tmp_path, file, wrapper
):
    """As peft, DDP and torch.compile leave them: LLaVA's training takes them, so its loader, check and export do."""
    from llava.model import LlavaLlamaForCausalLM

    from llava_projectors.export.checkpoint import read_checkpoint

    folder = adapter(renamed(f"{wrapper}mm_projector."))
    saved = torch.load(trained("saep").adapter / "mm_projector.bin", weights_only=True)
    path = folder / "mm_projector.bin"
    if file != path.name:
        from peft import LoraConfig, get_peft_model

        path = path.rename(folder / file)
        base = LlavaLlamaForCausalLM.from_pretrained(tiny.llm)
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    assert f"checkpoint: {folder}, every weight of the projector is there" in check(None, str(folder))
    assert f"adapter: {path}, fits, and all its numbers are finite" in check("saep", adapter=str(path))
    assert {k for k in read_checkpoint(folder, tiny.llm).weights if "mm_projector" in k} == set(saved)
    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llm).get_model()
    model.initialize_vision_modules(model_args("saep", pretrain_mm_mlp_adapter=str(path)))
    loaded = load(folder, tiny.llm, "llava-lora" if file != "mm_projector.bin" else "llava").get_model().mm_projector
    for name, value in saved.items():
        assert torch.equal(model.mm_projector.state_dict()[name[len(PREFIX) :]], value)
        assert torch.equal(loaded.state_dict()[name[len(PREFIX) :]], value.half())


@pytest.mark.parametrize("prefix", ["", "vision_resampler."])
def test_adapters_that_mean_something_else_are_refused_at_every_door(load, adapter, tiny, model_args, tmp_path, prefix):
    from llava.model import LlavaLlamaForCausalLM

    from llava_projectors.export.convert import export_checkpoint

    folder = adapter(renamed(prefix))
    path = folder / "mm_projector.bin"
    message = f"All of them are there, but begin with '{prefix}', and LLaVA's loader looks for 'model.mm_projector.'"
    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llm).get_model()
    doors = [
        lambda: check(None, str(folder)),
        lambda: check("saep", adapter=str(path)),
        lambda: load(folder, tiny.llm),
        lambda: model.initialize_vision_modules(model_args("saep", pretrain_mm_mlp_adapter=str(path))),
        lambda: export_checkpoint(str(folder), tmp_path / "out", str(tiny.llm)),
    ]
    for door in doors:
        with pytest.raises(ProjectorWeightsError, match=message):
            door()


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_a_full_checkpoint_of_a_wrapped_model_is_refused_with_the_cause(load, checkpoint, prefix):
    """transformers loads none of its keys; the LLM's would be random too."""
    folder = checkpoint("saep")
    edit(folder, lambda state: {f"{prefix}{name}": value for name, value in state.items()})
    for door in (load, lambda path: check(None, str(path))):
        with pytest.raises(ProjectorWeightsError, match=f"begin with '{prefix}{PREFIX}', and LLaVA's loader looks for"):
            door(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "got no weights from .*llava-adapter: missing: after.0.*There are no projector"),
        (without_norm, "got no weights from .*llava-adapter: missing: norm.bias, norm.weight"),
        (with_stock, "weights do not fit the projector 'saep': unexpected: 0.bias, 0.weight.* look like 'mlp2x_gelu'"),
        (with_projector("tokenpacker"), "do not fit the projector 'saep': unexpected.* look like 'tokenpacker'"),
        (with_projector("saep:layers=4+5+6+7"), r"wrong shape: aggregate.weight is \[32, 128\], not \[32, 64\]"),
    ],
)
def test_bad_adapters_are_errors(load, adapter, tiny, change, message):
    with pytest.raises(ProjectorWeightsError, match=message):
        load(adapter(change), tiny.llm)


def test_a_linear_layer_is_known_by_all_of_its_names():
    assert weights.identify({"weight", "bias"}) == "linear"
    assert weights.identify({"weight", "bias", "queries"}) is None


def test_a_quantised_parameter_has_no_shape_to_compare():
    """bitsandbytes packs the numbers of a layer in 4 bits into one column of bytes."""
    projector = build_projector("avg_pool", 8, 16)
    projector.mlp[0].weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    weights.guard(projector)
    other = {**build_projector("avg_pool", 8, 16).state_dict(), "mlp.0.weight": torch.zeros(64, 1, dtype=torch.uint8)}
    projector.load_state_dict(other)
    assert torch.equal(projector.mlp[2].weight, other["mlp.2.weight"])
    expected = weights.expected_shapes(projector)
    assert expected["mlp.0.weight"] == ()
    assert weights.problems(expected, {**expected, "mlp.0.weight": (3, 5)}) == ""
    assert weights.problems(expected, {**expected, "mlp.0.bias": (3,)}) == "wrong shape: mlp.0.bias is [3], not [16]"


def test_stock_checkpoints_are_not_looked_at(load, tiny):
    """Half a stock projector loads as LLaVA loads it, with its warning; that is LLaVA's to judge."""
    folder, _ = tiny.finetune("stock-guard", "mlp2x_gelu", max_steps=1)
    state = load_file(folder / "model.safetensors")
    del state[f"{PREFIX}2.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert load(folder).get_model().mm_projector is not None
    from llava.model import LlavaLlamaForCausalLM

    _, info = LlavaLlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == [f"{PREFIX}2.bias"]


def test_what_replaces_from_pretrained_later_is_called(tiny, monkeypatch):
    """Other packages replace it on transformers' base class, which LLaVA's classes and transformers' own inherit."""
    from llava.model import LlavaLlamaForCausalLM
    from transformers import LlavaForConditionalGeneration, PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda cls, *args, **kwargs: (cls, args)))
    for owner in (LlavaLlamaForCausalLM, LlavaForConditionalGeneration):
        assert owner.from_pretrained(tiny.llm) == (owner, (tiny.llm,))


def test_the_first_argument_may_be_named(checkpoint):
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder.builder import build_vision_tower

    model = LlavaLlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=checkpoint("saep"))
    assert build_vision_tower(vision_tower_cfg=model.config, delay_load=True).projector_layers == (4, 7)


def test_saving_and_loading_twice_over(checkpoint, tmp_path):
    from llava.model import LlavaLlamaForCausalLM

    first = LlavaLlamaForCausalLM.from_pretrained(checkpoint("tokenpacker"))
    first.save_pretrained(tmp_path / "once")
    second = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "once")
    second.save_pretrained(tmp_path / "twice")
    third = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "twice")
    for (name, a), b in zip(first.state_dict().items(), third.state_dict().values()):
        assert torch.equal(a, b), name


def test_llavas_scripts_on_checkpoints(checkpoint, tiny, trained, tmp_path):
    """`consolidate` passes the projector on; deltas know LLaVA's first one alone, and say so before they write."""
    from llava.model.apply_delta import apply_delta
    from llava.model.consolidate import consolidate_ckpt
    from llava.model.make_delta import make_delta

    folder = checkpoint("saep")
    consolidate_ckpt(str(folder), str(tmp_path / "consolidated"))
    saved = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "consolidated" / "model.safetensors")
    for name in (name for name in saved if name.startswith(PREFIX)):
        assert torch.equal(found[name], saved[name].half()), name
    for script in (
        lambda: make_delta(str(tiny.llm), str(folder), str(tmp_path / "delta"), None),
        lambda: apply_delta(str(tiny.llm), str(tmp_path / "target"), str(folder)),
    ):
        with pytest.raises(AssertionError, match="mm_projector.* not in base model"):
            script()
    assert not (tmp_path / "delta").exists()
    assert not (tmp_path / "target").exists()


def test_the_error_is_public():
    assert llava_projectors.ProjectorWeightsError is files.ProjectorWeightsError
    assert issubclass(ProjectorWeightsError, ValueError)
