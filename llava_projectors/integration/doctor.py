"""What `llava-projectors doctor` looks at: the hook, LLaVA, its seams, and the versions around them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import types
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Optional

from llava_projectors import autoload
from llava_projectors.columns import print_columns
from llava_projectors.integration import seams
from llava_projectors.integration.forks import known_forks

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "flash-attn")


@dataclass
class PackageDiagnosis:
    """LLaVA, or one fork of it.

    Attributes:
        package: the name it is imported by.
        version: of the distribution that holds it, if one does.
        place: its folder; None when it cannot be found.
        seams: state of every row of the table of seams.
        problems: why it cannot be patched, each with a remedy; empty when all is well.
    """

    package: str
    version: Optional[str] = None
    place: Optional[str] = None
    seams: list[seams.SeamReport] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Diagnosis:
    """Everything that `doctor` reports.

    Attributes:
        python: path of the interpreter that was examined.
        armed: whether a fresh interpreter of this environment has the hook.
        versions: of the libraries around, None where one is not installed.
        packages: one entry for each package examined.
        problems: what concerns no single package.
    """

    python: str
    armed: bool
    versions: dict[str, Optional[str]]
    packages: list[PackageDiagnosis]
    problems: list[str]

    @property
    def healthy(self) -> bool:
        """Whether every package examined is patched in every process of the environment."""
        return not self.problems and not any(p.problems for p in self.packages)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"healthy": self.healthy, **asdict(self)}


def diagnose(packages: list[str]) -> Diagnosis:
    """Examine this environment.

    Args:
        packages: names to look at, `llava` and forks.
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
            f"run `{sys.executable} -m pip install llava-projectors`"
        )
    versions = {name: _version(name) for name in LIBRARIES}
    return Diagnosis(sys.executable, armed, versions, [_diagnose_package(p) for p in packages], problems)


def _starts_armed() -> bool:
    script = "import sys; sys.exit('llava_projectors.autoload' not in sys.modules)"
    return subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def _version(distribution: str) -> Optional[str]:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _diagnose_package(package: str) -> PackageDiagnosis:
    diagnosis = PackageDiagnosis(package)
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        diagnosis.problems.append(
            f"no package {package!r} can be imported here: install LLaVA in this environment "
            f"(`pip install -e .` in its checkout), or name your fork's package with --package; tried: {known_forks()}"
        )
        return diagnosis
    diagnosis.place = next(iter(spec.submodule_search_locations), None)
    diagnosis.version = _package_version(package, diagnosis.place)
    error = _import_error(package)
    if error is not None:
        diagnosis.problems.append(f"importing {package!r} fails, with or without this plugin: {error}")
        return diagnosis
    for name, required in _seam_modules(package).items():
        try:
            importlib.import_module(name)
        except Exception as failure:  # LLaVA itself does without a model that cannot be imported
            if required:
                diagnosis.problems.append(f"importing {name} fails: {type(failure).__name__}: {failure}")
    diagnosis.seams = seams.report(package)
    rows = [row for row, seam in zip(diagnosis.seams, seams.SEAMS) if seam.required]
    absent = [row.seam for row in rows if row.state in ("missing", "waiting")]
    if absent:
        diagnosis.problems.append(
            f"{package} has no {' and no '.join(absent)}: it is no LLaVA, or a fork laid out so differently "
            f"that our types cannot be used with it; tried: {known_forks()}"
        )
    elif any(row.state == "found" for row in rows):
        diagnosis.problems.append(
            f"{package} can be patched but is not: set LLAVA_PROJECTORS_PACKAGES={package}, "
            f"or call llava_projectors.patch({package!r}) before training and serving"
        )
    return diagnosis


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


def _import_error(package: str) -> Optional[str]:
    """Why the package cannot be imported, or None.

    LLaVA hides errors inside its models behind a bare `except: pass` and then fails on a name that
    is not there; the models are imported one by one, below an empty parent, to see the cause.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            importlib.import_module(package)
            return None
        except Exception as failure:
            shown = f"{type(failure).__name__}: {failure}"
            if not (type(failure) is ImportError and "cannot import name" in str(failure)):
                return shown
        spec = importlib.util.find_spec(package)
        assert spec is not None
        parent = types.ModuleType(package)
        parent.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[package] = parent
        try:
            for name in _submodules(f"{package}.model.language_model", "*"):
                importlib.import_module(name)
        except Exception as cause:
            shown += f" (the cause, which {package} hides: {type(cause).__name__}: {cause})"
        finally:
            del sys.modules[package]
    return shown


def _seam_modules(package: str) -> dict[str, bool]:
    """Modules that the table of seams means, wildcards resolved in the folder -> whether one in it is required."""
    return dict.fromkeys(_submodules(f"{package}.model", "*"), False)


def _submodules(parent: str, pattern: str) -> list[str]:
    try:
        path = importlib.import_module(parent).__path__
    except (ImportError, AttributeError):
        return []
    return [f"{parent}.{m.name}" for m in pkgutil.iter_modules(path) if fnmatchcase(m.name, pattern)]


def print_diagnosis(diagnosis: Diagnosis, as_json: bool = False) -> None:
    """Print it for people, or as JSON."""
    if as_json:
        print(json.dumps(diagnosis.as_dict(), indent=2))
        return
    print(f"python        {diagnosis.python}")
    print(f"hook          {'armed' if diagnosis.armed else 'not armed'} in a fresh interpreter")
    for package in diagnosis.packages:
        print(f"{package.package:<14}{package.version or 'version unknown'}, {package.place or 'not found'}")
        print_columns([(seam.state, seam.seam, ", ".join(seam.where)) for seam in package.seams], "    ")
    print("versions      " + ", ".join(f"{name} {version or '-'}" for name, version in diagnosis.versions.items()))
    for problem in [*diagnosis.problems, *(p for package in diagnosis.packages for p in package.problems)]:
        print(f"PROBLEM: {problem}")
    if diagnosis.healthy:
        print("All is well: pass --mm_projector_type saep (or tokenpacker) to LLaVA's scripts.")
