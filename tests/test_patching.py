"""The hook and the table of seams: reversible, idempotent, in any import order, for any package name."""

import functools
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import warm

import llava_projectors
from llava_projectors import autoload, seam_names
from llava_projectors.integration import seams

LLAVA = Path(importlib.metadata.distribution("llava-torch").locate_file("llava"))


def python(script, *, run=warm.run, cwd=None, **environment):
    """Run a script in an interpreter of its own and return what it printed, less what DeepSpeed says on import."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return "\n".join(line for line in done.stdout.splitlines() if "ds_accelerator" not in line)


SHOW_PATCHED = """
from llava.model import llava_arch
from llava.model.multimodal_projector import builder
print(hasattr(llava_arch.build_vision_tower, "__wrapped__"),
      hasattr(llava_arch.build_vision_projector, "__wrapped__"),
      llava_arch.build_vision_projector is builder.build_vision_projector,
      hasattr(llava_arch.LlavaMetaModel.initialize_vision_modules, "__wrapped__"))
"""


def test_a_fresh_interpreter_is_armed_and_imports_nothing():
    script = """
    import sys
    before = set(sys.modules)
    print("torch" in before, sorted(m for m in before if m.startswith("llava_projectors")))
    """
    out = python(script, run=subprocess.run)
    assert out == "False ['llava_projectors', 'llava_projectors.autoload', 'llava_projectors.seam_names']"


def test_importing_llava_patches_it():
    assert python(SHOW_PATCHED, run=subprocess.run) == "True True True True"


@pytest.mark.parametrize("value", ["1", "true"])
def test_disabled_by_the_environment(value):
    assert python("import llava_projectors" + SHOW_PATCHED, LLAVA_PROJECTORS_DISABLE=value) == "False False True False"


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_not_disabled_by_an_empty_or_false_value(value):
    assert python(SHOW_PATCHED, LLAVA_PROJECTORS_DISABLE=value) == "True True True True"


def test_explicit_patch_after_llava_was_imported():
    """LLaVA first, the hook off; then one call patches every module that holds a name, the user's too."""
    script = f"""
    from llava.model.multimodal_projector.builder import build_vision_projector as mine
    from llava.model.multimodal_projector.builder import build_vision_projector
    import llava_projectors
    assert not hasattr(build_vision_projector, "__wrapped__")
    states = {{r.seam: r.state for r in llava_projectors.patch()}}
    for seam in ("model loader", "training loop", "checkpoint writer", "best checkpoint"):
        assert states.pop(seam) == "missing"  # llava.model.builder and llava.train are not imported here
    assert states.pop("further initializers") == "missing"  # LLaVA has none, forks have
    assert set(states.values()) == {{"patched"}}, states
    assert build_vision_projector.__wrapped__ is mine
    {SHOW_PATCHED.replace(chr(10), chr(10) + "    ")}
    """
    assert python(script, LLAVA_PROJECTORS_DISABLE="1") == "True True True True"


def test_import_of_the_package_after_llava_patches_it():
    """As a fork's `import llava_projectors` does where no start-up file is installed."""
    script = "import sys; sys.meta_path.pop(0); del sys.modules['llava_projectors']; "
    script += "del sys.modules['llava_projectors.autoload']\nimport llava.model\nimport llava_projectors\n"
    assert python(script + SHOW_PATCHED) == "True True True True"


def attributes():
    from llava.model import builder as model_builder
    from llava.model import llava_arch
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.multimodal_encoder import builder as tower_builder
    from llava.model.multimodal_projector import builder as projector_builder
    from llava.train.llava_trainer import LLaVATrainer

    pairs = [
        (tower_builder, "build_vision_tower"),
        (projector_builder, "build_vision_projector"),
        (llava_arch, "build_vision_tower"),
        (llava_arch, "build_vision_projector"),
        (llava_arch.LlavaMetaModel, "__init__"),
        (llava_arch.LlavaMetaModel, "initialize_vision_modules"),
        (llava_arch.LlavaMetaForCausalLM, "initialize_vision_tokenizer"),
        (llava_arch.LlavaMetaForCausalLM, "prepare_inputs_labels_for_multimodal"),
        (llava_arch.LlavaMetaForCausalLM, "encode_images"),
        (LlavaLlamaForCausalLM, "from_pretrained"),
        (model_builder, "load_pretrained_model"),
        *((LLaVATrainer, name) for name in ("train", "save_model", "_load_best_model")),
    ]
    return {(owner.__name__, name): vars(owner)[name] for owner, name in pairs if name in vars(owner)}


@pytest.fixture
def patched_again():
    yield
    llava_projectors.patch()


