"""`python -m benchmarks.speed`: run the suites, or draw the CSV of an earlier run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from benchmarks.speed.report import print_report
from benchmarks.speed.run import bench, choose_device
from benchmarks.speed.suites import SUITES
from benchmarks.table import read_rows


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Parse the command line and do as it says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Interleaves the candidates in one run, writes one CSV with machine and versions, prints a table "
        "of each suite and the targets, and draws the CSV. Models have random weights; nothing is downloaded. "
        "On a CPU a full run takes 25 to 50 minutes on 2 cores (an LLM of 0.3 B); on CUDA it is sized for seven "
        "minutes (the shape of LLaVA-7B; a candidate that does not fit is named). What an earlier run on the same "
        "machine measured stays in the CSV until it is measured anew.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, some minutes on 2 cores")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--csv", type=Path, default=Path("runs/bench.csv"), help="where to write (%(default)s)")
    parser.add_argument("--missing", action="store_true", help="only the groups that the CSV does not have yet")
    parser.add_argument(
        "--only", choices=("measure", "report", "plot"), help="the last two take the CSV as it is (all)"
    )
    parsed = parser.parse_args(arguments)
    status = 0
    try:
        if parsed.only in (None, "measure"):
            device = choose_device(parsed.device)
            status = bench(parsed.suite or list(SUITES), device, parsed.quick, parsed.csv, parsed.missing)
        if parsed.only in (None, "report") and (parsed.only or parsed.csv.exists()):
            print_report(read_rows(parsed.csv, "measured_to_bound"))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if parsed.only in (None, "plot") and (parsed.only or parsed.csv.exists()):
        return draw(parsed.csv) or status
    return status


def draw(csv: Path) -> int:
    """The picture beside the CSV; returns the exit status."""
    picture = csv.with_suffix(".png")
    try:
        from benchmarks.speed.plot import plot  # here, for a machine that measures need not be able to draw

        plot(csv, picture)
    except ImportError as error:
        print(f"not drawn: {error}. Where matplotlib is: python -m benchmarks.speed --only plot --csv {csv}")
        return 0
    except (OSError, ValueError) as error:
        print(f"cannot draw {csv}: {error}", file=sys.stderr)
        print("remedy: run `python -m benchmarks.speed --quick`, then draw the CSV it names", file=sys.stderr)
        return 1
    print(f"Drawn to {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
