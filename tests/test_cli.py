"""The command `llava-projectors`, as a user types it."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llava_projectors.integration.seams import SEAMS

COMMAND = str(Path(sys.executable).with_name("llava-projectors"))


def cli(*arguments, status=0, stderr=False, **environment):
    done = subprocess.run(
        [COMMAND, *arguments], env={**os.environ, **environment}, cwd="/", capture_output=True, text=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if stderr else done.stdout


def test_as_a_module():
    """Where the script is not on the PATH."""
    command = [sys.executable, "-m", "llava_projectors", "list", "--json"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == cli("list", "--json")


def test_list():
    out = cli("list")
    assert re.search(r"saep:stride=2 +144 tokens +75 % fewer", out)
    assert re.search(r"tokenpacker:scale_factor=3 +64 tokens +89 % fewer", out)
    assert re.search(r"order +default pointwise_first +pointwise_first \| depthwise_first", out)
    entries = {entry["name"]: entry for entry in json.loads(cli("list", "--json"))}
    assert {row["type"]: row["tokens"] for row in entries["tokenpacker"]["tokens"]} == {
        "tokenpacker:scale_factor=2": 144,
        "tokenpacker:scale_factor=3": 64,
        "tokenpacker:scale_factor=4": 36,
    }
    assert entries["saep"]["options"][0] == {
        "name": "stride",
        "default": "2",
        "choices": ["2", "3", "4"],
        "expects": "one of 2, 3, 4",
    }


def test_list_for_a_picture():
    out = cli("list", "--image", "1920x1080")
    assert re.search(r"slice:patch_num=9 +2x4 tiles and a thumbnail", out)
    # 9 tiles with the thumbnail, each of 144 tokens and a separator
    assert re.search(r"tokenpacker:scale_factor=2 +144 +1305 ", out)
    report = json.loads(cli("list", "--image", "300x300", "--json"))
    assert report["grids"] == {f"slice:patch_num={n}": [1, 1] for n in (9, 16, 25)}
    (saep,) = (row for row in report["types"] if row["type"] == "saep:stride=3")
    assert saep == {"type": "saep:stride=3", "tile": 64, **dict.fromkeys(report["grids"], 65)}
    for size in ("1920", "0x5", "ax5", "1920x1080x3", "-3x4"):
        assert "is no size in pixels like 1920x1080" in cli("list", f"--image={size}", status=2, stderr=True)


def test_doctor_on_a_healthy_environment():
    out = cli("doctor")
    assert "armed in a fresh interpreter" in out
    assert "1.2.2.post1" in out
    assert out.count("    patched  ") == len(SEAMS)
    assert "PROBLEM" not in out
    report = json.loads(cli("doctor", "--json"))
    assert report["healthy"] is True
    assert report["versions"]["transformers"] == importlib.metadata.version("transformers")
    assert [seam["state"] for seam in report["packages"][0]["seams"]] == ["patched"] * len(SEAMS)


def test_doctor_says_when_the_hook_is_switched_off():
    out = cli("doctor", status=1, LLAVA_PROJECTORS_DISABLE="1")
    assert "PROBLEM: the hook is switched off by the environment variable LLAVA_PROJECTORS_DISABLE=1: unset it" in out
    assert json.loads(cli("doctor", "--json", status=1, LLAVA_PROJECTORS_DISABLE="1"))["healthy"] is False


def test_doctor_on_packages_that_are_not_llava():
    out = cli("doctor", "--package", "lava", "--package", "json", status=1)
    assert "PROBLEM: no package 'lava' can be imported here: install LLaVA in this environment" in out
    assert "PROBLEM: json has no model.multimodal_encoder.builder.build_vision_tower and no " in out
    assert out.count("tried: llava (LLaVA, LLaVA-NeXT, LLaVA-Med), share4v (ShareGPT4V), mgm (MGM)") == 2


def fork(folder, **files):
    for name, text in {"__init__.py": "", "model/__init__.py": "", **files}.items():
        path = folder / "myfork" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"PYTHONPATH": str(folder)}


def test_doctor_finds_the_error_that_llava_hides(tmp_path):
    """LLaVA's `except: pass` turns any missing dependency into a failure to import a name."""
    environment = fork(
        tmp_path,
        **{
            "__init__.py": "from .model import LlavaLlamaForCausalLM",
            "model/__init__.py": "try:\n  from .language_model.llava_llama import LlavaLlamaForCausalLM\nexcept: pass",
            "model/language_model/__init__.py": "",
            "model/language_model/llava_llama.py": "import a_missing_dependency",
        },
    )
    out = cli("doctor", "--package", "myfork", status=1, **environment)
    assert "importing 'myfork' fails, with or without this plugin: ImportError: cannot import name" in out
    assert "the cause, which myfork hides: ModuleNotFoundError: No module named 'a_missing_dependency'" in out


def test_doctor_says_how_to_patch_a_fork(tmp_path):
    environment = fork(
        tmp_path,
        **{
            "model/multimodal_encoder/builder.py": "def build_vision_tower(cfg): ...",
            "model/multimodal_projector/builder.py": "def build_vision_projector(config): ...",
            "model/my_arch.py": "class MyMetaModel:\n"
            "    def __init__(self, config): ...\n"
            "    def initialize_vision_modules(self, model_args): ...",
        },
    )
    out = cli("doctor", "--package", "myfork", status=1, **environment)
    assert "PROBLEM: myfork can be patched but is not: set LLAVA_PROJECTORS_PACKAGES=myfork, or call" in out
    out = cli("doctor", "--package", "myfork", LLAVA_PROJECTORS_PACKAGES="myfork", **environment)
    assert out.count("    patched  ") == 4  # the two safeguards have no place in this fork


def test_broken_torch_is_reported(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so is missing')")
    out = cli("doctor", status=1, stderr=True, PYTHONPATH=str(tmp_path))
    assert "torch cannot be imported: OSError: libcudart.so is missing" in out
    assert "remedy: reinstall it" in out


def test_help_and_bad_usage():
    for command in ([], ["list"], ["doctor"], ["demo"]):
        assert "usage: llava-projectors" in cli(*command, "--help")
    out = cli("train", status=2, stderr=True)
    assert "invalid choice: 'train'" in out
    assert "usage" in cli(status=2, stderr=True)


@pytest.mark.parametrize("missing", ["sklearn", "transformers"])
def test_demo_says_what_to_install(tmp_path, missing):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{missing}'\")")
    out = cli("demo", "--output", str(tmp_path), status=1, stderr=True, PYTHONPATH=str(tmp_path))
    assert f"the demo lacks a package: No module named '{missing}'" in out
    assert "pip install 'llava-projectors[demo]'" in out
