"""The contract that every projector keeps: features in, visual tokens out, and what its class declares."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Optional

import torch
from torch import nn

# The first two parameters of a projector are positional and come from LLaVA's config;
# its options are keyword-only. See `llava_projectors.spec.declared_options`.


def multi_level_layers(selected: int) -> tuple[int, ...]:
    """Four hidden states spread over the upper half of the tower, `selected` the last of them.

    With n = selected + 1: n//2, 2n//3, n-2, n-1. For CLIP ViT-L (selected = 23) these are 12, 16,
    22, 23, the levels of TokenPacker (arXiv 2407.02392); the rule for other depths is our choice.
    """
    n = selected + 1
    return (n // 2, 2 * n // 3, n - 2, n - 1)


def middle_and_selected(selected: int) -> tuple[int, ...]:
    """Two hidden states: n//2 of n = selected + 1, and the selected one. For CLIP ViT-L (selected = 23) 12 and 23."""
    return ((selected + 1) // 2, selected)


def single_layer(selected: int) -> tuple[int, ...]:
    """Only the hidden state that LLaVA itself selects."""
    return (selected,)


class Projector(nn.Module):
    """Maps vision features to LLM inputs: [B, N, L*C] -> [B, M, D].

    L hidden states of C channels lie side by side on the last axis, the one that LLaVA selects
    last. N = H * H is a square grid of patches in row-major order, without a CLS token;
    M = ceil(H / stride)**2. Where the stride does not divide H, the grid is padded below and on
    the right with positions that take no part in anything.

    A subclass takes `mm_hidden_size`, `hidden_size` and its options, keyword-only with defaults.
    It keeps no buffers, because LLaVA's adapter files hold parameters only, and names no layer
    like one of the LLM's, because LoRA picks its targets by the end of a name. Where it derives
    the default of an option, it keeps the value as an attribute of that name: checkpoints record it.

    Args:
        mm_hidden_size: C, channels of one hidden state of the vision tower.
        hidden_size: D, width of the LLM.
        layers: the hidden states to aggregate, or None for the default of the class.
        stride: side of the square of patches that becomes one visual token.

    Example:
        >>> from llava_projectors import build_projector
        >>> projector = build_projector("avg_pool", mm_hidden_size=8, hidden_size=16)
        >>> isinstance(projector, Projector), projector(torch.zeros(2, 4 * 4, 8)).shape
        (True, torch.Size([2, 4, 16]))

    Attributes:
        name: what a type string calls the projector.
        default_layers: the selected hidden state's index -> the hidden states to aggregate.
        stride_option: the name that the stride has among the options.
        config_options: options that LLaVA's config may give when the type string does not.
        without_record: options as they were before checkpoints recorded them, where their defaults
            are something else now. A record that lacks one is read with it.
        removed_options: options that this version no longer has -> the recorded value that changes nothing.
        presets: name behind `preset=` in a type string -> the options that it stands for.
    """

    name: ClassVar[str]
    default_layers: ClassVar[Any] = staticmethod(single_layer)
    stride_option: ClassVar[str] = "stride"
    config_options: ClassVar[tuple[str, ...]] = ()
    without_record: ClassVar[Mapping[str, Any]] = {}
    removed_options: ClassVar[Mapping[str, Any]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, mm_hidden_size: int, hidden_size: int, layers: Optional[tuple[int, ...]], stride: int) -> None:
        super().__init__()
        self.mm_hidden_size = mm_hidden_size
        self.hidden_size = hidden_size
        self.num_levels = self.count_levels(layers)
        self.stride = stride

    @classmethod
    def options_from_record(cls, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments from a config's record: JSON's lists become tuples, `without_record` fills in."""
        if not recorded:
            return {}
        known = {**cls.without_record, **recorded}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}

    @classmethod
    def count_levels(cls, layers: Optional[tuple[int, ...]]) -> int:
        """L, which does not depend on the depth of the tower."""
        deep_enough = 1000
        return len(layers or cls.default_layers(deep_enough))

    @classmethod
    def output_side(cls, side: int, options: Mapping[str, Any]) -> int:
        """Side of the grid after the projector, for a grid of `side` x `side` patches.

        Raises:
            ValueError: one region would be larger than the grid.
        """
        stride = options.get(cls.stride_option, 1)
        if not 1 <= stride <= side:
            raise ValueError(f"{cls.stride_option}={stride} must be 1 to {side}, the side of the patch grid")
        return -(-side // stride)

    def to_grid(self, features: torch.Tensor) -> torch.Tensor:
        """[B, N, L*C] -> [B, H, W, L*C], a view where the input allows one.

        Raises:
            ValueError: the shape breaks the contract, with what was expected.
        """
        expected = self.num_levels * self.mm_hidden_size
        if features.ndim != 3 or features.shape[-1] != expected:
            raise ValueError(
                f"{type(self).__name__} expects features [batch, patches, {expected}], "
                f"{self.num_levels} hidden states of {self.mm_hidden_size} channels; "
                f"got {list(features.shape)}"
            )
        side = math.isqrt(operator.index(features.shape[1]))  # a compiler's symbol becomes a number
        if side * side != features.shape[1]:
            raise ValueError(
                f"{type(self).__name__} expects a square grid of patches, without the CLS token; "
                f"got {features.shape[1]} patches"
            )
        return features.reshape(features.shape[0], side, side, expected)

    def __getitem__(self, index: int) -> nn.Linear:
        """The linear layers by their place: LLaVA's own projectors are an `nn.Sequential`.

        Forks read dtype and device of `mm_projector[0].weight`, and set the bias of `mm_projector[-1]`.
        """
        return [module for module in self.modules() if isinstance(module, nn.Linear)][index]

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return (
            f"mm_hidden_size={self.mm_hidden_size}, hidden_size={self.hidden_size}, "
            f"num_levels={self.num_levels}, stride={self.stride}"
        )
