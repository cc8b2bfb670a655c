"""The one reader of folders and files on disk: configs, and which tensor is where.

Of weights only headers are read, until a tensor is asked for. Everything that cannot be used is a
one-line error that names the file and the remedy. torch and safetensors are imported when weights are read.

    config = read_config(folder)              # of a checkpoint or a vision tower
    tensors = checkpoint_tensors(folder)      # a whole checkpoint, sharded or not: name -> StoredTensor
    tensors = stored_tensors(path)            # one file, .safetensors or .bin
    tensors["lm_head.weight"].read()          # the numbers
    load_tensors(path)                        # all numbers of a small file, an adapter
    projector_keys(tensors)                   # name within the projector -> key
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from llava_projectors.spec import ProjectorSpecError

if TYPE_CHECKING:
    import torch

StrPath = Union[str, "os.PathLike[str]"]

# In the order in which transformers looks for them.
STEMS = ("model.safetensors", "pytorch_model.bin")
# How safetensors calls a dtype -> how torch does; old versions of torch lack the narrow ones.
STORED_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# A key of the projector's, whatever the model is called; `seg_mm_projector.` and the like are a fork's further ones.
_KEY = re.compile(r"(?:^|\.)mm_projector\.(.+)")
# What peft, DDP, torch.compile and FSDP put into the names of a model that they wrap.
_WRAPPER = re.compile(r"(?:^|\.)(?:base_model\.model|module|_orig_mod|_fsdp_wrapped_module)\.")


class ProjectorWeightsError(ValueError):
    """A file of weights cannot be read, or weights do not fit the projector; the message says what and why."""


# Configs


def read_config(folder: StrPath) -> dict[str, Any]:
    """The `config.json` of a checkpoint or of a vision tower.

    Raises:
        ProjectorSpecError: there is none, or it holds no settings.
    """
    return read_json(Path(folder) / "config.json")


def read_json(path: StrPath) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        ProjectorSpecError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProjectorSpecError(f"cannot read {path}: there is no such file; pass a folder that has one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ProjectorSpecError(f"cannot read {path}: {_first_line(error)}; copy it again") from error
    if not isinstance(found, dict):
        raise ProjectorSpecError(
            f"cannot read {path}: it holds a {type(found).__name__}, not an object of settings; copy it again"
        )
    return found


# Weights


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        path: the file.
        key: its name there.
        shape: its shape.
        dtype: its dtype.
    """

    path: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        if self.path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(self.path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(self.key)
                return tensor
        return _load_bin(self.path, "cpu")[self.key].clone()


def stored_tensors(path: StrPath) -> dict[str, StoredTensor]:
    """Name -> tensor of one file, `.safetensors` or `.bin`; numbers are not read.

    Raises:
        ProjectorWeightsError: the file cannot be read, is cut off, or holds something else.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        found = _explained(path, lambda: _load_bin(path, "meta"))
        return {key: StoredTensor(path, key, tuple(value.shape), value.dtype) for key, value in found.items()}
    tensors: dict[str, StoredTensor] = _explained(path, lambda: _read_header(path))
    return tensors


def load_tensors(path: StrPath) -> dict[str, torch.Tensor]:
    """Name -> tensor of one `.bin`, read whole, on the CPU: for small files.

    Raises:
        ProjectorWeightsError: as `stored_tensors`.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = _explained(path, lambda: _load_bin(path, "cpu"))
    return tensors


def has_weights(folder: StrPath) -> bool:
    """Whether a folder is a full checkpoint, which may be damaged; adapters do not count."""
    return any(any(Path(folder).glob(pattern)) for pattern in ("model*.safetensors*", "pytorch_model*.bin*"))


def checkpoint_tensors(folder: StrPath) -> dict[str, StoredTensor]:
    """Name -> tensor of a full checkpoint, sharded or not; numbers are not read.

    Raises:
        ProjectorWeightsError: there are no weights, or the index or a shard is missing or cut off.
    """
    folder = Path(folder)
    for stem in STEMS:
        index = folder / f"{stem}.index.json"
        if (folder / stem).is_file():
            return stored_tensors(folder / stem)
        if index.is_file():
            return _indexed_tensors(index)
    problem = "its shards have no index" if has_weights(folder) else f"neither {' nor '.join(STEMS)}, nor their index"
    raise ProjectorWeightsError(f"{folder} has no weights: {problem}; copy the checkpoint again")


def projector_keys(keys: Iterable[str]) -> dict[str, str]:
    """Name within the projector -> key, of the keys that are the projector's.

    Example:
        >>> projector_keys(["lm_head.weight", "base_model.model.model.mm_projector.norm.bias"])
        {'norm.bias': 'base_model.model.model.mm_projector.norm.bias'}
    """
    found: dict[str, str] = {}
    for key in keys:
        match = _KEY.search(key)
        if match and len(key) < len(found.get(match[1], key + ".")):  # of several models in one file, the outermost
            found[match[1]] = key
    return found


def is_wrapped(key: str) -> bool:
    """Whether a key is of a model inside peft, DDP, `torch.compile` or FSDP: a model by itself has no such name."""
    return _WRAPPER.search(key) is not None


def _indexed_tensors(index: Path) -> dict[str, StoredTensor]:
    try:
        shard_of = read_json(index).get("weight_map")
    except ProjectorSpecError as error:
        raise ProjectorWeightsError(str(error)) from error
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ProjectorWeightsError(f"{index} has no weight_map of names; copy the checkpoint again")
    return _of_shards(index, shard_of)


def _of_shards(index: Path, shard_of: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors that an index names, each of the shard that it has after transformers has loaded them."""
    shards = sorted(set(shard_of.values()))
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise ProjectorWeightsError(
            f"{index.parent} lacks {', '.join(missing)}, {len(missing)} of the {len(shards)} shards that "
            f"{index.name} names; copy the checkpoint again"
        )
    tensors = {name: stored_tensors(index.parent / name) for name in shards}
    for key, name in shard_of.items():
        if key not in tensors[name]:
            raise ProjectorWeightsError(
                f"{index} says that {name} has {key!r}, but it has not; copy the checkpoint again"
            )
    # transformers loads every shard whole, in this order: of two that hold a tensor, the last one counts.
    loaded = {key: tensor for name in shards for key, tensor in tensors[name].items()}
    return {key: loaded[key] for key in shard_of}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    import torch
    from safetensors import safe_open

    dtypes = {name: getattr(torch, kind) for name, kind in STORED_DTYPES.items() if hasattr(torch, kind)}
    with safe_open(path, framework="numpy") as file:  # for torch, it would map a file larger than memory in vain
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        return {
            key: StoredTensor(path, key, tuple(part.get_shape()), dtypes[part.get_dtype()])
            for key, part in parts.items()
        }


def _load_bin(path: Path, device: str) -> dict[str, torch.Tensor]:
    """What `torch.save` wrote, mapped; on the device `meta`, without its numbers."""
    import torch

    if zipfile.is_zipfile(path):
        try:
            found = torch.load(path, map_location=device, weights_only=True, mmap=True)
        except TypeError:  # torch 2.0
            found = torch.load(path, map_location=device, weights_only=True)
    else:
        found = _load_old_bin(path, device, path.stat().st_mtime_ns)
    others = [found] if not isinstance(found, Mapping) else found.values()
    kind = next((type(value).__name__ for value in others if not isinstance(value, torch.Tensor)), None)
    if kind is not None:
        holds = f"a dict with a value of type {kind}" if isinstance(found, Mapping) else f"a {kind}"
        raise ProjectorWeightsError(
            f"{path} is no file of weights: it holds {holds}, not a dict of tensors; pass the mm_projector.bin, "
            "non_lora_trainables.bin or pytorch_model.bin that LLaVA's training writes"
        )
    return dict(found)


@lru_cache(maxsize=1)
def _load_old_bin(path: Path, device: str, changed: int) -> Any:
    """What `torch.save` wrote before torch 1.6, which can only be read whole: once, and not for each tensor."""
    import torch

    return torch.load(path, map_location=device, weights_only=True)


def _explained(path: Path, read: Any) -> Any:
    """What `read` gives of a file; torch and safetensors raise a dozen kinds of errors, few of which name it."""
    try:
        return read()
    except ProjectorWeightsError:
        raise
    except Exception as error:
        raise ProjectorWeightsError(f"cannot read {path}: {_cause(path, error)}") from error


def _cause(path: Path, error: Exception) -> str:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as unreadable:
        return f"{unreadable.strerror}; copy it again"
    if isinstance(error, ImportError):
        return f"{error}; pip install safetensors"
    if size == 0:
        return "it is empty; copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if isinstance(error, pickle.UnpicklingError):  # whose message recommends to load without weights_only
        return f"it is no file of tensors ({size} bytes): of another format, or with objects in it that are not loaded"
    return f"it is truncated or of another format ({size} bytes; {type(error).__name__}: {_first_line(error)}); " + (
        "copy it again"
    )


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
