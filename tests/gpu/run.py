"""All that needs a GPU, on a machine without network: `python3 tests/gpu/run.py --out DIR --minutes 8`.

It needs the standard library, a Python 3.12 that has torch, this tree, and the archive that `make cuda-kit`
has made. It makes a virtual environment that sees the packages of that Python, and runs the steps below in
turn, the most valuable first, each with a deadline. What a step prints and measures is in DIR at once; a step that
fails or hangs takes nothing from the others. A second call goes on where the first stopped: with the same DIR, or
with `--earlier` and what the first has left in it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOR_PYTHON = (3, 12)  # the kit's compiled packages
SUMMARY_SECONDS = 25  # kept for the tables at the end
GRACE_SECONDS = 3  # between asking a process to end and killing it
PASSED, FAILED, TIMED_OUT = "passed", "failed", "timed out"
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-m", "cuda", "-v", "-ra")


@dataclass(frozen=True)
class Step:
    """Something that is run in a process of its own.

    Attributes:
        name: in the log and the summary.
        command: arguments of the environment's Python; `{out}`, `{device}`, `{work}` and `{quick}` are filled in.
        seconds: after so long it is killed.
        beside: it measures no time, and may run at the same time as its neighbours.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    beside: bool = False


def marked(name: str, seconds: float, *files: str, beside: bool = True) -> Step:
    """The tests of these files that are marked `cuda`."""
    return Step(name, (*PYTEST, "--basetemp", f"{{work}}/{name}", *files), seconds, beside)


def bench(suite: str, seconds: float) -> Step:
    """A suite of `benchmarks.speed`, without the groups that the CSV has already."""
    where = ("--device", "{device}", "--csv", "{out}/speed.csv", "{quick}")
    return Step(
        f"speed-{suite}",
        ("-m", "benchmarks.speed", "--suite", suite, "--missing", "--only", "measure", *where),
        seconds,
    )


STEPS = (
    Step("machine", ("tests/gpu/machine.py", "{device}"), 60),
    marked("kernels", 40, "tests/test_kernels.py", beside=False),
    marked("values", 60, "tests/test_truncated_encoder.py", "tests/gpu/test_values.py", beside=False),
    bench("model", 140),
    bench("generate", 80),
    bench("scaling", 80),
    bench("tower", 40),
    bench("projector", 90),
    Step(
        "variants", ("-m", "benchmarks.variants", "--device", "{device}", "--csv", "{out}/variants.csv", "{quick}"), 60
    ),
    Step("profile", ("-m", "benchmarks.profiles", "--device", "{device}", "--out", "{out}/profile.txt", "{quick}"), 60),
    marked("training", 150, "tests/test_llava_training.py", "tests/test_lora.py"),
    marked("zero", 180, "tests/test_deepspeed.py"),
    marked("serving", 150, "tests/test_serving.py"),
    marked("roads", 200, "tests/gpu/test_roads.py"),
    marked("precision", 120, "tests/test_precision.py"),
)


