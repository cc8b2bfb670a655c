"""What a package's own projector builder knows, found by asking it.

What a builder compares its type with may stand anywhere: in another module's table, behind `lower()`, in a regular
expression. So its code is not read. It is called, on the meta device, with the type in question and with a type
that nobody knows. Only when it refuses both alike is the type none of its own. Whatever else happens (it builds
something, it needs a setting that is not there, it never looks at the type) leaves the type to it.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Callable, Optional

import torch

from llava_projectors.registry import LLAVA_TYPES

# What LLaVA-1.5's config says and a builder may look at. No weight of these sizes is ever made.
_CONFIG = {
    "model_type": "llava",
    "hidden_size": 4096,
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "pad",
}
_UNKNOWN_TYPE = "zzqx"

_is_asking: ContextVar[bool] = ContextVar("is_asking", default=False)
_stdout_lock = threading.Lock()


def is_asking() -> bool:
    """Whether this thread is asking a builder now: what it calls meanwhile is the package's own."""
    return _is_asking.get()


class _Settings(SimpleNamespace):
    """A config that notes in `_read` what is read of it, in order."""

    def __getattribute__(self, name: str) -> Any:
        values = super().__getattribute__("__dict__")
        if not name.startswith("_"):
            values["_read"].append(name)
        return super().__getattribute__(name)


@dataclass(frozen=True)
class _Answer:
    """What a builder did with a type.

    Attributes:
        way: how it came there: what it read of the config, and kind, code and lines of every error.
        is_refusal: it built nothing, and an error names the type.
        words: for people.
    """

    way: tuple[Any, ...]
    is_refusal: bool
    words: str


class ProjectorBuilder:
    """A function `build_vision_projector(config, ...)` of a package, and what it answered so far.

    Args:
        function: the package's own.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._reasons: dict[str, Optional[str]] = {}

    def reason_to_leave(self, type_string: str) -> Optional[str]:
        """Why a type is the builder's own, in words; None when it refuses the type as it refuses an unknown one."""
        if type_string not in self._reasons:
            self._reasons[type_string] = self._find_reason(type_string)
        return self._reasons[type_string]

    def _find_reason(self, type_string: str) -> Optional[str]:
        answer = self._ask(type_string)
        if not answer.is_refusal:
            return answer.words
        unknown = self._ask(_UNKNOWN_TYPE)
        if not unknown.is_refusal:
            return "takes any name"
        if answer.way != unknown.way:
            return answer.words
        # From the last, `identity`: it has no parameters, which DeepSpeed's zero.Init would partition.
        if all(self._ask(known).way == unknown.way for known in reversed(LLAVA_TYPES)):
            return "refuses LLaVA's own types as well"
        return None

    def _ask(self, type_string: str) -> _Answer:
        settings = _Settings(**_CONFIG, mm_projector_type=type_string, _read=[])
        token = _is_asking.set(True)
        try:
            with _undisturbed(), torch.device("meta"):
                built = self.function(settings)
        except (Exception, SystemExit) as error:
            # An OSError names a file or a repository, which the type may be taken for.
            is_refusal = type_string.lower() in str(error).lower() and not isinstance(error, OSError)
            shown = f"{type(error).__name__}: {error}".strip().split("\n")[0].rstrip(": ")
            return _Answer((*settings._read, *_steps(error)), is_refusal, f"neither builds nor refuses it ({shown})")
        finally:
            _is_asking.reset(token)
        return _Answer((*settings._read, type(built)), built is None, f"builds a {type(built).__name__}")


def _steps(error: Optional[BaseException]) -> Iterator[Any]:
    """Kind, code and lines of an error and of those behind it."""
    while error is not None:
        yield type(error)
        yield from ((frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__))
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep what a builder prints to itself, and give every random generator its state back."""
    generators: list[Any] = [(random.getstate(), random.setstate)]
    if "numpy" in sys.modules:
        numpy_random = sys.modules["numpy"].random
        generators.append((numpy_random.get_state(), numpy_random.set_state))
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    # Python has one stdout for all threads. Who comes second leaves it as it is, for nobody may wait here.
    is_first = _stdout_lock.acquire(blocking=False)
    try:
        with torch.random.fork_rng(devices), contextlib.ExitStack() as stack:
            if is_first:
                stack.enter_context(contextlib.redirect_stdout(_OthersOnly(sys.stdout)))
            yield
    finally:
        if is_first:
            _stdout_lock.release()
        for state, set_state in generators:
            set_state(state)


class _OthersOnly:
    """Passes on what is written to it by threads that are not asking."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        return len(text) if is_asking() else self._stream.write(text)
