"""Efficient visual projectors for LLaVA: importing this package arms the hook for `llava`.

Everything but the hook is loaded on first use, because the start-up file imports
this package in every interpreter of the environment.
"""

from __future__ import annotations

from llava_projectors.autoload import TYPE_CHECKING, arm_from_environment, patch, unpatch

if TYPE_CHECKING:
    from typing import Any

    from llava_projectors.files import ProjectorWeightsError
    from llava_projectors.projectors.base import Projector
    from llava_projectors.projectors.registration import register_projector
    from llava_projectors.registry import build_projector, list_projectors, parse_spec
    from llava_projectors.spec import ProjectorSpec, ProjectorSpecError

__version__ = "0.2.0"

__all__ = [
    "Projector",
    "ProjectorSpec",
    "ProjectorSpecError",
    "ProjectorWeightsError",
    "build_projector",
    "list_projectors",
    "parse_spec",
    "patch",
    "register_projector",
    "unpatch",
]

_HOME = {
    "Projector": "projectors.base",
    "ProjectorSpec": "spec",
    "ProjectorSpecError": "spec",
    "ProjectorWeightsError": "files",
    "build_projector": "registry",
    "list_projectors": "registry",
    "parse_spec": "registry",
    "register_projector": "projectors.registration",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])


arm_from_environment()
