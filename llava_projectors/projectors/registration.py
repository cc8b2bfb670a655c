"""Projector name -> class: the decorator by which built-in projectors and those of users are registered."""

from __future__ import annotations

import re
from typing import Callable, TypeVar

from llava_projectors.projectors.base import Projector
from llava_projectors.spec import Option, declared_options

# LLaVA's own names: taking one over would change models that do not use this package.
LLAVA_TYPES = re.compile(r"linear|identity|mlp\d+x_gelu")
_NAME = re.compile(r"[a-z][a-z0-9_]*")

ProjectorClass = TypeVar("ProjectorClass", bound=type[Projector])

classes: dict[str, type[Projector]] = {}
options: dict[str, dict[str, Option]] = {}


def register_projector(name: str) -> Callable[[ProjectorClass], ProjectorClass]:
    """Class decorator: make `--mm_projector_type name` build this class.

    The class derives from `llava_projectors.Projector`; the keyword-only parameters of its
    `__init__` become the options of the type. Defining the same class again, as re-running
    a notebook cell does, replaces it.

    Raises:
        ValueError: the name is no lower-case identifier, is LLaVA's own, or is taken.
        TypeError: not a Projector, or an option that no type string could give.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"projector name {name!r} must be lower-case letters, digits and underscores")
    if LLAVA_TYPES.fullmatch(name):
        raise ValueError(f"projector name {name!r} is LLaVA's own; choose another")

    def register(cls: ProjectorClass) -> ProjectorClass:
        if not (isinstance(cls, type) and issubclass(cls, Projector)):
            raise TypeError(f"{cls!r} cannot be registered as {name!r}: derive it from llava_projectors.Projector")
        taken = classes.get(name)
        if taken is not None and _import_path(taken) != _import_path(cls):
            raise ValueError(f"projector name {name!r} is taken by {'.'.join(_import_path(taken))}")
        options[name] = declared_options(cls)
        cls.name = name
        classes[name] = cls
        return cls

    return register


def _import_path(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
