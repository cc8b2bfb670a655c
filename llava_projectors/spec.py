"""Type strings, `name[:key=value[,key=value...]]`, and the options a projector declares.

A projector's options are the keyword-only parameters of its `__init__`: their annotations
say what a type string may give, so a signature is the only place an option is written.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Callable, Optional

# `llava_projectors.saep` means this package's type where a fork has one of the same name.
PREFIX = "llava_projectors."
KIND = "projector type"
PRESET = "preset"


class ProjectorSpecError(ValueError):
    """A projector's type string, or an option in it, cannot be used; the message says what can."""


class Options(Mapping[str, Any]):
    """Options with their values, immutable and hashable, equal to a dict with the same items; lists become tuples.

    Example:
        >>> Options({"stride": 3, "layers": [6, 12]})
        {'stride': 3, 'layers': (6, 12)}
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


@dataclass(frozen=True)
class ProjectorSpec:
    """A parsed type string.

    Example:
        >>> str(ProjectorSpec("saep", {"stride": 3, "layers": (6, 12)}))
        'saep:stride=3,layers=6+12'

    Attributes:
        name: the projector's name in the registry.
        options: the options that the string gives, converted; defaults are not filled in.
    """

    name: str
    options: Mapping[str, Any] = Options({})

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", Options(self.options))

    def __str__(self) -> str:
        pairs = ",".join(f"{key}={format_value(value)}" for key, value in self.options.items())
        return f"{self.name}:{pairs}" if pairs else self.name


@dataclass(frozen=True)
class Values:
    """The values that an option can have.

    Attributes:
        expects: what a value looks like, in words.
        convert: text to value; raises ValueError.
        holds: whether a value is of the declared type.
        choices: the only values allowed, or () for all of the type.
        or_none: whether the annotation is Optional.
    """

    expects: str
    convert: Callable[[str], Any]
    holds: Callable[[Any], bool]
    choices: tuple[Any, ...] = ()
    or_none: bool = False


@dataclass(frozen=True)
class Option:
    """One option of a projector: what may stand behind `name=` in a type string.

    Attributes:
        name: the parameter's name.
        default: the value when the type string gives none; None stands for "derived".
        values: what its values are, in a type string and in a checkpoint's record.
    """

    name: str
    default: Any
    values: Values

    def parse(self, text: str, type_string: str, kind: str = KIND) -> Any:
        """The value that `text` stands for; errors quote `type_string` and call it a `kind`."""
        try:
            value = self.values.convert(text)
        except ValueError:
            raise self._error(text, type_string, kind, f"expected {self.values.expects}") from None
        return self._chosen(value, text, type_string, kind)

    def check(self, value: Any, type_string: str, kind: str = KIND) -> Any:
        """A value of a checkpoint's record, if it is of the declared type, or None where the option can be None.

        Raises:
            ProjectorSpecError: as `parse`.
        """
        if value is None and (self.default is None or self.values.or_none):
            return None
        if not self.values.holds(value):
            raise self._error(value, type_string, kind, f"expected {self.values.expects}")
        return self._chosen(value, value, type_string, kind)

    def _chosen(self, value: Any, written: Any, type_string: str, kind: str) -> Any:
        choices = self.values.choices
        if choices and value not in choices:
            shown = [format_value(choice) for choice in choices]
            hint = f"valid values are {', '.join(shown)}{suggest(str(written), shown)}"
            raise self._error(written, type_string, kind, hint)
        return value

    def _error(self, written: Any, type_string: str, kind: str, hint: str) -> ProjectorSpecError:
        return ProjectorSpecError(f"bad value {written!r} for option {self.name!r} in {kind} {type_string!r}: {hint}")


def format_value(value: Any) -> str:
    """A value as a type string writes it."""
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing."""
    nearest = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def base_name(type_string: str) -> str:
    """The projector's name alone.

    Example:
        >>> base_name("llava_projectors.saep:stride=3")
        'saep'
    """
    return type_string.partition(":")[0].strip().removeprefix(PREFIX)


