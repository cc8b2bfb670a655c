"""Type strings, the registry, and the errors that users read."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Literal, Optional, Union

import pytest
import torch

import llava_projectors as lp
from llava_projectors import registry
from llava_projectors.projectors import registration

BUILT_IN = (
    "avg_pool",
    "c_abstractor",
    "delta",
    "ldpv2",
    "pixel_shuffle",
    "resampler",
    "saep",
    "stf",
    "tokenpacker",
)


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registration, "classes", dict(registration.classes))
    monkeypatch.setattr(registration, "options", dict(registration.options))


@pytest.mark.parametrize(
    ("type_string", "name", "options"),
    [
        ("saep", "saep", {}),
        ("saep:stride=3", "saep", {"stride": 3}),
        ("tokenpacker:scale_factor=3", "tokenpacker", {"scale_factor": 3}),
        ("saep:layers=6+12+18+23,kernel_size=5", "saep", {"layers": (6, 12, 18, 23), "kernel_size": 5}),
        ("tokenpacker:layers=-13+-2", "tokenpacker", {"layers": (-13, -2)}),
        (" saep : stride = 4 ", "saep", {"stride": 4}),
    ],
)
def test_parse_and_write_back(type_string, name, options):
    spec = lp.parse_spec(type_string)
    assert (spec.name, spec.options) == (name, options)
    assert str(spec) == type_string.replace(" ", "")
    assert lp.parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    ("type_string", "message"),
    [
        (
            "seap",
            r"unknown projector type 'seap': .* has avg_pool,.* saep, stf, tokenpacker;.*did you mean 'saep'\?",
        ),
        ("TokenPaker", r"did you mean 'tokenpacker'\?"),
        ("mlp2x_gelu", "^.mlp2x_gelu. is a projector type of LLaVA.s own; llava_projectors has avg_pool"),
        ("mlp2x_glu", r"did you mean 'mlp2x_gelu'\?"),
        (None, "unknown projector type None"),
        ("", "unknown projector type ''"),
        ("saep:strid=3", r"unknown option 'strid'.*'saep' has stride, layers, .*did you mean 'stride'\?"),
        ("saep:scale_factor=3", "unknown option 'scale_factor'"),
        ("saep:stride=5", "bad value '5' for option 'stride'.*valid values are 2, 3, 4"),
        ("saep:stride=two", "bad value 'two' for option 'stride'.*expected one of 2, 3, 4"),
        ("saep:kernel_size=3.5", "bad value '3.5'.*expected a whole number"),
        ("saep:layers=6,12", r"cannot read '12'.*joined by \+, for example layers=6\+12"),
        (
            "tokenpacker:stride=3",
            "'tokenpacker' has scale_factor, layers, head_size, init; did you mean 'scale_factor'",
        ),
        ("saep:scale_factor=3", "did you mean 'stride'"),
        ("saep:layers=6+x", r"bad value '6\+x'.*expected a whole number, or several joined by '\+'"),
        ("saep:order=pointwise", r"did you mean 'pointwise_first'\?"),
        ("saep:stride=2,stride=3", "option 'stride' is given twice"),
        ("saep:", "cannot read ''"),
        ("saep:stride", "cannot read 'stride'.*name:key=value,key=value"),
        ("saep:stride=", "cannot read 'stride='"),
    ],
)
def test_bad_type_strings_are_explained(type_string, message):
    with pytest.raises(lp.ProjectorSpecError, match=message) as caught:
        lp.parse_spec(type_string)
    assert isinstance(caught.value, ValueError)


def test_options_come_from_the_signature(clean_registry):
    @lp.register_projector("every_kind")
    class EveryKind(lp.Projector):
        def __init__(
            self,
            mm_hidden_size,
            hidden_size,
            *,
            ratio: float = 0.5,
            bias: bool = True,
            act: str = "gelu",
            norm: Optional[Literal["layer", "rms"]] = None,
            widths: tuple[int, ...] = (1, 2),
        ):
            super().__init__(mm_hidden_size, hidden_size, None, 1)

    spec = lp.parse_spec("every_kind:ratio=0.25,bias=False,act=relu,norm=rms,widths=8+9")
    assert spec.options == {"ratio": 0.25, "bias": False, "act": "relu", "norm": "rms", "widths": (8, 9)}
    assert registry.resolve("every_kind").options["widths"] == (1, 2)
    with pytest.raises(lp.ProjectorSpecError, match="bad value 'yes' for option 'bias'.*true or false"):
        lp.parse_spec("every_kind:bias=yes")
    assert "every_kind" in lp.list_projectors()


def test_specs_are_values():
    """Equal ones have one hash, whatever the order, and nothing in them can be changed."""
    spec = lp.parse_spec("saep:layers=6+12,stride=3")
    same = lp.ProjectorSpec("saep", {"stride": 3, "layers": [6, 12]})
    assert spec == same
    assert hash(spec) == hash(same)
    assert len({spec, same, lp.parse_spec("saep"), lp.ProjectorSpec("saep")}) == 2
    with pytest.raises(TypeError, match="does not support item assignment"):
        spec.options["stride"] = 99
    given = {"stride": 3}
    kept = lp.ProjectorSpec("saep", given)
    given["stride"] = 99
    assert kept.options == {"stride": 3}
    resolved = registry.resolve("saep:stride=3")
    assert hash(resolved) == hash(registry.resolve("saep:stride=3"))
    for value in (spec, resolved):  # they travel with a pickled tower
        assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == value


@pytest.mark.parametrize(
    "hint", [Literal[None, "x"], Literal[None], Literal[1, "x"], Optional[Literal[None, "x"]], tuple]
)
def test_an_option_that_no_type_string_can_give_is_refused(clean_registry, hint):
    class Odd(lp.Projector):
        def __init__(self, mm_hidden_size, hidden_size, *, mode: hint = None):
            super().__init__(mm_hidden_size, hidden_size, None, 1)

    with pytest.raises(TypeError, match="option 'mode' of .*Odd is annotated .*; a type string can give int, "):
        lp.register_projector("odd")(Odd)


def test_registering_refuses_what_would_surprise(clean_registry):
    class Fine(lp.Projector):
        def __init__(self, mm_hidden_size, hidden_size):
            super().__init__(mm_hidden_size, hidden_size, None, 1)

    class NoDefault(lp.Projector):
        def __init__(self, mm_hidden_size, hidden_size, *, width: int):
            super().__init__(mm_hidden_size, hidden_size, None, 1)

    class NoText(lp.Projector):
        def __init__(self, mm_hidden_size, hidden_size, *, width: Optional[dict] = None):
            super().__init__(mm_hidden_size, hidden_size, None, 1)

    with pytest.raises(ValueError, match="'saep' is taken by llava_projectors.projectors.saep.SAEP"):
        lp.register_projector("saep")(Fine)
    for name in ("mlp2x_gelu", "linear", "identity"):
        with pytest.raises(ValueError, match="LLaVA's own"):
            lp.register_projector(name)
    with pytest.raises(ValueError, match="lower-case"):
        lp.register_projector("Fine:1")
    with pytest.raises(TypeError, match=r"derive it from llava_projectors\.Projector"):
        lp.register_projector("fine")(dict)
    with pytest.raises(TypeError, match="'width' of .*NoDefault needs a default"):
        lp.register_projector("no_default")(NoDefault)
    with pytest.raises(TypeError, match="'width' of .*NoText is annotated"):
        lp.register_projector("no_text")(NoText)
    assert lp.register_projector("fine")(Fine) is Fine
    assert lp.register_projector("fine")(Fine) is Fine  # a notebook cell run again
    assert lp.list_projectors() == sorted([*BUILT_IN, "fine"])


def test_scale_factor_of_the_config_counts_when_the_type_string_gives_none():
    class Config:
        scale_factor = 3
        stride = 4

    assert registry.resolve("tokenpacker", Config).options["scale_factor"] == 3
    assert registry.resolve("tokenpacker:scale_factor=4", Config).options["scale_factor"] == 4
    assert registry.resolve("saep", Config).options["stride"] == 2
    Config.scale_factor = 7
    with pytest.raises(lp.ProjectorSpecError, match="bad value '7' for option 'scale_factor'"):
        registry.resolve("tokenpacker", Config)


def test_a_projector_that_can_be_built_nowhere_says_what_it_said_first(clean_registry):
    """Without storage; with it, its error may be another."""

    @lp.register_projector("nowhere")
    class Nowhere(lp.Projector):
        def __init__(self, mm_hidden_size, hidden_size):
            super().__init__(mm_hidden_size, hidden_size, None, 1)
            raise RuntimeError(f"not on {torch.empty(0).device}")

    with pytest.raises(RuntimeError, match="^not on meta$"):
        registry.resolve("nowhere").build_empty(8, 16)


def test_types_of_other_distributions(installed_distribution):
    """An entry point brings a type into every process; a broken one is named and takes nothing down."""
    source = """
        import llava_projectors

        @llava_projectors.register_projector("theirs")
        class Theirs(llava_projectors.Projector):
            def __init__(self, mm_hidden_size, hidden_size):
                super().__init__(mm_hidden_size, hidden_size, None, 1)
        """
    folder = installed_distribution("theirs", "their_projectors", source, "a = their_projectors", "b = not_there")
    script = """
