"""Run the suites, write one CSV, print what came out beside the targets."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.speed.candidates import NAIVE, Subject
from benchmarks.speed.report import group_name, print_report
from benchmarks.speed.suites import PLANS, SUITES, Group, Plan
from benchmarks.table import Row, read_rows, write_rows

YARDSTICK = Subject("matrix product")


def choose_device(name: Optional[str]) -> torch.device:
    """The device of this name, or CUDA where there is one.

    Raises:
        ValueError: there is none of this name here, or no plan for it.
    """
    has_cuda = torch.cuda.is_available()
    known = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count() if has_cuda else 0)), *["cuda"] * has_cuda]
    if name is not None and name not in known:
        raise ValueError(f"there is no device {name!r} here: choose from {', '.join(known)}")
    return torch.device(name or ("cuda" if has_cuda else "cpu"))


class TimeIsUp(Exception):
    """The run has taken as long as it may; the message names the group that was next."""


def bench(suites: Sequence[str], device: torch.device, quick: bool, path: Path, minutes: Optional[float] = None) -> int:
    """Measure, write and print; returns the exit status.

    The file is written after every group of candidates. Groups of an earlier run stay in it until they are
    measured anew, if machine, versions and plan are the same: a run that is cut off takes nothing away.
    """
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    plan_name = "quick" if quick else device.type
    plan = PLANS[plan_name]
    dtypes, left_out = measure.without_slow_dtypes(plan.dtypes, device)
    plan = replace(plan, dtypes=dtypes)
    facts = {"plan": plan_name, **measure.machine(device)}
    earlier = rows_of_earlier_run(path, facts)
    rows: list[Row] = []
    failed = False
    with _silent_models():
        for suite in suites:
            try:
                for found in measure_suite(suite, plan, device, deadline):
                    rows += [{**row, **facts} for row in found]
                    write_rows(path, with_earlier(rows, earlier))
            except TimeIsUp as error:
                left_out.append(f"from suite {suite}, {error} on: {minutes:g} minutes are over")
                break
            except torch.cuda.OutOfMemoryError as error:
                left_out.append(f"the rest of suite {suite}: {str(error).splitlines()[0]}")
            except Exception as error:  # the suites have little in common: what fails in one may work in the others
                traceback.print_exc()
                failed = True
                left_out.append(f"the rest of suite {suite}, which FAILED: {type(error).__name__}, see above")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if not rows:
        print(*left_out, sep="\n", file=sys.stderr)
        return 1
    print_report(rows)
    for what in left_out:
        print(f"LEFT OUT, {what}")
    print(f"\nWritten to {path}")
    return int(failed)


def rows_of_earlier_run(path: Path, facts: dict[str, str]) -> list[Row]:
    """What the file holds of the same plan on the same machine with the same versions."""
    if not path.exists():
        return []
    return [row for row in read_rows(path, "measured_to_bound") if all(row.get(name) == facts[name] for name in facts)]


def with_earlier(rows: list[Row], earlier: list[Row]) -> list[Row]:
    """The rows and, of the earlier ones, those of groups that are not among them; suite by suite."""
    measured = {group_name(row) for row in rows}
    kept = [row for row in earlier if group_name(row) not in measured]
    return sorted([*kept, *rows], key=lambda row: list(SUITES).index(row["suite"]))


def measure_suite(suite: str, plan: Plan, device: torch.device, deadline: float) -> Iterator[list[Row]]:
    """The rows of every group, with progress on stderr."""
    progress = tqdm(SUITES[suite](plan, device), desc=suite, unit=" group")
    for group in progress:
        name = f"{group.measure}, {_dtype(group)}, batch {group.batch}, images {group.images}"
        if time.monotonic() > deadline:
            raise TimeIsUp(name)
        progress.set_postfix_str(name)
        yield list(measure_group(group, device, plan.seconds))


def measure_group(group: Group, device: torch.device, seconds: float) -> Iterator[dict[str, Any]]:
    """One row for each candidate."""
    multiply, matrix_flops = measure.matrix_rate_function(device, group.dtype)
    functions: dict[Subject, measure.Function] = {
        subject: candidate.function for subject, candidate in group.candidates.items()
    }
    times = measure.interleave({YARDSTICK: multiply, **functions}, device, seconds)
    rate = matrix_flops / statistics.median(times.pop(YARDSTICK))
    baseline = next(iter(group.candidates))
    for subject, candidate in group.candidates.items():
        low, middle, high = measure.quartiles(times[subject])
        bound = candidate.flops / rate
        yield {
            "suite": group.suite,
            "measure": group.measure,
            "type": subject.type_string,
            "implementation": subject.implementation,
            "dtype": _dtype(group),
            "batch": group.batch,
            "images": group.images,
            "visual_tokens": candidate.visual_tokens,
            "rounds": len(times[subject]),
            "median_s": _number(middle),
            "q1_s": _number(low),
            "q3_s": _number(high),
            "peak_mib": round(measure.peak_bytes(candidate.memory or candidate.function, device) / 2**20, 1),
            "flops": candidate.flops,
            "matrix_flops_per_s": _number(rate),
            "measured_to_bound": _number(middle / bound),
            "baseline": baseline.type_string,
            **_ratios("ratio", times[subject], times[baseline]),
            "flops_ratio": _number(candidate.flops / group.candidates[baseline].flops),
            **_ratios("ratio_to_naive", times[subject], times.get(subject._replace(implementation=NAIVE))),
        }


def _ratios(column: str, ours: list[float], others: Optional[list[float]]) -> dict[str, str]:
    """Median and quartiles of the ratios within each round."""
    columns = (f"{column}_q1", column, f"{column}_q3")
    if others is None:
        return dict.fromkeys(columns, "")
    return dict(zip(columns, map(_number, measure.quartiles([a / b for a, b in zip(ours, others)]))))


def _dtype(group: Group) -> str:
    return str(group.dtype).removeprefix("torch.")


def _number(value: float) -> str:
    return f"{value:.5g}"


@contextmanager
def _silent_models() -> Iterator[None]:
    """Building models of random weights is nothing to report."""
    import logging

    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
