"""The table of what is patched in LLaVA and its forks, and by what; patch, unpatch, report.

A function that other modules import by name is replaced in every module that holds it, and
only where the very same object is found, so that `unpatch` can give each its own back.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, Callable, Union

from llava_projectors.integration import wrappers


class PatchError(RuntimeError):
    """A package cannot be patched; the message names the seam."""


@dataclass(frozen=True)
class Seam:
    """One place in LLaVA that is patched.

    Attributes:
        module: pattern of the module's name below the package.
        owner: pattern of the class that has the attribute, or "" for the module itself.
        attribute: the function or method.
        wrap: makes the replacement from the original.
        required: whether our types cannot work without it. The others are safeguards, which a
            program that never imports their module does without.
    """

    module: str
    owner: str
    attribute: str
    wrap: Callable[[Any, Callable[[], None]], Any]
    required: bool = True

    def __str__(self) -> str:
        return ".".join(filter(None, (self.module, self.owner, self.attribute)))


SEAMS = (
    Seam("model.multimodal_encoder.builder", "", "build_vision_tower", wrappers.tower_builder),
    Seam("model.multimodal_projector.builder", "", "build_vision_projector", wrappers.projector_builder),
    Seam("model.*_arch", "*MetaModel", "__init__", wrappers.model_constructor),
    Seam("model.*_arch", "*MetaModel", "initialize_vision_modules", wrappers.vision_initializer),
    Seam("model.language_model.*", "*ForCausalLM", "from_pretrained", wrappers.checkpoint_loader, required=False),
    Seam("model.builder", "", "load_pretrained_model", wrappers.model_loader, required=False),
)


@dataclass(frozen=True)
class SeamReport:
    """What became of one seam.

    Attributes:
        seam: the module pattern and attribute.
        state: `patched`; `found` (the module is imported, the patch is off); `missing` (it is
            imported and lacks the attribute); `waiting` (it is not imported yet).
        where: the modules or classes concerned.
    """

    seam: str
    state: str
    where: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Patch:
    package: str
    seam: Seam
    owner: Union[ModuleType, type]
    original: Any
    wrapper: Any
    inherited: bool


_patches: list[_Patch] = []
_lock = threading.RLock()


def _suffix_matches(seam: Seam, package: str, module_name: str) -> bool:
    return module_name.startswith(f"{package}.") and fnmatchcase(module_name[len(package) + 1 :], seam.module)


def has_seams(package: str, module_name: str) -> bool:
    """Whether anything in this module of the package is patched."""
    return any(_suffix_matches(seam, package, module_name) for seam in SEAMS)


def _owners(seam: Seam, module: ModuleType) -> Iterator[Union[ModuleType, type]]:
    """The module, or the classes defined in it, that have the seam's attribute."""
    candidates: list[Any] = [module]
    if seam.owner:
        candidates = [
            value
            for name, value in list(vars(module).items())
            if isinstance(value, type) and value.__module__ == module.__name__ and fnmatchcase(name, seam.owner)
        ]
    for candidate in candidates:
        if callable(getattr(candidate, seam.attribute, None)):
            yield candidate


def _attribute(owner: Union[ModuleType, type], name: str) -> Any:
    """The attribute as it is stored, a class method unbound, in the owner or a class it inherits from."""
    return inspect.getattr_static(owner, name)


def _modules(package: str, seam: Seam) -> list[ModuleType]:
    """The imported modules that the seam means."""
    return [m for name, m in list(sys.modules.items()) if m is not None and _suffix_matches(seam, package, name)]


def _replace_copies(name: str, old: Any, new: Any) -> None:
    """Rebind `name` in every imported module that holds the very object `old`."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def patch_module(package: str, module: ModuleType) -> None:
    """Patch the seams in one module that has been executed."""
    with _lock:
        for seam in SEAMS:
            if not _suffix_matches(seam, package, module.__name__):
                continue
            for owner in _owners(seam, module):
                original = _attribute(owner, seam.attribute)
                if any(p.owner is owner and p.wrapper is original for p in _patches):
                    continue
                wrapper = seam.wrap(original, functools.partial(check_patched, package))
                patch_record = _Patch(package, seam, owner, original, wrapper, seam.attribute not in vars(owner))
                setattr(owner, seam.attribute, wrapper)
                if owner is module:
                    _replace_copies(seam.attribute, original, wrapper)
                    for stale in [p for p in _patches if p.owner is owner and p.seam is seam]:  # it was reloaded
                        _replace_copies(seam.attribute, stale.wrapper, wrapper)
                        _patches.remove(stale)
                _patches.append(patch_record)


def check_importable(package: str) -> None:
    """Raise PatchError unless the package is imported or could be."""
    try:
        found = package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise PatchError(f"cannot patch {package!r}: no such package can be imported from here")


def patch(package: str) -> list[SeamReport]:
    """Patch the modules of the package that are imported already; see `autoload.patch` for the rest."""
    with _lock:
        for name, module in list(sys.modules.items()):
            if module is not None and has_seams(package, name):
                patch_module(package, module)
        return report(package)


def unpatch(package: str) -> None:
    """Undo every patch of the package, in the modules that copied a wrapper as well."""
    with _lock:
        for p in [p for p in _patches if p.package == package]:
            if vars(p.owner).get(p.seam.attribute) is p.wrapper:
                if p.inherited:
                    delattr(p.owner, p.seam.attribute)
                else:
                    setattr(p.owner, p.seam.attribute, p.original)
            if not p.seam.owner:
                _replace_copies(p.seam.attribute, p.wrapper, p.original)
            _patches.remove(p)


def report(package: str) -> list[SeamReport]:
    """The state of every seam of the package, in the order of the table."""
    with _lock:
        return [_report_seam(package, seam) for seam in SEAMS]


def _report_seam(package: str, seam: Seam) -> SeamReport:
    modules = _modules(package, seam)
    owners = [owner for module in modules for owner in _owners(seam, module)]
    wrappers_here = {id(p.wrapper) for p in _patches if p.package == package}
    if not modules:
        state = "waiting"
    elif not owners:
        state = "missing"
    elif all(id(_attribute(owner, seam.attribute)) in wrappers_here for owner in owners):
        state = "patched"
    else:
        state = "found"
    places = owners or modules
    return SeamReport(str(seam), state, tuple(_describe(place) for place in places))


def _describe(place: Union[ModuleType, type]) -> str:
    return place.__name__ if isinstance(place, ModuleType) else f"{place.__module__}.{place.__qualname__}"


def check_patched(package: str) -> None:
    """Raise PatchError unless what our types need is patched; called when a projector is asked for."""
    broken = [r for r, seam in zip(report(package), SEAMS) if seam.required and r.state != "patched"]
    if broken:
        raise PatchError(
            f"{package!r} is patched only in part, and a projector would not work: "
            + "; ".join(f"{r.seam} is {r.state}" for r in broken)
            + f". Run `llava-projectors doctor --package {package}`"
        )
