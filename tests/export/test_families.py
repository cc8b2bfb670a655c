"""Layouts of pictures against LLaVA's own code, and whole families of checkpoints against their own stack."""

import random

import families
import pytest
import torch

from llava_projectors.export import verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.serving.layout import AnyResolution, OneTile, Slices, as_settings, layout_of, rows_of

PINPOINTS = tuple((336 * x, 336 * y) for x, y in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)))
LAYOUTS = [
    OneTile(6),
    OneTile(6, pad=True, newline=True),
    Slices(6, 336, 16, (1, 2)),
    *(AnyResolution(6, 336, PINPOINTS, merge) for merge in ("flat", "spatial", "spatial_unpad")),
    AnyResolution(6, 336, PINPOINTS, "spatial_unpad", most_tiles=2),
]


def sizes(count):
    generator = random.Random(0)
    return [(generator.randint(1, 1500), generator.randint(1, 1500)) for _ in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}-{getattr(layout, 'merge', '')}")
def test_as_many_positions_are_packed_as_are_counted(layout):
    extra = {Slices.kind: torch.ones(2, 4)}.get(layout.kind, torch.ones(4) if layout.newline else None)
    for size in sizes(100):
        tokens = torch.zeros(layout.tile_count(size), 36, 4)
        packed = layout.pack(tokens, size, extra)
        assert packed.shape == (layout.positions(size), 4)
        assert layout.positions(size) <= layout.positions(layout.largest_size())
        rows = rows_of(layout, [size])
        assert rows == [(*size, len(tokens))] * len(tokens)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}-{getattr(layout, 'merge', '')}")
def test_a_config_gives_the_layout_back(layout):
    assert layout_of(as_settings(layout)) == layout


def test_resolutions_are_llavas():
    from llava.mm_utils import select_best_resolution

    layout = LAYOUTS[3]
    for height, width in sizes(500):
        assert layout.best_resolution((height, width)) == select_best_resolution((width, height), PINPOINTS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", families.LLAVA)
def test_a_family_is_what_its_own_stack_says(root, name):
    """Pictures of several sizes, two in a prompt; pixels, tokens, logits, answers and their ends."""
    family = families.LLAVA[name]
    checkpoint, _ = families.make_checkpoint(root, name, family)
    folder = root / "exported" / name
    export_checkpoint(str(checkpoint), folder, dtype="float32")
    asked = families.questions(*families.prompt_parts(folder))[::2]
    cases = verify.reference(str(checkpoint), None, asked, 6)
    found = verify.compare_on_this_stack(folder, cases)
    differences = [line for case, result in zip(cases, found) for line in verify.different_answers(case, result)]
    assert differences == []
    if name.startswith(("slice", "anyres")):
        assert len({len(case["logits"]) for case in cases}) >= 3
    assert verify.verify(folder, str(checkpoint), None) == []
