"""A checkpoint describes itself: every option beside the type string, whatever the defaults become."""

import functools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import pytest
import torch
from safetensors.torch import load_file, save_file

import llava_projectors
from llava_projectors import ProjectorSpecError, ProjectorWeightsError, registry
from llava_projectors.projectors import registration
from llava_projectors.projectors.saep import SAEP

OPTIONS = {
    "stride": 2,
    "layers": [4, 7],
    "kernel_size": 5,
    "order": "pointwise_first",
    "shortcut": "max",
    "inner_size": 32,
    "blocks_before": 1,
    "blocks_after": 4,
    "level_norm": "layer",
    "readout_size": 80,
}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_adapter_and_checkpoint_hold_every_option(trained):
    saep = trained("saep")
    for folder in (saep.adapter, saep.checkpoint):
        config = config_of(folder.parent if folder.is_file() else folder)
        assert config["mm_projector_type"] == "saep"
        assert config["mm_projector_options"] == OPTIONS
        assert config["llava_projectors_version"] == llava_projectors.__version__
        assert config["mm_projector_grid"] == 12


def test_loading_builds_what_was_trained_whatever_the_defaults_have_become(trained, monkeypatch):
    from llava.model import LlavaLlamaForCausalLM

    before = SAEP.__init__

    def changed(self, *args, kernel_size=None, **options):
        before(self, *args, kernel_size=kernel_size or 7, **options)

    monkeypatch.setattr(SAEP, "__init__", changed)
    monkeypatch.setattr(SAEP, "default_layers", staticmethod(lambda selected: (1, selected)))
    model = LlavaLlamaForCausalLM.from_pretrained(trained("saep").checkpoint).get_model()
    assert model.mm_projector.depthwise.kernel_size == (5, 5)
    assert model.get_vision_tower().projector_layers == (4, 7)


def test_layers_counted_from_the_end_are_recorded_from_the_start(build_model):
    assert build_model("saep:layers=-5+-2").config.mm_projector_options["layers"] == [4, 7]


def test_checkpoints_without_a_record_load_as_before(trained, tmp_path):
    from llava.model import LlavaLlamaForCausalLM

    folder = tmp_path / "llava-older"
    shutil.copytree(trained("saep").checkpoint, folder)
    config = {name: value for name, value in config_of(folder).items() if "options" not in name}
    (folder / "config.json").write_text(json.dumps(config))
    assert LlavaLlamaForCausalLM.from_pretrained(folder).get_model().get_vision_tower().projector_layers == (4, 7)


def config(**settings):
    return SimpleNamespace(**{"mm_projector_type": "saep", "mm_projector_options": OPTIONS, **settings})


# What a checkpoint of SAEP recorded when its default was the separable convolution alone.
PLAIN = {**OPTIONS, "layers": [4, 5, 6, 7], "shortcut": "average", "blocks_before": 0, "blocks_after": 0}
PLAIN["level_norm"] = "none"


@pytest.mark.parametrize("lacks", [(), ("level_norm",), ("blocks_before", "blocks_after", "level_norm", "gate")])
def test_a_record_of_an_older_default_builds_what_it_built(lacks):
    record = {name: value for name, value in PLAIN.items() if name not in lacks}
    resolved = registry.resolve("saep", config(mm_projector_options=record))
    assert resolved.options["layers"] == (4, 5, 6, 7)
    plain = "saep:blocks_after=0,blocks_before=0,layers=4+5+6+7,level_norm=none,shortcut=average"
    torch.manual_seed(0)
    built = resolved.build(32, 80)
    torch.manual_seed(0)
    expected = registry.build_projector(plain, 32, 80)
    x = torch.randn(1, 36, 4 * 32)
    assert torch.equal(built(x), expected(x))


