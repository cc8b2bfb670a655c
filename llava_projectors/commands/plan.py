"""What a training step takes on each GPU, and what it sends: `llava-projectors plan`.

Counted, not measured: the tensors that PyTorch keeps for the backward pass of transformers' Llama
with fused attention, and the weights, gradients and optimizer states that DeepSpeed's ZeRO leaves on
one of N GPUs. tests/test_plan.py holds the activations against the peaks that the benchmark measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass

import torch

from llava_projectors.commands.arguments import at_least, positive
from llava_projectors.commands.columns import print_columns
from llava_projectors.integration.tower import resolve_layers
from llava_projectors.registry import build_projector, resolve
from llava_projectors.spec import ProjectorSpecError

DESCRIPTION = (
    "Counts what a training step of CLIP-L and an LLM takes on each GPU with DeepSpeed's ZeRO in bfloat16, how many "
    "sequences fit, and what is sent. Counted, not measured. Exit status 1: of a type asked for, not one sequence fits."
)
STOCK = "mlp2x_gelu"
GIB = 2**30
CLIP_LARGE_PARAMETERS = 304_000_000  # frozen
PATCHES_PER_SIDE = 336 // 14


@dataclass(frozen=True)
class LlmSizes:
    """The sizes of a Llama.

    Attributes:
        width: of the hidden states.
        intermediate: width of the MLP.
        layers: decoder layers.
        vocabulary: tokens.
        kv_width: width of keys and values together with all their heads; 0 for `width`.
    """

    width: int
    intermediate: int
    layers: int
    vocabulary: int = 32000
    kv_width: int = 0

    @property
    def parameters(self) -> int:
        """Weights of the layers, the embeddings and the head."""
        kv_width = self.kv_width or self.width
        layer = 2 * self.width * (self.width + kv_width) + 3 * self.width * self.intermediate + 2 * self.width
        return self.layers * layer + 2 * self.vocabulary * self.width + self.width


LLM_SIZES = {
    "7b": LlmSizes(4096, 11008, 32),
    "13b": LlmSizes(5120, 13824, 40),
    "mistral-7b": LlmSizes(4096, 14336, 32, kv_width=1024),
}


def activation_bytes(llm: LlmSizes, positions: int, *, train_llm: bool, bytes_each: int, checkpointing: bool) -> int:
    """What one sequence keeps for the backward pass.

    Per layer and position: the input of both norms (in float32), queries, keys, values and output of the
    attention, and three tensors of the MLP. Where the LLM is trained, also the input of each linear
    layer and the normalised input of each norm. The logits are there three times: as they come, shifted,
    and as log-probabilities, in float32 but for the first.

    Args:
        llm: the LLM.
        positions: of the sequence, text and visual tokens.
        train_llm: stage 2; in stage 1 the LLM is frozen.
        bytes_each: 2 for bfloat16, 4 for float32.
        checkpointing: keep the input of each layer only, and one layer whole.

    Example:
        >>> seq = {"train_llm": True, "bytes_each": 2, "checkpointing": False}
        >>> round(activation_bytes(LLM_SIZES["7b"], 700, **seq) / activation_bytes(LLM_SIZES["7b"], 268, **seq), 1)
        2.6
    """
    kv_width = llm.kv_width or llm.width
    norms = 2 * llm.width * 4
    kept = 2 * llm.width + 2 * kv_width + 3 * llm.intermediate
    if train_llm:
        kept += 5 * llm.width + llm.intermediate
    layer = norms + kept * bytes_each
    layers = llm.layers * llm.width * bytes_each + layer if checkpointing else llm.layers * layer
    logits = llm.vocabulary * (8 + bytes_each)
    return positions * (layers + logits)


@dataclass(frozen=True)
class Plan:
    """One GPU's share of a training step, in bytes.

    Attributes:
        type_string: the projector type.
        tokens: visual tokens of a picture.
        positions: of a sequence.
        resident: weights, gradients and optimizer states.
        per_sample: activations of one sequence.
        batch: sequences that fit beside `resident`; 0 when not even one does.
        sent: what the GPU sends in a step, whatever the batch.
    """

    type_string: str
    tokens: int
    positions: int
    resident: int
    per_sample: int
    batch: int
    sent: int


def plan(
    type_string: str,
    llm: LlmSizes,
    *,
    gpus: int = 8,
    memory: int = 80 * 10**9,
    zero: int = 3,
    text: int = 100,
    train_llm: bool = True,
    checkpointing: bool = True,
) -> Plan:
    """Count a step in bfloat16, as LLaVA's scripts train, with AdamW in float32.

    Args:
        type_string: ours, or `mlp2x_gelu`.
        llm: the LLM.
        gpus: N, over all nodes.
        memory: bytes of one GPU; a tenth is left for fragments and buffers.
        zero: ZeRO stage 0 to 3.
        text: text tokens of a sequence, answer included.
        train_llm: stage 2; else only the projector is trained.
        checkpointing: `--gradient_checkpointing True`.

    Example:
        >>> plan("saep", LLM_SIZES["7b"]).tokens
        144
    """
    tokens, projector = _projector(type_string, llm)
    trained = projector + llm.parameters * train_llm
    weights = projector + llm.parameters
    resident = 2 * (weights // (gpus if zero == 3 else 1) + CLIP_LARGE_PARAMETERS)
    resident += 2 * trained // (gpus if zero >= 2 else 1) + 12 * trained // (gpus if zero >= 1 else 1)
    per_sample = activation_bytes(llm, text + tokens, train_llm=train_llm, bytes_each=2, checkpointing=checkpointing)
    sent = 2 * 2 * trained if zero < 3 else 2 * (2 * weights + trained)
    room = math.floor(0.9 * memory) - resident
    sent_share = sent * (gpus - 1) // gpus
    return Plan(type_string, tokens, text + tokens, resident, per_sample, max(0, room // per_sample), sent_share)


def _projector(type_string: str, llm: LlmSizes) -> tuple[int, int]:
    """Visual tokens of a picture and parameters."""
    if type_string == STOCK:
        return PATCHES_PER_SIDE**2, 1024 * llm.width + llm.width**2 + 2 * llm.width
    with torch.device("meta"):
        projector = build_projector(type_string, 1024, llm.width)
    resolved = resolve(type_string)
    resolve_layers(resolved, depth=24, select_layer=-2)  # CLIP-L has all that it reads
    tokens = resolved.output_side(PATCHES_PER_SIDE) ** 2
    return tokens, sum(parameter.numel() for parameter in projector.parameters())


HEADER = ("type", "visual tokens", "sequence", "resident GiB", "GiB per sample", "batch per GPU", "GiB sent per step")


def print_plan(plans: list[Plan]) -> None:
    """One row per type."""
    rows = [HEADER]
    for p in plans:
        sizes = (f"{p.resident / GIB:.1f}", f"{p.per_sample / GIB:.2f}", str(p.batch), f"{p.sent / GIB:.1f}")
        rows.append((p.type_string, str(p.tokens), str(p.positions), *sizes))
    print_columns(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what may follow `llava-projectors plan`."""
    parser.add_argument("--type", action="append", help="a type string, may be repeated (saep and tokenpacker)")
    parser.add_argument("--llm", choices=list(LLM_SIZES), default="7b", help="(%(default)s)")
    parser.add_argument("--gpus", type=at_least(1), default=8, help="over all nodes (%(default)s)")
    parser.add_argument("--memory", type=positive, default=80, help="of one GPU, in 10**9 bytes (%(default)s)")
    parser.add_argument("--zero", type=int, choices=[0, 1, 2, 3], default=3, help="stage of ZeRO (%(default)s)")
    parser.add_argument("--text", type=at_least(0), default=100, help="text tokens of a sequence (%(default)s)")
    parser.add_argument(
        "--stage", type=int, choices=[1, 2], default=2, help="1 trains the projector only (%(default)s)"
    )
    parser.add_argument("--no-checkpointing", action="store_true", help="without --gradient_checkpointing")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan of LLaVA's own projector and of the types asked for; status 1 where one of these does not fit."""
    try:
        plans = [
            plan(
                type_string,
                LLM_SIZES[arguments.llm],
                gpus=arguments.gpus,
                memory=int(arguments.memory * 1e9),
                zero=arguments.zero,
                text=arguments.text,
                train_llm=arguments.stage == 2,
                checkpointing=not arguments.no_checkpointing,
            )
            for type_string in [STOCK, *(arguments.type or ["saep", "tokenpacker"])]
        ]
    except ProjectorSpecError as error:
        print(error, file=sys.stderr)
        return 1
    print_plan(plans)
    for p in plans:
        if p.batch == 0:
            print(
                f"{p.type_string} does not fit: {p.resident / GIB:.1f} GiB for weights, gradients and optimizer states "
                f"and {p.per_sample / GIB:.2f} GiB for a sequence, in nine tenths of {arguments.memory:g} GB"
            )
    return 0 if all(p.batch for p in plans[1:]) else 1
