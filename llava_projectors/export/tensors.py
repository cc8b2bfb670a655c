"""Tensors written one at a time to `.safetensors`.

The safetensors library writes a shard from memory, 5 GB of it; here a shard's header is written
first, from the shapes, and the tensors follow one by one.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_projectors.export.errors import ExportError
from llava_projectors.files import STORED_DTYPES

_NAMES = {f"torch.{kind}": name for name, kind in STORED_DTYPES.items()}
SHARD_BYTES = 5 * 10**9  # what transformers 4 writes


def item_size(dtype: torch.dtype) -> int:
    """Bytes of one number."""
    return torch.empty(0, dtype=dtype).element_size()  # torch 2.0, LLaVA's own pin, has no dtype.itemsize


@dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        key: its name.
        shape: its shape.
        make: gives it, in any dtype.
    """

    key: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


def write_checkpoint(
    folder: Path,
    outputs: Sequence[Output],
    dtype: torch.dtype,
    progress: Callable[[Sequence[Output]], Iterable[Output]] = iter,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write `model.safetensors`, or shards with an index, holding one tensor in memory at a time.

    Args:
        folder: where to.
        outputs: what to write, in this order.
        dtype: of all tensors.
        progress: wraps the outputs, for example in a progress bar.
        shard_bytes: a shard is not larger, unless one tensor is.

    Returns:
        Bytes of all tensors.

    Raises:
        ExportError: a tensor holds NaN or infinity, or would in this dtype.
    """
    shards: list[list[Output]] = []
    room = 0
    for output in outputs:
        size = math.prod(output.shape) * item_size(dtype)
        if size > room or not shards:
            shards.append([])
            room = shard_bytes
        shards[-1].append(output)
        room -= size
    total = sum(math.prod(output.shape) for output in outputs) * item_size(dtype)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        weight_map = {output.key: name for name, shard in zip(names, shards) for output in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    remaining = iter(progress(outputs))
    for name, shard in zip(names, shards):
        _write_shard(folder / name, shard, dtype, remaining)
    next(remaining, None)  # lets a progress bar finish
    return total


def _write_shard(path: Path, shard: Sequence[Output], dtype: torch.dtype, outputs: Iterable[Output]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for output in shard:
        start, end = end, end + math.prod(output.shape) * item_size(dtype)
        header[output.key] = {"dtype": _NAMES[str(dtype)], "shape": list(output.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, output in zip(shard, outputs):
            made = output.make()
            tensor = made.to(dtype).contiguous()
            if not tensor.isfinite().all():
                raise ExportError(_why_not_finite(output.key, made, dtype))
            if tuple(tensor.shape) != output.shape:
                raise AssertionError(f"{output.key} is {list(tensor.shape)}, planned was {list(output.shape)}")
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _why_not_finite(key: str, tensor: torch.Tensor, dtype: torch.dtype) -> str:
    if not tensor.isfinite().all():
        return f"{key} holds NaN or infinity: its training diverged; export an earlier checkpoint"
    largest, name = tensor.abs().max().item(), str(dtype).removeprefix("torch.")
    return f"{key} holds {largest:.3g}, which is infinity in {name}: pass --dtype bfloat16 or float32"
