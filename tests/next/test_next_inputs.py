"""What the first layer of the LLM receives, counted against a reference that knows the package's layout by itself."""

import math
import random
import re
from pathlib import Path

import family
import pytest
import torch
from drive import llm_input
from family import SQUARE, WIDE

from llava_projectors import ProjectorSpecError

TEXT = (5, 6, 7, 8)
SIDES = {"saep": 14, "saep:stride=3": 9, "tokenpacker": 14, "avg_pool:stride=4": 7, "mlp2x_gelu": 27}
ANYRES = {**family.ANYRES, "image_grid_pinpoints": family.PINPOINTS}


def positions(built, images, sizes, modalities, places=1):
    """Positions that a prompt of four tokens and so many pictures takes, less the four."""
    ids = torch.tensor([[*TEXT[:1], *[family.IMAGE_TOKEN] * places, *TEXT[1:]]])
    received = llm_input(built.model, input_ids=ids, images=images, image_sizes=sizes, modalities=modalities)
    return received.shape[1] - len(TEXT)


def anyres(size, grid, side, most_tiles=9):
    """The whole picture, then its tiles without their padding, scaled to a most number, a newline after each row."""
    (width, height), (rows, columns) = size, (grid[0] * side, grid[1] * side)
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(height * (columns / width))) // 2)
    else:
        columns -= 2 * ((columns - int(width * (rows / height))) // 2)
    times = math.sqrt(rows * columns / (most_tiles * side**2))
    if times > 1.1:
        rows, columns = int(rows // times), int(columns // times)
    return side**2 + rows * (columns + 1)


def tiles(built, size):
    """A picture as `process_images` gives it."""
    processor, config = built.model.get_vision_tower().image_processor, built.model.config
    return family.module("mm_utils").process_images([family.picture(*size)], processor, config)[0]


def frames(built, number=family.FRAMES):
    processor = built.model.get_vision_tower().image_processor
    return processor.preprocess(family.video(number), return_tensors="pt")["pixel_values"]


def numbers(messages, pattern):
    """The numbers in the lines that begin as the pattern does."""
    return [tuple(map(int, match.groups())) for match in (re.match(pattern, line) for line in messages) if match]


@pytest.mark.parametrize("projector_type", SIDES)
def test_one_picture(build, projector_type):
    built = build(projector_type)
    assert positions(built, tiles(built, SQUARE)[None], [SQUARE], ["image"]) == SIDES[projector_type] ** 2


@pytest.mark.parametrize("projector_type", ["saep", "tokenpacker", "saep:stride=3", "mlp2x_gelu"])
@pytest.mark.parametrize(("size", "grid"), [(SQUARE, (1, 1)), (WIDE, (1, 2))])
def test_anyres(build, projector_type, size, grid):
    built = build(projector_type, **ANYRES)
    picture = tiles(built, size)
    assert len(picture) == 1 + grid[0] * grid[1]
    assert positions(built, [picture], [size], ["image"]) == anyres(size, grid, SIDES[projector_type])


def test_several_pictures_of_one_sample_end_in_a_newline_each(build):
    built = build("saep", **ANYRES)
    pictures = [torch.zeros(3, family.SIDE, family.SIDE)] * 3
    assert positions(built, pictures, [SQUARE] * 3, ["image"] * 3, places=3) == 3 * (14**2 + 1)


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("setting", ["anyres", "anyres_max_4"])
def test_the_line_at_the_start_says_what_a_picture_takes_at_most(build, messages, setting, merge_type):
    built = build("saep", **{**ANYRES, "image_aspect_ratio": setting, "mm_patch_merge_type": merge_type})
    ((most,),) = numbers(messages, rf"{setting}: a picture takes up to (\d+) visual tokens$")
    # Tower and projector are left out: the layout is the package's own.
    built.model.encode_images = lambda images: torch.zeros(len(images), 14**2, 80)
    ids = torch.tensor([[family.IMAGE_TOKEN, 5]])
    shape = family.module("mm_utils").get_anyres_image_grid_shape
    draw = random.Random(0)
    taken = []
    for size in [(1152, 1152), (768, 1152), *((draw.randrange(90, 1600), draw.randrange(90, 1600)) for _ in range(40))]:
        columns, rows = shape(size, family.PINPOINTS, family.SIDE)
        picture = torch.zeros(1 + rows * columns, 3, family.SIDE, family.SIDE)
        prepared = built.model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, [picture], ["image"], [size]
        )
        taken.append(prepared[4].shape[1] - 1)
    assert 0.98 * most < max(taken) <= most


@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize("projector_type", ["saep", "saep:stride=3", "mlp2x_gelu"])
def test_frames_of_a_video(build, messages, projector_type, mode):
    built = build(projector_type, mm_spatial_pool_mode=mode)
    side = SIDES[projector_type]
    after = math.ceil(side / 2) if mode == "bilinear" else side // 2
    assert positions(built, [frames(built)], [SQUARE], ["video"]) == family.FRAMES * after**2
    told = numbers(messages, r"video: a frame takes (\d+) visual tokens \((\d+)x\d+ -> (\d+)x\d+")
    assert told == ([] if projector_type == "mlp2x_gelu" else [(after**2, side, after)])


NEWLINES = {"grid": 3 * 7, "frame": 3, "one_token": 1, "no_token": 0}
if family.PACKAGE == "llavaction":  # whose own code for it is an `append()` of nothing
    del NEWLINES["no_token"]


@pytest.mark.parametrize(("position", "newlines"), NEWLINES.items())
def test_newlines_of_a_video(build, position, newlines):
    built = build("saep", **ANYRES, mm_newline_position=position)
    assert positions(built, [frames(built)], [SQUARE], ["video"]) == family.FRAMES * 7**2 + newlines


@pytest.mark.parametrize("mode", ["average", "max", "bilinear"])
@pytest.mark.parametrize(("projector_type", "share"), [("saep", 0), ("saep:stride=3", 21), ("saep:stride=4", 27)])
def test_pooling_that_leaves_out_a_part_of_each_frame_is_said_once_with_the_remedy(
    build, messages, projector_type, share, mode
):
    built = build(projector_type, mm_spatial_pool_mode=mode)
    positions(built, [frames(built)], [SQUARE], ["video"])
    found = [line for line in messages if line.startswith("WARNING")]
    if share == 0 or mode == "bilinear":
        assert found == []
    else:
        (line,) = found
        assert f"{share}% of it" in line
        assert "set mm_spatial_pool_mode bilinear, or train with a stride that gives an even grid (2: 14x14)" in line


DOCUMENTED = ["mlp2x_gelu", "saep", "saep:stride=3", "saep:stride=4"]


def documented(row):
    """The numbers of a row in the table of docs/llava_next.md, by type."""
    text = (Path(__file__).parents[2] / "docs" / "llava_next.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return dict(zip(DOCUMENTED, (int(cell.strip(" *")) for cell in line.split("|")[2:-1])))


@pytest.mark.parametrize("projector_type", DOCUMENTED)
def test_the_documented_counts_are_the_packages(build, messages, projector_type):
    """The layout is the package's own; tower and projector are left out."""
    pinpoints = [[family.SIDE * i, family.SIDE * j] for i in range(1, 7) for j in range(1, 7)]
    settings = {**family.ANYRES, "image_grid_pinpoints": pinpoints, "tokenizer_model_max_length": 32768}
    built = build(projector_type, **settings, mm_newline_position="grid")
    side = built.model.get_vision_tower().num_patches_per_side
    built.model.encode_images = lambda images: torch.zeros(len(images), side**2, 80)

    def count(pictures, sizes, kinds):
        ids = torch.tensor([[family.IMAGE_TOKEN] * len(pictures) + [5]])
        return (
            built.model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pictures, kinds, sizes)[
                4
            ].shape[1]
            - 1
        )

    shape = family.module("mm_utils").get_anyres_image_grid_shape
    for row, size in (
        ("a picture of 640x480", (640, 480)),
        ("of 1280x720", (1280, 720)),
        ("of 1920x1080", (1920, 1080)),
    ):
        columns, rows = shape(size, pinpoints, family.SIDE)
        tiles_of = torch.zeros(1, 1, 1, 1).expand(1 + rows * columns, 3, family.SIDE, family.SIDE)
        assert count([tiles_of], [size], ["image"]) == documented(row)[projector_type], row
    one = torch.zeros(3, family.SIDE, family.SIDE)
    each = documented("each of several pictures in a sample")[projector_type]
    assert count([one, one], [SQUARE] * 2, ["image"] * 2) == 2 * each
    assert documented("a tile; a picture without `anyres`, less its newline")[projector_type] == each - 1
    video = torch.zeros(1, 1, 1, 1).expand(32, 3, family.SIDE, family.SIDE)
    assert count([video], [SQUARE], ["video"]) == documented("32 frames, `bilinear`, `grid`")[projector_type]
    built.model.config.mm_newline_position = "one_token"
    for row, mode in (("a frame, `bilinear`", "bilinear"), ("a frame, `average` or `max`", "average")):
        built.model.config.mm_spatial_pool_mode = mode
        assert count([video], [SQUARE], ["video"]) == 32 * documented(row)[projector_type] + 1
    told = numbers(messages, r"anyres_max_9: a picture takes up to (\d+) visual tokens$")
    assert told == [(documented("any picture, at most")[projector_type],)] * (projector_type != "mlp2x_gelu")


@pytest.fixture
def joined(monkeypatch):
    """The package with a SigLIP tower that is joined with a DINOv2, as a fork would write it."""
    from transformers import Dinov2Config, Dinov2Model

    class JoinedTower(family.module("model.multimodal_encoder.siglip_encoder").SigLipVisionTower):
        def load_model(self, device_map=None):
            super().load_model(device_map)
            config = Dinov2Config(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=378, patch_size=14
            )
            self.dino = Dinov2Model(config).requires_grad_(False)

        def forward(self, images):
            further = self.dino(images).last_hidden_state[:, 1:]
            return torch.cat([super().forward(images), further.to(images.dtype)], dim=-1)

        @property
        def hidden_size(self):
            return super().hidden_size + 16

    monkeypatch.setattr(family.module("model.multimodal_encoder.builder"), "SigLipVisionTower", JoinedTower)


def test_a_tower_that_joins_two_models_serves_types_of_one_layer(joined, build):
    with pytest.raises(ProjectorSpecError, match="which joins its `vision_tower` with dino: pass saep:layers=-1, or a"):
        build("saep", **ANYRES)
    built = build("saep:layers=-1", **ANYRES)
    assert built.model.config.mm_hidden_size == built.model.get_model().mm_projector.mm_hidden_size == 32 + 16
    assert positions(built, [tiles(built, WIDE)], [WIDE], ["image"]) == anyres(WIDE, (1, 2), 14)
    assert positions(built, [frames(built)], [SQUARE], ["video"]) == family.FRAMES * 7**2 + 1


def test_a_mixture_in_one_batch(root, build):
    """A picture, a wide one, two in a sample, a video, and text alone, as the package's own dataset prepares them."""
    built = build("saep", **ANYRES)
    batch = family.batch_of(root, built, image_aspect_ratio="anyres_max_9")
    lengths, text = family.lengths_of(built, batch)
    visual = [anyres(SQUARE, (1, 1), 14), anyres(WIDE, (1, 2), 14), 2 * (14**2 + 1), family.FRAMES * 7**2 + 1, 0]
    assert lengths == [words + tokens for words, tokens in zip(text, visual)]
