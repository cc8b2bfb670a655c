"""The table of what is replaced in LLaVA and its forks, and by what; patch, unpatch, report.

A seam is found by its role, wherever below the package it is defined: by the function's name, or
by what a class defines. Only attributes that a module or class defines itself are replaced. A
function that other modules import by name is replaced in every module that holds it, and only
where the very same object is found, so that `unpatch` can give each its own back.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable, Optional, Union

from llava_projectors import seam_names
from llava_projectors.integration import gate, high_resolution, trainer, wrappers
from llava_projectors.integration.gate import Package, is_ours

Owner = Union[ModuleType, type]
Arguments = Mapping[str, Any]


class PatchError(RuntimeError):
    """A package cannot be patched; the message names the seam."""


@dataclass(frozen=True)
class Seam:
    """One role in LLaVA that is replaced for models of our types.

    Attributes:
        role: what the attribute does there.
        names: what it is called, as a function or a method.
        of_class: whether a class defines it.
        settings: the call's arguments, by name and in the order of the original's signature -> what
            the gate looks at.
        replacement: what runs instead for our types: it gets the original, the package, and the
            call's own arguments.
        on_error: called instead of letting the original's ValueError through, for types that are
            not ours.
        required: whether our types cannot work without it. The others are safeguards, which a
            program that never imports their module does without.
        beside: methods of which the class has to define one, so that a name as common as `__init__` is not taken
            from another class; all of which it has to have, where it may inherit the attribute.
        inherited: the end of the name of a class that may inherit the attribute, and gets one of its own in front.
        spares_own: what such a class defines itself is left alone.
    """

    role: str
    names: tuple[str, ...]
    of_class: bool
    settings: Callable[[Arguments], tuple[Any, ...]]
    replacement: Callable[..., Any]
    on_error: Optional[Callable[[ValueError, Package, Any], ValueError]] = None
    required: bool = True
    beside: frozenset[str] = seam_names.SEAM_METHODS
    inherited: str = ""
    spares_own: bool = False

    def __str__(self) -> str:
        return self.role


def _argument(place: int) -> Callable[[Arguments], tuple[Any, ...]]:
    return lambda arguments: tuple(arguments.values())[place : place + 1]


SEAMS = (
    Seam("tower builder", seam_names.TOWER_BUILDERS, False, _argument(0), wrappers.build_tower),
    Seam(
        "projector builder",
        seam_names.PROJECTOR_BUILDERS,
        False,
        _argument(0),
        wrappers.build_projector,
        on_error=wrappers.explain_unknown_type,
    ),
    Seam(
        "model constructor",
        ("__init__",),
        True,
        _argument(1),
        wrappers.construct_model,
        beside=seam_names.INITIALIZERS,
    ),
    Seam(
        "vision initializer",
        (seam_names.VISION_INITIALIZER,),
        True,
        wrappers.settings_of_training,
        wrappers.initialize_vision_modules,
    ),
    Seam(
        "further initializers",
        seam_names.FURTHER_INITIALIZERS,
        True,
        wrappers.settings_of_model_in_use,
        wrappers.initialize_other_readers,
        required=False,
    ),
    # transformers defines it, one of its own on LLaVA's class comes before it: the loading report, which
    # says what a checkpoint lacked, is to be had nowhere else.
    Seam(
        "checkpoint loader",
        ("from_pretrained",),
        True,
        wrappers.settings_of_checkpoint,
        wrappers.load_checkpoint,
        required=False,
        beside=frozenset(),
        inherited=seam_names.SEAM_CLASS_ENDING,
        spares_own=True,
    ),
    Seam(
        "model loader",
        seam_names.MODEL_LOADERS,
        False,
        wrappers.settings_of_model,
        wrappers.load_model,
        required=False,
    ),
    # transformers defines them for the Trainer of every script.
    Seam(
        "training loop",
        (seam_names.TRAINING_LOOP,),
        True,
        trainer.settings_of_trainer,
        trainer.train,
        required=False,
        beside=seam_names.TRAINER_METHODS,
        inherited=seam_names.TRAINER_CLASS_ENDING,
    ),
    Seam(
        "checkpoint writer",
        (seam_names.CHECKPOINT_WRITER,),
        True,
        trainer.settings_of_trainer,
        trainer.save_model,
        required=False,
        beside=seam_names.TRAINER_METHODS,
        inherited=seam_names.TRAINER_CLASS_ENDING,
    ),
    Seam(
        "best checkpoint",
        (seam_names.BEST_CHECKPOINT,),
        True,
        trainer.settings_of_trainer,
        trainer.load_best_model,
        required=False,
        beside=seam_names.TRAINER_METHODS,
        inherited=seam_names.TRAINER_CLASS_ENDING,
    ),
    # The three of `image_aspect_ratio slice`. The first is the only place of LLaVA's script that knows
    # the setting and the tokenizer; the second joins the pictures of a batch, which tiles of other
    # grids do not survive; the third encodes what the second passes on.
    Seam(
        "tokenizer initializer",
        ("initialize_vision_tokenizer",),
        True,
        wrappers.settings_of_model_in_use,
        high_resolution.initialize_vision_tokenizer,
        required=False,
    ),
    Seam(
        "inputs preparer",
        (seam_names.INPUTS_PREPARER,),
        True,
        wrappers.settings_of_model_in_use,
        high_resolution.prepare_inputs,
        required=False,
    ),
    Seam(
        "image encoder",
        ("encode_images",),
        True,
        wrappers.settings_of_model_in_use,
        high_resolution.encode_images,
        required=False,
    ),
)


@dataclass(frozen=True)
class SeamReport:
    """What became of one seam.

    Attributes:
        seam: its role.
        state: `patched`; `found` (it is imported, the patch is off); `missing` (no module that is
            imported so far defines it).
        where: the functions and methods concerned.
    """

    seam: str
    state: str
    where: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Patch:
    package: str
    seam: Seam
    owner: Owner
    name: str
    original: Any
    wrapper: Any
    inherited: bool


_patches: list[_Patch] = []
_packages: dict[str, Package] = {}
_lock = threading.RLock()  # nothing may be imported under it


def _package(name: str) -> Package:
    return _packages.setdefault(name, Package(name, functools.partial(check_patched, name)))


def _owners(seam: Seam, module: ModuleType) -> Iterator[tuple[Owner, str]]:
    """Where the module itself defines the seam: the module, or a class of it, and the attribute."""
    if not seam.of_class:
        for name in seam.names:
            value = vars(module).get(name)
            if callable(value) and getattr(value, "__module__", None) == module.__name__:
                yield module, name
        return
    for name, value in list(vars(module).items()):
        if not isinstance(value, type) or value.__module__ != module.__name__:
            continue
        if seam.inherited:
            is_meant = name.endswith(seam.inherited) and all(hasattr(value, method) for method in seam.beside)
        else:
            is_meant = not seam.beside.isdisjoint(vars(value))
        for attribute in seam.names if is_meant else ():
            defined = vars(value).get(attribute)
            if (seam.inherited and defined is None) or seam.spares_own:
                defined = hasattr(value, attribute) and (defined is None or _is_wrapper(defined))
            if defined:
                yield value, attribute


def _is_wrapper(value: Any) -> bool:
    return any(p.wrapper is value for p in _patches)


def _is_in_place(owner: Owner, name: str, value: Any) -> bool:
    """Whether the attribute is our wrapper, or what somebody else has put over it."""
    is_reloaded = isinstance(owner, ModuleType) and getattr(value, "__module__", None) == owner.__name__
    return any(
        p.wrapper in _wrapped_by(value) or not (value is p.original or is_reloaded)
        for p in _patches
        if p.owner is owner and p.name == name
    )


def _wrapped_by(value: Any) -> Iterator[Any]:
    """The value, and all that it wraps by `functools.wraps`."""
    while value is not None:
        yield value
        value = getattr(value, "__dict__", {}).get("__wrapped__")


def _modules(package: str) -> list[ModuleType]:
    """The imported modules of the package that hold a seam."""
    found = [m for name, m in list(sys.modules.items()) if m is not None and name.startswith(f"{package}.")]
    return [module for module in found if seam_names.holds_seam(module)]


def _replace_copies(name: str, old: Any, new: Any) -> None:
    """Rebind `name` in every imported module that holds the very object `old`."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def _inherited(owner: Owner, name: str, function: Any) -> Any:
    """What the class inherits when it is called, for other packages replace it too, after us."""

    @functools.wraps(function)
    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(owner, cls), name)(*args, **kwargs)  # type: ignore[arg-type]

    return call


