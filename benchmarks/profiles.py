"""Where the time goes: tables of torch's profiler for projectors, tower and prefill, one file.

    python -m benchmarks.profiles --device cuda --out runs/profile.txt

On CUDA they are ordered by the time of the kernels, elsewhere by that of the operators. The file opens with what the
device reaches in a large matrix product and in a copy, and is written table by table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.speed.candidates import STOCK
from benchmarks.speed.run import choose_device
from benchmarks.speed.suites import PLANS, SUITES

TYPES = (STOCK, "saep", "saep:stride=2", "tokenpacker:scale_factor=2")
ROWS = 15
COPIED_BYTES = {"cuda": 2**32, "cpu": 2**26}


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--out", type=Path, default=Path("runs/profile.txt"), help="(%(default)s)")
    parsed = parser.parse_args(arguments)
    device = choose_device(parsed.device)
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    with parsed.out.open("w", encoding="utf-8") as file:
        print(ceilings(device), file=file, flush=True)
        for text in tables("quick" if parsed.quick else device.type, device):
            print(text, file=file, flush=True)
    print(f"Written to {parsed.out}")


def ceilings(device: torch.device) -> str:
    """What the device reaches in a matrix product, and in a copy, of which bytes read and written count."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    multiply, work = measure.matrix_rate_function(device, dtype)
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = measure.interleave({"product": multiply, "copy": lambda: target.copy_(source)}, device, 0.3)
    product, copy = (measure.quartiles(times[name])[1] for name in ("product", "copy"))
    return (
        f"{measure.machine(device)}\nproduct of {dtype}: {work / product / 1e12:.1f} TFLOP/s; "
        f"copy: {2 * source.numel() / copy / 1e12:.2f} TB/s"
    )


def tables(plan_name: str, device: torch.device) -> Iterator[str]:
    """A title and a table for each candidate of `TYPES`, at the largest batch and 8 images in a prompt."""
    plan = PLANS[plan_name]
    images = 8 if device.type == "cuda" else 1
    plan = replace(
        plan,
        dtypes=plan.dtypes[:1],
        batches=(max(plan.batches),),
        tower_batches=(max(plan.tower_batches),),
        prefills=((1, images),),
        graphs=False,
        decode=False,
        steps=(),
    )
    for suite in ("projector", "tower", "model"):
        for group in SUITES[suite](plan, device):
            for subject, candidate in group.candidates.items():
                if subject.type_string in TYPES:
                    title = f"{suite}, {group.measure}, batch {group.batch}: {subject.type_string}"
                    yield f"\n{title}, {subject.implementation}\n{table_of(candidate.function, device)}"


def table_of(function: measure.Function, device: torch.device) -> str:
    """The operators of one call that take longest, after a call to warm up; or why it cannot be run."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_cuda]
    try:
        function()
        with profile(activities=activities) as profiler:
            function()
            if on_cuda:
                torch.cuda.synchronize(device)
    except RuntimeError as error:  # memory, or a kernel that this device cannot run
        return f"{type(error).__name__}: {error}"
    averages: Any = profiler.key_averages()
    return averages.table(
        sort_by="self_device_time_total" if on_cuda else "self_cpu_time_total", row_limit=ROWS, max_name_column_width=60
    )


if __name__ == "__main__":
    main()
