"""Every type on fake CUDA tensors, in a process of its own: nothing leaves the device, nothing waits for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "fake_cuda" / "device.cpp"
WRONG = {
    "item": "waits for the device",
    "nonzero": "waits for the device",
    "comparison": "waits for the device",
    "to the host": "makes a tensor on cpu",
    "made elsewhere": "makes a tensor on cpu",
}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    """Case -> what was wrong, or ""."""
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA, where fake tensors need no device of ours")
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    (folder,) = cpp_extension.library_paths()
    flags = ["-std=c++20", "-shared", "-fPIC", *(f"-I{path}" for path in cpp_extension.include_paths())]
    links = [f"-L{folder}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}"]
    subprocess.run([os.environ.get("CXX", "c++"), *flags, SOURCE, "-o", library, *links], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_no_type_leaves_the_device_or_waits_for_it(problems):
    cases = {case: problem for case, problem in problems.items() if case not in WRONG}
    assert len(cases) == 12 * 3 * 2 * 2 * 2
    assert {case: problem for case, problem in cases.items() if problem} == {}


@pytest.mark.slow
def test_what_would_wait_is_found(problems):
    for case, words in WRONG.items():
        assert words in problems[case]