def _gated(seam: Seam, package: Package, owner: Owner, name: str, original: Any) -> Any:
    """The original for everything that is not of our types, with the very arguments; else our replacement."""
    is_class_method = isinstance(original, classmethod)
    function = original.__func__ if is_class_method else original
    signature = inspect.signature(function)
    if name not in vars(owner):
        function = _inherited(owner, name, function)

    @functools.wraps(function)
    def gated(*args: Any, **kwargs: Any) -> Any:
        if _packages.get(package.name) is not package:  # `unpatch` has found somebody else's wrapper over this one
            return function(*args, **kwargs)
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return function(*args, **kwargs)  # which says itself what it misses
        settings = seam.settings(arguments)
        if any(is_ours(one, package) for one in settings):
            # A replacement may call its first arguments otherwise, so they go to it by place.
            for parameter in list(signature.parameters.values())[len(args) :]:
                if parameter.name not in kwargs or parameter.default is not inspect.Parameter.empty:
                    break
                args = (*args, kwargs.pop(parameter.name))
            return seam.replacement(function, package, *args, **kwargs)
        if seam.on_error is None:
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except ValueError as error:
            raise seam.on_error(error, package, *settings) from error.__cause__

    return classmethod(gated) if is_class_method else gated


def patch_module(package: str, module: ModuleType) -> None:
    """Patch the seams in one module that has been executed."""
    with _lock:
        for seam in SEAMS:
            for owner, name in _owners(seam, module):
                original = inspect.getattr_static(owner, name)
                if _is_in_place(owner, name, original):
                    continue
                wrapper = _gated(seam, _package(package), owner, name, original)
                if seam.replacement is wrappers.build_projector:
                    _package(package).add_builder(original)
                patch_record = _Patch(package, seam, owner, name, original, wrapper, name not in vars(owner))
                setattr(owner, name, wrapper)
                if owner is module:
                    _replace_copies(name, original, wrapper)
                    for stale in [p for p in _patches if p.owner is owner and p.name == name]:  # it was reloaded
                        _replace_copies(name, stale.wrapper, wrapper)
                        _patches.remove(stale)
                        _package(package).forget_builder(stale.original)
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
        for module in _modules(package):
            patch_module(package, module)
        return report(package)


