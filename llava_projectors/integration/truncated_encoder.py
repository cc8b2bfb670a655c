"""The vision model run only as far as its hidden states are asked for, keeping only those.

LLaVA asks transformers for every hidden state and reads one; the layers above it are wasted work,
and the others wasted memory. Here a layer's input is kept, where it is asked for, as the layer is
called, and the layers above the highest return at once. Nothing else is replaced: the forwards of
the model, of its encoder and of its layers are their own, however they were wrapped or bound.

So the model and its layers become instances of subclasses of their own classes, which differ in
the call alone. What one run keeps is in context variables: threads do not meet, and a call from
outside of `keeping`, the recomputation of a checkpoint among them, is the stock call. A run in
which the layers were not called one after the other, or not seen (somebody replaced or compiled
them), counts for nothing, and the model runs again as transformers has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, ClassVar, NoReturn, Optional

import torch
from torch import nn

from llava_projectors.projectors.recompute import is_compiling
from llava_projectors.spec import ProjectorSpecError, format_value

# Where transformers' vision models (CLIP, SigLIP and their copies in the forks) keep their layers.
PLACE_OF_LAYERS = "vision_model.encoder.layers"


def can_keep(vision_model: nn.Module) -> None:
    """Prepare a vision model for `keeping`; one that is built otherwise than CLIP is left alone, and runs whole."""
    try:
        layers = vision_model.get_submodule(PLACE_OF_LAYERS)
    except AttributeError:
        return
    if isinstance(layers, nn.ModuleList):
        _mix(vision_model, _KeepingModel)
        for place, layer in enumerate(layers):
            _mix(layer, _KeepingLayer, _place=place)


@contextmanager
def keeping(layers: Sequence[int]) -> Iterator[None]:
    """Within it, a prepared model that is asked for hidden states gives these alone, and computes no further.

    Args:
        layers: indices of hidden states, ascending, 0 the embeddings.
    """
    with _set(_layers, tuple(layers)):
        yield


_layers: ContextVar[Optional[tuple[int, ...]]] = ContextVar("layers", default=None)
_run: ContextVar[Optional[_Run]] = ContextVar("run", default=None)


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


class _Run:
    """One run of a vision model.

    Attributes:
        layers: indices of the hidden states to keep, ascending.
        states: those kept so far.
        num_called: layers called so far, those that returned at once among them.
        in_order: whether they were called one after the other, each once.
        output: of the last layer that ran.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.states: dict[int, torch.Tensor] = {}
        self.num_called = 0
        self.in_order = True
        self.output: Any = None

    def see(self, place: int, state: Any) -> bool:
        """Take a layer's input; whether the layer has nothing to add."""
        self.in_order = self.in_order and place == self.num_called and isinstance(state, torch.Tensor)
        self.num_called += 1
        if self.in_order and place in self.layers:
            self.states[place] = state
        return self.in_order and place >= self.layers[-1] and self.output is not None

    def finish(self, outputs: Any) -> Any:
        """The model's outputs with the hidden states that were kept, or None where one is not there."""
        if self.num_called == self.layers[-1]:  # the last one is no layer's input
            self.states[self.num_called] = _state_in(self.output)
        if not self.in_order or tuple(self.states) != self.layers:
            return None
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        kept = f"only hidden states {format_value(self.layers)} were, which the projector reads"
        states = (self.states.get(i, _NotKept(f"hidden state {i}", kept)) for i in range(self.num_called + 1))
        device = outputs[0].device  # of a model spread over devices, where its own outputs are
        return BaseModelOutputWithPooling(
            last_hidden_state=_NotKept("last_hidden_state", kept),
            pooler_output=_NotKept("pooler_output", kept),
            hidden_states=tuple(s.to(device) if isinstance(s, torch.Tensor) else s for s in states),
            attentions=_NotKept("attentions", kept),
        )


class _NotKept:
    """In the place of an output that was not kept; tools that look for a tensor's attributes pass over it."""

    def __init__(self, name: str, kept: str) -> None:
        self._message = (
            f"{name} of the vision tower was not kept: {kept}. "
            "The code that asked for it chooses hidden states by itself, so it cannot work beside this projector type"
        )

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(self.__dict__.get("_message", name))

    def __getitem__(self, index: Any) -> NoReturn:
        raise ProjectorSpecError(self._message)


class _Mixin:
    """Mixed in before the class that a module had."""

    mixin: ClassVar[type]
    stock_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        return _rebuild, (self.mixin, self.stock_class), dict(self.__dict__)


class _KeepingModel(_Mixin):
    """A vision model that gives the hidden states of `keeping`."""

    _runs_whole = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layers = None if is_compiling() or self._runs_whole else _layers.get()
        call: Any = super().__call__  # type: ignore[misc]
        if layers is None or kwargs.get("output_hidden_states") is not True or kwargs.get("output_attentions"):
            return call(*args, **kwargs)
        run = _Run(layers)
        with _set(_layers, None), _set(_run, run):
            outputs = run.finish(call(*args, **{**kwargs, "output_hidden_states": False}))
        if outputs is None:
            self._runs_whole = True
            return call(*args, **kwargs)
        return outputs


class _KeepingLayer(_Mixin):
    """A layer whose input is kept where it is asked for."""

    _place: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = None if is_compiling() else _run.get()
        call: Any = super().__call__  # type: ignore[misc]
        if run is None:
            return call(*args, **kwargs)
        state = args[0] if args else kwargs.get("hidden_states")
        if run.see(self._place, state):
            return (state, *run.output[1:]) if isinstance(run.output, tuple) else state
        run.output = call(*args, **kwargs)
        return run.output


def _mix(module: Any, mixin: type, **attributes: Any) -> None:
    cls: Any = type(module)
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, cls)
    vars(module).update(attributes)


@cache
def _mixed(mixin: Any, cls: Any) -> Any:
    """The class under its own name, which accelerate's device maps and saved configs know it by."""
    attributes = {"mixin": mixin, "stock_class": cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (mixin, cls), attributes)


def _rebuild(mixin: type, cls: Any) -> Any:
    return object.__new__(_mixed(mixin, cls))


def _state_in(output: Any) -> Any:
    """The hidden state that a layer returns, alone or first of a tuple."""
    return output[0] if isinstance(output, tuple) else output