import llava_projectors as lp
print(lp.parse_spec("theirs").name)
print(*(lp.list_projectors() for _ in range(2)), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["theirs", *[str(sorted([*BUILT_IN, "theirs"]))] * 2]
    (warning,) = done.stderr.splitlines()
    assert "not_there" in warning


@pytest.mark.parametrize(
    "written", [" saep : stride = 3 , layers=6+12", "saep:stride=\uff13,layers=6+12", "saep:stride=+3,layers=06+12"]
)
def test_a_type_string_is_kept_in_its_plainest_form(written):
    assert registry.normalize(written) == "saep:stride=3,layers=6+12"
    for blanks in ("", " "):
        ours = registry.normalize(f"{blanks}llava_projectors.{written.strip()}")
        assert ours == "llava_projectors.saep:stride=3,layers=6+12"


def test_a_kernel_larger_than_the_grid_is_refused():
    with pytest.raises(lp.ProjectorSpecError, match="kernel_size=99 is larger than 24, the side of the patch grid"):
        registry.resolve("saep:kernel_size=99").output_side(24)
    for side in (24, 23):
        assert registry.resolve("saep:kernel_size=23").output_side(side) == 12


@pytest.mark.parametrize("type_string", ["saep", "saep:stride=3", "saep:stride=4"])
def test_a_default_kernel_stands_in_a_checkpoints_config_on_small_grids_too(type_string):
    resolved = registry.resolve(type_string)
    kernel_size = resolved.build(8, 16).kernel_size
    written = SimpleNamespace(mm_projector_options={**resolved.options, "kernel_size": kernel_size})
    assert registry.resolve(type_string, written).output_side(4) == resolved.output_side(4)


def test_a_preset_stands_for_options_and_those_beside_it_win():
    plain = {"blocks_before": 0, "blocks_after": 0, "level_norm": "none", "shortcut": "average"}
    assert lp.parse_spec("saep:preset=plain").options == plain
    assert lp.parse_spec("saep:stride=3,preset=plain,blocks_after=2").options == {
        **plain,
        "blocks_after": 2,
        "stride": 3,
    }
    assert lp.parse_spec(registry.normalize("saep:preset=plain")).options == plain
    with pytest.raises(lp.ProjectorSpecError, match=r"'plane' for option 'preset'.*values are plain; did you mean 'pl"):
        lp.parse_spec("saep:preset=plane")
    with pytest.raises(lp.ProjectorSpecError, match="unknown option 'preset'.*'avg_pool' has stride, layers$"):
        lp.parse_spec("avg_pool:preset=plain")


def test_values_are_read_whatever_their_case_and_blanks(clean_registry):
    @lp.register_projector("cased")
    class Cased(lp.Projector):
        def __init__(self, mm_hidden_size, hidden_size, *, on: bool = True, norm: Literal["rms", "layer"] = "rms"):
            super().__init__(mm_hidden_size, hidden_size, None, 1)

    assert lp.parse_spec("cased:on=False").options == {"on": False}
    assert lp.parse_spec("cased:on=TRUE").options == {"on": True}
    assert lp.parse_spec(" llava_projectors.cased").name == "cased"
    with pytest.raises(lp.ProjectorSpecError, match="did you mean 'layer'"):
        lp.parse_spec("cased:norm=LAYER")


def test_two_types_in_one_annotation_are_refused(clean_registry):
    with pytest.raises(TypeError, match="option 'x' of .* is annotated"):

        @lp.register_projector("both")
        class Both(lp.Projector):
            def __init__(self, mm_hidden_size, hidden_size, *, x: Optional[Union[int, str]] = None):
                super().__init__(mm_hidden_size, hidden_size, None, 1)


def test_a_projector_is_for_clip_large_and_a_7b_llm_unless_it_is_told():
    projector = lp.build_projector("avg_pool")
    assert (projector.mm_hidden_size, projector.hidden_size) == (1024, 4096)


def test_options_decide_whether_two_types_are_one():
    one, two = registry.resolve("saep"), registry.resolve("saep:stride=3")
    assert one.same_projector(registry.resolve("llava_projectors.saep:stride=2"))
    assert not one.same_projector(two)
    assert not one.same_projector(registry.resolve("avg_pool"))
