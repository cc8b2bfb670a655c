"""The matrix: every fork in a folder, through the same checks, each in processes of its own; writes docs/forks.md.

`python -m tests.forks --forks DIR [--environments DIR] [--path DIR] [--only NAME]`. The folders hold
checkouts by the names in `table.py`. What a run found is kept as JSON beside the table, so that single
forks can be run again.
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

from llava_projectors.tiny import assets, train
from tests.forks.table import COMPANIONS, EXTRAS, ROWS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TYPE = "saep"
SECONDS = 900


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
    for row in ROWS:
        if (options.only and row.folder not in options.only) or not (options.forks / row.folder).is_dir():
            continue
        start = time.time()
        found = examine(row, options)
        (options.results / f"{row.folder}.json").write_text(json.dumps(found, indent=1))
        print(f"{row.folder}: {found['verdict']} ({time.time() - start:.0f} s)", flush=True)
    from tests.forks.report import write_table

    write_table(options.results, options.table)


def pip(folder, *packages):
    """Packages in a folder of their own, without what they depend on; made once."""
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *packages]
        subprocess.run(command, check=True)
    return folder


def environment(row, options, armed):
    """The variables of a fork's processes."""
    folders = [ROOT, options.forks / row.folder / row.below, HERE / "site"]
    if row.transformers != "4.37.2":
        folder = options.environments / f"transformers-{row.transformers}"
        folders.append(pip(folder, f"transformers=={row.transformers}", *COMPANIONS[row.transformers]))
    folders += options.path or [pip(options.environments / "extras", *EXTRAS)]
    variables = {
        "PYTHONPATH": os.pathsep.join(str(folder.resolve()) for folder in folders),
        "FORKS_STAND_INS": ",".join(row.stand_ins),
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "LLAVA_PROJECTORS_DISABLE": "" if armed else "1",
        "LLAVA_PROJECTORS_PACKAGES": row.package,
    }
    return {**os.environ, **variables}


def examine(row, options):
    """Everything that is found out about one fork."""
    commit = (options.forks / row.folder / ".commit").read_text().split()[0] if _has_commit(row, options) else "unknown"
    found = {"fork": row.folder, "repository": row.repository, "commit": commit[:7], "package": row.package}
    found.update({"transformers": row.transformers, "arguments": row.arguments, "tower": row.tower})
    found["stand_ins"] = row.stand_ins
    found["without"] = child(row, options, armed=False)
    found["with"] = child(row, options, armed=True)
    found["unharmed"] = all(found["without"].get(k) == found["with"].get(k) for k in ("import", "stock", "failures"))
    found["doctor"] = doctor(row, options)
    works = [one for one in found["with"].get("ours", []) if one.get("save_and_load") == "bit for bit"]
    if works and row.train:
        found["training"] = training(row, options)
    found["verdict"] = found["doctor"].get("verdict", "no answer")
    return found


def _has_commit(row, options):
    return (options.forks / row.folder / ".commit").is_file()


def child(row, options, armed):
    """What `child.py` answers."""
    request = {"package": row.package, "type": TYPE, "arguments": row.arguments, "with_ours": armed}
    request["config"] = row.config
    with tempfile.TemporaryDirectory() as folder:
        done = run([sys.executable, str(HERE / "child.py"), json.dumps(request)], row, options, armed, folder)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"import": f"the process ended with {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}"}


def run(command, row, options, armed, folder):
    variables = environment(row, options, armed)
    try:
        return subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"took longer than {SECONDS} s")


def doctor(row, options):
    """Its verdict, as a user gets it."""
    settings = [word for name, value in row.arguments.items() for word in ("--argument", f"{name}={value}")]
    command = [sys.executable, "-m", "llava_projectors", "doctor", "--json", "--package", row.package, *settings]
    with tempfile.TemporaryDirectory() as folder:
        done = run(command, row, options, True, folder)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return {"verdict": "no answer", "reason": (done.stderr.splitlines() or [""])[-1], "status": done.returncode}
    package = answer["packages"][0]
    return {"verdict": answer["verdict"], "reason": package["reason"], "trials": package["trials"],
            "status": done.returncode}  # fmt: skip


def training(row, options):
    """Losses of the fork's own training script with our type, or the last line of its error."""
    with tempfile.TemporaryDirectory(prefix="llava") as name:
        folder = Path(name)
        tower, llm = assets.make_vision_tower(folder / "openai" / "clip-vit"), assets.make_llm(folder / "vicuna")
        _, data = assets.make_dataset(folder / "data", num_scenes=2)
        settings = train.finetune_arguments(data, folder / "data" / "images", None, max_steps=2)
        command = train.training_command(folder / "llava-out", llm, tower, TYPE, **settings)
        command[2] = f"{row.package}.{row.train}"
        for setting, value in {**row.arguments, **row.train_arguments}.items():
            if value == "":  # a setting of LLaVA's that this script does not know
                place = command.index(f"--{setting}")
                del command[place : place + 2]
            else:
                command += [f"--{setting}", value.replace("TOWER", str(tower))]
        done = run(command, row, options, True, folder)
        try:
            losses = train.losses(folder / "llava-out")
        except OSError:
            losses = []
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        return {"losses": losses, "status": done.returncode, "end": "" if done.returncode == 0 else errors[-1]}


if __name__ == "__main__":
    main()