def test_patch_is_idempotent_and_unpatch_restores_every_object(patched_again):
    llava_projectors.patch()
    once = attributes()
    states = {r.seam: r.state for r in llava_projectors.patch()}
    assert states.pop("further initializers") == "missing"  # LLaVA has none, forks have
    assert set(states.values()) == {"patched"}
    twice = attributes()
    assert all(once[key] is twice[key] for key in once)
    inherited = ("from_pretrained", "train", "save_model", "_load_best_model")  # LLaVA's classes have none of their own
    originals = {key: value.__wrapped__ for key, value in once.items() if key[1] not in inherited}

    llava_projectors.unpatch()
    restored = attributes()
    assert restored.keys() == originals.keys()
    assert all(restored[key] is originals[key] for key in originals)
    assert {r.state for r in seams.report("llava")} == {"found", "missing"}
    assert "llava" not in autoload.armed_packages()
    llava_projectors.unpatch()  # once more is harmless
    assert all(attributes()[key] is originals[key] for key in originals)

    llava_projectors.patch()
    assert all(attributes()[key].__wrapped__ is originals[key] for key in originals)


def test_a_loader_that_a_fork_defines_itself_is_left_alone(monkeypatch, patched_again):
    """It hands on what it likes of its arguments, and returns one model; LLaVA's own below it is still patched."""
    from llava.model.language_model import llava_llama

    class ForkForCausalLM(llava_llama.LlavaLlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, path, **kwargs):
            return super().from_pretrained(path, **kwargs).eval()

    ForkForCausalLM.__module__ = llava_llama.__name__
    own = vars(ForkForCausalLM)["from_pretrained"]
    monkeypatch.setattr(llava_llama, "ForkForCausalLM", ForkForCausalLM, raising=False)
    for change in (llava_projectors.patch, llava_projectors.unpatch):
        change()
        assert vars(ForkForCausalLM)["from_pretrained"] is own
        patched = "from_pretrained" in vars(llava_llama.LlavaLlamaForCausalLM)
        assert patched is (change is llava_projectors.patch)


def wrapped(function):
    @functools.wraps(function)
    def theirs(*args, **kwargs):
        return function(*args, **kwargs)

    return theirs


