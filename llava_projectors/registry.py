"""What a type string resolves to: a projector class and the value of every option.

Importing a module in `projectors/` registers its class. Other distributions name a module under
the entry-point group `llava_projectors`; it is imported when a type is first looked up.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from llava_projectors import projectors
from llava_projectors.projectors import registration
from llava_projectors.projectors.base import Projector
from llava_projectors.spec import (
    KIND,
    PREFIX,
    Option,
    Options,
    ProjectorSpec,
    ProjectorSpecError,
    base_name,
    format_value,
    parse_type_string,
    suggest,
)

if TYPE_CHECKING:
    from typing import TypeGuard  # Python 3.10

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "llava_projectors"
# In a checkpoint's config, beside the type string: the value of every option, whatever the defaults become.
OPTIONS_SETTING = "mm_projector_options"
# Beside them: the version of this package that trained it.
VERSION_SETTING = "llava_projectors_version"
# And the side of the patch grid that the tower returned: some forks make larger pictures than its config says.
GRID_SETTING = "mm_projector_grid"


def list_projectors() -> list[str]:
    """Names of all registered projectors, sorted.

    Example:
        >>> "saep" in list_projectors()
        True
    """
    _load_entry_points()
    return sorted(registration.classes)


def projector_options(name: str) -> dict[str, Option]:
    """The options of a registered projector, in the order of its signature."""
    return registration.options[name]


def is_registered(type_string: Any) -> TypeGuard[str]:
    """Whether the name in a type string is one of ours; options are not looked at.

    Other distributions are asked for their types only when the name is neither built in nor LLaVA's own.
    """
    if not isinstance(type_string, str):
        return False
    name = base_name(type_string)
    if name in registration.classes:
        return True
    return registration.LLAVA_TYPE_PATTERN.fullmatch(name) is None and name in list_projectors()


LLAVA_TYPES = ("linear", "mlp2x_gelu", "identity")


def unknown_type(type_string: Any) -> ProjectorSpecError:
    """The error for a name that is none of this package's."""
    name = str(type_string).partition(":")[0]
    ours = list_projectors()
    if name in LLAVA_TYPES:
        return ProjectorSpecError(
            f"{name!r} is a projector type of LLaVA's own; llava_projectors has {', '.join(ours)}"
        )
    return ProjectorSpecError(
        f"unknown projector type {type_string!r}: llava_projectors has {', '.join(ours)}; "
        f"LLaVA has {', '.join(LLAVA_TYPES)}{suggest(name, [*ours, *LLAVA_TYPES])}"
    )


def parse_spec(type_string: str) -> ProjectorSpec:
    """Read and check a type string, for example `saep:stride=3,layers=6+12+18+23`.

    Raises:
        ProjectorSpecError: unknown name, option or value; says what is valid and what is near.

    Example:
        >>> parse_spec("tokenpacker:scale_factor=3").options
        {'scale_factor': 3}
    """
    if not is_registered(type_string):
        raise unknown_type(type_string)
    name = base_name(type_string)
    cls = registration.classes[name]
    strides = {other.stride_option for other in registration.classes.values()}
    synonyms = dict.fromkeys(strides, cls.stride_option) if cls.stride_option in registration.options[name] else {}
    return parse_type_string(type_string, registration.options[name], synonyms, presets=cls.presets)


def normalize(type_string: str) -> str:
    """A type string as it is kept in a checkpoint's config: without blanks, numbers in their plainest form.

    Raises:
        ProjectorSpecError: as `parse_spec`.

    Example:
        >>> normalize(" saep : stride = +3")
        'saep:stride=3'
    """
    prefix = PREFIX if type_string.strip().startswith(PREFIX) else ""
    return f"{prefix}{parse_spec(type_string)}"


