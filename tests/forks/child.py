"""Runs jobs, one line of JSON each on stdin, every one in a fork of this process; answers on stdout.

This process imports torch and transformers and nothing else: what a fork of LLaVA imports, and whether
this plugin is armed, is settled in the process of the job.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

from llava_projectors import autoload
from llava_projectors.commands import doctor, trial
from llava_projectors.integration import seams
from llava_projectors.registry import list_projectors
from llava_projectors.tiny import train

SECONDS = 900
RAN = "ran: "
OURS = (*trial.OUR_ERRORS, trial.CannotWork)


# A process for each job


def main():
    for line in sys.stdin:
        print(json.dumps(in_fork(perform, json.loads(line))), flush=True)


def in_fork(function, *arguments):
    """What the function returns in a fork of this process, or {"error": ...}."""
    with tempfile.TemporaryDirectory(prefix="llava") as folder:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=answer, args=(Path(folder), function, *arguments))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        try:
            return json.loads((Path(folder) / "answer.json").read_text())
        except OSError:
            return {"error": f"the process ended with status {process.exitcode}"}


def answer(folder, function, *arguments):
    os.chdir(folder)
    try:
        found = function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        found = {"error": trial.one_line(error)}
    sys.stderr.flush()
    (folder / "answer.json").write_text(json.dumps(found))


def perform(job):
    """One job, in a process that finds the fork and its stand-ins, and has the plugin armed or not."""
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.path.insert(0, job["checkout"])
    import sitecustomize

    sitecustomize.stand_in_for(job["stand_ins"])
    if job["armed"]:
        os.environ[autoload.DISABLE_VARIABLE] = ""
        os.environ[autoload.PACKAGES_VARIABLE] = job["package"]
        autoload.arm_from_environment()  # as the start-up file does
    with contextlib.redirect_stdout(sys.stderr):
        return {"models": run_models, "doctor": run_doctor, "train": run_training}[job["job"]](job)


# The jobs


def run_models(job):
    """Every LLM class of the package: with its own type, and when armed, with ours."""
    first_errors = trial.note_first_errors(job["package"])
    try:
        importlib.import_module(job["package"])
    except Exception as error:
        return {"error": trial.one_line(trial.cause_of(error, first_errors))}
    place = Path(next(iter(sys.modules[job["package"]].__path__)))
    if Path(job["checkout"]) not in place.parents:
        return {"error": f"the checkout has no package {job['package']}"}
    classes, failures = trial.find_models(job["package"])
    trial.make_tower(job["width"])
    if job["armed"]:
        job["type"] = seams.our_name(job["package"], job["type"])
    return {
        "type": job["type"],
        "failures": {name: trial.one_line(trial.cause_of(error, first_errors)) for name, error in failures.items()},
        "stock": {
            kind: {name: with_its_own(cls, kind, job) for name, cls in classes.items()} for kind in own_types(job)
        },
        "ours": [with_ours(cls, name, job) for name, cls in classes.items()] if job["armed"] else [],
        "names": its_names(job["package"]) if job["armed"] else {},
    }


def its_names(package):
    """Of our names, those that the gate leaves to the fork, and those that the fork's own builders build."""
    known = seams._packages.get(package)
    builders = known.projector_builders if known else ()
    found = {"kept": [name for name in list_projectors() if builders and known.reason_to_keep(name)], "built": []}
    for name in list_projectors():
        settings = SimpleNamespace(mm_projector_type=name, mm_hidden_size=1024, hidden_size=4096, scale_factor=2)
        for builder in builders:
            with contextlib.suppress(Exception), torch.device("meta"):
                builder.function(settings)
                found["built"].append(name)
    return found


# As scripts pass it, and as configs write it.
NAMED_TYPE = re.compile(r"mm_projector_type[\"']?[\s=:]+[\"']?(\$?\{?\w[\w.:-]*)")
SCRIPTS = (".sh", ".slurm", ".json", ".yaml", ".yml", ".md", ".txt")


def own_types(job):
    """The fork's default type, and every type that its scripts and configs name."""
    found = [own_type(job), *job["types"]]
    for path in sorted(Path(job["scripts"]).rglob("*")):
        if path.suffix in SCRIPTS and path.is_file() and path.stat().st_size < 10**6:
            text = path.read_text(errors="replace")
            for name in NAMED_TYPE.findall(text):
                if name.startswith("$"):  # a variable of the script
                    found += re.findall(rf"^\s*(?:export )?{name.strip('${')}=[\"']?(\w[\w.:-]*)", text, re.MULTILINE)
                else:
                    found.append(name)
    return list(dict.fromkeys(found))


