"""Run the suites, write one CSV, print what came out beside the targets."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.speed.candidates import NAIVE, PUBLISHED, Subject
from benchmarks.speed.report import group_name
from benchmarks.speed.suites import PLANS, SUITES, Candidate, Group, Plan
from benchmarks.table import Row, read_rows, write_rows

YARDSTICK = Subject("matrix product")
REFERENCES = (NAIVE, PUBLISHED)
RATIOS = ("ratio", *(f"ratio_to_{name}" for name in REFERENCES))
# Columns that are empty where a candidate could not be run.
MEASURED = (
    *("rounds", "median_s", "q1_s", "q3_s", "measured_to_bound", "tokens_per_s", "held_mib", "peak_mib"),
    *(f"{name}{quartile}" for name in RATIOS for quartile in ("_q1", "", "_q3")),
)
FAILED = "FAILED"  # so begins the note on a candidate that could not be run, for another reason than memory


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


def bench(suites: Sequence[str], device: torch.device, quick: bool, path: Path, missing: bool = False) -> int:
    """Measure and write; returns the exit status.

    The file is written after every group of candidates. Groups of an earlier run stay in it until they are
    measured anew, if machine, versions and plan are the same: a run that is cut off takes nothing away.
    With `missing` they are not measured anew.
    """
    plan_name = "quick" if quick else device.type
    plan = PLANS[plan_name]
    dtypes, left_out = measure.without_slow_dtypes(plan.dtypes, device)
    plan = replace(plan, dtypes=dtypes)
    facts = {"plan": plan_name, **measure.machine(device)}
    earlier = rows_of_earlier_run(path, facts)
    failed_before = {group_name(row) for row in earlier if row["note"].startswith(FAILED)}
    present = {group_name(row) for row in earlier} - failed_before if missing else set()
    rows: list[Row] = []
    failed = False
    with _silent_models():
        for suite in suites:
            try:
                for found in measure_suite(suite, plan, device, present):
                    rows += [{**row, **facts} for row in found]
                    failed |= any(row["note"].startswith(FAILED) for row in found)
                    write_rows(path, with_earlier(rows, earlier))
            except torch.cuda.OutOfMemoryError as error:
                left_out.append(f"the rest of suite {suite}: {str(error).splitlines()[0]}")
            except Exception as error:  # the suites have little in common: what fails in one may work in the others
                traceback.print_exc()
                failed = True
                left_out.append(f"the rest of suite {suite}, which FAILED: {type(error).__name__}, see above")
            free(device)
    for what in left_out:
        print(f"LEFT OUT, {what}")
    print(f"{len(rows)} rows written to {path}")
    return int(failed)


def rows_of_earlier_run(path: Path, facts: dict[str, str]) -> list[Row]:
    """What the file holds of the same plan on the same machine with the same versions."""
    if not path.exists():
        return []
    rows = [row for row in read_rows(path, "measured_to_bound") if all(row.get(name) == facts[name] for name in facts)]
    # An older file may lack columns.
    return [{"note": "", "timing": "calls", **row} for row in rows]


def with_earlier(rows: list[Row], earlier: list[Row]) -> list[Row]:
    """The rows and, of the earlier ones, those of groups that are not among them; suite by suite."""
    measured = {group_name(row) for row in rows}
    kept = [row for row in earlier if group_name(row) not in measured]
    return sorted([*kept, *rows], key=lambda row: list(SUITES).index(row["suite"]))


def measure_suite(
    suite: str, plan: Plan, device: torch.device, present: Container[tuple[str, ...]]
) -> Iterator[list[Row]]:
    """The rows of every group that is not present, with progress on stderr."""
    progress = tqdm(SUITES[suite](plan, device), desc=suite, unit=" group")
    for group in progress:
        progress.set_postfix_str(f"{group.measure}, {_dtype(group)}, batch {group.batch}, images {group.images}")
        if group_name(_facts(group)) not in present:
            yield list(measure_group(group, device, plan.seconds))


def measure_group(group: Group, device: torch.device, seconds: float) -> Iterator[Row]:
    """One row for each candidate; for one that cannot be run, the reason."""
    notes = {subject: reason_not_to_run(candidate, device) for subject, candidate in group.candidates.items()}
    functions = {subject: group.candidates[subject].function for subject, note in notes.items() if not note}
    timed, no_graph = in_graphs(functions, device) if group.graph else (functions, "")
    multiply, matrix_flops = measure.matrix_rate_function(device, group.dtype)
    times = measure.interleave({YARDSTICK: multiply, **timed}, device, seconds)
    del timed  # and the memory of graphs
    rate = matrix_flops / statistics.median(times.pop(YARDSTICK))
    baseline = next(iter(group.candidates))
    for subject, candidate in group.candidates.items():
        row = {
            **_facts(group),
            "type": subject.type_string,
            "implementation": subject.implementation,
            "visual_tokens": candidate.visual_tokens,
            "timing": "graph" if group.graph and device.type == "cuda" and not no_graph else "calls",
            "flops": candidate.flops,
            "matrix_flops_per_s": _number(rate),
            "baseline": baseline.type_string,
            "flops_ratio": _number(candidate.flops / group.candidates[baseline].flops),
            "note": notes[subject] or no_graph,
        }
        if subject in times:
            others = [times.get(baseline), *(times.get(subject._replace(implementation=name)) for name in REFERENCES)]
            yield {**row, **_measured(candidate, times[subject], rate, device), **_ratios(times[subject], others)}
        else:
            yield {**row, **dict.fromkeys(MEASURED, "")}


def reason_not_to_run(candidate: Candidate, device: torch.device) -> str:
    """What keeps the candidate from running here, or nothing: a group is measured without it."""
    try:
        candidate.function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        note = "out of memory"
    except Exception as error:  # whatever a kernel or library cannot do on this device
        traceback.print_exc()
        note = f"{FAILED}: {_line_of(error)}"
    else:
        return ""
    free(device)
    return note


def in_graphs(
    functions: dict[Subject, measure.Function], device: torch.device
) -> tuple[dict[Subject, measure.Function], str]:
    """Replays of the functions' graphs; or the functions, all of them, and why one could not be captured."""
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    try:
        return {subject: measure.as_graph(function, device, pool) for subject, function in functions.items()}, ""
    except Exception as error:  # whatever a capture cannot hold
        note = f"no graph: {_line_of(error)}"
    free(device)
    return functions, note


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def free(device: torch.device) -> None:
    """Give back what the allocator keeps of things that are gone."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _facts(group: Group) -> Row:
    """What all rows of the group have in common, and no other group's."""
    return {
        "suite": group.suite,
        "measure": group.measure,
        "dtype": _dtype(group),
        "batch": group.batch,
        "images": group.images,
    }


def _measured(candidate: Candidate, seconds: list[float], rate: float, device: torch.device) -> Row:
    """Time and memory."""
    low, middle, high = measure.quartiles(seconds)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    return {
        "rounds": len(seconds),
        "median_s": _number(middle),
        "q1_s": _number(low),
        "q3_s": _number(high),
        "measured_to_bound": _number(middle * rate / candidate.flops),
        "tokens_per_s": _number(candidate.generated / middle) if candidate.generated else "",
        # Weights, gradients and optimizer state that were there before, those of the other candidates too.
        "held_mib": "" if held is None else round(held / 2**20, 1),
        "peak_mib": round(measure.peak_bytes(candidate.memory or candidate.function, device) / 2**20, 1),
    }


def _ratios(ours: list[float], others: Sequence[Optional[list[float]]]) -> Row:
    """Median and quartiles of the ratios within each round, to each of `RATIOS`."""
    row: Row = {}
    for column, theirs in zip(RATIOS, others):
        columns = (f"{column}_q1", column, f"{column}_q3")
        values = measure.quartiles([a / b for a, b in zip(ours, theirs)]) if theirs else None
        row.update(zip(columns, map(_number, values)) if values else dict.fromkeys(columns, ""))
    return row


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
