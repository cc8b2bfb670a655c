"""The one gate: whether a model or config is of our types. Nothing else of ours runs before it has said so.

A name that a fork's own builder knows is the fork's. `llava_projectors.NAME` always means ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any, Callable

from llava_projectors import registry
from llava_projectors.spec import PREFIX, base_name

# Where LLaVA and its forks keep the type string, in configs and arguments alike.
TYPE_SETTING = "mm_projector_type"

Function = Callable[..., Any]


@dataclass
class Package:
    """LLaVA, or a fork of it, as far as it has been imported.

    Attributes:
        name: that it is imported by.
        projector_builders: its own functions that build a projector.
        check_patched: raises PatchError unless everything that our types need is patched.
    """

    name: str
    check_patched: Callable[[], None]
    projector_builders: list[Function] = field(default_factory=list)

    def knows(self, type_name: str) -> bool:
        """Whether a projector builder of the package has a type of this name, by the constants it compares with."""
        return any(type_name in _constants(builder) for builder in self.projector_builders)


def is_ours(settings: Any, package: Package) -> bool:
    """Whether a config, or a training script's arguments, ask for a projector of ours.

    Args:
        settings: anything; only its `mm_projector_type` is looked at.
        package: where it comes from.

    Example:
        >>> from types import SimpleNamespace
        >>> llava = Package("llava", check_patched=lambda: None)
        >>> is_ours(SimpleNamespace(mm_projector_type="saep:stride=3"), llava)
        True
        >>> is_ours(SimpleNamespace(mm_projector_type="mlp2x_gelu"), llava)
        False
    """
    return is_our_type(getattr(settings, TYPE_SETTING, None), package)


def is_our_type(type_string: Any, package: Package) -> bool:
    """Whether a type string means a projector of ours in this package."""
    if not registry.is_registered(type_string):
        return False
    return type_string.strip().startswith(PREFIX) or not package.knows(base_name(type_string))


@cache  # the gate stands in front of every forward
def _constants(function: Function) -> frozenset[str]:
    """Every word that a function, or a table in its module, compares with or looks up."""
    function = inspect.unwrap(function)
    tables = [
        value
        for name, value in vars(inspect.getmodule(function)).items()
        if isinstance(value, dict) and not name.startswith("__")
    ]
    return frozenset([*_words(function.__code__), *(key for table in tables for key in table if isinstance(key, str))])


def _words(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from (word for word in constant if isinstance(word, str))
        elif isinstance(constant, CodeType):
            yield from _words(constant)
