"""The command `llava-projectors`, as a user types it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import warm
from PIL import Image
from safetensors import SafetensorError

import llava_projectors
from llava_projectors.commands import waiting
from llava_projectors.commands.cli import main
from llava_projectors.commands.demo import Assets
from llava_projectors.tiny.train import TrainingFailed, run

COMMAND = str(Path(sys.executable).with_name("llava-projectors"))


def cli(*arguments, status=0, stderr=False, run=warm.run, **environment):
    command = [sys.executable, "-m", "llava_projectors", *arguments]
    done = run(command, env={**os.environ, **environment}, cwd="/", capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if stderr else done.stdout


def test_as_a_module():
    """The script, and `python -m` where it is not on the PATH, as in all other tests here."""
    for command in ([COMMAND], [sys.executable, "-m", "llava_projectors"]):
        done = subprocess.run([*command, "list", "--json"], cwd="/", capture_output=True, text=True, check=True)
        assert done.stdout == cli("list", "--json")


def test_a_reader_that_stops_early_is_no_error():
    """As `list | head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([COMMAND, "list"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


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
    for size in ("1920", "0x5", "ax5", "1920x1080x3", "-3x4", "²x4", f"1x{10**20}"):
        assert "is no size in pixels like 1920x1080" in cli("list", f"--image={size}", status=2, stderr=True)


def test_version():
    assert cli("--version") == f"llava-projectors {llava_projectors.__version__}\n"


def test_check_without_an_llm(tiny, trained, tmp_path):
    resnet, listed = tmp_path / "resnet", tmp_path / "listed"
    for folder, config in ((resnet, {"model_type": "resnet"}), (listed, [])):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    adapter, checkpoint = trained("saep").adapter / "mm_projector.bin", trained("saep").checkpoint
    out = cli("check", "saep", "--vision-tower", str(tiny.coarse_tower), "--adapter", str(adapter))
    assert "12x12 -> 6x6, 144 -> 36 visual tokens, hidden states 4+7" in out
    assert "all its numbers are finite" in out
    seen = "24x24 -> 12x12, 576 -> 144 visual tokens, hidden states 12+23"
    assert cli("check", "saep") == f"type: saep\ntower: none given; on LLaVA-1.5's {seen}\n"
    name = "openai/clip-vit-large-patch14-336"  # whose config is known without the hub
    assert f"tower: {name}, {seen}\n" in cli("check", "saep", "--vision-tower", name)
    for folder in (checkpoint, adapter.parent):
        assert "every weight of the projector is there" in cli("check", "--model-path", str(folder))
    for arguments, message in (
        (["saep:kernel_size=1"], "does not fit: projector type 'saep:kernel_size=1': .* at least stride=2"),
        (["resampler:num_queries=0"], "does not fit: projector type 'resampler:num_queries=0': "),
        (["saep:inner_size=9999999999999"], r"'saep:inner_size=9999999999999' cannot be built: .*overflow"),
        ([f"saep:inner_size={10**23}"], rf"'saep:inner_size={10**23}' cannot be built: "),
        (
            ["saep:layers=6+30"],
            r"does not fit: .*layer 30 is out of range; the vision tower has 24 layers, .*\(LLaVA-1.5's, "
            r"openai/clip-vit-large-patch14-336; --vision-tower names another\)",
        ),
        (["saep:strid=3"], "does not fit: unknown option 'strid' .* did you mean 'stride'"),
        (["saep", "--model-path", str(tiny.llm / "nothing")], "^cannot read .*nothing/config.json"),
        (["saep:layers=3+40", "--vision-tower", str(tiny.coarse_tower)], "layer 40 is out of range; .* has 8 layers"),
        (["tokenpacker", "--vision-tower", str(tiny.coarse_tower), "--adapter", str(adapter)], "look like 'saep'"),
        (
            ["saep:stride=3", "--model-path", str(checkpoint)],
            "has stride=3, but the checkpoint was .* stride=2",
        ),
        (
            ["saep", "--vision-tower", str(resnet)],
            "the vision tower .*resnet is a 'resnet', no ViT of layers and patches",
        ),
        (["saep", "--model-path", str(listed)], "^cannot read .*listed/config.json"),
        ([], "nothing to check: give a TYPE, or --model-path"),
        (
            ["saep", "--adapter", "nothing/mm_projector.bin"],
            "^cannot read nothing/mm_projector.bin: No such file or directory",
        ),
    ):
        assert re.search(message, cli("check", *arguments, status=1, stderr=True)), arguments


def test_check_of_an_adapter_takes_the_tower_that_its_training_recorded(tiny, trained, tmp_path):
    adapter = trained("saep").adapter / "mm_projector.bin"
    out = cli("check", "saep", "--adapter", str(adapter))
    assert f"tower: {tiny.coarse_tower}, 12x12 -> 6x6, 144 -> 36 visual tokens, hidden states 4+7" in out
    alone = shutil.copy(adapter, tmp_path)
    out = cli("check", "saep", "--adapter", alone, status=1)
    assert "not checked: layers and patch grid, for want of a vision tower (--vision-tower)" in out
    assert f"adapter: {alone}, fits" in out


@pytest.mark.parametrize("command", ["check", "show"])
def test_a_vision_tower_named_by_a_relative_path(tiny, trained, tmp_path, monkeypatch, capsys, command):
    """As a training writes it that was given one; `check` and `show` say where it is, from every folder."""
    run = tmp_path / "run"
    checkpoint = shutil.copytree(trained("saep").checkpoint, run / "checkpoints" / "llava-x")
    shutil.copytree(tiny.coarse_tower, run / "towers" / "clip")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "towers/clip"}))
    pictures = [str(tiny.images / "flower.jpg")] if command == "show" else []
    command = [command, *pictures, "--model-path", str(checkpoint)]
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{checkpoint} has mm_vision_tower 'towers/clip' in its config.json, a path from {run}: " in line
    assert line.endswith(
        f"here {tmp_path}. Start it in {run}, or set mm_vision_tower in the config.json of {checkpoint} to "
        f"{run / 'towers' / 'clip'}"
    )
    monkeypatch.chdir(run)
    assert main(command) == 0


@pytest.mark.parametrize(
    ("arguments", "trained_with"),
    [
        (["tokenpacker:scale_factor=3"], "scale_factor=2 (now 3)"),
        (["tokenpacker", "--select-layer", "-3"], "layers="),
        (["tokenpacker:layers=1+3+5+7"], "(now 1+3+5+7)"),
    ],
)
def test_check_of_an_adapter_that_was_trained_otherwise(trained, arguments, trained_with):
    """Its weights have the shapes all the same."""
    adapter = trained("tokenpacker").adapter / "mm_projector.bin"
    assert "the same options and layers" in cli("check", "tokenpacker", "--adapter", str(adapter))
    err = cli("check", *arguments, "--adapter", str(adapter), status=1, stderr=True)
    assert "was trained with" in err
    assert trained_with in err


def test_check_of_an_adapter_without_a_record_says_so(trained, tmp_path):
    """Its type string has no layers, so nothing tells which it was trained on."""
    folder = tmp_path / "llava-old"
    shutil.copytree(trained("tokenpacker").adapter, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["mm_projector_options"]
    (folder / "config.json").write_text(json.dumps(config))
    out = cli("check", "tokenpacker", "--adapter", str(folder / "mm_projector.bin"), status=1)
    assert f"not checked: what {folder / 'mm_projector.bin'} was trained for" in out


@pytest.mark.parametrize(
    ("setting", "value"), [("mm_vision_select_layer", "-2"), ("mm_vision_select_layer", None), ("mm_vision_tower", 5)]
)
def test_check_quotes_a_setting_of_another_kind(trained, tmp_path, setting, value):
    folder = tmp_path / "llava"
    shutil.copytree(trained("saep").checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, setting: value}))
    assert f"{folder} has {setting} {value!r} in its config.json" in cli(
        "check", "--model-path", str(folder), status=1, stderr=True
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", ""], ["check", "saep", "--vision-tower", ""], ["check", "--model-path", ""],
        ["export", "llava", "out", "--new-projector", ""], ["export", "llava", "out", "--vision-tower", ""],
        ["export", "", "out"], ["export", "llava", "out", "--package", ""], ["show", "picture.jpg", "--type", ""],
        ["show", "picture.jpg", "--output", ""], ["demo", "--output", ""],
    ],
)  # fmt: skip
def test_an_empty_value_is_not_one_that_was_left_out(arguments):
    """As an unset variable of a shell gives it."""
    assert "it is empty" in cli(*arguments, status=2, stderr=True)


def test_plan_knows_the_layers_of_clip():
    assert "layer 90 is out of range" in cli("plan", "--type", "saep:layers=90", status=1, stderr=True)
    assert "above 0 and below 1e+15" in cli("plan", "--memory", "1e308", status=2, stderr=True)


def test_a_new_projector_takes_no_other_option():
    err = cli(
        "export", "llava", "out", "--new-projector", "saep", "--verify", "--dtype", "float16", status=1, stderr=True
    )
    assert "leave out --verify, --dtype" in err


def test_check_says_what_a_damaged_file_is(trained, tmp_path):
    folder = tmp_path / "llava-damaged"
    shutil.copytree(trained("saep").checkpoint, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    for name, data, message in (
        ("model.safetensors", whole[: len(whole) // 2], r"model.safetensors: it is truncated .*\d+ bytes"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "safetensors: it is a Git LFS pointer"),
        ("model.safetensors", b"abc", "model.safetensors: it is truncated or of another format"),
        ("model.safetensors", b"", "model.safetensors: it is empty"),
        ("pytorch_model.bin", b"some text", "pytorch_model.bin: it is truncated or of another format"),
    ):
        (folder / name).write_bytes(data)
        printed = cli("check", "--model-path", str(folder), status=1, stderr=True)
        assert re.search(f"^cannot read .*{message}", printed), printed
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--steps", "0"], "--steps: '0' is no whole number from 1"),
        (["demo", "--steps", "-1"], "--steps: '-1' is no whole number from 1"),
        (["demo", "--steps", "ten"], "--steps: 'ten' is no whole number from 1"),
        (["demo", "--steps", "²"], "--steps: '²' is no whole number from 1"),
        (["plan", "--gpus", "0"], "--gpus: '0' is no whole number from 1"),
        (["plan", "--text", "-1"], "--text: '-1' is no whole number from 0"),
        (["plan", "--memory", "nan"], "--memory: 'nan' is no number above 0"),
        (["plan", "--memory", "-4"], "--memory: '-4' is no number above 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_before_work_starts(capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("llava_projectors.commands.listing.print_types", interrupted)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "\nlist: interrupted\n"


def test_what_takes_long_is_said_again_and_again(monkeypatch):
    was_said = threading.Event()

    class Stream(io.StringIO):
        def write(self, text):
            if re.fullmatch(r"some work: \d+ s", text):
                was_said.set()
            return super().write(text)

    monkeypatch.setattr(waiting, "EVERY_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stderr", Stream())
    with waiting.waiting("some work"):
        assert was_said.wait(60)
    assert sys.stderr.getvalue().startswith("some work\nsome work: 0 s\n")


def test_help_and_bad_usage():
    for command in ([], ["list"], ["doctor"], ["demo"], ["check"], ["show"], ["export"], ["plan"]):
        assert "usage: llava-projectors" in cli(*command, "--help")
    out = cli("train", status=2, stderr=True)
    assert "invalid choice: 'train'" in out
    assert "usage" in cli(status=2, stderr=True)


def test_the_demo_refuses_a_folder_that_makes_an_mpt_of_its_llm(tmp_path):
    folder = tmp_path / "prompts"
    out = cli("demo", "--output", str(folder), status=1, stderr=True)
    assert f"cannot run the demo: LLaVA's script takes {folder}/vicuna for an MPT" in out
    assert not folder.exists()


@pytest.mark.parametrize("receiver", ["terminal", "command alone", "command alone, by kill"])
def test_ctrl_c_stops_the_demo_and_its_runs(tmp_path, can_train, receiver):
    """In a terminal all processes of the group are interrupted, elsewhere the command alone."""
    command = [sys.executable, "-m", "llava_projectors", "demo", "--output", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What a shell starts in the background, CI perhaps, ignores Ctrl-C, and so would all that it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd="/", start_new_session=True, preexec_fn=heed, **pipes) as demo:
        for line in demo.stdout:
            if "pretraining" in line:
                break
        runs = wait_for_children(demo)
        if receiver == "terminal":
            os.killpg(demo.pid, signal.SIGINT)
        else:
            demo.send_signal(signal.SIGTERM if "kill" in receiver else signal.SIGINT)
        printed, errors = demo.communicate()
    assert (demo.returncode, errors) == (130, "\ndemo: interrupted\n")
    assert not any(run.is_running() for run in runs)
    assert "fine-tuning" not in printed
    assert not (tmp_path / "tokenpacker-scale_factor-3").exists()


def wait_for_children(process):
    while not (children := psutil.Process(process.pid).children()):
        assert process.poll() is None
        time.sleep(0.05)
    return children


def test_the_demos_checkpoints_name_their_tower_from_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assets = Assets.make(Path("tiny"))
    assert assets.tower == tmp_path / "tiny" / "clip"
    assert assets.llm == Path("tiny/vicuna")  # as given: LLaVA's script looks for `mpt` in the whole path


def test_the_first_type_that_fails_stops_the_others(tmp_path, monkeypatch, capsys):
    def train(projector_type, folder, assets, steps, say, stop):
        if projector_type == "saep":
            raise TrainingFailed("exit status 1")
        run([sys.executable, "-c", "import time; time.sleep(1e6)"], folder / "log", stop=stop)

    monkeypatch.setattr("llava_projectors.commands.demo.Assets.make", lambda folder: None)
    monkeypatch.setattr("llava_projectors.commands.demo.train", train)
    monkeypatch.setattr("llava_projectors.commands.demo._workers", lambda: 2)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "s] saep failed: exit status 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(30, "Read-only file system", "/x"), "[Errno 30] Read-only file system: '/x'"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, error, message):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr("llava_projectors.commands.demo.make_vision_tower", refuse)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cannot run the demo: ")
    assert message in line


def test_a_disk_that_fills_while_training_is_one_line(tmp_path):
    command = [sys.executable, "-c", "raise OSError(28, 'No space left on device')"]
    with pytest.raises(TrainingFailed) as failure:
        run(command, tmp_path / "x.log")
    assert str(failure.value) == f"No space left on device: {tmp_path}; the whole output is in {tmp_path / 'x.log'}"


@pytest.mark.slow
def test_the_demo_trains_asks_and_prints_a_row_for_each_type(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llava_projectors.commands.demo.TYPES", ("mlp2x_gelu", "saep"))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "2", "--output", "tiny"]) == 0
    out = capsys.readouterr().out
    cli("check", "--model-path", str(tmp_path / "tiny" / "saep" / "llava"))  # from another folder
    for name, tokens, sequence in (("mlp2x_gelu", 144, 295), ("saep", 36, 187)):
        assert re.search(rf"^{name} +{tokens} +{sequence} +\d+\.\d+ +\d+\.\d+ +\d+\.\d+ ", out, re.MULTILINE), out


@pytest.mark.parametrize(
    ("command", "missing", "remedy"),
    [
        (["demo"], "sklearn", "install 'scikit-learn'"),
        (["demo"], "transformers", "install 'transformers<4.38,>=4.36'"),
        (["check", "saep", "--vision-tower", "x"], "transformers", "install 'transformers<4.38,>=4.36'"),
        (["show", "x.png"], "PIL", "install 'pillow'"),
        (["show", "x.png"], "matplotlib", "install 'matplotlib'"),
        (["list"], "torch", "install 'torch'"),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_installs_it(tmp_path, command, missing, remedy):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('no {missing}', name='{missing}')")
    out = cli(*command, status=1, stderr=True, run=subprocess.run, PYTHONPATH=str(tmp_path))
    (line,) = out.splitlines()
    assert re.match(f"{command[0]} cannot run: .*(no {missing}|the photographs come with scikit-learn)", line)
    assert line.endswith(f"; remedy: {sys.executable} -m pip {remedy}")


def test_without_llava_a_command_says_how_to_get_it(tmp_path):
    (tmp_path / "llava.py").write_text("raise ModuleNotFoundError('no llava', name='llava')")
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    arguments = ("show", str(picture), "--model-path", str(tmp_path), "--output", str(tmp_path / "x.png"))
    out = cli(*arguments, status=1, stderr=True, run=subprocess.run, PYTHONPATH=str(tmp_path))
    assert "show cannot run: no llava; remedy: install LLaVA in this environment" in out
