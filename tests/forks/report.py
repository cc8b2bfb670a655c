"""docs/forks.md from what the matrix found."""

import json
import platform
import re
from pathlib import Path

import torch

from tests.forks.table import ROWS, USUAL_TYPE

PATCHES = Path(__file__).parents[2] / "patches"

INTRODUCTION = """\
# Forks of LLaVA

Every fork below was checked out as published and run on a CPU by `make forks FORKS=DIR`, with a tiny
random CLIP tower (24 layers, 336 px) and a tiny random LLM in the fork's own classes. Nothing of a fork
was changed. Each check runs in a process of its own. The same checks run on each:

- **Visual tokens**: built with `{type}` through the fork's own `initialize_vision_modules`, two pictures through its
  own forward, tokens counted at the first layer of its LLM; the projector was called once for each call of the tower,
  with what the tower returned, and got gradients.
- **Saved, loaded**: by `save_pretrained` and `from_pretrained`; weights and visual tokens are the same bits.
- **Its script**: two steps of the fork's own training script, full fine-tuning with `{type}`, on a CPU.
- **Its own types**: with its default type, and with every type that its scripts and configs name, weights, loss and
  gradients are the same bits with the plugin on and off. In brackets: types with which no class of it could be run
  here; its errors are the same then.
- **doctor**: what `llava-projectors doctor` says. Exit status 0 only for *works*.

*not checked* means that the fork itself could not be run here, with any projector. A fork that was tried with other
settings than these says so below; so does one whose usual tower was not tried. A fork whose own projector builder
keeps the bare name was tried with `llava_projectors.{type}`.

"""


def write_table(results, table):
    """One line per fork, then the reasons."""
    found = [json.loads(p.read_text()) for r in ROWS for p in [results / f"{r.folder}.json"] if p.is_file()]
    lines = [
        INTRODUCTION.format(type=USUAL_TYPE),
        f"Python {platform.python_version()}, torch {torch.__version__}.\n\n",
    ]
    counts = {v: sum(one["doctor"]["verdict"] == v for one in found) for v in ("works", "cannot work", "not checked")}
    lines.append(
        f"{len(found)} forks: {', '.join(f'{n} {v}' for v, n in counts.items())}. {' '.join(agreement(found))}\n\n"
    )
    heads = ("fork, commit", "package", "transformers", "doctor", "visual tokens", "saved, loaded", "its script")
    lines.append(f"| {' | '.join(heads)} | its own types |\n")
    lines.append("|---|---|---|---|---|---|---|---|\n")
    lines += [line_of(one) for one in sorted(found, key=lambda one: list(counts).index(one["doctor"]["verdict"]))]
    lines.append("\n## Why, and with what\n\n")
    lines += [f"- **{one['fork']}**: {' '.join(notes_of(one))}\n" for one in found if notes_of(one)]
    table.write_text("".join(lines))


def agreement(found):
    """Whether what doctor says is what happened, and whether a type of a fork's own was harmed, in words."""
    counted = {one["fork"] for one in found if any("seen" in trial for trial in one["with"].get("ours", []))}
    said = {one["fork"] for one in found if one["doctor"]["verdict"] == "works"}
    harmed = [one["fork"] for one in found if not one["unharmed"]]
    pairs = sum(len(ran(one)) for one in found)
    if counted == said:
        yield "doctor says *works* of exactly those whose visual tokens were counted."
    else:
        yield f"**doctor and what happened differ on {', '.join(sorted(counted ^ said))}.**"
    if harmed:
        yield f"**The plugin changes a type of {', '.join(harmed)}.**"
    else:
        yield f"The plugin changes no fork's own type ({pairs} pairs of a fork and a type that runs in it)."
    yield from agreement_on_names(found)