def unpatch(package: str) -> None:
    """Undo every patch of the package, in the modules that copied a wrapper as well."""
    with _lock:
        for p in [p for p in _patches if p.package == package]:
            if vars(p.owner).get(p.name) is p.wrapper:
                if p.inherited:
                    delattr(p.owner, p.name)
                else:
                    setattr(p.owner, p.name, p.original)
            if not p.seam.of_class:
                _replace_copies(p.name, p.wrapper, p.original)
            _patches.remove(p)
        _packages.pop(package, None)


def our_name(package: str, type_string: str) -> str:
    """The type string by which this package's type of that name is meant there."""
    return gate.our_name(type_string, _package(package))


def report(package: str) -> list[SeamReport]:
    """The state of every seam of the package, in the order of the table."""
    with _lock:
        modules = _modules(package)
        return [_report_seam(package, seam, modules) for seam in SEAMS]


def _report_seam(package: str, seam: Seam, modules: list[ModuleType]) -> SeamReport:
    owners = [found for module in modules for found in _owners(seam, module)]
    # A wrapper of somebody else's may hide one of ours.
    hidden = [(p.owner, p.name) for p in _patches if p.package == package and p.seam is seam]
    owners += [found for found in hidden if found not in owners]
    if not owners:
        state = "missing"
    elif all(_is_in_place(owner, name, inspect.getattr_static(owner, name)) for owner, name in owners):
        state = "patched"
    else:
        state = "found"
    return SeamReport(str(seam), state, tuple(f"{_describe(owner)}.{name}" for owner, name in owners))


# What LLaVA calls the arguments in which its functions get a config, or the settings of a training script.
_CONFIG_NAMES = ("cfg", "config", "args")


def wrong_signatures(package: str) -> list[str]:
    """Required functions and methods that do not take a config, or arguments, where LLaVA's do; one line each."""
    wrong = []
    for seam in (seam for seam in SEAMS if seam.required):
        for module in _modules(package):
            for owner, name in _owners(seam, module):
                parameters = [*inspect.signature(inspect.getattr_static(owner, name)).parameters.values()]
                taken = parameters[int(seam.of_class) :][:1]
                if not any(p.kind is p.VAR_POSITIONAL or any(n in p.name for n in _CONFIG_NAMES) for p in taken):
                    shown = ", ".join(p.name for p in parameters)
                    wrong.append(f"{_describe(owner)}.{name} takes ({shown})")
    return wrong


def _describe(place: Owner) -> str:
    return place.__name__ if isinstance(place, ModuleType) else f"{place.__module__}.{place.__qualname__}"


def check_patched(package: str) -> None:
    """Raise PatchError unless what our types need is patched; called when a projector is asked for."""
    broken = [r for r, seam in zip(report(package), SEAMS) if seam.required and r.state != "patched"]
    if broken:
        raise PatchError(
            f"{package!r} is patched only in part, and a projector would not work: "
            + "; ".join(f"its {r.seam} is {r.state}" for r in broken)
            + f". Run `llava-projectors doctor --package {package}`"
        )
