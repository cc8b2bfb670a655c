"""Tensors on disk: read one at a time from `.safetensors` and `.bin`, written one at a time to `.safetensors`.

The safetensors library writes a shard from memory, 5 GB of it; here a shard's header is written
first, from the shapes, and the tensors follow one by one.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_projectors.export.errors import ExportError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
STEMS = ("model.safetensors", "pytorch_model.bin")
SHARD_BYTES = 5 * 10**9  # what transformers 4 writes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        path: the file.
        key: its name there.
        shape: its shape.
        dtype: its dtype.
        offset: of its first byte in a `.safetensors` file; -1 in a `.bin` file.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int = -1

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        if self.offset < 0:
            return _load_bin(self.path)[self.key].clone()
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        data = bytearray(math.prod(self.shape) * item_size(self.dtype))
        with self.path.open("rb") as file:
            file.seek(self.offset)
            file.readinto(data)
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)


def item_size(dtype: torch.dtype) -> int:
    """Bytes of one number."""
    return torch.empty(0, dtype=dtype).element_size()  # torch 2.0, LLaVA's own pin, has no dtype.itemsize


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of one file; only headers are read.

    Raises:
        ExportError: no such file, or it is cut off or of another format.
    """
    try:
        if path.suffix == ".safetensors":
            return _read_header(path)
        return {
            key: StoredTensor(path, key, tuple(value.shape), value.dtype)
            for key, value in _load_bin(path).items()
            if isinstance(value, torch.Tensor)
        }
    except pickle.UnpicklingError as error:  # whose message recommends to load without weights_only
        raise ExportError(
            f"cannot read {path}: it is of another format, or has objects in it that are not loaded"
        ) from error
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, struct.error) as error:
        raise ExportError(f"cannot read {path}: {error}. Copy or save the checkpoint again") from error


def checkpoint_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a checkpoint's folder, sharded or not.

    Raises:
        ExportError: there are no weights, or a shard is missing or cut off.
    """
    for stem in STEMS:
        index = folder / f"{stem}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / stem).is_file():
            shards = [stem]
        else:
            continue
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            tensors.update(stored_tensors(folder / shard))
        return tensors
    raise ExportError(f"{folder} has no weights: neither {' nor '.join(STEMS)}, nor an index of shards")


def _read_header(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size:
            raise ValueError("this is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise ValueError(f"it is cut off, {size} of {end} bytes")
    return {
        key: StoredTensor(
            path, key, tuple(entry["shape"]), DTYPES[entry["dtype"]], start + int(entry["data_offsets"][0])
        )
        for key, entry in header.items()
    }


def _load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.bin`, mapped, so that memory holds only what is touched until this mapping is dropped."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, TypeError):  # torch 2.0, or a file in the format before torch 1.6
        weights = torch.load(path, map_location="cpu", weights_only=True)
    return dict(weights)


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
        header[output.key] = {"dtype": NAMES[dtype], "shape": list(output.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, output in zip(shard, outputs):
            tensor = output.make().to(dtype).contiguous()
            if tuple(tensor.shape) != output.shape:
                raise AssertionError(f"{output.key} is {list(tensor.shape)}, planned was {list(output.shape)}")
            file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