class Log:
    """One file for all steps, each line with the step's name, written at once."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a", encoding="utf-8")
        self.lock = threading.Lock()

    def write(self, name: str, line: str) -> None:
        """Add a line."""
        with self.lock:
            self.file.write(f"{name} | {line.rstrip()}\n")
            self.file.flush()


@dataclass
class Run:
    """What the steps of a call share.

    Attributes:
        python: interpreter of the environment that steps run in.
        device: cuda or cpu.
        out: folder of the results.
        work: folder of everything else.
        end: of all steps, by `time.monotonic`.
        patience: times a step's seconds: its deadline.
    """

    python: str
    device: str
    out: Path
    work: Path
    end: float
    patience: float

    def __post_init__(self) -> None:
        self.log = Log(self.out / "log.txt")
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen[str]] = set()
        self.last: dict[str, str] = {}
        path = self.out / "steps.json"
        self.results: dict[str, dict[str, object]] = json.loads(path.read_text()) if path.exists() else {}

    def note(self, name: str, status: str, seconds: float, last: str) -> None:
        """Keep how a step ended, and print it."""
        with self.lock:
            self.results[name] = {"status": status, "seconds": round(seconds, 1), "last": last}
            (self.out / "steps.json").write_text(json.dumps(self.results, indent=1) + "\n")
            print(f"{name}: {status} after {seconds:.0f} s: {last}", flush=True)

    def environment(self, name: str) -> dict[str, str]:
        """Of a step: nothing is written at home, nothing fetched, no package that needs jax or TensorFlow."""
        home = self.work / "home"
        home.mkdir(exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {
            **kept,
            "HOME": str(home),
            "HF_HOME": str(home / "huggingface"),
            "TRITON_CACHE_DIR": str(home / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / f"{name}-inductor"),  # a compiler that is killed spoils it
            "XDG_CACHE_HOME": str(home / "cache"),
            "PATH": os.pathsep.join([str(Path(self.python).parent), os.environ.get("PATH", "")]),
            "USE_FLAX": "0",
            "USE_TF": "0",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # of what the machine has, some import jax
            "TQDM_MININTERVAL": "5",
            "LLAVA_PROJECTORS_TEST_DEVICE": self.device,
            "LLAVA_PROJECTORS_TEST_ROOT": str(self.work / "tiny"),  # what one step has trained, others load
            "LLAVA_PROJECTORS_TEST_TRANSFORMERS": sys.executable,  # with the machine's own, current transformers
        }

    def command(self, step: Step) -> list[str]:
        """The step's command line, filled in."""
        quick = "--quick" if self.device == "cpu" else ""
        values = {"out": self.out, "work": self.work, "device": self.device, "quick": quick}
        return [self.python, *filter(None, (argument.format(**values) for argument in step.command))]

    def execute(self, step: Step) -> None:
        """Run a step to its end or its deadline, unless less than half of its time is left."""
        deadline = step.seconds * self.patience
        left = self.end - time.monotonic()
        if left < deadline / 2:
            print(f"{step.name}: not started, {max(0, left):.0f} of {deadline:.0f} s are left", flush=True)
            return
        started = time.monotonic()
        self.log.write(step.name, f"$ {' '.join(self.command(step)[1:])}")
        child = start(self.command(step), self.environment(step.name))
        self.running.add(child)
        reader = threading.Thread(target=self.copy_output, args=(step.name, child), daemon=True)
        reader.start()
        try:
            status = PASSED if child.wait(min(deadline, left)) == 0 else FAILED
        except subprocess.TimeoutExpired:
            status = TIMED_OUT
        stop(child)
        self.running.remove(child)
        reader.join(GRACE_SECONDS)  # what has outlived even that may hold the pipe
        self.note(step.name, status, time.monotonic() - started, self.last.get(step.name, ""))

    def copy_output(self, name: str, child: subprocess.Popen[str]) -> None:
        """Line by line into the log."""
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip():
                self.last[name] = line.strip()[-200:]
                self.log.write(name, line)

    def give_up(self) -> None:
        """Stop what runs and start nothing more: the summary is next."""
        self.end = 0
        for child in list(self.running):
            stop(child)


def start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """A process in a session of its own, with one stream for all that it prints."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def stop(child: subprocess.Popen[str]) -> None:
    """End a process, its session, and what has left the session: ask first, then kill."""
    family: set[int] = set()
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        family |= descendants(child.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)


def descendants(pid: int) -> set[int]:
    """All processes that a process has started, and those of these."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        waiting += (new := children.get(waiting.pop(), []))
        found.update(new)
    return found


def install(kit: Path, folder: Path) -> str:
    """Make the environment; returns the path of its interpreter.

    The machine's Python may itself belong to a virtual environment, which `--system-site-packages` would pass
    over: a `.pth` names its packages, and theirs is processed too.
    """
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    with tempfile.TemporaryDirectory(dir=folder) as unpacked, tarfile.open(kit) as packed:
        packed.extractall(unpacked, filter="data")
        shutil.copytree(Path(unpacked) / "site", site, dirs_exist_ok=True)
    shutil.rmtree(site / "llava_projectors")
    shutil.copytree(ROOT / "llava_projectors", site / "llava_projectors")  # the tree may be newer than the kit
    machine = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "machine.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in machine))
    return str(folder / "bin" / "python")


