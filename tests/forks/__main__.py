"""The matrix: every fork in a folder, through the same checks; writes docs/forks.md.

`python -m tests.forks --forks DIR [--environments DIR] [--path DIR] [--only NAME]`. The folders hold
checkouts by the names in `table.py`. Each check of each fork runs in a process of its own, forked from
one that has imported torch and transformers already, which is most of a check's time. What a run
found is kept as JSON, so that single forks can be run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.forks.report import write_table
from tests.forks.table import COMPANIONS, EXTRAS, ROWS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forks", type=Path, required=True, help="folder of checkouts")
    parser.add_argument("--environments", type=Path, default=ROOT / ".forks", help="folder for packages (%(default)s)")
    parser.add_argument("--path", type=Path, action="append", default=[], help="has the extra packages already")
    parser.add_argument("--only", action="append", default=[], help="a fork, may be repeated")
    parser.add_argument("--results", type=Path, default=ROOT / ".forks" / "results", help="folder (%(default)s)")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "forks.md")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="data_") as data:  # in /tmp/tmpt... LLaVA's script finds an `mpt`
        subprocess.run([sys.executable, str(HERE / "assets.py"), data], check=True, env=variables(ROWS[0], options))
        rows = [row for row in ROWS if not options.only or row.folder in options.only]
        for version in dict.fromkeys(row.transformers for row in rows):
            with Processes(next(row for row in rows if row.transformers == version), options) as processes:
                for row in rows:
                    if row.transformers == version and (options.forks / row.folder).is_dir():
                        start = time.time()
                        found = examine(row, options, processes, data)
                        (options.results / f"{row.folder}.json").write_text(json.dumps(found, indent=1))
                        print(f"{row.folder}: {found['doctor']['verdict']} ({time.time() - start:.0f} s)", flush=True)
    write_table(options.results, options.table)


def pip(folder, *packages):
    """Packages in a folder of their own, without what they depend on; made once."""
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
        subprocess.run(command, check=True)
    return folder


def variables(row, options):
    """The environment of all forks with a version of transformers."""
    folders = [ROOT, HERE / "site"]
    if row.transformers != "4.37.2":
        folder = options.environments / f"transformers-{row.transformers}"
        folders.append(pip(folder, f"transformers=={row.transformers}", *COMPANIONS[row.transformers]))
    folders += options.path or [pip(options.environments / "extras", *EXTRAS)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(folder.resolve()) for folder in folders),
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "LLAVA_PROJECTORS_DISABLE": "1",
    }


class Processes:
    """A warm process that runs each job in a fork of itself; see `child.py`."""

    def __init__(self, row, options):
        command = [sys.executable, str(HERE / "child.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=variables(row, options), **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def run(self, **job):
        """What the job returns, or its error."""
        print(json.dumps(job), file=self.process.stdin, flush=True)
        # What the libraries print when they are imported comes before the first answer.
        return json.loads(next(line for line in self.process.stdout if line.startswith("{")))


def examine(row, options, processes, data):
    """Everything that is found out about one fork."""
    checkout = (options.forks / row.folder).resolve()
    common = {
        "package": row.package,
        "type": row.type_string,
        "arguments": row.arguments,
        "config": row.config,
        "checkout": str(checkout / row.below),
        "scripts": str(checkout),
        "width": row.width,
        "types": row.types,
        "stand_ins": row.stand_ins,
        "log": str(options.results.resolve() / f"{row.folder}.log"),
    }
    (options.results / f"{row.folder}.log").write_text("")
    found = {"fork": row.folder, "repository": row.repository, "commit": commit_of(checkout), "package": row.package}
    found.update(
        transformers=row.transformers,
        type=row.type_string,
        arguments=row.arguments,
        tower=row.tower,
        stand_ins=row.stand_ins,
    )
    found["without"] = processes.run(job="models", armed=False, **common)
    found["with"] = processes.run(job="models", armed=True, **common)
    found["unharmed"] = all(found["without"].get(k) == found["with"].get(k) for k in ("error", "stock", "failures"))
    found["doctor"] = processes.run(job="doctor", armed=True, **common)
    found["doctor"].setdefault("verdict", "no answer")
    if row.train and any("seen" in one for one in found["with"].get("ours", [])):
        job = {**common, "script": f"{row.package}.{row.train}", "settings": row.train_arguments, "data": data}
        job["type"] = found["with"]["type"]
        found["training"] = processes.run(job="train", armed=True, own=False, **job)
        if not found["training"].get("losses"):
            found["training_own"] = processes.run(job="train", armed=False, own=True, **job)
    return found


def commit_of(checkout):
    """The commit that is checked out, as git or a file beside the sources says."""
    if (checkout / ".commit").is_file():
        return (checkout / ".commit").read_text().split()[0][:7]
    command = ["git", "-C", str(checkout), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
