"""`llava-projectors doctor` is never wrong: each verdict against a copy of LLaVA with one fork's peculiarity."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llava
import pytest
import torch
import warm
from torch import nn

from llava_projectors.commands import doctor, trial
from llava_projectors.integration import tower

LLAVA = Path(llava.__file__).parent
ARCH, TOWERS, PROJECTORS = (
    f"model/{name}.py" for name in ("llava_arch", "multimodal_encoder/builder", "multimodal_projector/builder")
)


def say(*arguments, status=0, run=warm.run, **environment):
    command = [sys.executable, "-m", "llava_projectors", "doctor", *arguments]
    done = run(command, capture_output=True, text=True, cwd="/", env={**os.environ, **environment})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def small_fork(tmp_path):
    """A copy of LLaVA called myfork, for Llama alone, in the test's folder."""
    folder = tmp_path / "myfork"
    shutil.copytree(LLAVA, folder, ignore=shutil.ignore_patterns("__pycache__", "serve", "eval", "*_m*t*.py"))
    for path in folder.rglob("*.py"):
        path.write_text(path.read_text().replace("llava.", "myfork.").replace("from llava ", "from myfork "))
    return folder


@pytest.fixture
def fork(small_fork, monkeypatch):
    """Replace texts in it; returns what doctor says of it."""

    def examine(*changes, type_string="saep", is_warm=True, **arguments):
        for name, old, new in changes:
            text = (small_fork / name).read_text()
            assert old in text
            (small_fork / name).write_text(text.replace(old, new))
        monkeypatch.syspath_prepend(small_fork.parent)
        monkeypatch.setenv("LLAVA_PROJECTORS_PACKAGES", "myfork")
        if is_warm:
            monkeypatch.setattr(trial, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": warm.run}))
        return doctor.diagnose(["myfork"], type_string, arguments).packages[0]

    return examine


CALL = "image_features = self.get_model().mm_projector(image_features)"
LLAMA = "model/language_model/llava_llama.py"


def test_llava_itself():
    out = say("--type", "saep:stride=2", run=subprocess.run)
    assert out.endswith("All is well: pass --mm_projector_type saep:stride=2 to LLaVA's scripts.\n")
    assert "armed in a fresh interpreter" in out
    assert "1.2.2.post1" in out
    assert "works        LlavaLlamaForCausalLM    576 -> 144 visual tokens at the first layer of its LLM" in out
    assert "llava: works: 576 -> 144 visual tokens" in out
    assert "; not checked: LlavaMptForCausalLM\n" in out
    # The forward of this LLaVA's MPT class fails with any projector.
    assert "LlavaMptForCausalLM cannot be run on tiny parts without this plugin either: TypeError" in out


def test_as_json(small_fork):
    environment = {"PYTHONPATH": str(small_fork.parent), "LLAVA_PROJECTORS_PACKAGES": "myfork"}
    report = json.loads(say("--json", "--type", "tokenpacker:scale_factor=3", "--package", "myfork", **environment))
    assert report["verdict"] == report["packages"][0]["verdict"] == "works"
    assert "576 -> 64 visual tokens" in report["packages"][0]["reason"]
    assert [row["state"] for row in report["packages"][0]["seams"]][:4] == ["patched"] * 4


def test_a_mistyped_type_is_the_reason():
    out = say("--type", "seap", status=1)
    assert "llava: cannot work: " in out
    assert "did you mean" in out


def test_switched_off(small_fork):
    out = say("--package", "myfork", status=1, LLAVA_PROJECTORS_DISABLE="1", PYTHONPATH=str(small_fork.parent))
    assert "PROBLEM: the hook is switched off by the environment variable LLAVA_PROJECTORS_DISABLE=1: unset it" in out


def test_a_fork_that_is_llava(fork):
    found = fork()
    assert (found.verdict, [t.model for t in found.trials]) == ("works", ["LlavaLlamaForCausalLM"])


def test_a_fork_that_is_not_armed(fork, monkeypatch):
    found = fork()
    monkeypatch.delenv("LLAVA_PROJECTORS_PACKAGES")
    again = doctor.diagnose(["myfork"]).packages[0]
    assert (found.verdict, again.verdict) == ("works", "cannot work")
    assert "set LLAVA_PROJECTORS_PACKAGES=myfork, or call llava_projectors.patch('myfork')" in again.reason
    assert "then it works (576 -> 144 visual tokens" in again.reason
    init = Path(found.place) / "__init__.py"
    init.write_text("import llava_projectors\nllava_projectors.patch('myfork')\n" + init.read_text())
    assert doctor.diagnose(["myfork"]).packages[0].verdict == "works"


PECULIARITIES = {
    "a compressor reads the projector too, as in LLaVA-Mini": (
        [(ARCH, CALL, f"self.get_model().mm_projector(image_features)\n        {CALL}")],
        "calls its projector 2 times for 1 calls of its vision tower, on features [2304, 64] where the tower gave "
        "[1152, 64]",
    ),
    "the tower's feature_select returns several, as in TokenPacker": (
        [("model/multimodal_encoder/clip_encoder.py", "return image_features\n\n    @torch.no_grad()",
          "return image_features, image_features\n\n    @torch.no_grad()")],
        "needs one tensor of features: feature_select of the vision tower CLIPVisionTower returns several",
    ),
    "the tower reads the picture's embedding, as in HiDe-LLaVA": (
        [("model/multimodal_encoder/clip_encoder.py", "return image_features\n\n    @property\n    def dummy",
          "return image_forward_outs.image_embeds, image_features\n\n    @property\n    def dummy")],
        "cannot use the vision tower CLIPVisionTower: its forward ends in AttributeError: ",
    ),
    "features are joined on the way, as in VideoGPT+": (
        [(ARCH, CALL, CALL.replace("(image_features)", "(image_features.flip(0))"))],
        "changes the features on their way from its vision tower to its projector",
    ),
    "tokens are dropped behind the projector": (
        [(ARCH, CALL, CALL + "[:, :100]")],
        "gives its LLM 100 visual tokens, and the projector made 144",
    ),
    "no gradients reach the projector": (
        [(ARCH, CALL, CALL + ".detach()")],
        "gives its projector no gradients",
    ),
    "the projector is built in line, as in LISA": (
        [(ARCH, "build_vision_projector(self.config)", "torch.nn.Linear(32, self.config.hidden_size)")],
        "built a Linear by itself, not by its build_vision_projector",
    ),
    "towers come as a list, as in Cambrian": (
        [(TOWERS, "def build_vision_tower(", "def build_vision_tower_aux_list("),
         (ARCH, "import build_vision_tower", "import build_vision_tower_aux_list as build_vision_tower")],
        "myfork has no tower builder of LLaVA's kind",
    ),
    "another signature, as in VILA": (
        [(TOWERS, "def build_vision_tower(vision_tower_cfg,", "def build_vision_tower(name, config=None,")],
        "myfork.model.multimodal_encoder.builder.build_vision_tower takes (name, config, kwargs)",
    ),
    "a setting of a table row": (
        [("train/train.py", "class ModelArguments:\n", "class ModelArguments:\n    compressor_size: int = 2\n")],
        "--compressor_size 2 exclude each other: its compressor puts one visual token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PECULIARITIES)
def test_cannot_work(fork, name):
    changes, reason = PECULIARITIES[name]
    found = fork(*changes)
    assert found.verdict == "cannot work"
    assert reason in found.reason


def test_a_projector_called_with_keywords(fork):
    """As in VideoChat-Flash, whose own projectors take them."""
    own = "class Own(nn.Linear):\n    def forward(self, x, compress):\n        return super().forward(x)\n\n\n"
    found = fork(
        (ARCH, CALL, CALL.replace("(image_features)", "(image_features, compress=True)")),
        (PROJECTORS, "def build_vision_projector", own + "def build_vision_projector"),
        (PROJECTORS, "return nn.Linear(", "return Own("),
    )
    assert found.verdict == "cannot work"
    assert "runs with 'linear', and with 'saep' it fails: TypeError" in found.reason


def test_all_pictures_in_one_call_of_the_tower_and_a_projector_call_each(fork):
    """As in LongVA."""
    each = "image_features = torch.cat([self.get_model().mm_projector(f[None]) for f in image_features])"
    found = fork((ARCH, CALL, each))
    assert (found.verdict, found.reason[:10]) == ("works", "576 -> 144")


def test_a_builder_that_takes_any_name(fork):
    """As in TokenPacker and MoE-LLaVA: the bare name is its own, and ours works there under its full name."""
    read = "projector_type = getattr(config, 'mm_projector_type', 'linear')"
    found = fork((PROJECTORS, read, "projector_type = 'linear'"))
    assert (found.verdict, found.type_string) == ("works", "llava_projectors.saep")
    assert found.reason.startswith("576 -> 144 visual tokens")
    assert found.reason.endswith(
        "; tried with --mm_projector_type llava_projectors.saep, for myfork's own builder keeps 'saep'"
    )


def test_both_errors_are_shown_where_neither_runs(fork):
    found = fork((ARCH, CALL, "raise KeyError(type(self.get_model().mm_projector).__name__)"))
    assert found.verdict == "not checked"
    shown = re.sub(r" \(myfork/model/llava_arch.py:\d+\)", "", found.reason)
    assert shown == (
        "LlavaLlamaForCausalLM cannot be run on tiny parts without this plugin either: KeyError: 'Linear'; "
        "with 'saep' it ends in KeyError: 'SAEP'"
    )


SIDE_CLASS = """
from . import llava_llama
from ..llava_arch import LlavaMetaForCausalLM
class {name}(llava_llama.LlavaLlamaForCausalLM, LlavaMetaForCausalLM):
    def forward(self, *args, **kwargs):
        raise ValueError("Errors in loading:\\n\\tsizes differ\\n\\tmore")
"""


def test_a_class_that_did_not_run_is_named(fork, small_fork, tmp_path, capsys):
    """As in matryoshka-mm and dynamic_llava, where only a side class runs. That one alone is tried again."""
    (small_fork / LLAMA).with_name("llava_side.py").write_text(SIDE_CLASS.format(name="LlavaSideForCausalLM"))
    found = fork()
    said = [line for line in capsys.readouterr().err.splitlines() if not re.search(r": \d+ s$", line)]
    assert said == [
        "doctor: myfork: a tiny model of each of its LLM classes, with saep",
        "doctor: myfork: without this plugin, LlavaSideForCausalLM",
    ]
    (tmp_path / "empty").mkdir()
    again = trial.run_trial(
        "myfork", "linear", {}, str(tmp_path / "empty"), stock=True, models=["LlavaSideForCausalLM"]
    )
    assert [t.model for t in again.trials] == ["LlavaSideForCausalLM"]
    assert found.verdict == "works"
    assert found.reason.endswith(", with LlavaLlamaForCausalLM; not checked: LlavaSideForCausalLM")
    reason = next(t.reason for t in found.trials if t.model == "LlavaSideForCausalLM")
    assert "without this plugin either: ValueError: Errors in loading: sizes differ (" in reason


def test_two_classes_of_one_name(fork, small_fork):
    """As in vstar: the second took the place of the first."""
    (small_fork / LLAMA).with_name("llava_side.py").write_text(SIDE_CLASS.format(name="LlavaLlamaForCausalLM"))
    found = fork()
    place, name = "myfork.model.language_model", "LlavaLlamaForCausalLM"
    verdicts = {t.model: t.verdict for t in found.trials}
    assert verdicts == {f"{place}.llava_llama.{name}": "works", f"{place}.llava_side.{name}": "not checked"}
    assert found.reason.endswith(f", with {place}.llava_llama.{name}; not checked: {place}.llava_side.{name}")


def test_a_broken_import_inside_the_fork(fork):
    found = fork((TOWERS, "import os", "import os\nimport myfork.nothing"))
    assert found.verdict == "not checked"
    assert found.reason.endswith("No module named 'myfork.nothing': myfork is there, without this module")


@pytest.mark.parametrize("is_hidden", [True, False])
def test_a_missing_dependency(fork, is_hidden):
    """LLaVA's `except: pass` turns it into a failure to import a name; the first cause is what counts."""
    changes = [(TOWERS, "import os", "import os\nimport a_missing_dependency")]
    if not is_hidden:
        changes.append(("model/__init__.py", "try:\n", "if True:\n"))
        changes.append(("model/__init__.py", "except:\n    pass", ""))
    found = fork(*changes)
    assert found.verdict == "not checked"
    assert "with or without this plugin: ModuleNotFoundError: No module named 'a_missing_dependency'" in found.reason
    assert "install a_missing_dependency" in found.reason


def test_a_fork_that_cannot_run_by_itself(fork):
    found = fork((ARCH, "def encode_images(self, images):", "def encode_images(self, images):\n        1 / 0"))
    assert found.verdict == "not checked"
    assert "without this plugin either: ZeroDivisionError" in found.reason


def test_a_tower_that_cannot_wait_for_its_weights(fork):
    """LLaVA-NeXT's asks `"…" in args.mm_tunable_parts`, which is None, when it is built without them."""
    own = "    if kwargs.get('delay_load'):\n        'x' in vision_tower_cfg.tune\n    vision_tower = getattr("
    found = fork((TOWERS, "    vision_tower = getattr(", own))
    assert (found.verdict, found.reason[:10]) == ("works", "576 -> 144")


def test_a_constructor_of_another_class(fork):
    """Osprey's class that prepares inputs has a constructor; the model's is the one that builds tower and projector."""
    own = "class LlavaMetaForCausalLM(ABC):\n    def __init__(self):\n        super().__init__()\n"
    found = fork((ARCH, "class LlavaMetaForCausalLM(ABC):\n", own))
    assert (found.verdict, found.reason[:10]) == ("works", "576 -> 144")
    constructor = next(row for row in found.seams if row.seam == "model constructor")
    assert constructor.where == ("myfork.model.llava_arch.LlavaMetaModel.__init__",)


def test_packages_that_are_not_llava():
    out = say("--package", "lava", "--package", "json", status=1)
    assert "lava: not checked: no package 'lava' can be imported here: install LLaVA in this environment" in out
    assert "json: cannot work: json has no tower builder and no projector builder and no model constructor" in out
    assert "share4v (ShareGPT4V), " in out


def test_versions_outside_the_tested_range():
    newer = doctor.untested_versions({"transformers": "5.1.0", "torch": "2.4.1+cu121", "python": "3.11"})
    assert newer == ["transformers 5.1.0 is outside the tested 4.31 to 4.45"]
    assert doctor.untested_versions({"transformers": "4.37.2", "torch": None, "python": "3.12"}) == []


def test_beside_a_transformers_with_which_nothing_runs(fork, tmp_path):
    """As transformers 5: LLaVA hides the failure, then lacks a name."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '5.1.0'")
    found = fork(is_warm=False)
    assert found.verdict == "not checked"
    assert "ImportError: cannot import name " in found.reason


def test_a_crash_of_the_trial_is_no_verdict(fork):
    found = fork(("__init__.py", "from .model", "import os; os._exit(3)\nfrom .model"))
    assert (found.verdict, found.reason) == ("not checked", "its process ended with status 3: no output")


def test_the_remedy_of_a_hook_that_is_not_armed_names_what_is_there(tmp_path):
    checkout = Path(__file__).parents[1]
    assert doctor._how_to_arm(checkout, "/site").endswith(f"-m pip install {checkout}`")
    assert "install it with pip, from its checkout or wheel" in doctor._how_to_arm(tmp_path, "/site")
    (tmp_path / "llava_projectors.pth").touch()
    line = f"`import site; site.addsitedir({str(tmp_path)!r})` into a file /site/llava_projectors_folder.pth"
    assert line in doctor._how_to_arm(tmp_path, "/site")


def test_broken_torch_is_reported(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so is missing')")
    command = [sys.executable, "-m", "llava_projectors", "doctor"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 1
    assert "torch cannot be imported: OSError: libcudart.so is missing" in done.stderr
    assert "pip install --force-reinstall torch" in done.stderr


def test_a_setting_reaches_the_forks_own_code(fork):
    line = "vision_tower = model_args.vision_tower"
    needs = ("model/llava_arch.py", line, f"assert model_args.my_width == 7\n        {line}")
    assert fork(needs, my_width="7").verdict == "works"


def test_a_setting_is_a_name_and_a_value():
    assert (
        "'compressor' is not NAME=VALUE"
        in subprocess.run(
            [sys.executable, "-m", "llava_projectors", "doctor", "--argument", "compressor"],
            capture_output=True,
            text=True,
        ).stderr
    )
    assert [trial.literal(text) for text in ("336", "None", "patch", "-2")] == [336, None, "patch", -2]


def test_other_readers_of_the_tower_get_one_layer(build_model):
    """VCoder's segmentation projector expects C channels: the layer that LLaVA itself selects."""
    model = build_model("saep").get_model()
    stock = build_model("mlp2x_gelu").get_model()
    model.seg_mm_projector = nn.Identity()
    tower.give_other_readers_one_layer(model)
    tower.give_other_readers_one_layer(model)
    pictures = torch.randn(1, 3, 336, 336)
    features = model.get_vision_tower()(pictures)
    assert torch.equal(model.seg_mm_projector(features), stock.get_vision_tower()(pictures))
    assert model.mm_projector(features).shape == (1, 144, 80)


def test_several_layers_for_none_but_ours(build_model):
    model = build_model("mlp2x_gelu").get_model()
    model.seg_mm_projector = nn.Identity()
    tower.give_other_readers_one_layer(model)
    assert not model.seg_mm_projector._forward_pre_hooks


def test_a_video_tower_is_refused_with_a_remedy(model_args, build_model):
    from llava.model.multimodal_encoder.builder import build_vision_tower

    settings = vars(model_args("saep"))
    with pytest.raises(ValueError, match="--video_tower LanguageBind .* frames .* Train with the image tower alone$"):
        build_vision_tower(SimpleNamespace(**settings, video_tower="LanguageBind"))


def test_a_transformers_outside_the_tested_range_is_not_healthy(fork, monkeypatch):
    """A training step of LLaVA may run beside transformers 5; generating does not."""
    monkeypatch.setattr(doctor, "TESTED", {"transformers": ("3.0", "3.5")})
    found = fork()
    assert found.verdict == "not checked"
    assert "is outside the tested 3.0 to 3.5: the tiny model's training step runs (576 -> 144" in found.reason