def in_order(steps: Sequence[Step], results: dict[str, dict[str, object]]) -> list[Step]:
    """What has not passed yet, first of all what was not tried yet."""
    status = {step.name: results.get(step.name, {}).get("status") for step in steps}
    return sorted(
        (step for step in steps if status[step.name] != PASSED), key=lambda step: status[step.name] is not None
    )


def run_all(run: Run, steps: Sequence[Step], jobs: int) -> None:
    """One after the other; neighbours that may run beside others run so."""
    for beside, neighbours in itertools.groupby(steps, lambda step: step.beside):
        with ThreadPoolExecutor(jobs if beside else 1) as pool:
            list(pool.map(run.execute, neighbours))


def summarise(run: Run) -> None:
    """Write and print the tables of what was measured, and how the steps ended."""
    lines: list[str] = []
    csv = run.out / "speed.csv"
    if csv.exists():
        command = [run.python, "-m", "benchmarks.speed", "--only", "report", "--csv", str(csv)]
        seconds = SUMMARY_SECONDS * run.patience
        try:
            report = subprocess.run(
                command, cwd=ROOT, env=run.environment("report"), capture_output=True, text=True, timeout=seconds
            )
            lines += [report.stdout, report.stderr]
        except subprocess.TimeoutExpired:
            lines.append(f"no tables within {seconds:.0f} s; later: python {' '.join(command[1:])}")
    lines += [
        f"{name:16} {result['status']:10} {result['seconds']:6} s  {result['last']}"
        for name, result in run.results.items()
    ]
    (run.out / "summary.txt").write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, six files")
    parser.add_argument("--minutes", type=float, required=True, help="for all of it")
    parser.add_argument("--earlier", type=Path, help="what an earlier call has left: this one goes on from there")
    parser.add_argument(
        "--steps", help=f"only these, with commas between, passed or not: {','.join(s.name for s in STEPS)}"
    )
    parser.add_argument("--kit", type=Path, default=ROOT / ".cuda-kit" / "site.tar.xz", help="(%(default)s)")
    parser.add_argument("--python", help="an interpreter that has every package: nothing is installed")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses at tiny sizes")
    parser.add_argument("--patience", type=float, default=1, help="times each step's seconds (%(default)s)")
    parser.add_argument("--jobs", type=int, default=4, help="tests that run at the same time (%(default)s)")
    options = parser.parse_args(arguments)
    known = {step.name: step for step in STEPS}
    names = options.steps.split(",") if options.steps else list(known)
    if unknown := set(names) - set(known):
        parser.error(f"there is no step {sorted(unknown)}")
    options.steps = [known[name] for name in names] if options.steps else None
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do as the command line says; returns the exit status."""
    started = time.monotonic()
    options = parse(arguments)
    if options.python is None and sys.version_info[:2] != FOR_PYTHON:
        sys.exit(f"this is Python {sys.version.split()[0]}, and the kit is for {FOR_PYTHON[0]}.{FOR_PYTHON[1]}")
    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.earlier.iterdir() if options.earlier else ():
        shutil.copyfile(file, options.out / file.name)  # without its mode, which may be read-only
    # LLaVA takes a path that contains "mpt" for an MPT model, so no random letters.
    work = Path(tempfile.gettempdir()).resolve() / f"llava-gpu-{os.getpid()}"
    work.mkdir()
    try:
        python = options.python or install(options.kit.resolve(), work / "env")
        print(f"installed after {time.monotonic() - started:.0f} s", flush=True)
        end = started + 60 * options.minutes - SUMMARY_SECONDS * options.patience
        run = Run(python, options.device, options.out.resolve(), work, end, options.patience)
        before = signal.signal(signal.SIGTERM, lambda *_: run.give_up())
        run_all(run, options.steps or in_order(STEPS, run.results), options.jobs)
        signal.signal(signal.SIGTERM, before)
        summarise(run)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes in all")
    return int(any(result["status"] != PASSED for result in run.results.values()))


if __name__ == "__main__":
    sys.exit(main())
