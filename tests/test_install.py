"""The start-up file: in wheel and editable installs, gone after uninstall, harmless whatever is broken.

Each test makes a virtual environment of its own, without torch: an interpreter must start without it.
"""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHOW_ARMED = "import sys; print('llava_projectors.autoload' in sys.modules)"


class Environment:
    def __init__(self, folder):
        # Without pip, which this environment's own pip stands in for: a fraction of the time.
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        self.site_packages = next((folder / "lib").glob("python3*")) / "site-packages"
        self.pth = self.site_packages / "llava_projectors.pth"

    def run(self, *arguments, **environment):
        done = subprocess.run(
            [self.python, *arguments], env={**os.environ, **environment}, cwd="/", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()

    def pip(self, *arguments):
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr + done.stdout

    def installed_names(self):
        return {path.name for path in self.site_packages.glob("*llava*")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # A copy, so that no build folder is left in the checkout and no stale one gets into the wheel.
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "tests"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def editable_wheel(wheel, tmp_path_factory):
    """What `pip install -e` installs: it calls this hook of the build backend, and the result is a wheel too."""
    folder = tmp_path_factory.mktemp("editable")
    script = f"import build_with_pth; build_with_pth.build_editable({str(folder)!r})"
    source = wheel.parent / "source"
    environment = {**os.environ, "PYTHONPATH": str(source / "build_backend")}
    subprocess.run([sys.executable, "-c", script], cwd=source, env=environment, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(params=["wheel", "editable_wheel"])
def installed(request, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "-q", "--no-deps", str(request.getfixturevalue(request.param)))
    return environment


def test_start_up_file_arms_and_uninstall_removes_it(installed):
    assert installed.pth.exists()
    assert installed.run("-c", SHOW_ARMED) == "True"
    assert installed.run("-c", "import sys; print('torch' in sys.modules)") == "False"
    assert installed.run("-c", "import llava_projectors; print(llava_projectors.__version__)")
    assert installed.run("-S", "-c", SHOW_ARMED) == "False"
    installed.pip("uninstall", "-q", "-y", "llava-projectors")
    assert installed.installed_names() == set()
    assert installed.run("-c", SHOW_ARMED) == "False"


def test_a_folder_on_the_path_is_armed_as_the_documents_say(tmp_path, wheel):
    """Python reads start-up files from site-packages only: the line of docs/troubleshooting.md names the folder."""
    environment, folder = Environment(tmp_path / "venv"), tmp_path / "folder"
    environment.pip("install", "-q", "--no-deps", "--target", str(folder), str(wheel))
    assert environment.run("-c", SHOW_ARMED, PYTHONPATH=str(folder)) == "False"
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    (command,) = re.findall(r"^echo .+ > .+\.pth\"$", text, re.MULTILINE)
    command = command.replace("/the/folder", str(folder)).replace("python ", f"{environment.python} ")
    subprocess.run(["sh", "-c", command], check=True)
    assert environment.run("-c", SHOW_ARMED) == "True"


def test_switched_off(installed):
    armed = "import sys, llava_projectors.autoload as a; print(a.armed_packages())"
    assert installed.run("-c", armed) == "('llava',)"
    assert installed.run("-c", armed, LLAVA_PROJECTORS_DISABLE="1") == "()"
    assert installed.run("-c", armed, LLAVA_PROJECTORS_PACKAGES=" share4v,mgm,llava,") == "('llava', 'share4v', 'mgm')"


@pytest.mark.parametrize("torch", [None, "raise RuntimeError('broken')", "import sys; sys.exit(3)"])
def test_a_missing_or_broken_torch_stops_no_interpreter(installed, torch):
    if torch is not None:
        (installed.site_packages / "torch.py").write_text(torch)
    assert installed.run("-c", "print('alive')") == "alive"
    assert installed.run("-c", "import llava_projectors; print('alive')") == "alive"


@pytest.mark.parametrize("broken", ["raise RuntimeError", "syntax error", None])
def test_a_broken_package_stops_no_interpreter(tmp_path, wheel, broken):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "-q", "--no-deps", str(wheel))
    autoload = environment.site_packages / "llava_projectors" / "autoload.py"
    autoload.unlink()
    if broken:
        autoload.write_text(broken)
    assert environment.run("-c", "print('alive')") == "alive"


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.testzip() is None
        record = next(name for name in names if name.endswith("/RECORD"))
        listed = {line.split(",")[0] for line in archive.read(record).decode().splitlines()}
    assert set(names) == listed
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"llava_projectors", "llava_projectors.pth"}
    assert {"llava_projectors/py.typed", "llava_projectors/commands/show/page.html"} <= set(names)