def agreement_on_names(found):
    """Whether the gate leaves to every fork the names that its builder builds, in words."""
    taken = [one["fork"] for one in found if set(names_of(one, "built")) - set(names_of(one, "kept"))]
    yield (
        f"**The gate takes names of {', '.join(taken)}.**"
        if taken
        else "The names that a builder builds are left to it."
    )
    every = [one["fork"] for one in found if "saep" in names_of(one, "kept")]
    if every:
        yield f"Every bare name stays with {', '.join(every)}."
    for one in found:
        if names_of(one, "kept") and one["fork"] not in every:
            yield f"{one['fork']} keeps {', '.join(names_of(one, 'kept'))}."


def names_of(one, kind):
    """Of our names, those that the gate leaves to the fork (`kept`), or that its builder builds (`built`)."""
    return one["with"].get("names", {}).get(kind, [])


def ran(one):
    """Types of its own with which a class of the fork ran."""
    stock = one["without"].get("stock", {})
    return [kind for kind, classes in stock.items() if any(end.startswith("ran: ") for end in classes.values())]


def own_types_of(one):
    stock = one["without"].get("stock", {})
    failed = [kind for kind in stock if kind not in ran(one)]
    shown = ", ".join(ran(one) + [f"({kind})" for kind in failed]) or "-"
    return f"same: {shown}" if one["unharmed"] else f"**other**: {shown}"


def line_of(one):
    """A row of the table."""
    cells = [
        f"[{one['fork']}](https://github.com/{one['repository']}) {one['commit']}",
        f"`{one['package']}`",
        one["transformers"],
        f"**{one['doctor']['verdict']}**",
        tokens_of(one),
        saved_of(one),
        script_of(one),
        own_types_of(one),
    ]
    return f"| {' | '.join(cells)} |\n"


def tokens_of(one):
    seen = {trial["seen"].split(" visual")[0] for trial in one["with"].get("ours", []) if "seen" in trial}
    return ", ".join(sorted(seen)) or "-"


def saved_of(one):
    kept = set()
    for trial in one["with"].get("ours", []):
        own = trial.get("save_and_load_own")
        if "save_and_load" in trial:
            kept.add("fails, its own too" if own not in (None, "bit for bit") else trial["save_and_load"])
    return ", ".join(sorted(kept)) or "-"


def script_of(one):
    training = one.get("training")
    if training is None:
        return "-"
    if training.get("losses"):
        return "loss " + ", ".join(f"{loss:.2f}" for loss in training["losses"])
    return "**runs with its own type only**" if one["training_own"].get("losses") else "fails, with its own type too"


def notes_of(one):
    """What the table has no room for."""
    notes = []
    tried = one["with"].get("type", one["type"])
    settings = {**({"mm_projector_type": tried} if tried != USUAL_TYPE else {}), **one["arguments"]}
    if settings:
        notes.append("With " + ", ".join(f"`--{name} {value}`" for name, value in settings.items()) + ".")
    if one["tower"] != "CLIP":
        notes.append(f"Tried with CLIP; its usual tower is {one['tower']}.")
    works = [t for t in one["with"].get("ours", []) if "seen" in t]
    if works:
        notes.append("LLMs: " + ", ".join(t["model"] for t in works) + ".")
    if one["doctor"]["verdict"] != "works":
        notes.append(f"{one['doctor']['reason'].rstrip('.')}.")
        if (PATCHES / f"{one['fork'].lower()}.patch").is_file():
            notes.append("A patch brings it types of one layer: [patches/README.md](../patches/README.md).")
    else:
        others = [t for t in one["doctor"].get("trials", []) if t["verdict"] != "works"]
        notes += [f"{t['verdict'].capitalize()}: {t['reason'].rstrip('.')}." for t in others]
    training = one.get("training")
    if training and not training.get("losses"):
        end = training.get("end") or training.get("error", "")
        end = re.sub(r"/tmp/\w+/", "", end)
        notes.append(f"Its script ended with `{end[:160]}`.")
    if one["stand_ins"]:
        notes.append(f"Imported, never called, with stand-ins for {', '.join(one['stand_ins'])}.")
    return notes
