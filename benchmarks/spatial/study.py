"""The whole study: pre-train both models, run every configuration, keep every result in one CSV.

Choices are made on the validation split; the test split is for the comparison at the end.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks import measure
from benchmarks.spatial import contrastive, language, sizes, vision
from benchmarks.spatial.optimize import TimeIsUp
from benchmarks.spatial.probe import probe
from benchmarks.spatial.scenes import NUM_PATCHES_PER_SIDE
from benchmarks.spatial.store import Split
from benchmarks.spatial.train import run
from benchmarks.speed.models import STOCK
from benchmarks.table import Row, append_rows, read_rows
from llava_projectors import registry
from llava_projectors.projectors.base import multi_level_layers

# The first one, "test", was asked in a comparison before SAEP's blocks, STF and Delta were there.
TEST = "test2"


@dataclass(frozen=True)
class Plan:
    """Sizes of a run.

    Attributes:
        vision_steps: of the vision model's pre-training, 32 pictures each.
        matching_steps: of its upper half's training with captions after that; 0 where labels train all of it.
        language_steps: of the LLM's, 16 dialogues each.
        pictures: of each split.
        steps: of stages 1 and 2.
        rate_steps: of stage 1, and there is no other, where learning rates are tried.
        batch: pictures per step.
        max_seeds: of a configuration, however many its study asks for.
        name: what the CSV calls it.
        probed: the most pictures of a split whose hidden states are probed.
        device: that everything runs on.
    """

    vision_steps: int = sizes.SIZES.vision_steps
    matching_steps: int = sizes.SIZES.matching_steps
    language_steps: int = sizes.SIZES.language_steps
    pictures: tuple[tuple[str, int], ...] = tuple(zip(("train", "validation", TEST), sizes.SIZES.pictures))
    steps: tuple[int, int] = sizes.SIZES.steps
    rate_steps: int = 1200
    batch: int = 8
    max_seeds: int = 3
    name: str = {"small": "full"}.get(sizes.NAME, sizes.NAME)
    probed: int = 6000
    device: str = "cpu"


FULL = Plan()
QUICK = Plan(
    vision_steps=2,
    matching_steps=min(2, sizes.SIZES.matching_steps),
    language_steps=2,
    pictures=(("train", 32), ("validation", 8), (TEST, 8)),
    steps=(2, 2),
    rate_steps=2,
    max_seeds=1,
    name="quick",
)


def with_options(name: str, **options: Any) -> str:
    """The type with these options, sorted, in the place of its own; None takes one out."""
    spec = registry.parse_spec(name)
    kept = {key: value for key, value in {**spec.options, **options}.items() if value is not None}
    return str(replace(spec, options=dict(sorted(kept.items()))))


# A resampler with as many tokens as stride 2 leaves; STF on eight hidden states, as published, which are all up to the
# selected one.
RESAMPLER = f"resampler:num_queries={(NUM_PATCHES_PER_SIDE // 2) ** 2}"
MEDIUM_RESAMPLER = "resampler:num_queries=81"  # a quarter of that scale's patches
STF = f"stf:layers={'+'.join(map(str, range(vision.SELECTED + 1)))}"
# What SAEP is made of, one by one: a separable convolution on four layers and nothing else; blocks on both sides of the
# stride, on the selected layer; with the largest value of each region beside the strided convolution; with one block on
# the full grid, where a block costs most; on two layers. What is left to SAEP itself is a norm for each layer.
FOUR_LAYERS = tuple(multi_level_layers(vision.SELECTED))
ONE_LAYER = (vision.SELECTED,)
PLAIN_SAEP = with_options(
    "saep", blocks_before=0, blocks_after=0, layers=FOUR_LAYERS, level_norm="none", shortcut="average"
)
DEEP_SAEP = with_options("saep", blocks_before=4, layers=ONE_LAYER, level_norm="none", shortcut="average")
MAX_SAEP = with_options(DEEP_SAEP, shortcut=None)
ONE_BEFORE = with_options(MAX_SAEP, blocks_before=None)
UNNORMED = with_options(ONE_BEFORE, layers=None)
# Half the width between aggregation and readout.
NARROW = {"inner_size": vision.WIDTH // 2}

# Learning rates of stage 1 that the study `learning_rate` tries at each scale, and the best on validation; stage 2 has
# one for all. Small: neighbours on a grid of factors of two, up to a best one that has a neighbour on each side.
# Medium: the small scale's and one to three beside it. Average pooling and pixel shuffle keep the small scale's: after
# stage 1 they are too near to chance to tell. All types at the largest scale take the small scale's best.
ALL_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "small": {
        STOCK: (2e-3, 4e-3, 8e-3),
        PLAIN_SAEP: (1e-3, 2e-3, 4e-3, 8e-3),
        "tokenpacker": (1.25e-4, 2.5e-4, 5e-4),
        "avg_pool": (2e-3, 4e-3, 8e-3),
        "pixel_shuffle": (1e-3, 2e-3, 4e-3, 8e-3),
        "ldpv2": (2e-3, 4e-3, 8e-3),
        "c_abstractor": (1e-3, 2e-3, 4e-3),
        RESAMPLER: (5e-4, 1e-3, 2e-3),
        STF: (2.5e-4, 5e-4, 1e-3, 2e-3),
        "delta": (1.25e-4, 2.5e-4, 5e-4, 1e-3),
        DEEP_SAEP: (2e-3, 4e-3, 8e-3, 1.6e-2),
        MAX_SAEP: (4e-3, 8e-3, 1.6e-2, 3.2e-2),
        UNNORMED: (4e-3, 8e-3, 1.6e-2, 3.2e-2),
        "saep": (4e-3, 8e-3, 1.6e-2),
    },
    "medium": {
        STOCK: (2e-3, 4e-3),
        PLAIN_SAEP: (2e-3, 4e-3),
        "tokenpacker": (2.5e-4, 5e-4),
        "avg_pool": (2e-3, 4e-3),
        "pixel_shuffle": (2e-3, 4e-3),
        "ldpv2": (2e-3, 4e-3),
        "c_abstractor": (2e-3, 4e-3),
        MEDIUM_RESAMPLER: (5e-4, 1e-3),
        STF: (2.5e-4, 5e-4, 1e-3),
        "delta": (2.5e-4, 5e-4),
        UNNORMED: (2e-3, 4e-3, 8e-3, 1.6e-2),
        "saep": (2e-3, 4e-3, 8e-3),
    },
}
ALL_BEST_RATES: dict[str, dict[str, float]] = {
    "small": {
        STOCK: 4e-3,
        PLAIN_SAEP: 4e-3,
        "tokenpacker": 2.5e-4,
        "avg_pool": 4e-3,
        "pixel_shuffle": 4e-3,
        "ldpv2": 4e-3,
        "c_abstractor": 2e-3,
        RESAMPLER: 1e-3,
        STF: 5e-4,
        "delta": 2.5e-4,
        DEEP_SAEP: 8e-3,
        MAX_SAEP: 1.6e-2,
        UNNORMED: 1.6e-2,
        "saep": 8e-3,
    },
    "medium": {
        STOCK: 4e-3,
        PLAIN_SAEP: 2e-3,
        "tokenpacker": 2.5e-4,
        "ldpv2": 2e-3,
        "c_abstractor": 2e-3,
        MEDIUM_RESAMPLER: 1e-3,
        STF: 5e-4,
        "delta": 5e-4,
        UNNORMED: 2e-3,
        "saep": 2e-3,
    },
}
RATES = ALL_RATES.get(sizes.NAME, ALL_RATES["small"])
BEST_RATE = {**ALL_BEST_RATES["small"], **ALL_BEST_RATES.get(sizes.NAME, {})}
STAGE_2_RATE = 5e-4


class Configuration(NamedTuple):
    """A projector type and its learning rate in stage 1."""

    type_string: str
    learning_rate: float


def at_best_rate(*type_strings: str) -> tuple[Configuration, ...]:
    """Types with the rates that the study of learning rates chose, for other options than theirs as well."""
    return tuple(Configuration(name, BEST_RATE[_tried_for(name)]) for name in type_strings)


def with_stride(name: str, stride: int) -> str:
    """The type with that stride."""
    return with_options(name, stride=stride)


def _tried_for(name: str) -> str:
    """The key of BEST_RATE whose rate a type takes; SAEP with blocks, or with a norm for each layer, wants others."""
    if kind(name) != "saep":
        return next(tried for tried in BEST_RATE if kind(tried) == kind(name))
    if with_options(name, stride=None) in BEST_RATE:
        return with_options(name, stride=None)
    options = registry.parse_spec(name).options
    if options.get("blocks_after") == 0:
        return PLAIN_SAEP
    if options.get("level_norm") != "none":
        return "saep"
    return DEEP_SAEP if options.get("shortcut") == "average" else MAX_SAEP


def kind(projector_type: str) -> str:
    """Its name without options, also of LLaVA's own type, which our registry does not know."""
    return projector_type.partition(":")[0]


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        configurations: what is run; the first is what the others are held against.
        split: whose questions are asked.
        seeds: how many runs of each.
    """

    configurations: tuple[Configuration, ...]
    split: str = "validation"
    seeds: int = 3


REDUCED = tuple(
    name
    for stride in (2, 3)
    for name in (
        with_stride(PLAIN_SAEP, stride),
        with_stride(UNNORMED, stride),
        with_stride("saep", stride),
        f"tokenpacker:scale_factor={stride}",
        with_stride("avg_pool", stride),
        with_stride("pixel_shuffle", stride),
        with_stride("ldpv2", stride),
        with_stride("c_abstractor", stride),
        f"resampler:num_queries={(NUM_PATCHES_PER_SIDE // stride) ** 2}",
        with_stride(STF, stride),
        f"delta:scale_factor={stride}",
    )
)
DEPTH = "depth"  # the rows about hidden states, of which there is no run
RATE = "learning_rate"
STUDIES = {
    RATE: Study(tuple(Configuration(name, rate) for name, rates in RATES.items() for rate in rates), seeds=1),
    # Table "saep" is about the separable convolution alone.
    "saep": Study(
        at_best_rate(
            PLAIN_SAEP,
            with_options(PLAIN_SAEP, layers=ONE_LAYER),
            with_options(PLAIN_SAEP, layers=None),
            with_options(PLAIN_SAEP, layers=(1, 3, 5, 7)),
            with_options(PLAIN_SAEP, kernel_size=3),
            with_options(PLAIN_SAEP, kernel_size=4),
            with_options(PLAIN_SAEP, blocks_before=None, order="depthwise_first"),
            with_options(PLAIN_SAEP, shortcut="none"),
            with_options(PLAIN_SAEP, inner_size=256),
        )
    ),
    "tokenpacker": Study(at_best_rate("tokenpacker", "tokenpacker:layers=7", "tokenpacker:layers=1+3+5+7")),
    "options": Study(
        at_best_rate(
            PLAIN_SAEP,
            with_options(PLAIN_SAEP, shortcut=None),
            with_options(PLAIN_SAEP, blocks_after=2, blocks_before=2),
            with_options(PLAIN_SAEP, blocks_after=8, layers=ONE_LAYER),
            DEEP_SAEP,
            with_options(DEEP_SAEP, blocks_after=7),
            with_options(DEEP_SAEP, blocks_after=3, layers=None),
            with_options(DEEP_SAEP, readout_size=sizes.SIZES.llm_width // 2),
            MAX_SAEP,
            with_options(MAX_SAEP, **NARROW),
            ONE_BEFORE,
            with_options(MAX_SAEP, blocks_after=3, layers=None),
            with_stride(PLAIN_SAEP, 3),
            with_options(PLAIN_SAEP, shortcut=None, stride=3),
            with_stride(DEEP_SAEP, 3),
            with_options(DEEP_SAEP, blocks_before=3, layers=None, stride=3),
            with_stride(MAX_SAEP, 3),
            with_options(MAX_SAEP, stride=3, **NARROW),
            with_stride(ONE_BEFORE, 3),
            with_options(MAX_SAEP, blocks_before=3, layers=None, stride=3),
            "c_abstractor",
            "c_abstractor:stride=3",
        )
    ),
    # What the options left, at both scales.
    "finalists": Study(
        at_best_rate(
            *(
                with_stride(name, stride)
                for stride in (2, 3)
                for name in (
                    PLAIN_SAEP,
                    with_options(PLAIN_SAEP, shortcut=None),
                    ONE_BEFORE,
                    UNNORMED,
                    "saep",
                    with_options("saep", layers=ONE_LAYER),
                    with_options(UNNORMED, layers=FOUR_LAYERS),
                    with_options(UNNORMED, layers=FOUR_LAYERS, **NARROW),
                    "c_abstractor",
                )
            )
        )
    ),
    "small_width": Study(
        at_best_rate(
            "tokenpacker",
            "tokenpacker:head_size=32",
            "tokenpacker:init=scaled",
            "tokenpacker:head_size=32,init=scaled",
        )
    ),
    "comparison": Study(at_best_rate(STOCK, *REDUCED), split=TEST),
}

COLUMNS = (
    "study", "type", "seed", "split", "visual_tokens", "family", "accuracy", "questions", "correct",
    "learning_rate", "stage1_loss", "stage2_loss", "seconds", "plan", "machine", "python", "torch", "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One training run."""

    study: str
    configuration: Configuration
    seed: int


