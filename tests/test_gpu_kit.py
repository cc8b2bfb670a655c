"""The script that runs on a card: what hangs, dies, or is cut off costs nothing else; and what it installs works."""

import json
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from gpu import run
from gpu.run import Step

ROOT = Path(__file__).parents[1]
MANY_FILES = 8  # that a rented machine may give back

FINE = Step("fine", ("-c", "print('measured 1.0')"), 60)
DIES = Step("dies", ("-c", "print('half', flush=True); import os; os._exit(3)"), 60)
# A child in a session of its own, whose parent takes no notice of being asked to end.
HANGS = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path("{out}/pid").write_text(str(child.pid))
print("row one", flush=True)
time.sleep(600)
"""


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Run the script on these steps, with this interpreter for an environment; returns status, results and log."""

    def call_it(steps, *arguments, out="out"):
        monkeypatch.setattr(run, "STEPS", steps)
        folder = tmp_path / out
        options = ["--python", sys.executable, "--device", "cpu", "--minutes", "3", "--out", str(folder)]
        status = run.main([*options, *arguments])
        return status, json.loads((folder / "steps.json").read_text()), (folder / "log.txt").read_text()

    return call_it


def is_running(pid):
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_step_that_hangs_or_dies_loses_nothing(call, tmp_path):
    hangs = Step("hangs", ("-c", HANGS), 3)
    started = time.monotonic()
    status, results, log = call((DIES, hangs, FINE))
    assert status == 1
    assert {name: result["status"] for name, result in results.items()} == {
        "dies": "failed",
        "hangs": "timed out",
        "fine": "passed",
    }
    assert time.monotonic() - started < 90
    printed = ["dies | half", "hangs | row one", "fine | measured 1.0"]
    assert [line for line in log.splitlines() if line in printed] == printed
    assert not is_running(int((tmp_path / "out" / "pid").read_text()))
    assert "timed out" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_second_call_goes_on_where_the_first_stopped(call, tmp_path):
    """In another folder, on another machine: what was not tried comes first, and what passed is not run again."""
    call((FINE, DIES))
    for file in (tmp_path / "out").iterdir():
        file.chmod(0o444)
    steps = (FINE, DIES, Step("new", FINE.command, 60))
    _, results, log = call(steps, "--earlier", str(tmp_path / "out"), out="second")
    assert list(results) == ["fine", "dies", "new"]
    ran = [line.split(" | ")[0] for line in log.splitlines() if " | $ " in line]
    assert ran == ["fine", "dies", "new", "dies"]


def test_no_step_begins_without_time(call, capsys):
    long = Step("long", FINE.command, 1000)
    _, results, _ = call((long, FINE))
    assert list(results) == ["fine"]
    assert "long: not started" in capsys.readouterr().out


def test_neighbours_that_measure_nothing_run_at_the_same_time(call, tmp_path):
    """Each waits for the other's file."""
    waits = """
import pathlib, time
pathlib.Path("{{out}}/{}").touch()
while not pathlib.Path("{{out}}/{}").exists():
    time.sleep(0.05)
"""
    steps = tuple(Step(a, ("-c", waits.format(a, b)), 30, beside=True) for a, b in ("xy", "yx"))
    status, _, _ = call(steps)
    assert status == 0


def test_every_test_for_a_gpu_is_in_a_step():
    named = {argument for step in run.STEPS for argument in step.command if argument.endswith(".py")}
    marked = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("tests/**/test_*.py")
        if "pytest.mark.cuda" in path.read_text()
    }
    assert marked - named == {str(Path(__file__).relative_to(ROOT))}  # this line
    assert all((ROOT / name).exists() for name in named)


def test_the_document_has_every_step_and_its_deadline():
    text = (ROOT / "docs" / "cuda.md").read_text()
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| `") and line.count("|") == 4]
    assert [(name.strip("|` "), seconds) for name, seconds in rows][: len(run.STEPS)] == [
        (step.name, str(step.seconds)) for step in run.STEPS
    ]


def test_few_files_come_back():
    """Those that steps name, and what the script itself writes."""
    named = {word for step in run.STEPS for argument in step.command for word in argument.split() if "{out}/" in word}
    assert len(named | {"log.txt", "steps.json", "summary.txt"}) <= MANY_FILES


def test_what_is_installed_sees_the_machine_and_is_the_tree(tmp_path):
    site = tmp_path / "site"
    (site / "llava_projectors").mkdir(parents=True)
    (site / "llava_projectors" / "__init__.py").write_text("raise ImportError('the code of an older kit')")
    (site / "of_the_kit.py").write_text("")
    with tarfile.open(tmp_path / "site.tar.xz", "w:xz") as archive:
        archive.add(site, "site")
    python = run.install(tmp_path / "site.tar.xz", tmp_path / "env")
    script = "import of_the_kit, torch, llava_projectors; print(torch.__file__, llava_projectors.__file__)"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    torch_file, our_file = done.stdout.split()
    assert not torch_file.startswith(str(tmp_path))
    assert our_file.startswith(str(tmp_path / "env"))


def test_another_python_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "FOR_PYTHON", (2, 7))
    with pytest.raises(SystemExit, match=r"the kit is for 2\.7"):
        run.main(["--out", str(tmp_path), "--minutes", "1"])


def test_an_unknown_step_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["--out", str(tmp_path), "--minutes", "1", "--steps", "tower"])
    assert "there is no step ['tower']" in capsys.readouterr().err