def test_a_checkpoint_of_the_older_default_loads(trained, tmp_path, messages):
    """As LLaVA loads it: its type string is `saep`, its record says what that meant."""
    from llava.model import LlavaLlamaForCausalLM

    folder = tmp_path / "llava-older"
    shutil.copytree(trained("saep").checkpoint, folder)
    (folder / "config.json").write_text(json.dumps({**config_of(folder), "mm_projector_options": PLAIN}))
    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if "mm_projector" not in k}
    plain = registry.resolve("saep", config(mm_projector_options=PLAIN)).build(32, 80).state_dict()
    state.update({f"model.mm_projector.{name}": value for name, value in plain.items()})
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    model = LlavaLlamaForCausalLM.from_pretrained(folder).get_model()
    assert all(torch.equal(value, plain[name]) for name, value in model.mm_projector.state_dict().items())
    assert model.get_vision_tower().projector_layers == (4, 5, 6, 7)
    assert "hidden states 4+5+6+7" in messages[-1]

    # Without the record, nothing says it but the weights.
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config_of(folder).items() if "options" not in name})
    )
    older = "saep:blocks_before=0,blocks_after=0,level_norm=none,shortcut=average"
    with pytest.raises(ProjectorWeightsError, match=f"look like '{older}': they were trained as that type"):
        LlavaLlamaForCausalLM.from_pretrained(folder)


def test_a_type_string_that_contradicts_the_record_is_an_error():
    assert registry.resolve("saep:kernel_size=5", config()).options["layers"] == (4, 7)
    assert registry.resolve("saep:layers=-5+-2", config()).options["layers"] == (4, 7)
    with pytest.raises(ProjectorSpecError, match="'saep:stride=3' has stride=3, but the checkpoint .*stride=2"):
        registry.resolve("saep:stride=3", config())
    for first in (3, 0):
        with pytest.raises(ProjectorSpecError, match=rf"has layers={first}\+7, but the .* layers=4\+7"):
            registry.resolve(f"saep:layers={first}+7", config())
    with pytest.raises(ProjectorSpecError, match="'tokenpacker': the checkpoint was trained as 'saep'"):
        registry.resolve("tokenpacker", config())
    with pytest.raises(ProjectorSpecError, match=r"mm_projector_options in the .* is \['a'\], not options with their"):
        registry.resolve("saep", config(mm_projector_options=["a"]))
    with pytest.raises(ProjectorSpecError, match="'wide' for option 'stride' in mm_projector_options of the config"):
        registry.resolve("saep", config(mm_projector_options={**OPTIONS, "stride": "wide"}))
    with pytest.raises(ProjectorSpecError, match="bad value True for option 'stride' in mm_projector_options"):
        registry.resolve("saep", config(mm_projector_options={**OPTIONS, "stride": True}))
    with pytest.raises(ProjectorSpecError, match="has blocks_after=-3, but the checkpoint .* blocks_after=4 "):
        registry.resolve("saep:blocks_after=-3", config())
    newer = config(mm_projector_options={**OPTIONS, "colour": 1})
    with pytest.raises(ProjectorSpecError, match="mm_projector_options has colour, which this version does not know"):
        registry.resolve("saep", newer)


def test_options_that_are_gone_are_read_where_they_changed_nothing():
    gone = {"dilations": [1], "level_kernel": 0, "gate": "none", "positions": "none"}
    assert registry.resolve("saep", config(mm_projector_options={**OPTIONS, **gone})).options == {
        **OPTIONS,
        "layers": tuple(OPTIONS["layers"]),
    }
    trained = config(mm_projector_options={**OPTIONS, **gone, "gate": "softmax"}, llava_projectors_version="0.1.9")
    with pytest.raises(ProjectorSpecError, match="has gate, which this version does not know; .* llava-projectors 0.1"):
        registry.resolve("saep", trained)


def test_every_value_of_an_option_comes_back(monkeypatch):
    """Also those that no type string can give, and None where the default has become something else."""
    monkeypatch.setattr(registration, "classes", dict(registration.classes))
    monkeypatch.setattr(registration, "options", dict(registration.options))

    def define(norm, widths):
        @llava_projectors.register_projector("anything")
        class Anything(llava_projectors.Projector):
            def __init__(
                self,
                mm_hidden_size,
                hidden_size,
                *,
                norm: Optional[Literal["layer", "rms"]] = norm,
                widths: tuple[int, ...] = widths,
                names: tuple[str, ...] = ("a",),
                ratio: float = 0.5,
                bias: bool = True,
                act: str = "gelu",
            ):
                super().__init__(mm_hidden_size, hidden_size, None, 1)

        return Anything

    record = {"norm": None, "widths": [], "names": ["b", "c"], "ratio": 1, "bias": False, "act": "2"}
    kept = SimpleNamespace(mm_projector_type="anything", mm_projector_options=json.loads(json.dumps(record)))
    for default in (None, "layer"):
        define(default, (1, 2))
        options = registry.resolve("anything", kept).options
        assert options == {**record, "widths": (), "names": ("b", "c")}
        with pytest.raises(ProjectorSpecError, match="has norm=rms, but the checkpoint was trained with norm=None"):
            registry.resolve("anything:norm=rms", kept)
    for name, value in {"norm": "batch", "widths": 3, "names": [1], "ratio": "x", "bias": 0, "act": 2}.items():
        kept.mm_projector_options = {**record, name: value}
        with pytest.raises(ProjectorSpecError, match=f"for option '{name}' in mm_projector_options of the config"):
            registry.resolve("anything", kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"mm_vision_select_layer": -3},
            "trained with --mm_vision_select_layer -2, but .*is -3",
        ),
        ({"mm_vision_select_feature": "cls_patch"}, "--mm_vision_select_feature patch, but"),
    ],
)
def test_going_on_with_other_features_is_refused_before_training(trained, model_args, settings, message):
    from llava.model import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(trained("saep").checkpoint).get_model()
    with pytest.raises(ProjectorSpecError, match=message):
        model.initialize_vision_modules(model_args("saep", **settings))
    model.initialize_vision_modules(model_args("saep"))


