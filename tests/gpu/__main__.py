"""`python -m tests.gpu`: all that needs a GPU, in under ten minutes on one card, without network.

First the tests marked `cuda`, then the suites of `benchmarks.speed` in the time that is left. Nothing is
installed and nothing downloaded: docs/cuda.md says what has to be there. Each thing that is not run is
named with its reason.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "peft", "deepspeed", "llava-torch", "llava-projectors",
    "flash-attn", "bitsandbytes",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses (%(default)s)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (%(default)s)")
    parser.add_argument("--only", choices=("tests", "bench"), help="(both)")
    parser.add_argument("--csv", type=Path, help="of the bench (benchmarks/results/cuda.csv)")
    options = parser.parse_args()
    started = time.monotonic()
    print(f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES), sep=", ")
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print(f"torch {torch.__version__} sees no GPU here: nothing was run. `--device cpu` rehearses.")
            return 1
        print(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    print(flush=True)
    statuses = []
    if options.only != "bench":
        statuses.append(run_tests(options.device))
    if options.only != "tests":
        left = options.minutes - (time.monotonic() - started) / 60
        statuses.append(run_bench(options.device, options.csv, left))
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes in all")
    return max(statuses)


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def run_tests(device):
    # This machine need not have the plugins that the options in pyproject.toml ask for, nor what other tests import.
    options = ["-m", "cuda", "-ra", "-q", "--durations=10", "-o", "addopts=--strict-markers"]
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.cuda" in path.read_text()]
    return run(["pytest", *options, *files], {"LLAVA_PROJECTORS_TEST_DEVICE": device})


def run_bench(device, csv, minutes):
    if csv is None:
        csv = ROOT / ("runs/rehearsal.csv" if device == "cpu" else "benchmarks/results/cuda.csv")
    command = ["benchmarks.speed", "--device", device, "--csv", str(csv), "--minutes", f"{max(0, minutes):.2f}"]
    return run([*command, *(["--quick"] if device == "cpu" else [])], {})


def run(command, variables):
    print("$", *(f"{name}={value}" for name, value in variables.items()), "python -m", *command, flush=True)
    environment = {**os.environ, "TRANSFORMERS_OFFLINE": "1", **variables}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
