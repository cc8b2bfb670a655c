"""What the documents point at is there, and their figures are those that were measured."""

import re
import sys
from pathlib import Path

import pytest
import torch
import warm

from benchmarks.speed import flops
from benchmarks.speed.candidates import Subject
from benchmarks.table import read_rows
from llava_projectors import build_projector

ROOT = Path(__file__).parents[1]
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("patches/*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    local = [link for link in links if not link.startswith("http")]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("module", sorted(set(re.findall(r"`python (?:-m )?([^\s`]*benchmarks[^\s`]*)", BENCHMARKS))))
def test_a_benchmark_starts_as_its_readme_says(module):
    assert "usage: " in warm.run([sys.executable, "-m", module, "--help"], cwd=ROOT).stdout


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_mathematics_counts_saeps_operations():
    text = (ROOT / "docs" / "mathematics.md").read_text()
    counts = [flops.projector(Subject(f"saep:stride={stride}"), 24, 1024, 4096).forward / 1e9 for stride in (2, 3, 4)]
    aggregation = flops.linear(24**2, 4 * 1024, 1024).forward / 1e9
    one, two, three = (f"{count:.2f}" for count in counts)
    assert f"{aggregation:.2f} GFLOP of {one} at stride 2, {two} at stride 3 and {three} at stride 4" in text


def test_what_tiles_cost_is_what_was_measured():
    rows = read_rows(ROOT / "benchmarks" / "results" / "high_resolution.csv", "chunk_size")
    peaks = {(r["type"], r["measure"], int(r["chunk_size"])): round(float(r["peak_mib"])) for r in rows}
    forward, saep, tokenpacker = (
        "from {} to {} MiB".format(*(peaks[projector_type, measure, size] for size in (64, 32)))
        for projector_type, measure in (
            ("saep", "forward"),
            ("saep", "forward+backward"),
            ("tokenpacker", "forward+backward"),
        )
    )
    assert peaks["saep", "forward", 64] == peaks["tokenpacker", "forward", 64]
    seconds = [float(row["s_per_tile"]) for row in rows]
    text = (ROOT / "docs" / "high_resolution.md").read_text()
    assert f"falls {forward} forward; with backward {saep} (`saep`) and {tokenpacker} (`tokenpacker`)" in text
    assert f"{min(seconds):.2f} to {max(seconds):.2f} s per tile" in text


def test_what_recomputation_costs_is_what_was_measured():
    rows = read_rows(ROOT / "benchmarks" / "results" / "recompute-cpu.csv", "implementation")
    ratio = {(row["type"], row["implementation"]): f"{float(row['ratio']):.2f}" for row in rows}
    (saep, tokenpacker) = (
        [ratio[projector_type, way] for way in ("recomputed", "checkpoint", "whole")]
        for projector_type in ("saep", "tokenpacker")
    )
    assert (
        f"`saep` {saep[0]} with ours, {saep[1]} with `checkpoint`; `tokenpacker` {tokenpacker[0]} and {tokenpacker[1]}"
        in BENCHMARKS
    )
    assert f"a step takes {saep[2]} and {tokenpacker[2]} of the time" in BENCHMARKS


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
def test_the_readme_counts_parameters_right(type_string, row):
    with torch.device("meta"):
        projector = build_projector(type_string, mm_hidden_size=1024, hidden_size=4096)
    millions = sum(parameter.numel() for parameter in projector.parameters()) / 1e6
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(row)]
    assert any(f"{millions:.2f} M" in line for line in lines)
