"""The one gate: whether a model or config is of our types. Nothing else of ours runs before it has said so.

A bare name is ours only where the package's own projector builder was seen to refuse it. `llava_projectors.NAME`
always means ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

from llava_projectors import registry
from llava_projectors.integration.builders import ProjectorBuilder, is_asking
from llava_projectors.integration.log import log
from llava_projectors.spec import PREFIX, base_name

Function = Callable[..., Any]  # of LLaVA, or a fork
Arguments = Mapping[str, Any]  # of a call, by name, in the order of the signature


@dataclass
class Package:
    """LLaVA, or a fork of it, as far as it has been imported.

    Attributes:
        name: that it is imported by.
        check_patched: raises PatchError unless everything that our types need is patched.
        projector_builders: its own functions that build a projector.
        said: types that a line has named as left to the package.
    """

    name: str
    check_patched: Callable[[], None]
    projector_builders: tuple[ProjectorBuilder, ...] = ()
    said: set[str] = field(default_factory=set)

    def add_builder(self, function: Function) -> None:
        """Ask this function too from now on."""
        self.projector_builders = (*self.projector_builders, ProjectorBuilder(function))

    def forget_builder(self, function: Function) -> None:
        """Its module was reloaded."""
        self.projector_builders = tuple(b for b in self.projector_builders if b.function is not function)

    def reason_to_keep(self, type_string: str) -> Optional[str]:
        """Why a type of one of our names is the package's own; None when every builder refuses name and string."""
        if not self.projector_builders:
            return "has not been found"
        asked = dict.fromkeys((base_name(type_string), type_string))
        reasons = (builder.reason_to_leave(one) for builder in self.projector_builders for one in asked)
        return next((reason for reason in reasons if reason is not None), None)

    def left(self, type_string: str) -> str:
        """One sentence about a type that the package keeps."""
        return (
            f"{type_string!r} is left to {self.name}'s own projector builder, which "
            f"{self.reason_to_keep(type_string)}; for llava_projectors' own pass --mm_projector_type "
            f"{PREFIX}{type_string.strip()}"
        )


def is_ours(settings: Any, package: Package) -> bool:
    """Whether a config, or a training script's arguments, ask for a projector of ours.

    Args:
        settings: anything; only its `mm_projector_type` is looked at.
        package: where it comes from.
    """
    return is_our_type(getattr(settings, "mm_projector_type", None), package)


def is_our_type(type_string: Any, package: Package) -> bool:
    """Whether a type string means a projector of ours in this package."""
    if is_asking() or not registry.is_registered(type_string):
        return False
    if type_string.strip().startswith(PREFIX):
        return True
    if package.reason_to_keep(type_string) is None:
        return True
    if type_string not in package.said:
        package.said.add(type_string)
        log(package.left(type_string))
    return False


def our_name(type_string: str, package: Package) -> str:
    """The type string by which this package's type of that name is meant there."""
    if is_our_type(type_string, package) or not registry.is_registered(type_string):
        return type_string
    return f"{PREFIX}{type_string.strip()}"
