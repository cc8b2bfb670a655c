"""What the documents point at is there, and their figures are those that were measured."""

import configparser
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
import warm
from prose import says

from benchmarks import idea
from benchmarks.speed import flops
from benchmarks.speed import report as speed_report
from benchmarks.speed.candidates import Subject
from benchmarks.table import read_rows
from llava_projectors import build_projector, slicing
from llava_projectors.commands.cli import COMMANDS, main
from llava_projectors.commands.doctor import TESTED
from llava_projectors.integration.tower import resolve_layers
from llava_projectors.registry import resolve

ROOT = Path(__file__).parents[1]
BENCHMARKS = "".join((ROOT / "benchmarks" / name).read_text() for name in ("README.md", "speed/README.md"))
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("benchmarks/**/README.md"),
    *ROOT.glob("patches/*.md"),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)]+)\)", path.read_text())
    for link in (link for link in links if not link.startswith("http")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def anchors(path):
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("module", sorted(set(re.findall(r"`python (?:-m )?([^\s`]*benchmarks[^\s`]*)", BENCHMARKS))))
def test_a_benchmark_starts_as_its_readme_says(module):
    assert "usage: " in warm.run([sys.executable, "-m", module, "--help"], cwd=ROOT).stdout


def test_the_photograph_is_credited_wherever_it_is_shown():
    """Author, source and licence: in NOTICE, in the drawing, and beside it."""
    credited = [ROOT / "NOTICE", ROOT / "README.md", ROOT / "examples" / "2_what_a_visual_token_sees.ipynb"]
    for text in (*(path.read_text() for path in credited), idea.CREDIT):
        assert "vultilion" in text
        assert "flickr.com/photos/vultilion/6056698931" in text
        assert re.search(r"CC BY 2\.0|Creative Commons Attribution 2\.0", text)


def test_the_changelog_and_one_table_have_every_environment_variable():
    sources = [*ROOT.glob("llava_projectors/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    names = set(re.findall(r"\bLLAVA_PROJECTORS_[A-Z_]*[A-Z]\b", "".join(path.read_text() for path in sources)))
    for document in ("CHANGELOG.md", "docs/compatibility.md"):
        assert names <= set(re.findall(r"LLAVA_PROJECTORS_\w+", (ROOT / document).read_text())), document


def test_the_changelog_has_every_command():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert all(f"`llava-projectors {command}`" in text or f"`{command}`" in text for command in COMMANDS)


def test_one_range_of_versions_is_tested():
    """In what pip reads, in doctor, and in the documents."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert says(text, *(f"{name.replace('py', 'Py')} {' to '.join(ends)}" for name, ends in TESTED.items()))
    lowest = {name: ends[0] for name, ends in TESTED.items()}
    assert setup["options"]["python_requires"] == f">={lowest['python']}"
    assert f"torch>={lowest['torch']}" in setup["options"]["install_requires"].split()
    next_one = "4.{}".format(int(TESTED["transformers"][1].partition(".")[2]) + 1)
    bounds = f"transformers>={lowest['transformers']},<{next_one}"
    assert bounds in setup["options.extras_require"]["viz"].split()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_readmes_table_is_what_was_measured():
    names = ("saep:stride=2", "tokenpacker:scale_factor=2", "saep:stride=3")
    text = (ROOT / "README.md").read_text()
    for line, measure in (
        ("| training step (stage 2) | 1 |", "training step, stage 2"),
        ("| reading picture and question (prefill) | 1 |", "prefill"),
    ):
        first, *others = (f"{speed_up('model', measure, name)[0]:.1f}" for name in names)
        assert f"{line} {first} times as fast | {' | '.join(others)} |" in text
    peaks = {r["type"]: float(r["peak_mib"]) for r in SPEED if r["measure"] == "training step, stage 2"}
    shares = [f"{peaks[name] / peaks['mlp2x_gelu']:.0%}".replace("%", " %") for name in names]
    assert f"| its peak memory | 100 % | {' | '.join(shares)} |" in text
    # These rows of the other document are held against the study's own CSV, tests/test_spatial.py.
    rows = [row.split(" | ") for row in BENCHMARKS.splitlines() if row.startswith("| `")]
    answers = {row[0].strip("| `"): row[2] for row in rows if len(row) > 5 and row[2].endswith("%")}
    shown = [answers[name] for name in ("mlp2x_gelu", "saep", "tokenpacker", "saep:stride=3")]
    assert f"| right answers (small study, same shares of tokens) | {' | '.join(shown)} |" in text


def test_the_line_to_expect_of_a_released_checkpoint_is_what_is_printed():
    """Its config says `tokenpacker` and a scale factor; the towers and projectors are CLIP-L's and Vicuna-7B's."""
    text = (ROOT / "docs" / "examples.md").read_text()
    resolved = resolve("tokenpacker", SimpleNamespace(scale_factor=2))
    layers = "+".join(map(str, resolve_layers(resolved, 24, -2)))
    after = resolved.output_side(24)
    assert (
        f"llava_projectors: tokenpacker: 576 -> {after**2} visual tokens per image (24x24 -> {after}x{after}), hidden "
        f"states {layers}, {millions('tokenpacker'):.2f}M parameters\n"
    ) in text
    fewest, most = slicing.visual_tokens((1, 1), after**2), slicing.visual_tokens((3, 3), after**2)
    assert f"a thumbnail: {fewest} to {most} visual tokens with the separators\n" in text


def test_the_page_of_an_index_leads_to_no_file():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    page = ROOT / setup["metadata"]["long_description"].removeprefix("file: ")
    assert not re.search(r"\]\((?!http)", page.read_text())


def test_the_mathematics_counts_saeps_operations():
    text = (ROOT / "docs" / "mathematics.md").read_text()
    counts = [flops.projector(Subject(f"saep:stride={stride}"), 24, 1024, 4096).forward / 1e9 for stride in (2, 3, 4)]
    full_grid = flops.linear(24**2, (2 + 1) * 1024, 1024).forward / 1e9
    one, two, three = (f"{count:.2f}" for count in counts)
    assert says(text, f"{full_grid:.2f} GFLOP", one, "stride 2", two, "stride 3", three, "stride 4")


def test_what_tiles_cost_is_what_was_measured():
    rows = read_rows(ROOT / "benchmarks" / "results" / "high_resolution.csv", "chunk_size")
    peaks = {(r["type"], r["measure"], int(r["chunk_size"])): round(float(r["peak_mib"])) for r in rows}
    forward, backward = (
        [peaks[name, measure, size] for name in ("saep", "tokenpacker") for size in (64, 32)]
        for measure in ("forward", "forward+backward")
    )
    seconds = [float(row["s_per_tile"]) for row in rows]
    text = (ROOT / "docs" / "high_resolution.md").read_text()
    assert says(text, *forward[:2], "MiB (`saep`)", *forward[2:], "MiB (`tokenpacker`)", "backward", *backward, "MiB")
    assert forward == backward
    assert f"{min(seconds):.2f} to {max(seconds):.2f} s per tile" in text


SPEED = read_rows(ROOT / "benchmarks" / "results" / "cpu.csv", "measured_to_bound")
SHOWN = ("saep:stride=2", "tokenpacker:scale_factor=2", "saep:stride=3", "tokenpacker:scale_factor=3")


def speed_up(suite, measure, projector_type, images="1"):
    """Of the row, measured and as the FLOP bound has it; a suite has one batch of each measure, but for scaling."""
    row = next(
        row
        for row in SPEED
        if (row["suite"], row["measure"], row["type"], row["images"]) == (suite, measure, projector_type, images)
    )
    return 1 / float(row["ratio"]), 1 / float(row["flops_ratio"])


@pytest.mark.parametrize("measure", ["prefill", "decode 8 tokens", "training step, stage 1", "training step, stage 2"])
def test_the_table_of_speed_ups_is_what_was_measured(measure):
    cells = ("{:.1f} ({:.1f})".format(*speed_up("model", measure, name)) for name in SHOWN)
    batch = next(row["batch"] for row in SPEED if (row["suite"], row["measure"]) == ("model", measure))
    assert f"| {measure.replace(' 8 tokens', '')}, batch {batch} | {' | '.join(cells)} |" in BENCHMARKS


def test_the_memory_of_a_training_step_is_what_was_measured():
    peaks = {r["type"]: float(r["peak_mib"]) for r in SPEED if r["measure"] == "training step, stage 2"}
    cells = (f"{peaks[name] / peaks['mlp2x_gelu']:.0%}".replace("%", " %") for name in SHOWN)
    assert f"| peak memory of a stage 2 step | {' | '.join(cells)} |" in BENCHMARKS


def test_targets_are_met_where_the_readme_says():
    for line in speed_report.target_lines(SPEED):
        assert f"| {' | '.join(line)} |".replace(">=", "≥").replace("<=", "≤") in BENCHMARKS


def test_why_a_target_is_missed_names_what_was_measured():
    rows = [row for row in SPEED if row["ratio_to_naive"] and row["implementation"] == "eager"]
    ranges, widest = [], []
    for chosen in (["144"], ["64", "36"]):
        found = [row for row in rows if row["visual_tokens"] in chosen]
        ratios = [float(row["ratio_to_naive"]) for row in found]
        ranges.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        widest.append(max(float(row["ratio_to_naive_q3"]) - float(row["ratio_to_naive_q1"]) for row in found))
    assert says(BENCHMARKS, "s = 2", ranges[0], "s = 3 and 4", ranges[1], "quartiles", f"{widest[1]:.2f}")
    for named, wanted in (("Prefill", "prefill"), ("Training steps", "training step")):
        reached = [
            speed_report.bound_reached(row)
            for row in SPEED
            if row["suite"] == "model" and row["measure"].startswith(wanted) and row["visual_tokens"] in ("144", "64")
        ]
        assert says(BENCHMARKS, named, f"{min(reached):.2f} to {max(reached):.2f}")


def test_speed_is_named_as_it_was_measured():
    saep, tokenpacker = (
        [f"{ratio:.1f}" for ratio in speed_up("scaling", "prefill", name, "8")] for name in (SHOWN[0], SHOWN[3])
    )
    figures = (saep[0], "`saep`", "bound", saep[1], tokenpacker[0], "`tokenpacker:scale_factor=3`", "bound")
    assert says(BENCHMARKS, "8 images", "prefill", *figures, tokenpacker[1])
    choosing = (ROOT / "docs" / "choosing.md").read_text()
    assert says(choosing, "prefill", "8 images", tokenpacker[0], "times")
    for name in SHOWN[:2]:
        ratios = [
            float(row["ratio"])
            for row in SPEED
            if (row["suite"], row["type"], row["implementation"]) == ("projector", name, "eager")
        ]
        assert says(choosing, f"{min(ratios):.1f} to {max(ratios):.1f} times", "`mlp2x_gelu`")
    steps = [speed_up("model", f"training step, stage {stage}", SHOWN[0])[0] for stage in (1, 2)]
    assert says(choosing, "training steps", f"{min(steps):.1f} to {max(steps):.1f} times")


def test_the_start_takes_as_much_longer_as_was_measured():
    rows = read_rows(ROOT / "benchmarks" / "results" / "startup.csv", "with_hook_ms")
    low, middle, high = statistics.quantiles(
        (float(r["with_hook_ms"]) - float(r["without_hook_ms"]) for r in rows), n=4
    )
    text = (ROOT / "docs" / "compatibility.md").read_text()
    assert says(text, f"{middle:.1f} ms", "median", len(rows), "quartiles", f"{low:.1f} to {high:.1f} ms")


def test_what_recomputation_costs_is_what_was_measured():
    rows = read_rows(ROOT / "benchmarks" / "results" / "recompute-cpu.csv", "implementation")
    ratio = {(row["type"], row["implementation"]): f"{float(row['ratio']):.2f}" for row in rows}
    (saep, tokenpacker) = (
        [ratio[projector_type, way] for way in ("recomputed", "checkpoint", "whole")]
        for projector_type in ("saep", "tokenpacker")
    )
    figures = ("`saep`", saep[0], saep[1], "`checkpoint`", "`tokenpacker`", *tokenpacker[:2])
    assert says(BENCHMARKS, *figures, "`whole`", saep[2], tokenpacker[2])
    peaks = {(row["type"], row["implementation"]): round(float(row["peak_mib"])) for row in rows}
    assert {peaks[name, "recomputed"] - peaks[name, "checkpoint"] for name in ("saep", "tokenpacker")} == {0}
    both = [peaks["tokenpacker", way] for way in ("recomputed", "kept")]
    assert says(BENCHMARKS, *both, "MiB", "`tokenpacker`", "`saep`", peaks["saep", "kept"], "MiB")
    assert peaks["saep", "kept"] == peaks["saep", "recomputed"]


@pytest.mark.parametrize(
    ("type_string", "row"),
    [
        ("saep:stride=2", "| `saep`, "),
        ("saep:stride=3", "| `saep`, "),
        ("saep:stride=4", "| `saep`, "),
        ("tokenpacker:scale_factor=2", "| `tokenpacker`, "),
        ("avg_pool:stride=2", "| `avg_pool` "),
        ("pixel_shuffle:stride=2", "| `pixel_shuffle` "),
        ("ldpv2:stride=2", "| `ldpv2` "),
        ("c_abstractor:stride=2", "| `c_abstractor` "),
        ("resampler:num_queries=144", "| `resampler` "),
        ("stf:stride=2", "| `stf` "),
        ("delta:scale_factor=2", "| `delta` "),
    ],
)
def test_the_documents_count_parameters_right(type_string, row):
    shown = ["README.md"] if type_string.startswith(("saep", "tokenpacker")) else []
    for document in ("docs/types.md", *shown):
        lines = [line for line in (ROOT / document).read_text().splitlines() if line.startswith(row)]
        assert any(f"{millions(type_string):.2f} M" in line for line in lines), document


def test_what_the_plain_separable_convolution_has():
    text = (ROOT / "docs" / "types.md").read_text()
    layers = "layers=12+16+22+23"
    parameters = f"{millions(f'saep:preset=plain,{layers}'):.2f} M parameters"
    assert says(text, "`saep:preset=plain`", f"`{layers}`", parameters)


def millions(type_string):
    with torch.device("meta"):
        projector = build_projector(type_string, mm_hidden_size=1024, hidden_size=4096)
    return sum(parameter.numel() for parameter in projector.parameters()) / 1e6


@pytest.mark.slow
def test_a_users_projector_passes_the_type_checker(tmp_path):
    """The class in the documents and the one in the notebook, beside the installed package."""
    documented = re.search(
        r"```python\n(import llava_projectors\n.+?)```", (ROOT / "docs" / "types.md").read_text(), re.S
    )
    notebook = nbformat.read(ROOT / "examples" / "3_your_own_projector.ipynb", as_version=4)
    written = next(cell.source for cell in notebook.cells if cell.source.startswith("%%writefile"))
    for name, source in (("documented", documented[1]), ("written", written.partition("\n")[2])):
        (tmp_path / f"{name}.py").write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "documented.py", "written.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_plan_of_many_nodes_is_what_is_printed(capsys):
    text = (ROOT / "docs" / "serving.md").read_text()
    command, printed = re.search(r"^\$ llava-projectors (plan .+)\n((?:.+\n)+?)```$", text, re.MULTILINE).groups()
    assert main(command.split()) == 0
    assert capsys.readouterr().out == printed
