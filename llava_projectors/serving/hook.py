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
# In the configs of the two processors: where transformers finds their code.
PROCESSOR_AUTO_MAP = {
    "AutoImageProcessor": "image_processing_llava_projectors.LlavaProjectorsImageProcessor",
    "AutoProcessor": "processing_llava_projectors.LlavaProjectorsProcessor",
}
# What the files call the processors: transformers' own classes, which fail, or give way. It would refuse names that it
# does not know before they could.
STOCK_NAMES = {"processor_class": "LlavaProcessor", "image_processor_type": "LlavaImageProcessor"}
# Module of transformers -> the class whose subclasses, or itself, give way, and the methods that load.
WATCHED = {
    "transformers.models.llava.modeling_llava": ("LlavaPreTrainedModel", ("from_pretrained", "_from_config")),
    "transformers.models.llava.processing_llava": ("LlavaProcessor", ("from_pretrained",)),
}
# By class and method; identity tells ours from what somebody else put over it.
_wrappers: dict[tuple[str, str], Any] = {}
_is_installed = False


def install(module: ModuleType) -> None:
    """Put a method in front of each that loads, which all LLaVA classes of `module` inherit.

    Args:
        module: one of `WATCHED`; one that is only being imported is left alone.
    """
    global _is_installed
    _is_installed = True
    class_name, methods = WATCHED[module.__name__]
    owner: Any = getattr(module, class_name, None)
    for name in methods if owner is not None else ():
        if name not in vars(owner):
            _wrappers[class_name, name] = _giving_way(owner, name)
            setattr(owner, name, _wrappers[class_name, name])


def uninstall(module: ModuleType) -> None:
    """The classes inherit the methods of transformers again; what somebody has put over ours stays, with ours idle."""
    global _is_installed
    _is_installed = False
    class_name, methods = WATCHED[module.__name__]
    owner: Any = getattr(module, class_name, None)
    for name in methods if owner is not None else ():
        if name in vars(owner) and vars(owner)[name] is _wrappers.get((class_name, name)):
            delattr(owner, name)


def _giving_way(owner: Any, name: str) -> Any:
    """The class method in front. It calls the inherited one; if that stops at an exported config, our class loads."""

    @functools.wraps(getattr(owner, name).__func__)
    def load(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            # Looked up at each call: other packages replace it too, after us.
            return getattr(super(owner, cls), name)(*args, **kwargs)
        except (KeyError, TypeError, ValueError) as error:
            # Not the whole sentence, which other versions have written otherwise.
            if not _is_installed or OURS not in str(error):
                raise
            classes = _exported_classes()
            if cls.__name__ not in classes:
                raise
        return getattr(classes[cls.__name__], name)(*args, **kwargs)

    return classmethod(load)


def _exported_classes() -> dict[str, Any]:
    try:
        from llava_projectors.serving.modeling import CLASSES
        from llava_projectors.serving.processing import LlavaProjectorsProcessor
    except ImportError as error:
        import transformers

        raise ImportError(
            f"an exported folder needs transformers 4.57 or newer, this is {transformers.__version__}; LLaVA's own "
            "scripts load the checkpoint that it was exported from"
        ) from error
    return {**CLASSES, "LlavaProcessor": LlavaProjectorsProcessor}
