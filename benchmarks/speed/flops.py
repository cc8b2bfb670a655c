"""How many floating-point operations each part takes: the bound that measured times are held against.

A multiplication and an addition are two operations. Counted are matrix products and convolutions;
elementwise work, norms and softmax are left out, as in `torch.utils.flop_counter`, against which
every function here is tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.candidates import NAIVE, PUBLISHED, STOCK, Subject
from llava_projectors import registry
from llava_projectors.projectors.base import Projector
from llava_projectors.projectors.layers import DepthwiseConv2d
from llava_projectors.projectors.saep import SAEP
from llava_projectors.projectors.tokenpacker import TokenPacker


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass and of the backward pass after it."""

    forward: int = 0
    backward: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(self.forward * times, self.backward * times)

    @property
    def both(self) -> int:
        """A forward and a backward pass."""
        return self.forward + self.backward


def linear(rows: int, in_features: int, out_features: int, *, train: bool = True, input_grad: bool = True) -> Flops:
    """A linear layer: `train` for the gradient of its weight, `input_grad` for that of its input."""
    forward = 2 * rows * in_features * out_features
    return Flops(forward, forward * (train + input_grad))


def product(rows: int, inner: int, columns: int) -> Flops:
    """A matrix product of two activations, both with gradients."""
    forward = 2 * rows * inner * columns
    return Flops(forward, 2 * forward)


def mlp2x_gelu(num_patches_per_side: int, mm_hidden_size: int, hidden_size: int) -> Flops:
    """LLaVA-1.5's projector, for one image of a frozen tower."""
    patches = num_patches_per_side**2
    return linear(patches, mm_hidden_size, hidden_size, input_grad=False) + linear(patches, hidden_size, hidden_size)


def depthwise(positions: int, layer: DepthwiseConv2d, *, input_grad: bool = True) -> Flops:
    """A depthwise convolution that gives so many positions."""
    forward = 2 * positions * layer.in_channels * layer.kernel_size[0] ** 2
    return Flops(forward, forward * (1 + input_grad))


def saep(model: SAEP, num_patches_per_side: int) -> Flops:
    """One image of a frozen tower."""
    channels, inner = model.num_levels * model.mm_hidden_size, model.inner_size
    patches, tokens = num_patches_per_side**2, _tokens(model, num_patches_per_side)
    pointwise_first = model.order == "pointwise_first"
    work = linear(patches if pointwise_first else tokens, channels, inner, input_grad=not pointwise_first)
    work += depthwise(tokens, model.depthwise, input_grad=pointwise_first)
    for blocks, positions in ((model.before, patches), (model.after, tokens)):
        work += linear(positions, inner, inner) * len(blocks)
        for layer in blocks.modules():
            if isinstance(layer, DepthwiseConv2d):
                work += depthwise(positions, layer)
    return work + linear(tokens, inner, model.readout_size) + linear(tokens, model.readout_size, model.hidden_size)


def tokenpacker(model: TokenPacker, num_patches_per_side: int) -> Flops:
    """One image of a frozen tower; some is made again for the gradient."""
    width, tokens, region = model.mm_hidden_size, _tokens(model, num_patches_per_side), model.stride**2
    heads = model.clip_attn.num_heads
    attention = linear(tokens, width, width) * 2 + product(tokens * heads, width, region) * 2
    made_again = Flops(0, linear(tokens, width, width).forward + product(tokens * heads, width, region).forward)
    return _around_attention(model, num_patches_per_side) + attention + made_again


def naive_tokenpacker(model: TokenPacker, num_patches_per_side: int) -> Flops:
    """A projector of `naive.py` of the same sizes: every key and value is projected."""
    width, patches, tokens = model.mm_hidden_size, num_patches_per_side**2, _tokens(model, num_patches_per_side)
    attention = linear(patches, width, width) * 2 + product(tokens, width, model.stride**2) * 2
    return _around_attention(model, num_patches_per_side) + attention


def _around_attention(model: TokenPacker, num_patches_per_side: int) -> Flops:
    """TokenPacker without what its attention does to keys and values."""
    width, patches, tokens = model.mm_hidden_size, num_patches_per_side**2, _tokens(model, num_patches_per_side)
    stack = linear(patches, model.num_levels * width, width, input_grad=False) + linear(patches, width, width)
    query = linear(tokens, width, width, input_grad=False) + linear(tokens, width, width)
    out = linear(tokens, width, width)
    mlp = linear(tokens, width, model.hidden_size) + linear(tokens, model.hidden_size, model.hidden_size)
    return stack * 2 + query + out + mlp


def _tokens(model: Projector, num_patches_per_side: int) -> int:
    return math.ceil(num_patches_per_side / model.stride) ** 2


def projector(subject: Subject, num_patches_per_side: int, mm_hidden_size: int, hidden_size: int) -> Flops:
    """One image through a projector.

    Raises:
        KeyError: there is no written model for the type.
    """
    if subject.type_string == STOCK:
        return mlp2x_gelu(num_patches_per_side, mm_hidden_size, hidden_size)
    with torch.device("meta"):
        model: Any = registry.build_projector(subject.type_string, mm_hidden_size, hidden_size)
    is_naive = subject.implementation in (NAIVE, PUBLISHED)
    functions: dict[Any, Any] = {SAEP: saep, TokenPacker: naive_tokenpacker if is_naive else tokenpacker}
    return functions[type(model)](model, num_patches_per_side)


def vision_tower(num_patches_per_side: int, patch_size: int, width: int, intermediate: int, layers: int) -> int:
    """Forward pass of the first `layers` layers of a CLIP vision model, one image."""
    patches = num_patches_per_side**2
    positions = patches + 1
    patch_embedding = 2 * patches * 3 * patch_size**2 * width
    layer = linear(positions, width, width) * 4 + linear(positions, width, intermediate) * 2
    attention = product(positions, width, positions) * 2
    return patch_embedding + layers * (layer + attention).forward


def llama(
    positions: int,
    width: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    *,
    train: bool,
    past: int = 0,
    lora_rank: int = 0,
    checkpointing: bool = False,
) -> Flops:
    """Forward and backward pass of one sequence, with the logits of every position and attention to all of them.

    Args:
        positions: new positions of the sequence.
        width: hidden size.
        intermediate: width of the MLP.
        layers: number of decoder layers.
        vocabulary: number of tokens.
        train: whether weights get gradients; the input gets one at any rate.
        past: positions in the key-value cache.
        lora_rank: of the trained layers beside those of the decoder layers, if any.
        checkpointing: whether the backward pass runs every decoder layer again.
    """
    layer = linear(positions, width, width, train=train) * 4 + linear(positions, width, intermediate, train=train) * 3
    if lora_rank:
        square = linear(positions, width, lora_rank) + linear(positions, lora_rank, width)
        layer += square * 4 + (linear(positions, width, lora_rank) + linear(positions, lora_rank, intermediate)) * 3
    attention = product(positions, width, positions + past) * 2
    decoder = (layer + attention) * layers
    made_again = Flops(0, decoder.forward * checkpointing)
    return decoder + made_again + linear(positions, width, vocabulary, train=train)
