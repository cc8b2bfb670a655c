"""What the start-up file costs an interpreter that never imports LLaVA.

Installs the wheel in a virtual environment of its own and starts `python -c pass` with the file
and without it, in turn. Writes one row per run to a CSV and prints the medians.

    python -m benchmarks.startup [--runs 30] [--csv benchmarks/results/startup.csv]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from benchmarks.table import write_rows
from llava_projectors.commands.arguments import at_least

ROOT = Path(__file__).parents[1]


def install(folder: Path) -> Path:
    """A virtual environment with this package alone; returns its folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheels = folder / "wheels"
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    wheel = next(wheels.glob("*.whl"))
    subprocess.run([*pip, "--python", python, "install", "-q", "--no-deps", wheel], check=True)
    return folder / "venv"


def milliseconds_to_start(python: Path) -> float:
    """Wall-clock time of one interpreter, start to exit."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LLAVA_"))}
    started = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True, env=environment, cwd="/")
    return (time.perf_counter() - started) * 1000


def measure(environment: Path, runs: int) -> list[tuple[float, float]]:
    """(with, without) the start-up file, interleaved, after two runs to warm the disk cache."""
    python = environment / "bin" / "python"
    (pth,) = environment.glob("lib/python3*/site-packages/llava_projectors.pth")
    hidden = pth.with_suffix(".off")
    pairs = []
    for number in range(runs + 2):
        with_hook = milliseconds_to_start(python)
        pth.rename(hidden)
        without = milliseconds_to_start(python)
        hidden.rename(pth)
        if number >= 2:
            pairs.append((with_hook, without))
    return pairs


def main() -> None:
    """Parse the command line, measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=at_least(2), default=30, help="interleaved pairs (%(default)s)")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "startup.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = measure(install(Path(folder)), arguments.runs)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    facts = {"python": platform.python_version(), "machine": machine}
    rows = [
        {"run": number, "with_hook_ms": f"{with_hook:.3f}", "without_hook_ms": f"{without:.3f}", **facts}
        for number, (with_hook, without) in enumerate(pairs)
    ]
    write_rows(arguments.csv, rows)
    medians = [statistics.median(column) for column in zip(*pairs)]
    differences = [with_hook - without for with_hook, without in pairs]
    low, middle, high = statistics.quantiles(differences, n=4)
    print(f"median with {medians[0]:.2f} ms, without {medians[1]:.2f} ms")
    print(f"difference: median {middle:.2f} ms, quartiles {low:.2f} to {high:.2f} ms")


if __name__ == "__main__":
    main()