def test_layers_counted_from_the_end_are_compared_with_the_checkpoints(trained, model_args):
    """`resolve` knows no tower, so it cannot; the tower can, wherever one is at hand."""
    from llava.model import LlavaLlamaForCausalLM

    from llava_projectors.commands.check import check

    folder = trained("saep").checkpoint
    model = LlavaLlamaForCausalLM.from_pretrained(folder).get_model()
    with pytest.raises(ProjectorSpecError, match=r"of type 'saep', but --mm_projector_type is 'saep:layers=-7\+-2'"):
        model.initialize_vision_modules(model_args("saep:layers=-7+-2"))
    model.initialize_vision_modules(model_args("saep:layers=-5+-2"))
    assert model.config.mm_projector_options["layers"] == [4, 7]

    message = r"'saep:layers=-7\+-2' has layers=2\+7, counted from 0, but the checkpoint was trained with layers=4\+7 "
    with pytest.raises(ProjectorSpecError, match=message):
        check("saep:layers=-7+-2", folder)
    assert "hidden states 4+7" in check("saep:layers=-5+-2", folder)[1]


def test_a_fork_that_builds_the_projector_anew_keeps_the_trained_one(trained, model_args, monkeypatch):
    """As LLaVA-HR does on going on from a checkpoint."""
    from llava.model import LlavaLlamaForCausalLM
    from llava.model.llava_arch import LlavaMetaModel

    model = LlavaLlamaForCausalLM.from_pretrained(trained("saep").checkpoint).get_model()
    before = {name: value.clone() for name, value in model.mm_projector.state_dict().items()}
    own = LlavaMetaModel.__dict__["initialize_vision_modules"].__wrapped__

    @functools.wraps(own)
    def rebuilding(self, model_args, fsdp=None):
        own(self, model_args, fsdp)
        self.mm_projector = registry.build_projector("saep", 32, self.config.hidden_size)

    from llava_projectors.integration import seams, wrappers

    wrappers.initialize_vision_modules(rebuilding, seams._package("llava"), model, model_args("saep"))
    assert all(torch.equal(value, before[name]) for name, value in model.mm_projector.state_dict().items())


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of saep's adapter, and of the config beside it."""
    folder = tmp_path / "adapter"
    shutil.copytree(trained("saep").adapter, folder)
    return folder / "mm_projector.bin"


def start(build_model_args, path, model):
    model.get_model().initialize_vision_modules(build_model_args("saep", pretrain_mm_mlp_adapter=str(path)))


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty; copy it again"),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:999]),
        "it is truncated or .*999 bytes",
    ),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "it is a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
    "text": (lambda path: path.write_text("weights\n"), "it is no file of tensors .*of another format"),
    "object": (lambda path: torch.save({"a": Path}, path), "no file of tensors .*objects in it that are not loaded"),
    "list": (
        lambda path: torch.save([torch.ones(2)], path),
        "is no file of weights: it holds a list, not a dict of tensors",
    ),
    "nested": (
        lambda path: torch.save({"model": torch.load(path, weights_only=True)}, path),
        "is no file of weights: it holds a dict with a value of type dict",
    ),
    "nan": (
        lambda path: torch.save({k: v * float("nan") for k, v in torch.load(path, weights_only=True).items()}, path),
        "holds NaN or infinity in 'model.mm_projector.*its training diverged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_names_file_cause_and_remedy(adapter, damage, model_args, tiny):
    from llava.model import LlavaLlamaForCausalLM

    spoil, message = DAMAGES[damage]
    spoil(adapter)
    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llm)
    with pytest.raises(ProjectorWeightsError, match=message) as error:
        start(model_args, adapter, model)
    assert str(adapter) in str(error.value)


