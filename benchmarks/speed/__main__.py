"""`python -m benchmarks.speed`: run the suites, or draw the CSV of an earlier run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from benchmarks.speed.run import bench, choose_device
from benchmarks.speed.suites import SUITES


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Parse the command line and do as it says; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description="Interleaves the candidates in one run, writes one CSV with machine and versions, prints a table "
        "of each suite and the targets, and draws the CSV. Models have random weights; nothing is downloaded. "
        "On a CPU a full run takes 25 to 50 minutes on 2 cores (an LLM of 0.3 B); on CUDA it is sized for under ten "
        "minutes (the shape of LLaVA-7B, whose full training step wants some 90 GiB; what does not fit is left out "
        "and named). What an earlier run on the same machine measured stays in the CSV until it is measured anew.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="may be repeated (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, some minutes on 2 cores")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--minutes", type=float, help="start no further group of candidates after so long")
    parser.add_argument("--csv", type=Path, default=Path("runs/bench.csv"), help="where to write (%(default)s)")
    parser.add_argument("--plot-only", action="store_true", help="draw the CSV as it is")
    parsed = parser.parse_args(arguments)
    status = 0
    if not parsed.plot_only:
        try:
            device = choose_device(parsed.device)
            status = bench(parsed.suite or list(SUITES), device, parsed.quick, parsed.csv, parsed.minutes)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        if not parsed.csv.exists():
            return status
    picture = parsed.csv.with_suffix(".png")
    try:
        from benchmarks.speed.plot import plot  # here, for a machine that measures need not be able to draw

        plot(parsed.csv, picture)
    except ImportError as error:
        print(f"not drawn: {error}. Where matplotlib is: python -m benchmarks.speed --plot-only --csv {parsed.csv}")
        return status
    except (OSError, ValueError) as error:
        print(f"cannot draw {parsed.csv}: {error}", file=sys.stderr)
        print("remedy: run `python -m benchmarks.speed --quick`, then draw the CSV it names", file=sys.stderr)
        return 1
    print(f"Drawn to {picture}")
    return status


if __name__ == "__main__":
    sys.exit(main())