def jobs(plan: Plan, studies: tuple[str, ...]) -> Iterator[Job]:
    """Seed by seed, so that an interrupted study has something of every type."""
    for seed in range(plan.max_seeds):
        for study in studies:
            if seed < STUDIES[study].seeds:
                yield from (Job(study, name, seed) for name in STUDIES[study].configurations)


def splits(plan: Plan, folder: Path) -> dict[str, Split]:
    """All splits by name."""
    return {name: Split(name, size, folder) for name, size in plan.pictures}


def visual_tokens(projector_type: str) -> int:
    """That the LLM sees of a picture."""
    if projector_type == STOCK:
        return NUM_PATCHES_PER_SIDE**2
    return registry.resolve(projector_type).output_side(NUM_PATCHES_PER_SIDE) ** 2


def prepare(plan: Plan, folder: Path, deadline: float = math.inf) -> None:
    """Pre-train and look at pictures, as far as that is not done yet.

    Raises:
        TimeIsUp: at the deadline; another call goes on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vision" / "config.json").exists():
        pretrain_vision(plan, folder, deadline)
    if not (folder / "language" / "config.json").exists():
        found = language.pretrain(folder / "language", plan.language_steps, device=plan.device, deadline=deadline)
        print("Language model, answers from captions:", ", ".join(f"{k} {v:.0%}" for k, v in found.items()))
    for split in (splits(plan, folder) if sizes.SIZES.is_cached else probed_splits(plan, folder)).values():
        split.prepare(folder / "vision", device=plan.device)


def pretrain_vision(plan: Plan, folder: Path, deadline: float = math.inf) -> None:
    """All of it with labels; where the plan has matching steps, the lower half with labels, the upper with captions."""
    if not plan.matching_steps:
        vision.pretrain(folder / "vision", plan.vision_steps, plan.device, deadline)
        return
    lower = folder / "lower"
    if not (lower / "config.json").exists():
        vision.pretrain(lower, plan.vision_steps, plan.device, deadline, layers=vision.DENSE_LAYER)
    contrastive.pretrain(lower, folder / "vision", plan.matching_steps, plan.device, deadline)


def probed_splits(plan: Plan, folder: Path) -> dict[str, Split]:
    """As many pictures of training and validation as are probed."""
    return {name: Split(name, min(size, plan.probed), folder) for name, size in plan.pictures if name != TEST}


def depth_rows(plan: Plan, folder: Path) -> list[dict[str, Any]]:
    """What the hidden states know."""
    by_name = probed_splits(plan, folder)
    return [
        {
            **_facts(plan, DEPTH, f"hidden state {layer}", by_name["validation"]),
            **_score(what, right),
        }
        for layer, what, right in probe(by_name["train"], by_name["validation"])
    ]


def study(
    plan: Plan, folder: Path, path: Path, studies: tuple[str, ...], workers: int, deadline: float = math.inf
) -> None:
    """Run what the CSV does not hold yet; every finished run is written at once.

    Raises:
        TimeIsUp: no further run would end before the deadline (`time.time()`); another call goes on.
    """
    prepare(plan, folder, deadline)
    rows = read_rows(path, "stage1_loss") if path.exists() else []
    if not any(row["study"] == DEPTH for row in rows):
        append_rows(path, depth_rows(plan, folder), COLUMNS)
    done = {_job_of(row) for row in rows if row["study"] != DEPTH}
    todo = [job for job in jobs(plan, studies) if job not in done]
    # Nobody knows how long a run takes before the first.
    longest = max((float(row["seconds"]) for row in rows if row["plan"] == plan.name and row["seconds"]), default=0.0)
    # A fresh interpreter per worker: a forked one would share torch's threads.
    context = multiprocessing.get_context("spawn")
    progress = tqdm(total=len(todo), desc="runs", unit=" run")
    finished = 0
    with ProcessPoolExecutor(workers, context, _start_worker, (workers,)) as pool:
        running: dict[Future[list[Row]], Job] = {}
        waiting = iter(todo)
        while True:
            while len(running) < workers and _has_time(deadline, longest, is_first=not (running or finished)):
                job = next(waiting, None)
                if job is None:
                    break
                running[pool.submit(_work, plan, folder, job)] = job
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                rows = future.result()
                append_rows(path, rows, COLUMNS)
                longest = max(longest, float(rows[0]["seconds"]))
                finished += 1
                progress.update()
                progress.write(_summary(running.pop(future), rows))
    if finished < len(todo):
        raise TimeIsUp(f"{len(todo) - finished} of {len(done) + len(todo)} runs are left")


def _has_time(deadline: float, longest: float, *, is_first: bool) -> bool:
    """Whether a run that starts now ends in time; the first of a call starts at any rate, or nothing would get done."""
    return is_first or time.time() + longest <= deadline


def _summary(job: Job, rows: Sequence[Row]) -> str:
    mean = sum(float(row["accuracy"]) for row in rows) / len(rows)
    name, rate = job.configuration
    return f"{job.study}, {name}, rate {rate:g}, seed {job.seed}: {mean:.1%} of the answers right"


def _job_of(row: Row) -> Job:
    return Job(row["study"], Configuration(row["type"], float(row["learning_rate"])), int(row["seed"]))


def _start_worker(workers: int) -> None:
    import logging
    import warnings

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _work(plan: Plan, folder: Path, job: Job) -> list[dict[str, Any]]:
    started = time.monotonic()
    by_name = splits(plan, folder)
    judged = by_name[STUDIES[job.study].split]
    projector_type, rate = job.configuration
    found = run(
        projector_type,
        job.seed,
        folder / "vision",
        folder / "language",
        by_name["train"],
        judged,
        (plan.rate_steps,) if job.study == RATE else plan.steps,
        plan.batch,
        (rate, STAGE_2_RATE),
        plan.device,
    )
    facts = {
        **_facts(plan, job.study, projector_type, judged),
        "seed": job.seed,
        "visual_tokens": visual_tokens(projector_type),
        "learning_rate": rate,
        **{f"stage{number}_loss": f"{loss:.4f}" for number, loss in enumerate(found.losses, start=1)},
        "seconds": f"{time.monotonic() - started:.0f}",
    }
    return [{**facts, **_score(family, right)} for family, right in found.correct.items()]


def _facts(plan: Plan, study: str, name: str, split: Split) -> dict[str, Any]:
    machine = measure.machine(torch.device(plan.device))
    return {
        "study": study,
        "type": name,
        "split": split.name,
        "plan": plan.name,
        **{column: machine[column] for column in ("machine", "python", "torch", "transformers")},
    }


def _score(family: str, right: list[bool]) -> dict[str, Any]:
    return {
        "family": family,
        "accuracy": f"{sum(right) / len(right):.4f}",
        "questions": len(right),
        "correct": to_hex(right),
    }


def to_hex(correct: list[bool]) -> str:
    """Right and wrong as one hexadecimal number, the first question the highest bit."""
    bits = "".join(map(str, map(int, correct)))
    return f"{int(bits, 2):0{-(-len(bits) // 4)}x}"


def from_hex(text: str, questions: int) -> list[bool]:
    """The inverse of `to_hex`."""
    return [bit == "1" for bit in f"{int(text, 16):0{questions}b}"]
