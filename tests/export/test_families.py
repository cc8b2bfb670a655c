"""Layouts of pictures against LLaVA's own code, and whole families of checkpoints against their own stack."""

import dataclasses
import json
import random
import shutil

import families
import pytest
import torch
import transformers

from llava_projectors.export import verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.templates import TEMPLATES
from llava_projectors.serving.layout import (
    AnyResolution,
    Frames,
    OneTile,
    Slices,
    as_settings,
    layout_of,
    pack_pictures,
    positions_of,
    row_of_video,
    rows_of,
)

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
        (row,) = rows_of(layout, [size], [False])
        assert row == (*size, len(tokens))
        assert positions_of(layout, row) == layout.positions(size)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}-{getattr(layout, 'merge', '')}")
def test_a_picture_that_is_seen_whole_takes_one_tile(layout):
    extra = {Slices.kind: torch.ones(2, 4)}.get(layout.kind, torch.ones(4) if layout.newline else None)
    (row,) = rows_of(layout, [(1000, 300)], [True])
    assert row == (1000, 300, 1)
    (packed,) = pack_pictures(layout, torch.zeros(1, 36, 4), [row], extra)
    assert packed.shape == (positions_of(layout, row), 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.kind}-{getattr(layout, 'merge', '')}")
@pytest.mark.parametrize("video", [None, Frames(6, "max", "grid")])
def test_a_config_gives_the_layout_back(layout, video):
    layout = dataclasses.replace(layout, video=video)
    assert layout_of(json.loads(json.dumps(as_settings(layout)))) == layout


@pytest.mark.parametrize("position", ["grid", "frame", "one_token", "no_token"])
@pytest.mark.parametrize("pool", ["bilinear", "average", "max"])
@pytest.mark.parametrize("side", [6, 7])
def test_videos_of_several_lengths_are_packed_as_they_are_counted(side, pool, position):
    layout = OneTile(side, newline=position != "no_token", video=Frames(side, pool, position))
    rows = [row_of_video(3), (5, 5, 1), row_of_video(2)]
    spread = [row for row in rows for _ in range(row[2])]
    packed = pack_pictures(layout, torch.zeros(6, side**2, 4), spread, torch.ones(4) if layout.newline else None)
    assert [len(tokens) for tokens in packed] == [positions_of(layout, row) for row in rows]
    newlines = {"grid": 3 * layout.video.side, "frame": 3, "one_token": 1, "no_token": 0}
    assert int(packed[0].sum()) == 4 * newlines[position]


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
    asked = families.questions(*families.prompt_parts(folder), family)[::2]
    cases = verify.reference(str(checkpoint), None, asked, 6)
    found = verify.compare_on_this_stack(folder, cases)
    differences = [line for case, result in zip(cases, found) for line in verify.different_answers(case, result)]
    assert differences == []
    if name.startswith(("slice", "anyres")):
        assert len({len(case["logits"]) for case in cases}) >= 3
    assert verify.verify(folder, str(checkpoint), None) == []


def test_pictures_stand_between_tokens_where_they_were_trained_so(root, tmp_path):
    checkpoint, _ = families.make_checkpoint(root, "start-end", families.LLAVA["start-end"])
    export_checkpoint(str(checkpoint), tmp_path / "out")
    start, end = families.prompt_parts(tmp_path / "out")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "TEXT"}]}]
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    template = (tmp_path / "out" / "chat_template_vllm.jinja").read_text()
    text = tokenizer.apply_chat_template(chat, template, tokenize=False, add_generation_prompt=True)
    assert text == f"<s>{start}<im_start><image><im_end>\nTEXT{end}"
    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0]['content'] }} <image>")
    with pytest.raises(ExportError, match=r"stands as <im_start><image><im_end>: write it so in --chat-template own"):
        export_checkpoint(str(checkpoint), tmp_path / "other", chat_template=own)
    own.write_text("{{ messages[0]['content'] }} <im_start><image><im_end>")
    export_checkpoint(str(checkpoint), tmp_path / "other", chat_template=own)
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == own.read_text()


@pytest.mark.parametrize(("name", "shown"), [("llama3", "a dog. It's!"), ("llama-square", "a dog . It 's !")])
def test_spaces_before_punctuation_are_llavas(root, tmp_path, name, shown):
    """`check_folders.py` expects what LLaVA's own tokenizers give here."""
    checkpoint, _ = families.make_checkpoint(root, name, families.LLAVA[name])
    export_checkpoint(str(checkpoint), tmp_path / "out")
    trained = transformers.AutoTokenizer.from_pretrained(checkpoint, use_fast=False)
    exported = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    for tokenizer in (trained, exported):
        ids = tokenizer("a dog . It 's !", add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == shown


TURN = "<|start_header_id|>{}<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("dates", "name"),
    [
        ("", "llava_llama_3"),
        ("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n", "llama_3_1"),
        ("Today Date: 1 Jan 2025\n\n", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_conversation_of_llava_mores_llamas(root, tmp_path, dates, name):
    """Its prompts come from the chat template of the base's tokenizer, with its own system message."""
    folder = tmp_path / "llava-more"
    shutil.copytree(families.make_checkpoint(root, "llama3", families.LLAVA["llama3"])[0], folder)
    system = TURN.format("system") + f"{dates}{{{{ messages[0]['content'] | trim }}}}<|eot_id|>"
    turns = TURN.format("{{ message['role'] }}") + "{{ message['content'] | trim }}<|eot_id|>"
    own = f"<|begin_of_text|>{system}{{% for message in messages[1:] %}}{turns}{{% endfor %}}"
    edit(folder / "tokenizer_config.json", chat_template=None if dates is None else own)
    edit(folder / "config.json", model_architecture="llama_3_1")
    if name is None:
        with pytest.raises(ExportError, match="from the tokenizer's own chat_template. It gives others than"):
            export_checkpoint(str(folder), tmp_path / "out")
        export_checkpoint(str(folder), tmp_path / "out", conversation="llama_3_1")
        return
    export_checkpoint(str(folder), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATES[name]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = own
    start = tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}], tokenize=False)
    tokenizer.chat_template = TEMPLATES[name]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Why? "}]
    expected = f"{start}{TURN.format('user')}Why?<|eot_id|>{TURN.format('assistant')}"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
