"""What `llava-projectors doctor` says: whether our types work here, proven by a tiny model, or why not.

A verdict is *works*, *cannot work* or *not checked*, the last two with the reason and, where there is
one, the remedy. Every package is imported and tried in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

from llava_projectors import autoload
from llava_projectors.commands.columns import print_columns
from llava_projectors.commands.trial import CANNOT_WORK, NOT_CHECKED, STOCK_TYPE, WORKS, Report, Trial, run_trial
from llava_projectors.commands.waiting import waiting
from llava_projectors.integration.forks import known_forks
from llava_projectors.integration.seams import SeamReport

DESCRIPTION = (
    "Checks the start-up hook, the versions around and every place that is patched, then builds a tiny random model of "
    "each LLM class of the package, by the package's own code, and counts the visual tokens that reach the LLM. "
    "Verdicts: works; cannot work, with the reason; not checked, with the reason. "
    "Exit status 0: everything works; 1: not."
)
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "flash-attn")
DEFAULT_TYPE = "saep"

# First and last version that the tests, or the table of forks, were run on.
TESTED = {"python": ("3.9", "3.12"), "torch": ("2.0", "2.13"), "transformers": ("4.31", "4.45")}


@dataclass
class PackageDiagnosis:
    """LLaVA, or one fork of it.

    Attributes:
        package: the name it is imported by.
        verdict: WORKS, CANNOT_WORK or NOT_CHECKED.
        reason: what was seen, or why not.
        type_string: by which the projector is meant in this package.
        version: of the distribution that holds it, if one does.
        place: its folder; None when it cannot be found.
        seams: state of every row of the table of seams, once the package is patched.
        trials: one of each LLM class that was built.
    """

    package: str
    verdict: str
    reason: str
    type_string: str = ""
    version: Optional[str] = None
    place: Optional[str] = None
    seams: list[SeamReport] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)


@dataclass
class Diagnosis:
    """Everything that `doctor` reports.

    Attributes:
        type_string: the projector that the packages were tried with.
        python: path of the interpreter that was examined.
        armed: whether a fresh interpreter of this environment has the hook.
        versions: of the libraries around, None where one is not installed.
        untested: versions outside the tested range, in words.
        packages: one entry for each package examined.
        problems: what concerns no single package.
    """

    type_string: str
    python: str
    armed: bool
    versions: dict[str, Optional[str]]
    untested: list[str]
    packages: list[PackageDiagnosis]
    problems: list[str]

    @property
    def verdict(self) -> str:
        """WORKS when every package does, and in every process of the environment; else the worst."""
        verdicts = [p.verdict for p in self.packages] + [CANNOT_WORK] * bool(self.problems)
        return next((v for v in (CANNOT_WORK, NOT_CHECKED) if v in verdicts), WORKS)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"verdict": self.verdict, **asdict(self)}


def diagnose(
    packages: list[str], type_string: str = DEFAULT_TYPE, arguments: Optional[Mapping[str, str]] = None
) -> Diagnosis:
    """Examine this environment.

    Args:
        packages: names to look at, `llava` and forks.
        type_string: the projector to try them with.
        arguments: settings of the training script, where they differ from its defaults.
    """
    problems = []
    armed = _starts_armed()
    if autoload.is_disabled():
        variable = f"{autoload.DISABLE_VARIABLE}={os.environ[autoload.DISABLE_VARIABLE]}"
        problems.append(f"the hook is switched off by the environment variable {variable}: unset it")
        armed = False
    elif not armed:
        problems.append(
            "a fresh interpreter is not armed, the start-up file llava_projectors.pth is not in its site-packages: "
            + _how_to_arm(Path(autoload.__file__).parents[1], sysconfig.get_path("purelib"))
        )
    versions = {name: _version(name) for name in LIBRARIES}
    untested = untested_versions({**versions, "python": "{}.{}".format(*sys.version_info)})
    diagnoses = [_diagnose_package(p, type_string, arguments or {}, untested) for p in packages]
    return Diagnosis(type_string, sys.executable, armed, versions, untested, diagnoses, problems)


def untested_versions(versions: Mapping[str, Optional[str]]) -> list[str]:
    """What lies outside the tested range, in words.

    Example:
        >>> untested_versions({"transformers": "5.1.0", "torch": "2.4.1+cu121", "python": "3.11"})
        ['transformers 5.1.0 is outside the tested 4.31 to 4.45']
    """
    return [
        f"{name} {version} is outside the tested {first} to {last}"
        for name, (first, last) in TESTED.items()
        for version in [versions.get(name)]
        if version is not None and not _minor(first) <= _minor(version) <= _minor(last)
    ]


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _how_to_arm(folder: Path, site_packages: str) -> str:
    """What helps an installation in this folder: a checkout, what `pip install --target` wrote, or a copy."""
    if (folder / "setup.cfg").exists():
        return f"run `{sys.executable} -m pip install {folder}`"
    if (folder / "llava_projectors.pth").exists():
        line = f"import site; site.addsitedir({str(folder)!r})"
        return f"write the line `{line}` into a file {os.path.join(site_packages, 'llava_projectors_folder.pth')}"
    return f"{folder} holds a copy of the package: install it with pip, from its checkout or wheel"


def _starts_armed() -> bool:
    script = "import sys; sys.exit('llava_projectors.autoload' not in sys.modules)"
    return subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def _version(distribution: str) -> Optional[str]:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _diagnose_package(
    package: str, type_string: str, arguments: Mapping[str, str], untested: list[str]
) -> PackageDiagnosis:
    place = _place(package)
    if place is None:
        return PackageDiagnosis(
            package,
            NOT_CHECKED,
            f"no package {package!r} can be imported here: install LLaVA in this environment "
            f"(`pip install -e .` in its checkout), or name your fork's package with --package; tried: {known_forks()}",
        )
    report = _try(package, type_string, arguments)
    verdict, reason = _judge(package, report, untested)
    if report.type_string not in ("", type_string):
        whose = f"{package}'s own builder keeps {type_string!r}"
        reason += f"; tried with --mm_projector_type {report.type_string}, for {whose}"
    return PackageDiagnosis(
        package,
        verdict,
        reason,
        report.type_string or type_string,
        _package_version(package, place),
        place,
        report.seams,
        report.trials,
    )


def _judge(package: str, report: Report, untested: list[str]) -> tuple[str, str]:
    """Verdict and reason: a package works where its trials do, it is armed, and its transformers was tested."""
    verdict, reason = _sum_up(report.trials)
    notes = "; ".join(untested)
    if verdict != WORKS:
        return verdict, f"{reason} ({notes})" if untested else reason
    if not report.armed and not autoload.is_disabled():
        return CANNOT_WORK, (
            f"{package} can be patched but is not: set {autoload.PACKAGES_VARIABLE}={package}, or call "
            f"llava_projectors.patch({package!r}) before training and serving; then it works ({reason})"
        )
    if any(note.startswith("transformers ") for note in untested):
        return NOT_CHECKED, (
            f"{notes}: the tiny model's training step runs ({reason}), but loading and generating were not tried with "
            "it: install transformers 4.37.2"
        )
    return verdict, reason


def _place(package: str) -> Optional[str]:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return next(iter(spec.submodule_search_locations or ()), None) if spec else None


def _try(package: str, type_string: str, arguments: Mapping[str, str]) -> Report:
    """A trial with our type; what ends in an error that is not ours is tried again without this plugin."""
    what = f"doctor: {package}: a tiny model of each of its LLM classes, with {type_string}"
    with tempfile.TemporaryDirectory() as folder, waiting(what):
        report = run_trial(package, type_string, arguments, folder)
    failed = {trial.model: trial for trial in report.trials if trial.foreign and trial.model}
    if failed:
        what = f"doctor: {package}: without this plugin, {', '.join(failed)}"
        with tempfile.TemporaryDirectory() as folder, waiting(what):
            again = run_trial(package, STOCK_TYPE, arguments, folder, stock=True, models=list(failed))
        stock = {trial.model: trial for trial in again.trials}
        for name, trial in failed.items():
            _compare_with_stock(trial, stock.get(name), report.type_string)
    return report


def _compare_with_stock(trial: Trial, alone: Optional[Trial], tried: str) -> None:
    """Put into the trial of a class that failed what became of it without this plugin."""
    if alone is None or alone.verdict != WORKS:
        trial.verdict = NOT_CHECKED
        trial.reason = _neither(trial, alone, tried)
    else:
        trial.reason = f"{trial.model} runs with {STOCK_TYPE!r}, and with {tried!r} it fails: {trial.reason}"


def _neither(trial: Trial, alone: Optional[Trial], type_string: str) -> str:
    """The reason for a class that runs neither with our type nor without this plugin: one error, or both."""
    without = f"{trial.model} cannot be run on tiny parts without this plugin either"
    if alone is None:
        return f"{without}; with {type_string!r} it ends in {trial.reason}"
    both = "" if alone.reason == trial.reason else f"; with {type_string!r} it ends in {trial.reason}"
    return f"{without}: {alone.reason}{both}"


def _sum_up(trials: list[Trial]) -> tuple[str, str]:
    """One verdict for a package: what cannot work comes first, then what does."""
    for verdict in (CANNOT_WORK, WORKS, NOT_CHECKED):
        found = [trial for trial in trials if trial.verdict == verdict]
        if found:
            return verdict, found[0].reason + _with_models(found) + (_untried(trials) if verdict == WORKS else "")
    return NOT_CHECKED, "nothing was tried"


def _with_models(found: list[Trial]) -> str:
    names = [trial.model for trial in found if trial.model and trial.model not in trial.reason]
    return f", with {', '.join(names)}" if names else ""


def _untried(trials: list[Trial]) -> str:
    names = [trial.model for trial in trials if trial.model and trial.verdict == NOT_CHECKED]
    return f"; not checked: {', '.join(names)}" if names else ""


def _package_version(package: str, place: Optional[str]) -> Optional[str]:
    """Version of the distribution that the package at `place` belongs to; another copy may be installed beside it."""
    names = ["llava-torch", package]
    if sys.version_info >= (3, 10):
        names = importlib.metadata.packages_distributions().get(package, [])
    for name in names:
        distribution = importlib.metadata.distribution(name) if _version(name) else None
        if distribution is None or place is None:
            continue
        origin = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
        editable = origin.startswith("file://") and place.startswith(origin[len("file://") :])
        if editable or str(distribution.locate_file(package)) == place:
            return distribution.version
    return None


def print_diagnosis(diagnosis: Diagnosis, as_json: bool = False) -> None:
    """Print it for people, or as JSON."""
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
        return
    print(f"python        {diagnosis.python}")
    print(f"hook          {'armed' if diagnosis.armed else 'not armed'} in a fresh interpreter")
    print("versions      " + ", ".join(f"{name} {version or '-'}" for name, version in diagnosis.versions.items()))
    for note in diagnosis.untested:
        print(f"note          {note}")
    for package in diagnosis.packages:
        _print_package(package)
    for problem in diagnosis.problems:
        print(f"PROBLEM: {problem}")
    for package in diagnosis.packages:
        print(f"{package.package}: {package.verdict}: {package.reason}")
    if diagnosis.verdict == WORKS:
        types = dict.fromkeys(package.type_string for package in diagnosis.packages)
        print(f"All is well: pass --mm_projector_type {' or '.join(types)} to LLaVA's scripts.")


def _print_package(package: PackageDiagnosis) -> None:
    """Where it is, its seams, and what became of each of its LLM classes."""
    print(f"{package.package:<14}{package.version or 'version unknown'}, {package.place or 'not found'}")
    print_columns([(seam.state, seam.seam, ", ".join(seam.where)) for seam in package.seams if seam.where], "    ")
    print_columns([(trial.verdict, trial.model or "", trial.reason) for trial in package.trials], "    ")


def setting(text: str) -> tuple[str, str]:
    """`NAME=VALUE` -> both, the name without dashes before it."""
    name, equals, value = text.lstrip("-").partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors doctor`."""
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument(
        "--package",
        action="append",
        metavar="NAME",
        help="a package to check, may be repeated (default: llava, and those in LLAVA_PROJECTORS_PACKAGES)",
    )
    parser.add_argument("--type", default=DEFAULT_TYPE, help="the type string to try (%(default)s)")
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        type=setting,
        metavar="NAME=VALUE",
        help="a setting of your training command, without the dashes, may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; status 1 unless everything works."""
    logging.disable(logging.INFO)  # DeepSpeed reports its accelerator on import
    packages = arguments.package or list(autoload.armed_packages()) or ["llava"]
    diagnosis = diagnose(packages, arguments.type, dict(arguments.argument))
    print_diagnosis(diagnosis, arguments.json)
    return 0 if diagnosis.verdict == WORKS else 1