def own_type(job):
    """The fork's default."""
    own = trial.own_arguments(job["package"])
    return (getattr(own(), "mm_projector_type", None) if own else None) or trial.STOCK_TYPE


def with_its_own(cls, kind, job):
    """A digest of weights, gradients and loss with a type of the fork's own, or its error."""
    try:
        model = trial.build(cls, job["package"], kind, job["arguments"])
        torch.manual_seed(1)
        seen = trial.run_once(model)
    except Exception as error:
        return trial.one_line(error)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return f"{RAN}{digest(model.parameters())} {digest(gradients)} {seen.positions} {seen.loss!r}"


def digest(tensors):
    """One hash of all numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def with_ours(cls, name, job):
    """Build, forward, backward, save and load with our type."""
    row = {"model": name}
    try:
        model = trial.build(cls, job["package"], job["type"], job["arguments"])
        row["seen"] = trial.judge(model, trial.run_once(model))
    except Exception as error:
        traceback.print_exc()
        row["error"] = str(error).strip().split("\n")[0] if isinstance(error, OURS) else trial.one_line(error)
        return row
    row["save_and_load"] = save_and_load(cls, model, job)
    if row["save_and_load"] not in ("bit for bit", "other weights", "other tokens"):
        stock = trial.build(cls, job["package"], own_type(job), job["arguments"])
        row["save_and_load_own"] = save_and_load(cls, stock, job)
    return row


def save_and_load(cls, model, job):
    """Whether the projector that comes back has the same bits, and gives the same tokens; or an error."""
    arguments = trial.training_arguments(job["package"], job["type"], job["arguments"])
    for name in job["config"]:
        setattr(model.config, name, getattr(arguments, name))
    try:
        return round_trip(cls, model)
    except Exception as error:
        traceback.print_exc()
        return trial.one_line(error)


def round_trip(cls, model):
    folder = Path("saved") / cls.__name__
    model.save_pretrained(folder, safe_serialization=False)
    loaded = cls.from_pretrained(folder).float()
    tower = trial.find_tower(loaded)
    if not tower.is_loaded:
        tower.load_model()
    tower.float()
    weights, again = (m.get_model().mm_projector.state_dict() for m in (model, loaded))
    if weights.keys() != again.keys() or not all(torch.equal(weights[k], again[k]) for k in weights):
        return "other weights"
    size = trial.embedded_size(tower) or trial.picture_size(tower)
    picture = torch.randn(1, 3, size, size)
    with torch.no_grad():
        before, after = (
            m.get_model().mm_projector(features[0] if isinstance(features, tuple) else features)
            for m in (model.eval(), loaded.eval())
            for features in [trial.find_tower(m)(picture)]
        )
    return "bit for bit" if torch.equal(before, after) else "other tokens"


def run_doctor(job):
    """The diagnosis of the package; its trials are forks of this process too."""

    def run_trial(package, type_string, arguments, folder, **how):
        report = in_fork(lambda: trial.dataclasses.asdict(trial.try_package(package, type_string, arguments, **how)))
        if "error" in report:
            return trial.Report([], [trial.Trial(trial.NOT_CHECKED, report["error"])])
        rows = [doctor.SeamReport(s["seam"], s["state"], tuple(s["where"])) for s in report["seams"]]
        return trial.Report(rows, [trial.Trial(**t) for t in report["trials"]], report["armed"], report["type_string"])

    doctor.run_trial = run_trial
    diagnosis = doctor.diagnose([job["package"]], job["type"], job["arguments"]).as_dict()
    package = diagnosis["packages"][0]
    return {name: package[name] for name in ("verdict", "reason", "trials", "type_string")}


def run_training(job):
    """Losses of two steps of the fork's own training script, or its error."""
    data = Path(job["data"])
    settings = train.finetune_arguments(data / "data" / "finetune.json", data / "data" / "images", None, max_steps=2)
    tower, llm = data / "openai" / "clip-vit", data / "vicuna"
    kind = own_type(job) if job["own"] else job["type"]
    options = train.training_command(Path("llava-out"), llm, tower, kind, **settings)[3:]
    for name, value in {**job["arguments"], **job["settings"]}.items():
        if value is None:  # a setting of LLaVA's that this script does not know
            place = options.index(f"--{name}")
            del options[place : place + 2]
        else:
            options += [f"--{name}", value.replace("TOWER", str(tower))]
    sys.argv = [job["script"], *options]
    error = ""
    try:
        runpy.run_module(job["script"], run_name="__main__", alter_sys=True)
    except BaseException as failure:
        traceback.print_exc()
        error = trial.one_line(failure)
    try:
        return {"losses": train.losses(Path("llava-out")), "end": error}
    except OSError:
        return {"losses": [], "end": error or "no record of its losses"}


if __name__ == "__main__":
    main()
