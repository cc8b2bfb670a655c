"""Grids, canvases and tiles of high-resolution pictures, against what the published code makes of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from llava_projectors import ProjectorSpecError, slicing

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "data" / "tokenpacker_hd.npz")


def normalised(pixels):
    picture = torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)
    return (picture - MEAN[:, None, None]) / STD[:, None, None]


@pytest.mark.parametrize("patch_num", [9, 16, 25])
def test_every_published_grid(golden, patch_num):
    chosen = [slicing.choose_grid(int(w), int(h), patch_num) for w, h in golden["width_height"]]
    assert len(chosen) == 400
    assert chosen == [tuple(grid) for grid in golden[f"grid_{patch_num}"].tolist()]


@pytest.mark.parametrize("number", range(8))
def test_published_tiles(golden, number):
    pixels = golden[f"picture_{number}"]
    grid = slicing.choose_grid(pixels.shape[1], pixels.shape[0], 9)
    assert grid == tuple(golden[f"picture_{number}_grid"])
    canvas = slicing.to_canvas(normalised(pixels), grid)
    assert slicing.canvas_grid(canvas) == grid
    tiles = torch.stack(slicing.to_tiles(canvas))
    assert len(tiles) == slicing.tile_count(grid)
    for name, found in (
        ("sample", tiles[:, :, ::29, ::29]),
        ("mean", tiles.mean((2, 3))),
        ("std", tiles.std((2, 3), unbiased=False)),
    ):
        expected = torch.from_numpy(golden[f"picture_{number}_{name}"])
        assert found.shape == expected.shape
        tolerance = 1e-6 if name == "sample" else 1e-5
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("side", [14, 42])
@pytest.mark.parametrize("patch_num", [9, 16, 25])
def test_a_canvas_tells_its_grid(patch_num, side):
    """Every allowed grid goes through a canvas and comes back, tile by tile."""
    for grid in slicing.grids(patch_num):
        rows, columns = grid
        picture = torch.arange(rows * columns).view(rows, columns).float() + 1
        picture = picture.repeat_interleave(side, 0).repeat_interleave(side, 1).expand(3, -1, -1)
        canvas = slicing.to_canvas(picture, grid, side)
        assert slicing.canvas_grid(canvas, side) == grid
        tiles = slicing.to_tiles(canvas, side)
        assert [int(tile[0, side // 2, side // 2]) for tile in tiles[: rows * columns]] == list(
            range(1, 1 + rows * columns)
        )
        assert all(tile.shape == (3, side, side) for tile in tiles)
        assert len(tiles) == len(slicing.ends_line(grid)) == slicing.tile_count(grid)


def test_lines_and_tokens():
    assert slicing.ends_line((1, 1)) == [True]
    assert slicing.ends_line((1, 3)) == [False, False, True, True]
    assert slicing.ends_line((3, 1)) == [True, True, True, True]
    assert slicing.ends_line((2, 2)) == [False, True, False, True, True]
    assert slicing.visual_tokens((1, 1), 144) == 145
    assert slicing.visual_tokens((1, 1), 81) == 82
    assert slicing.visual_tokens((3, 3), 144) == 9 * 144 + 9 + 144 + 1


@pytest.mark.parametrize(
    ("size", "grid"), [((1, 1), (1, 1)), ((1, 5000), (9, 1)), ((5000, 1), (1, 9)), ((1, 20000), (9, 1))]
)
def test_extreme_sizes(size, grid):
    """As the published rule has them; a thumbnail that would be empty, on which the published code fails, is not."""
    width, height = size
    assert slicing.choose_grid(width, height, 9) == grid
    canvas = slicing.to_canvas(torch.ones(3, height, width), grid)
    assert slicing.canvas_grid(canvas) == grid
    tiles = torch.stack(slicing.to_tiles(canvas))
    assert len(tiles) == slicing.tile_count(grid)
    assert (tiles[: grid[0] * grid[1]].amax((1, 2, 3)) > 0.99).all()
    assert tiles.isfinite().all()


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_without_pixels_is_named(size):
    with pytest.raises(ValueError, match="a picture of {}x{} pixels".format(*size)):
        slicing.choose_grid(*size, 9)


@pytest.mark.parametrize("shape", [(336, 672), (672, 336), (400, 400), (300, 300), (0, 0)])
def test_shapes_that_are_no_canvas(shape):
    with pytest.raises(ValueError, match="is no canvas of 336 px tiles.*image processor"):
        slicing.canvas_grid(torch.zeros(3, *shape))
    with pytest.raises(ValueError, match="is no canvas"):
        slicing.canvas_grid(torch.zeros(1, 3, 336, 336))


def test_settings():
    for setting in ("slice", "slice:patch_num=9", " slice "):
        assert slicing.is_slice(setting)
        assert slicing.parse_slicing(setting).patch_num == 9
    for setting in ("pad", "square", "anyres", "slices", "", None, 9):
        assert not slicing.is_slice(setting)
    assert slicing.parse_slicing("slice:patch_num=25,chunk_size=8").chunk_size == 8
    # what a checkpoint's config says stands in for what the setting leaves out; released ones say it as text
    assert slicing.parse_slicing("slice", patch_num="16").patch_num == 16
    assert slicing.parse_slicing("slice:patch_num=25", patch_num="16", chunk_size=None).patch_num == 25


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "slice:patch_num=10",
            "bad value '10' for option 'patch_num' in image_aspect_ratio 'slice:patch_num=10'.*9, 16",
        ),
        ("slice:patch_num=many", "bad value 'many' for option 'patch_num' in image_aspect_ratio"),
        ("slice:patches=9", "unknown option 'patches' in image_aspect_ratio.*did you mean 'patch_num'"),
        ("slice:", "cannot read '' in image_aspect_ratio 'slice:'"),
        ("slice:chunk_size=0", "chunk_size=0 .*must be at least 1"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(ProjectorSpecError, match=message):
        slicing.parse_slicing(setting)


def test_a_config_that_cannot_be():
    with pytest.raises(ProjectorSpecError, match="bad value '10' for option 'patch_num'"):
        slicing.parse_slicing("slice", patch_num="10")
