"""Lets transformers' own LLaVA classes load an exported folder, without `trust_remote_code`.

`autoload` installs it when transformers' LLaVA has been imported; the standard library is all it imports.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

# Stands in an exported config where transformers looks up the activation of its own projector, so that its
# classes fail, and say why, rather than answer from a projector with random weights.
OURS = "a projector of llava-projectors"
NOT_STOCK = f"{OURS}: load with trust_remote_code=True, or install llava-projectors here, from its checkout or wheel"
METHODS = ("from_pretrained", "_from_config")
# By name; identity tells ours from what somebody else put over it.
_wrappers: dict[str, Any] = {}
_is_installed = False


def install(module: ModuleType) -> None:
    """Put a method in front of each of `METHODS`, which all LLaVA classes of `module` inherit.

    Args:
        module: `transformers.models.llava.modeling_llava`.
    """
    global _is_installed
    owner = module.LlavaPreTrainedModel
    for name in METHODS:
        if name not in vars(owner):
            _wrappers[name] = _giving_way(owner, name)
            setattr(owner, name, _wrappers[name])
    _is_installed = True


def uninstall(module: ModuleType) -> None:
    """The classes inherit the methods of transformers again; what somebody has put over ours stays, with ours idle."""
    global _is_installed
    owner = module.LlavaPreTrainedModel
    for name in METHODS:
        if name in vars(owner) and vars(owner)[name] is _wrappers.get(name):
            delattr(owner, name)
    _is_installed = False


def _giving_way(owner: Any, name: str) -> Any:
    """The class method in front. It calls the inherited one; if that stops at an exported config, our class loads."""

    @functools.wraps(getattr(owner, name).__func__)
    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            # Looked up at each call: other packages replace it too, after us.
            return getattr(super(owner, cls), name)(*args, **kwargs)
        except KeyError as error:
            # Not the whole sentence, which other versions have written otherwise.
            if not _is_installed or not any(str(argument).startswith(OURS) for argument in error.args):
                raise
            classes = _exported_classes()
            if cls.__name__ not in classes:
                raise
        return getattr(classes[cls.__name__], name)(*args, **kwargs)

    return classmethod(load)


def _exported_classes() -> dict[str, Any]:
    try:
        from llava_projectors.serving.modeling import CLASSES
    except ImportError as error:
        import transformers

        raise ImportError(
            f"an exported folder needs transformers 4.57 or newer, this is {transformers.__version__}; LLaVA's own "
            "scripts load the checkpoint that it was exported from"
        ) from error
    return CLASSES
