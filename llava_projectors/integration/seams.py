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
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable, Optional, Union

from llava_projectors import seam_names
from llava_projectors.integration import gate, high_resolution, trainer, wrappers
from llava_projectors.integration.gate import Arguments, Package, is_ours

Owner = Union[ModuleType, type]


class PatchError(RuntimeError):
    """A package cannot be patched; the message names the seam."""


@dataclass(frozen=True)
class Seam:
    """One role in LLaVA that is replaced for models of our types.

    Attributes:
        role: what the attribute does there.
        names: what it is called, as a function or a method.
        places: finds it in a module: the module, or a class of it, and the attribute.
        settings: the call's arguments, by name and in the order of the original's signature -> what
            the gate looks at.
        replacement: what runs instead for our types: it gets the original, the package, and the
            call's own arguments.
        otherwise: what runs for other types, with the original, the package, what the gate looked at, and
            the call's own arguments; None for the original itself.
        required: whether our types cannot work without it. The others are safeguards, which a
            program that never imports their module does without.
    """

    role: str
    names: tuple[str, ...]
    places: Callable[[tuple[str, ...], ModuleType], Iterator[tuple[Owner, str]]]
    settings: Callable[[Arguments], tuple[Any, ...]]
    replacement: Callable[..., Any]
    otherwise: Optional[Callable[..., Any]] = None
    required: bool = True

    def __str__(self) -> str:
        return self.role


def _argument(place: int) -> Callable[[Arguments], tuple[Any, ...]]:
    return lambda arguments: tuple(arguments.values())[place : place + 1]


def _functions(names: tuple[str, ...], module: ModuleType) -> Iterator[tuple[Owner, str]]:
    """Functions that the module itself defines."""
    for name in names:
        value = vars(module).get(name)
        if callable(value) and getattr(value, "__module__", None) == module.__name__:
            yield module, name


def _methods(
    names: tuple[str, ...], module: ModuleType, known_by: frozenset[str] = seam_names.SEAM_METHODS
) -> Iterator[tuple[Owner, str]]:
    """Methods that a class of the module defines itself, beside one of those by which LLaVA's classes are known."""
    for cls in _classes(module):
        if not known_by.isdisjoint(vars(cls)):
            yield from ((cls, name) for name in names if vars(cls).get(name))


def _constructors(names: tuple[str, ...], module: ModuleType) -> Iterator[tuple[Owner, str]]:
    """As `_methods`, of the classes that build tower and projector: every class has a constructor."""
    return _methods(names, module, seam_names.INITIALIZERS)


def _inherited_loaders(names: tuple[str, ...], module: ModuleType) -> Iterator[tuple[Owner, str]]:
    """Methods that a model's class inherits from transformers; one of its own, in front, is left alone."""
    for cls in _classes(module):
        for name in names if cls.__name__.endswith(seam_names.SEAM_CLASS_ENDING) else ():
            own = vars(cls).get(name)
            if hasattr(cls, name) and (own is None or _is_wrapper(own)):
                yield cls, name


def _trainers(names: tuple[str, ...], module: ModuleType) -> Iterator[tuple[Owner, str]]:
    """Methods of a Trainer's class, its own or inherited."""
    for cls in _classes(module):
        is_trainer = all(hasattr(cls, name) for name in seam_names.TRAINER_METHODS)
        if is_trainer and cls.__name__.endswith(seam_names.TRAINER_CLASS_ENDING):
            yield from ((cls, name) for name in names)


def _classes(module: ModuleType) -> list[type]:
    return [v for v in list(vars(module).values()) if isinstance(v, type) and v.__module__ == module.__name__]


SEAMS = (
    Seam("tower builder", seam_names.TOWER_BUILDERS, _functions, _argument(0), wrappers.build_tower),
    Seam(
        "projector builder",
        seam_names.PROJECTOR_BUILDERS,
        _functions,
        _argument(0),
        wrappers.build_our_projector,
        otherwise=wrappers.build_other_projector,
    ),
    Seam("model constructor", ("__init__",), _constructors, _argument(1), wrappers.construct_model),
    Seam(
        "vision initializer",
        (seam_names.VISION_INITIALIZER,),
        _methods,
        wrappers.settings_of_training,
        wrappers.initialize_vision_modules,
    ),
    Seam(
        "further initializers",
        seam_names.FURTHER_INITIALIZERS,
        _methods,
        wrappers.settings_of_model_in_use,
        wrappers.initialize_other_readers,
        required=False,
    ),
    # The loading report, which says what a checkpoint lacked, is to be had nowhere else.
    Seam(
        "checkpoint loader",
        ("from_pretrained",),
        _inherited_loaders,
        wrappers.settings_of_checkpoint,
        wrappers.load_checkpoint,
        required=False,
    ),
    Seam(
        "model loader",
        seam_names.MODEL_LOADERS,
        _functions,
        wrappers.settings_of_model,
        wrappers.load_model,
        required=False,
    ),
    Seam(
        "training loop",
        (seam_names.TRAINING_LOOP,),
        _trainers,
        trainer.settings_of_trainer,
        trainer.train,
        required=False,
    ),
    Seam(
        "checkpoint writer",
        (seam_names.CHECKPOINT_WRITER,),
        _trainers,
        trainer.settings_of_trainer,
        trainer.save_model,
        required=False,
    ),
    Seam(
        "best checkpoint",
        (seam_names.BEST_CHECKPOINT,),
        _trainers,
        trainer.settings_of_trainer,
        trainer.load_best_model,
        required=False,
    ),
    # The three of `image_aspect_ratio slice`. The first is the only place of LLaVA's script that knows
    # the setting and the tokenizer; the second joins the pictures of a batch, which tiles of other
    # grids do not survive; the third encodes what the second passes on.
    Seam(
        "tokenizer initializer",
        ("initialize_vision_tokenizer",),
        _methods,
        wrappers.settings_of_model_in_use,
        high_resolution.initialize_vision_tokenizer,
        required=False,
    ),
    Seam(
        "inputs preparer",
        (seam_names.INPUTS_PREPARER,),
        _methods,
        wrappers.settings_of_model_in_use,
        high_resolution.prepare_inputs,
        required=False,
    ),
    Seam(
        "image encoder",
        ("encode_images",),
        _methods,
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
            # A replacement may have other names for its first parameters, so it gets them by position.
            for parameter in list(signature.parameters.values())[len(args) :]:
                if parameter.name not in kwargs or parameter.default is not inspect.Parameter.empty:
                    break
                args = (*args, kwargs.pop(parameter.name))
            return seam.replacement(function, package, *args, **kwargs)
        if seam.otherwise is not None:
            return seam.otherwise(function, package, settings, *args, **kwargs)
        return function(*args, **kwargs)

    return classmethod(gated) if is_class_method else gated


def patch_module(package: str, module: ModuleType) -> None:
    """Patch the seams in one module that has been executed."""
    with _lock:
        for seam in SEAMS:
            for owner, name in seam.places(seam.names, module):
                original = inspect.getattr_static(owner, name)
                if _is_in_place(owner, name, original):
                    continue
                wrapper = _gated(seam, _package(package), owner, name, original)
                if seam.replacement is wrappers.build_our_projector:
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
            if isinstance(p.owner, ModuleType):
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
    owners = [found for module in modules for found in seam.places(seam.names, module)]
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
            for owner, name in seam.places(seam.names, module):
                parameters = [*inspect.signature(inspect.getattr_static(owner, name)).parameters.values()]
                taken = parameters[int(isinstance(owner, type)) :][:1]
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