@dataclass(frozen=True)
class ResolvedSpec:
    """A type string with its class and the value of every option.

    Attributes:
        type_string: as the user or the checkpoint wrote it.
        cls: the projector class.
        options: keyword arguments for the class; None where the class derives the value.
        given: those of them that the type string itself gives.
    """

    type_string: str
    cls: type[Projector]
    options: Options
    given: Options

    def same_projector(self, other: ResolvedSpec) -> bool:
        """Whether both describe the same module, however they are written."""
        return (self.cls, self.options) == (other.cls, other.options)

    def build(self, mm_hidden_size: int, hidden_size: int) -> Projector:
        """The module, with fresh weights."""
        with _quoting(self.type_string):
            return self.cls(mm_hidden_size, hidden_size, **self.options)

    def build_empty(self, mm_hidden_size: int, hidden_size: int) -> Projector:
        """The module without storage, to ask for its shapes; with storage, where its constructor looks at numbers."""
        try:
            with torch.device("meta"):
                return self.build(mm_hidden_size, hidden_size)
        except (RuntimeError, TypeError) as error:
            try:
                with torch.random.fork_rng(devices=[]):
                    return self.build(mm_hidden_size, hidden_size)
            except (RuntimeError, TypeError):
                raise error from None

    def output_side(self, side: int) -> int:
        """Side of the grid of visual tokens for a grid of `side` x `side` patches."""
        with _quoting(self.type_string):
            return self.cls.output_side(side, self.options)


@contextmanager
def _quoting(type_string: str) -> Iterator[None]:
    """Re-raise a projector class's ValueErrors with the type string that led to them."""
    try:
        yield
    except ValueError as error:
        raise ProjectorSpecError(f"projector type {type_string!r}: {error}") from error


def resolve(type_string: str, config: Any = None) -> ResolvedSpec:
    """Fill in the options that a type string leaves out: as the checkpoint was trained, else by default.

    Args:
        type_string: one of ours.
        config: LLaVA's config or arguments. Training writes every option there (`OPTIONS_SETTING`);
            of configs without that, the class's `config_options` are read.

    Raises:
        ProjectorSpecError: the type string is not valid, or contradicts the checkpoint's own options.

    Example:
        >>> resolve("saep:stride=3").options["stride"]
        3
    """
    spec = parse_spec(type_string)
    cls = registration.classes[spec.name]
    known = registration.options[spec.name]
    recorded = cls.options_from_record(_record(spec.name, type_string, config, known))
    options = {}
    for option in known.values():
        if option.name in recorded:
            options[option.name] = _as_recorded(option, recorded[option.name], spec, type_string)
        elif option.name in spec.options:
            options[option.name] = spec.options[option.name]
        else:
            options[option.name] = _from_config(option, cls, config, type_string)
    return ResolvedSpec(type_string, cls, Options(options), Options(spec.options))


def _as_recorded(option: Option, kept: Any, spec: ProjectorSpec, type_string: str) -> Any:
    """The value that a checkpoint was trained with, unless the type string says another one."""
    kept = option.check(kept, type_string, f"{OPTIONS_SETTING} of the config.json, for {KIND}")
    if option.name not in spec.options:
        return kept
    given = spec.options[option.name]
    if not _agree(option.name, given, kept):
        raise ProjectorSpecError(
            f"projector type {type_string!r} has {option.name}={format_value(given)}, but the checkpoint was "
            f"trained with {option.name}={format_value(kept)} ({OPTIONS_SETTING} in its config.json)"
        )
    return given if kept is None else kept


def _from_config(option: Option, cls: type[Projector], config: Any, type_string: str) -> Any:
    """What LLaVA's config says of an option that its class takes from there, else the default."""
    value = getattr(config, option.name, None) if option.name in cls.config_options else None
    # Released configs hold some numbers as texts.
    return option.default if value is None else option.parse(str(value), type_string)