def hidden(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


@pytest.fixture
def seams_of_llava(patched_again):
    """Two attributes that are patched; afterwards LLaVA's own are there again."""
    from llava.model import llava_arch
    from llava.model.multimodal_projector import builder

    llava_projectors.patch()
    pairs = ((builder, "build_vision_projector"), (llava_arch.LlavaMetaModel, "initialize_vision_modules"))
    originals = [vars(owner)[name].__wrapped__ for owner, name in pairs]
    yield pairs
    for (owner, name), original in zip(pairs, originals):
        setattr(owner, name, original)


@pytest.mark.parametrize("over", [wrapped, hidden])
def test_what_others_put_over_our_wrappers_stays(seams_of_llava, over):
    """Patching again puts nothing over it, and after `unpatch` ours below it does nothing."""
    theirs = [over(vars(owner)[name]) for owner, name in seams_of_llava]
    for (owner, name), value in zip(seams_of_llava, theirs):
        setattr(owner, name, value)
    states = {r.seam: r.state for r in llava_projectors.patch()}
    assert states["projector builder"] == states["vision initializer"] == "patched"
    assert [vars(owner)[name] for owner, name in seams_of_llava] == theirs
    config = SimpleNamespace(mm_projector_type="saep", mm_hidden_size=32, hidden_size=80)
    build = theirs[0]
    assert type(build(config)).__name__ == "SAEP"

    llava_projectors.unpatch()
    assert [vars(owner)[name] for owner, name in seams_of_llava] == theirs
    with pytest.raises(ValueError, match="^Unknown projector type: saep$"):
        build(config)


def test_unpatch_leaves_nothing_in_transformers(patched_again):
    """There a hook lets its LLaVA classes load exported folders; somebody else's wrapper over it stays."""
    from transformers.models.llava import modeling_llava

    owner = modeling_llava.LlavaPreTrainedModel
    llava_projectors.patch()
    assert {"from_pretrained", "_from_config"} <= vars(owner).keys()
    ours = vars(owner)["_from_config"]
    owner._from_config = theirs = classmethod(functools.wraps(ours)(lambda cls, *args: ours.__func__(cls, *args)))
    try:
        llava_projectors.unpatch()
        assert "from_pretrained" not in vars(owner)
        assert vars(owner)["_from_config"] is theirs
    finally:
        del owner._from_config
    llava_projectors.patch()
    assert {"from_pretrained", "_from_config"} <= vars(owner).keys()


def test_patch_and_unpatch_from_several_threads(patched_again):
    llava_projectors.unpatch()
    originals = attributes()
    errors = []

    def work():
        try:
            for _ in range(30):
                llava_projectors.patch()
                llava_projectors.unpatch()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    llava_projectors.unpatch()
    assert errors == []
    assert all(attributes()[key] is originals[key] for key in originals)


def test_a_reloaded_module_is_patched_again(patched_again):
    from llava.model import llava_arch
    from llava.model.multimodal_projector import builder

    llava_projectors.patch()
    importlib.reload(builder)
    assert llava_arch.build_vision_projector is builder.build_vision_projector
    assert hasattr(builder.build_vision_projector, "__wrapped__")
    assert not hasattr(builder.build_vision_projector.__wrapped__, "__wrapped__")
    llava_projectors.unpatch()
    llava_projectors.patch()
    assert llava_arch.build_vision_projector is builder.build_vision_projector
    assert hasattr(builder.build_vision_projector, "__wrapped__")


def copy_llava(folder, package):
    """LLaVA's own sources under another package name, as a fork is; a dotted name is a folder below others."""
    place = folder / package.replace(".", "/")
    shutil.copytree(LLAVA, place, ignore=shutil.ignore_patterns("__pycache__", "serve", "eval"))
    for path in place.rglob("*.py"):
        path.write_text(path.read_text().replace("llava.", f"{package}.").replace("from llava ", f"from {package} "))
    return folder


SHOW_FORK = SHOW_PATCHED.replace("llava.model", "myfork.model")


def test_forks_with_another_package_name(tmp_path):
    copy_llava(tmp_path, "myfork")
    assert python(SHOW_FORK, cwd=tmp_path) == "False False True False"
    assert python(SHOW_FORK, cwd=tmp_path, LLAVA_PROJECTORS_PACKAGES="other, myfork") == "True True True True"
    script = "import llava_projectors; llava_projectors.patch('myfork')\n" + SHOW_FORK
    assert python(script, cwd=tmp_path) == "True True True True"


@pytest.mark.slow
def test_training_a_fork(tmp_path, tiny, can_train):
    """LLaVA's own training script under another name, from adapter to checkpoint."""
    from llava_projectors.tiny import train

    environment = {
        "PYTHONPATH": str(copy_llava(tmp_path, "myfork")),
        "LLAVA_PROJECTORS_PACKAGES": "myfork",
    }
    adapter, checkpoint = tmp_path / "llava-adapter", tmp_path / "llava"
    first = train.pretrain_arguments(tiny.pretrain_data, tiny.images, max_steps=2)
    second = train.finetune_arguments(tiny.finetune_data, tiny.images, adapter / "mm_projector.bin", max_steps=2)
    for folder, options in ((adapter, first), (checkpoint, second)):
        command = train.training_command(folder, tiny.llm, tiny.coarse_tower, "tokenpacker:scale_factor=3", **options)
        command[command.index("llava.train.train")] = "myfork.train.train"
        output = train.run(command, tmp_path / "log", environment)
        assert output.count("llava_projectors: tokenpacker:scale_factor=3: 144 -> 16 visual tokens") == 1
        assert all(value > 0.0 for value in train.losses(folder))
    script = f"""
    from myfork.model.builder import load_pretrained_model
    _, model, _, _ = load_pretrained_model({str(checkpoint)!r}, None, "llava", device="cpu", device_map="cpu")
    print(type(model).__module__, model.get_vision_tower().num_patches)
    """
    assert python(script, **environment).splitlines()[-1] == "myfork.model.language_model.llava_llama 16"


PATCHES = Path(__file__).parents[1] / "patches"
CONNECTOR_PATCH = "tinyllava_factory.patch"


def apply(patch, folder):
    command = ["git", "apply", "--unidiff-zero", PATCHES / patch]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(command, cwd=folder, check=True, env=environment)


@pytest.mark.parametrize("patch", sorted({path.name for path in PATCHES.glob("*.patch")} - {CONNECTOR_PATCH}))
def test_patch_files(tmp_path, patch):
    """The explicit import alone, with no start-up hook, patches the package; applied to LLaVA under the fork's name."""
    text = (PATCHES / patch).read_text()
    patched = tmp_path / re.search(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE).group(1)
    call = re.search(r'^\+llava_projectors.patch\("([\w.]+)"\)$', text, re.MULTILINE)
    package = call.group(1) if call else "llava"
    if package == "llava":
        shutil.copytree(LLAVA, tmp_path / "llava", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        copy_llava(tmp_path, package)
    if "--- /dev/null" in text:  # the fork is a namespace package
        patched.unlink()
    original = patched.read_text() if patched.exists() else ""
    apply(patch, tmp_path)
    assert patched.read_text().endswith(original)
    script = (
        "import sys; sys.meta_path.pop(0)\nfor m in list(sys.modules):\n  if 'llava_proj' in m: del sys.modules[m]\n"
    )
    script += SHOW_PATCHED.replace("llava.model", f"{package}.model")
    assert python(script, cwd=tmp_path) == "True True True True"


def test_the_patch_that_adds_a_connector(tmp_path):
    """In a package with what TinyLLaVA_Factory has of connectors: a base class, and a registry that reads files."""
    place = tmp_path / "tinyllava" / "model" / "connector"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(
        "kinds = {}\ndef register_connector(name):\n    return lambda cls: kinds.setdefault(name, cls)\n"
        "from . import llava_projectors\n"
    )
    (place / "base.py").write_text(
        "from torch import nn\nclass Connector(nn.Module):\n"
        "    def forward(self, x):\n        return self._connector(x)\n"
    )
    apply(CONNECTOR_PATCH, tmp_path)
    script = """
    from types import SimpleNamespace
    import torch
    from tinyllava.model.connector import kinds
    def build(kind):
        config = SimpleNamespace(connector_type=kind, vision_hidden_size=8, hidden_size=16, vision_feature_layer=-2)
        return kinds["llava_projectors"](config)
    print(list(build("llava_projectors.saep:layers=-2")(torch.ones(1, 16, 8)).shape))
    try:
        build("llava_projectors.saep")
    except ValueError as error:
        print(error)
    """
    assert python(script, cwd=tmp_path).splitlines() == [
        "[1, 4, 16]",
        "'llava_projectors.saep' reads several layers: say layers=-2 in the type",
    ]


def test_patching_what_is_not_there_is_an_error():
    with pytest.raises(seams.PatchError, match="cannot patch 'lava': no such package"):
        llava_projectors.patch("lava")
    assert "lava" not in autoload.armed_packages()


def test_a_name_of_a_seam_may_be_bound_to_nothing():
    """As `except ImportError: build_vision_tower = None` leaves it."""
    module = ModuleType("fork.model")
    module.build_vision_tower = None
    assert not seam_names.holds_seam(module)


def test_a_fork_without_a_seam_fails_when_a_projector_is_asked_for(tmp_path):
    """Not at import, where LLaVA swallows errors; and a stock projector is not disturbed."""
    copy_llava(tmp_path, "myfork")
    builder = tmp_path / "myfork" / "model" / "multimodal_encoder" / "builder.py"
    builder.write_text(builder.read_text().replace("def build_vision_tower(", "def make_tower("))
    arch = tmp_path / "myfork" / "model" / "llava_arch.py"
    arch.write_text(arch.read_text().replace("import build_vision_tower", "import make_tower as build_vision_tower"))
    script = """
    from types import SimpleNamespace
    from myfork.model.llava_arch import build_vision_projector
    print(build_vision_projector(SimpleNamespace(mm_projector_type="linear", mm_hidden_size=4, hidden_size=8)))
    try:
        build_vision_projector(SimpleNamespace(mm_projector_type="saep", mm_hidden_size=4, hidden_size=8))
    except Exception as error:
        print(type(error).__name__, error)
    """
    lines = python(script, cwd=tmp_path, LLAVA_PROJECTORS_PACKAGES="myfork").splitlines()
    assert lines[0] == "Linear(in_features=4, out_features=8, bias=True)"
    assert lines[1].startswith("PatchError 'myfork' is patched only in part")
    assert "its tower builder is missing" in lines[1]
    assert "doctor --package myfork" in lines[1]


@pytest.mark.parametrize(
    "breakage",
    [
        # what a half-removed installation looks like, and a table that does not fit what it finds
        "import sys; sys.modules['llava_projectors.integration'] = None",
        "from llava_projectors.integration import seams; seams.SEAMS = None",
    ],
)
def test_an_error_while_patching_leaves_llava_importable(breakage):
    """One line on stderr, and LLaVA as it is without us: it would swallow an exception."""
    script = f"""
    {breakage}
    import llava.model.multimodal_projector.builder as builder
    from llava.model import LlavaLlamaForCausalLM
    print(hasattr(builder.build_vision_projector, "__wrapped__"))
    """
    done = warm.run([sys.executable, "-c", textwrap.dedent(script)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
    assert "llava_projectors: cannot patch llava.model.multimodal_projector.builder, it stays as it is" in done.stderr
    assert "llava-projectors doctor" in done.stderr