def split_type_string(type_string: str, kind: str = KIND) -> tuple[str, dict[str, str]]:
    """The name and the options, as texts.

    Example:
        >>> split_type_string("saep:stride=3,layers=6+12")
        ('saep', {'stride': '3', 'layers': '6+12'})
    """
    _, colon, tail = type_string.partition(":")
    pairs: dict[str, str] = {}
    for part in tail.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            hint = "; the values of a list are joined by +, for example layers=6+12" if pairs else ""
            raise ProjectorSpecError(
                f"cannot read {part!r} in {kind} {type_string!r}: options are written name:key=value,key=value{hint}"
            )
        if key in pairs:
            raise ProjectorSpecError(f"option {key!r} is given twice in {kind} {type_string!r}")
        pairs[key] = value
    return base_name(type_string), pairs


def parse_type_string(
    type_string: str,
    options: Mapping[str, Option],
    synonyms: Optional[Mapping[str, str]] = None,
    kind: str = KIND,
    presets: Optional[Mapping[str, Mapping[str, Any]]] = None,
) -> ProjectorSpec:
    """Read a type string of a projector, or of another `kind`, that declares `options`.

    Args:
        type_string: what the user wrote.
        options: name -> what may stand behind it.
        synonyms: what other projectors call an option -> its name here, for suggestions.
        kind: what errors call it.
        presets: what may stand behind `preset=` -> the options that it stands for; those beside it win.
    """
    name, pairs = split_type_string(type_string, kind)
    values: dict[str, Any] = {}
    if presets and PRESET in pairs:
        chosen = replace(_PLAIN[str], choices=tuple(presets))
        values.update(presets[Option(PRESET, None, chosen).parse(pairs.pop(PRESET), type_string, kind)])
    for key in pairs:
        if key not in options:
            valid = ", ".join([*options, *([PRESET] if presets else [])]) or "none"
            near = f"; did you mean {synonyms[key]!r}?" if synonyms and key in synonyms else suggest(key, options)
            raise ProjectorSpecError(f"unknown option {key!r} in {kind} {type_string!r}: {name!r} has {valid}{near}")
    values.update({key: options[key].parse(text, type_string, kind) for key, text in pairs.items()})
    return ProjectorSpec(name, values)


def declared_options(cls: type) -> dict[str, Option]:
    """The options of a projector class, read off the keyword-only parameters of its `__init__`.

    Annotations that a type string can express: int, float, bool, str, `Literal[...]`,
    `tuple[int, ...]`, and `Optional` of these.

    Raises:
        TypeError: a parameter has another annotation, or no default.
    """
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    options = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        where = f"option {parameter.name!r} of {cls.__qualname__}"
        if parameter.default is inspect.Parameter.empty:
            raise TypeError(f"{where} needs a default")
        values = _values(hints.get(parameter.name, str), where)
        options[parameter.name] = Option(parameter.name, parameter.default, values)
    return options


def _values(hint: Any, where: str) -> Values:
    """What an annotation allows; `where` says in an error whose it is."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(arguments) == 2 and type(None) in arguments:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return replace(_values(inner, where), or_none=True)
    if origin is typing.Literal:
        values = _literal_values(arguments)
    elif origin is tuple:
        values = _tuple_values(arguments)
    else:
        values = _PLAIN.get(hint)
    if values is None:
        raise TypeError(
            f"{where} is annotated {hint!r}; a type string can give int, float, bool, str, "
            "Literal[...] of one of these, tuple[int, ...] or Optional of these"
        )
    return values


def _literal_values(choices: tuple[Any, ...]) -> Optional[Values]:
    kind = type(choices[0])
    if kind not in _PLAIN or any(type(choice) is not kind for choice in choices):
        return None
    return replace(_PLAIN[kind], expects="one of " + ", ".join(map(format_value, choices)), choices=choices)


def _tuple_values(arguments: tuple[Any, ...]) -> Optional[Values]:
    if arguments[1:] != (Ellipsis,) or arguments[0] not in _PLAIN:
        return None
    item = _PLAIN[arguments[0]]
    return Values(
        f"{item.expects}, or several joined by '+'",
        lambda text: tuple(map(item.convert, text.split("+"))),
        lambda value: isinstance(value, tuple) and all(map(item.holds, value)),
    )


def _read_bool(text: str) -> bool:
    word = text.lower()
    if word not in ("true", "false"):
        raise ValueError(text)
    return word == "true"


_PLAIN: dict[Any, Values] = {
    int: Values("a whole number", int, lambda value: type(value) is int),  # True is an int as well
    float: Values("a number", float, lambda value: type(value) in (int, float)),
    bool: Values("true or false", _read_bool, lambda value: isinstance(value, bool)),
    str: Values("a word", str, lambda value: isinstance(value, str)),
}