def as_trained(type_string: str, recorded: Mapping[str, Any]) -> str:
    """The type string that means today what a checkpoint's record says.

    Args:
        type_string: what the checkpoint was trained as, ours or not.
        recorded: the options beside it, or nothing.
    """
    if not recorded or not is_registered(type_string):
        return type_string
    spec = parse_spec(type_string)
    known = registration.options[spec.name]
    kept = registration.classes[spec.name].options_from_record(recorded)
    now = resolve(type_string).options
    if all(_agree(name, value, kept.get(name, value)) for name, value in now.items() if value is not None):
        return type_string
    differing = {name: value for name, value in kept.items() if name in known and value != known[name].default}
    return str(ProjectorSpec(spec.name, dict(sorted(differing.items()))))


def _record(name: str, type_string: str, config: Any, known: Mapping[str, Option]) -> Mapping[str, Any]:
    """What training wrote of the options."""
    recorded: Mapping[str, Any] = getattr(config, OPTIONS_SETTING, None) or {}
    trained_as = getattr(config, "mm_projector_type", None) or type_string
    if recorded and base_name(str(trained_as)) != name:
        raise ProjectorSpecError(f"projector type {type_string!r}: the checkpoint was trained as {trained_as!r}")
    if not isinstance(recorded, Mapping):
        raise ProjectorSpecError(
            f"projector type {type_string!r}: {OPTIONS_SETTING} in the checkpoint's config.json is {recorded!r}, "
            "not options with their values"
        )
    removed = registration.classes[name].removed_options
    recorded = {key: value for key, value in recorded.items() if key not in removed or value != removed[key]}
    unknown = ", ".join(sorted(recorded.keys() - known.keys()))
    if unknown:
        version = getattr(config, VERSION_SETTING, None) or "of its training"
        raise ProjectorSpecError(
            f"projector type {type_string!r}: the checkpoint's {OPTIONS_SETTING} has {unknown}, which this version "
            f"does not know; install llava-projectors {version}"
        )
    return recorded


def _agree(name: str, given: Any, kept: Any) -> bool:
    """Whether a typed option is the recorded one.

    Layers counted from the end are compared in `resolve_layers`, which knows the tower. A record without
    layers is of a tower that has no hidden states to choose from.
    """
    return given == kept or (name == "layers" and (kept is None or min(given, default=0) < 0))


def forms() -> Iterator[str]:
    """Every type without options: as it is now, and as it was before checkpoints recorded them."""
    for name in list_projectors():
        yield name
        older = registration.classes[name].without_record
        if older:
            yield str(ProjectorSpec(name, dict(older)))


def projector_class(type_string: str) -> type[Projector]:
    """The class that a type string names.

    Raises:
        ProjectorSpecError: unknown name, option or value.
    """
    return resolve(type_string).cls


def build_projector(type_string: str, mm_hidden_size: int = 1024, hidden_size: int = 4096) -> Projector:
    """A projector with fresh weights; LLaVA need not be installed.

    Args:
        type_string: for example `saep` or `tokenpacker:scale_factor=3`.
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.

    Returns:
        A module that maps [B, N, L*C] to [B, M, D].

    Raises:
        ProjectorSpecError: unknown name, option or value.

    Example:
        >>> import torch
        >>> projector = build_projector("saep:layers=2+3", mm_hidden_size=8, hidden_size=16)
        >>> projector(torch.zeros(1, 6 * 6, 2 * 8)).shape
        torch.Size([1, 9, 16])
    """
    return resolve(type_string).build(mm_hidden_size, hidden_size)


@cache
def _load_entry_points() -> None:
    for entry_point in _entry_points():
        try:
            importlib.import_module(entry_point.value)
        except Exception as error:  # somebody else's module must not take ours down
            logger.warning("cannot load projectors of %s: %s: %s", entry_point, type(error).__name__, error)


def _entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    found: Any = importlib.metadata.entry_points()
    if hasattr(found, "select"):
        return found.select(group=ENTRY_POINT_GROUP)
    return found.get(ENTRY_POINT_GROUP, ())  # Python 3.9


def _import_built_ins() -> None:
    for module in pkgutil.iter_modules(projectors.__path__, f"{projectors.__name__}."):
        importlib.import_module(module.name)


_import_built_ins()
