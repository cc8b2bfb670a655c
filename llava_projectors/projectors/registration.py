"""Projector name -> class: the decorator by which built-in projectors and those of users are registered."""

from __future__ import annotations

import re
from typing import Callable, TypeVar

from llava_projectors.projectors.base import Projector
from llava_projectors.spec import Option, declared_options

# LLaVA's own names: taking one over would change models that do not use this package.
LLAVA_TYPE_PATTERN = re.compile(r"linear|identity|mlp\d+x_gelu")
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

    Example:
        >>> from torch import nn
        >>> @register_projector("first_patch")
        ... class FirstPatch(Projector):
        ...     def __init__(self, mm_hidden_size, hidden_size, *, stride: int = 2):
        ...         super().__init__(mm_hidden_size, hidden_size, layers=None, stride=stride)
        ...         self.to_llm = nn.Linear(mm_hidden_size, hidden_size)
        ...     def forward(self, features):
        ...         return self.to_llm(self.to_grid(features)[:, :: self.stride, :: self.stride].flatten(1, 2))
        >>> _ = classes.pop("first_patch"), options.pop("first_patch")  # so that this example leaves nothing behind
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"projector name {name!r} must be lower-case letters, digits and underscores")
    if LLAVA_TYPE_PATTERN.fullmatch(name):
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