def test_a_damaged_adapter_beside_a_base_model_is_explained(adapter, tiny):
    """On the road of `load_pretrained_model(adapter, base)`."""
    from llava.model.builder import load_pretrained_model

    adapter.write_bytes(adapter.read_bytes()[:999])
    with pytest.raises(ProjectorWeightsError, match=r"cannot read .*mm_projector.bin: it is truncated"):
        load_pretrained_model(str(adapter.parent), str(tiny.llm), "llava-adapter", device="cpu", device_map="cpu")


def test_an_adapter_whose_purpose_cannot_be_known_is_used_with_a_warning(adapter, model_args, tiny, messages):
    from llava.model import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llm)
    start(model_args, adapter, model)
    assert not [line for line in messages if "WARNING" in line]
    config = config_of(adapter.parent)
    config["mm_projector_options"]["layers"] = [1, 7]
    (adapter.parent / "config.json").write_text(json.dumps(config))
    start(model_args, adapter, LlavaLlamaForCausalLM.from_pretrained(tiny.llm))
    assert "was trained with layers=1+7 (now 4+7); its weights fit" in messages[-2]
    (adapter.parent / "config.json").unlink()
    start(model_args, adapter, LlavaLlamaForCausalLM.from_pretrained(tiny.llm))
    assert "has no readable config.json beside it, so it cannot be known which" in messages[-2]


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({"mm_projector_options": {n: v for n, v in OPTIONS.items() if n != "readout_size"}}, ""),  # as of older ones
        ({"mm_projector_options": {}}, ""),
        ({"mm_projector_options": {}, "mm_projector_type": "saep:layers=-5+-2"}, ""),  # which depend on the tower
        ({"mm_projector_options": {}, "mm_projector_type": "saep:shortcut=average"}, "shortcut=average (now max)"),
        ({"mm_projector_options": {}, "mm_projector_type": "mlp2x_gelu"}, ""),
    ],
)
def test_what_the_config_beside_an_adapter_does_not_say_is_no_difference(
    adapter, model_args, tiny, messages, change, warned
):
    from llava.model import LlavaLlamaForCausalLM

    (adapter.parent / "config.json").write_text(json.dumps({**config_of(adapter.parent), **change}))
    start(model_args, adapter, LlavaLlamaForCausalLM.from_pretrained(tiny.llm))
    warnings = [line for line in messages if "WARNING" in line]
    assert len(warnings) == bool(warned)
    assert all(f"was trained with {warned}; its weights fit" in line for line in warnings)


def test_an_adapter_of_the_older_default_says_what_to_pass(adapter, model_args, tiny):
    """Trained as `saep` when that meant something else: to be told `saep` again would not help."""
    from llava.model import LlavaLlamaForCausalLM

    (adapter.parent / "config.json").write_text(
        json.dumps({**config_of(adapter.parent), "mm_projector_options": PLAIN})
    )
    plain = registry.resolve("saep", config(mm_projector_options=PLAIN)).build(32, 80).state_dict()
    torch.save({f"model.mm_projector.{name}": value for name, value in plain.items()}, adapter)
    older = (
        "saep:blocks_after=0,blocks_before=0,inner_size=32,kernel_size=5,layers=4+5+6+7,level_norm=none,"
        "readout_size=80,shortcut=average"
    )
    model = LlavaLlamaForCausalLM.from_pretrained(tiny.llm)
    with pytest.raises(ProjectorWeightsError, match=re.escape(f"it was trained as {older!r}: pass that type")):
        start(model_args, adapter, model)
    model.get_model().initialize_vision_modules(model_args(older, pretrain_mm_mlp_adapter=str(adapter)))
    assert registry.as_trained("saep", OPTIONS) == "saep"
    assert registry.as_trained("linear", OPTIONS) == "linear"
    # A record has the layers' numbers; counted from the end they are the same.
    assert registry.as_trained("tokenpacker:layers=-2", {"layers": [3]}) == "tokenpacker:layers=-2"
