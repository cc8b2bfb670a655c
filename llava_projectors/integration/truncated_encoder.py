"""The vision model run only as far as its hidden states are asked for, keeping only those.

LLaVA asks transformers for every hidden state and reads one; the layers above it are wasted work,
and the others wasted memory. Here the encoder's own code runs the layers in parts, each ending in
a hidden state that is asked for, and the layers above the highest do not run.

Nothing is changed in the model: every call makes shallow copies of the few modules on the way to
the layers, so checkpoints, hooks, LoRA and threads see the model as it always was, and the layers
themselves, with all their hooks, are the same objects. The computations are the stock ones in the
stock order, hence the same bits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import nn

from llava_projectors.spec import ProjectorSpecError, format_value

# Where transformers' vision models (CLIP, SigLIP and their copies in the forks) keep the encoder.
ENCODER = ("vision_model", "encoder")


class KeptHiddenStates(dict[int, torch.Tensor]):
    """Index -> hidden state [B, positions, C], of those that were asked for. Negative indices are not resolved."""

    def __missing__(self, index: Any) -> torch.Tensor:
        kept = format_value(tuple(self))
        raise ProjectorSpecError(
            f"hidden state {index!r} of the vision tower was not kept: only {kept} were, which the projector reads. "
            "The code that asked for it chooses hidden states by itself, so it cannot work beside this projector type"
        )


class TruncatedVisionModel:
    """Stands for a vision model in one forward of LLaVA's tower; all but the call is the model's own.

    Args:
        vision_model: what LLaVA's tower calls `vision_tower`.
        layers: indices of hidden states, ascending, 0 the embeddings.
    """

    def __init__(self, vision_model: nn.Module, layers: Sequence[int]) -> None:
        self._vision_model = vision_model
        self._layers = layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vision_model, name)

    def __call__(self, images: torch.Tensor, **kwargs: Any) -> Any:
        """The outputs of the model; `hidden_states` maps each index asked for to [B, positions, C]."""
        encoder = _find_encoder(self._vision_model)
        if encoder is None:
            return self._vision_model(images, **kwargs)
        parts = _EncoderInParts(encoder, self._layers)
        outputs = _with_submodule(self._vision_model, ENCODER, parts)(images, **kwargs)
        # A model whose forward is bound to the original (accelerate spreads one over devices so) ran whole.
        return SimpleNamespace(hidden_states=parts.hidden_states) if parts.hidden_states else outputs


class _EncoderInParts(nn.Module):
    """Called like a transformers encoder, once; a module, because some tools walk the modules that run."""

    def __init__(self, encoder: nn.Module, layers: Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        self.ends = layers
        self.hidden_states = KeptHiddenStates()

    def forward(self, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        """The outputs of the last part."""
        kwargs["output_hidden_states"] = False
        start, outputs, num_layers = 0, None, len(self.encoder.get_submodule("layers"))  # type: ignore[arg-type]
        if self.ends[-1] > num_layers:
            raise ProjectorSpecError(
                f"hidden state {self.ends[-1]} does not exist: the vision tower that was loaded has {num_layers} layers"
            )
        for end in self.ends:
            layers = self.encoder.get_submodule("layers")[start:end]  # type: ignore[index]
            outputs = _with_submodule(self.encoder, ("layers",), layers)(inputs_embeds=inputs_embeds, **kwargs)
            inputs_embeds = self.hidden_states[end] = outputs[0]
            start = end
        return outputs


def _find_encoder(vision_model: nn.Module) -> Optional[nn.Module]:
    """The encoder, or None where the model is built otherwise."""
    try:
        encoder = vision_model.get_submodule(".".join(ENCODER))
    except AttributeError:
        return None
    return encoder if isinstance(getattr(encoder, "layers", None), nn.ModuleList) else None


def _with_submodule(module: nn.Module, path: Sequence[str], replacement: Any) -> Any:
    """A shallow copy of the module, and of the modules on the path, with another module at its end."""
    if not path:
        return replacement
    clone = copy.copy(module)
    modules = dict(module._modules)
    modules[path[0]] = _with_submodule(module.get_submodule(path[0]), path[1:], replacement)
    clone._modules = modules
    return clone
