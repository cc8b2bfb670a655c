"""`python -m benchmarks.spatial`: run the study, or go on with it, then write its tables and plots."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from benchmarks.spatial.questions import conversation
from benchmarks.spatial.report import write_report
from benchmarks.spatial.store import Split
from benchmarks.spatial.study import FULL, QUICK, STUDIES, study
from benchmarks.table import read_rows

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    """Parse the command line and do as it says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.spatial",
        description=__doc__,
        epilog="An interrupted study goes on where it was: every finished run is in the CSV, "
        "pre-trained models and hidden states are in the working folder.",
    )
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="(all)")
    parser.add_argument("--csv", type=Path, default=RESULTS / "spatial.csv", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/spatial"), help="for what is large (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (%(default)s, the cores)")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument("--report-only", action="store_true", help="tables and plots from the CSV as it is")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="only write the pictures and LLaVA's JSON files of all splits"
    )
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.quick and arguments.csv == RESULTS / "spatial.csv":
        arguments.csv = arguments.folder / "quick.csv"
    if arguments.export:
        for name, size in plan.pictures:
            export(Split(name, size, arguments.export), arguments.export)
        return
    if not arguments.report_only:
        os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
        study(plan, arguments.folder, arguments.csv, tuple(arguments.studies), arguments.workers)
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
