"""Time and memory of functions that are compared: interleaved in one run, so that a slow minute hits all alike."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, TypeVar

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that counts memory on a CPU is chatty

import torch
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], Any]
Key = TypeVar("Key")
QUEUED_SECONDS, MOST_CALLS = 0.02, 100  # of the calls that are timed as one, on CUDA


def interleave(
    functions: Mapping[Key, Function],
    device: torch.device,
    seconds_per_function: float,
    min_rounds: int = 3,
    max_rounds: int = 30,
) -> dict[Key, list[float]]:
    """Run the functions in turn, round after round; the first round warms up and does not count.

    On CUDA several calls of a short function are queued for each time that is read: what the host does before the
    first one is then a small part of it. Whatever the host cannot queue fast enough still counts.

    Args:
        functions: name -> what to time.
        device: where it runs; on CUDA, the device's own events are read.
        seconds_per_function: rounds go on for about so long times the number of functions.
        min_rounds: rounds that are run at any rate.
        max_rounds: rounds after which it is enough.

    Returns:
        name -> seconds of a call, one for each round.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    calls = dict.fromkeys(functions, 1)
    if device.type == "cuda":
        calls = {name: calls_to_queue(seconds_of(function, device)) for name, function in functions.items()}
    started = time.perf_counter()
    for number in range(max_rounds):
        if number >= min_rounds and time.perf_counter() - started > seconds_per_function * len(functions):
            break
        for name, function in functions.items():
            seconds[name].append(seconds_of(function, device, calls[name]))
    return seconds


def calls_to_queue(seconds: float) -> int:
    """How many calls of a function that takes so long are timed as one."""
    return min(MOST_CALLS, max(1, round(QUEUED_SECONDS / seconds)))


def seconds_of(function: Function, device: torch.device, calls: int = 1) -> float:
    """How long one call takes, of so many in a row."""
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - started) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000 / calls


def as_graph(function: Function, device: torch.device, pool: Any = None) -> Function:
    """The call as one CUDA graph, whose replay costs the host a single launch; on a CPU, the function itself.

    Args:
        function: reads and writes the same tensors at every call, and reads nothing back to the host.
        device: where it runs.
        pool: of `torch.cuda.graph_pool_handle`, for graphs that never run at the same time and whose results no one
            reads: they share their memory.
    """
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is made at the first call, must be there before
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph.replay


def peak_bytes(function: Function, device: torch.device) -> int:
    """Most memory the call held beyond what was there before it, by torch's allocator.

    The call must free nothing that was there before it, because on a CPU torch's profiler would subtract some of
    it: a backward pass adds to gradients that are there. Scratch memory of oneDNN and cuBLAS is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def matrix_rate_function(device: torch.device, dtype: torch.dtype) -> tuple[Function, int]:
    """A large matrix product, the yardstick of what the device can do, and its FLOPs."""
    rows, width = (16384, 4096) if device.type == "cuda" else (1152, 4096)
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(width, width, device=device, dtype=dtype)
    return lambda: a @ b, 2 * rows * width * width


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 512) -> float:
    """FLOPs a second of a small matrix product: enough to see whether the device has instructions for the dtype."""
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / min(interleave({"": lambda: a @ a}, device, 0.1)[""])


def without_slow_dtypes(
    dtypes: Sequence[torch.dtype], device: torch.device
) -> tuple[tuple[torch.dtype, ...], list[str]]:
    """The dtypes that the device does not merely emulate, and a line for each of the others.

    A CPU without bfloat16 products takes several to a hundred times as long for them: nobody would run a model so.
    """
    rates = {dtype: matrix_rate(device, dtype) for dtype in {torch.float32, *dtypes}}
    kept = tuple(dtype for dtype in dtypes if rates[dtype] > rates[torch.float32] / 2)
    lines = [
        f"{dtype}: this device multiplies matrices of it at {rates[dtype] / 1e9:.1f} GFLOP/s, "
        f"of float32 at {rates[torch.float32] / 1e9:.1f}"
        for dtype in dtypes
        if dtype not in kept
    ]
    return kept, lines


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def machine(device: torch.device) -> dict[str, str]:
    """The machine and the versions, for every row of the CSV."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = {package: version(package) for package in ("torch", "transformers", "llava-projectors")}
    return {"device": device.type, "machine": name, "python": platform.python_version(), **versions}


def version(package: str) -> str:
    """Of an installed package, or ""."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache  # every row of a CSV has it
def _cpu_name() -> str:
    """The processor, as Linux names it, and the widest matrix instructions on it."""
    get_capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "")
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        facts = ""
    model = re.search(r"^model name\s*: (.+)$", facts, re.MULTILINE)
    amx = "AMX" if re.search(r"^flags.* amx_tile\b", facts, re.MULTILINE) else ""
    return " ".join(filter(None, (model[1] if model else platform.machine(), get_capability(), amx)))
