"""`python -m benchmarks.spatial`: run the study, or go on with it, then write its tables and plots."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.spatial import sizes
from benchmarks.spatial.optimize import TimeIsUp
from benchmarks.spatial.questions import conversation
from benchmarks.spatial.report import write_report
from benchmarks.spatial.store import Split
from benchmarks.spatial.study import FULL, QUICK, STUDIES, study
from benchmarks.speed.run import choose_device
from benchmarks.table import read_rows
from llava_projectors.commands.arguments import at_least

RESULTS = Path(__file__).parents[1] / "results"
NAME = {"small": "spatial"}.get(sizes.NAME, f"spatial-{sizes.NAME}")


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spatial",
        description=__doc__,
        epilog="An interrupted study goes on where it was: every finished run is in the CSV, "
        "pre-trained models and hidden states are in the working folder. "
        f"{sizes.VARIABLE}=medium in the environment makes a harder study, with photographs behind more objects and "
        "a tower whose top has lost places; large makes one for a GPU: pictures of 336 px, an LLM of 8 layers and "
        "512 channels, ten times the pictures.",
    )
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="(all)")
    parser.add_argument("--csv", type=Path, default=RESULTS / f"{NAME}.csv", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs") / NAME, help="for what is large (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after about so long, to go on later")
    parser.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count(), help="runs at a time (%(default)s, the cores)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--report-only", action="store_true", help="tables and plots from the CSV as it is")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="only write the pictures and LLaVA's JSON files of all splits"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.quick and arguments.csv == RESULTS / f"{NAME}.csv":
        arguments.csv = arguments.folder / "quick.csv"
    if arguments.export:
        for name, size in plan.pictures:
            export(Split(name, size, arguments.export), arguments.export)
        return
    if not arguments.report_only:
        os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
        try:
            plan = replace(plan, device=str(choose_device(arguments.device)))
        except ValueError as error:
            parser.error(str(error))
        deadline = time.time() + 60 * arguments.minutes
        try:
            study(plan, arguments.folder, arguments.csv, tuple(arguments.studies), arguments.workers, deadline)
        except TimeIsUp as error:
            print(f"Time is up, {error}. The same command goes on:", file=sys.stderr)
            print(f"  python -m benchmarks.spatial {shlex.join(sys.argv[1:])}", file=sys.stderr)
            return
    if not arguments.csv.exists():
        parser.error(f"{arguments.csv} does not exist: run the study first, or say where it is with --csv")
    print(write_report(read_rows(arguments.csv, "stage1_loss"), arguments.csv))
    print(f"Written: {arguments.csv}, and beside it .md and, where types were compared, .png")


def export(split: Split, folder: Path) -> None:
    """Pictures, captions and questions of a split as LLaVA's own scripts read them."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    captions, questions = [], []
    for index in range(split.size):
        name = f"{split.name}-{index}"
        split.picture(index).save(images / f"{name}.png")
        captions.append(conversation(name, [("", split.caption(index))]))
        questions.append(conversation(name, list(split.questions(index).values())))
    (folder / f"{split.name}-captions.json").write_text(json.dumps(captions))
    (folder / f"{split.name}-questions.json").write_text(json.dumps(questions))
    print(f"{split.size} pictures and two JSON files of split {split.name} in {folder}")


if __name__ == "__main__":
    main()
