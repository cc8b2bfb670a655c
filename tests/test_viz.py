"""What a visual token was made from: maps whose truth is known, and the command."""

import pytest
import torch
from PIL import Image
from test_projectors import features_for, randomise

from llava_projectors import build_projector, viz
from llava_projectors.cli import main
from llava_projectors.projectors import tokenpacker


@pytest.mark.parametrize(("type_string", "side"), [("avg_pool:stride=3", 12), ("avg_pool", 7)])
def test_average_pooling_sees_its_region_evenly(type_string, side):
    torch.manual_seed(0)
    projector = build_projector(type_string, 8, 16)
    # One picture in which all patches are alike, so that the derivative by each is the same.
    features = torch.randn(1, 1, 8).expand(1, side * side, 8)
    s, token_side = projector.stride, -(-side // projector.stride)
    maps = viz.token_maps(projector, features, range(token_side**2))
    for token, found in enumerate(maps):
        row, column = divmod(token, token_side)
        expected = torch.zeros(side, side)
        expected[row * s : row * s + s, column * s : column * s + s] = 1
        torch.testing.assert_close(found, expected / expected.sum())


def test_saep_sees_as_far_as_its_kernel():
    projector = randomise(build_projector("saep:kernel_size=5", 8, 16))
    (found,) = viz.token_maps(projector, features_for(projector, batch=1), [3 * 6 + 2])
    rows, columns = (found.sum(dim).gt(0).nonzero().flatten().tolist() for dim in (1, 0))
    # Output pixel i of a 5x5 kernel with stride 2 and padding 2 reaches from 2i - 2 to 2i + 2.
    assert (rows, columns) == ([4, 5, 6, 7, 8], [2, 3, 4, 5, 6])


@pytest.mark.parametrize("side", [12, 11])
@pytest.mark.parametrize("heads", [1, 8])
def test_tokenpackers_maps_are_the_weights_it_attends_with(monkeypatch, side, heads):
    projector = randomise(build_projector("tokenpacker:scale_factor=3", 32, 16))
    projector.clip_attn.num_heads = heads
    features = features_for(projector, side=side, batch=2)
    attend, used = tokenpacker._attend, []
    monkeypatch.setattr(tokenpacker, "_attend", lambda *a: used.append(attend(*a)) or used[-1])
    projector(features)
    weights = used[0][1].mean(1).view(2, 4, 4, 3, 3)

    maps = projector.region_weights(features)
    assert maps.shape == (2, 16, side, side)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 16))
    for token in range(16):
        row, column = token // 4 * 3, token % 4 * 3
        region = maps[:, token, row : row + 3, column : column + 3]
        torch.testing.assert_close(region, weights[:, token // 4, token % 4, : region.shape[1], : region.shape[2]])
    torch.testing.assert_close(viz.token_maps(projector, features, [5]), maps[:1, 5])


@pytest.mark.parametrize("type_string", ["saep:stride=3", "tokenpacker", "resampler:num_queries=16"])
def test_command_draws(tmp_path, capsys, tiny, type_string):
    target = tmp_path / "tokens.png"
    assert main(["show", str(tiny.images / "flower.jpg"), "--type", type_string, "--output", str(target)]) == 0
    out = capsys.readouterr().out
    assert "576 patches" in out
    assert "random weights" in out
    with Image.open(target) as drawn:
        assert drawn.width > 600
        assert len(drawn.convert("RGB").getcolors(2**24)) > 1000


def test_command_draws_a_trained_projector(tmp_path, capsys, tiny, trained):
    checkpoint = trained("tokenpacker").checkpoint
    arguments = ["--model-path", str(checkpoint), "--token", "20", "--output", str(tmp_path / "tokens.png")]
    assert main(["show", str(tiny.images / "china.jpg"), *arguments]) == 0
    assert f"36 visual tokens; attention; {checkpoint}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        ("flower.jpg", ["--token", "144"], "token 144 does not exist: there are 144, 0 to 143"),
        ("flower.jpg", ["--type", "seap"], "did you mean 'saep'"),
        ("no.jpg", [], "No such file"),
    ],
)
def test_bad_input_is_explained(tmp_path, capsys, tiny, image, arguments, message):
    target = tmp_path / "tokens.png"
    assert main(["show", str(tiny.images / image), *arguments, "--output", str(target)]) == 1
    assert message in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(("tiles", "expected"), [(9, "2x3 tiles and a thumbnail"), (25, "2x3 tiles and a thumbnail")])
def test_command_draws_tiles(tmp_path, capsys, tiny, tiles, expected):
    target = tmp_path / "tiles.png"
    arguments = ["show", str(tiny.images / "flower.jpg"), "--type", "tokenpacker:scale_factor=4", "--tiles", str(tiles)]
    assert main([*arguments, "--token", "36", "--token", "251", "--output", str(target)]) == 0
    assert f"{expected} of 336 px: 7 x 36 visual tokens, 259 with the separators" in capsys.readouterr().out
    with Image.open(target) as drawn:
        assert drawn.width > 500
    assert main([*arguments, "--token", "252", "--output", str(target)]) == 1
    assert "token 252 does not exist: there are 252, 0 to 251" in capsys.readouterr().err


def test_a_tokens_map_lies_in_its_tile(tiny):
    """Six tokens of average pooling: each map covers its own region, at its own tile's place in the canvas."""
    from llava_projectors.integration.image_processor import set_slicing
    from llava_projectors.viz import models, tiles

    get_features, projector, processor = models.random_model("avg_pool:stride=4")
    set_slicing(processor, 9)
    picture = Image.new("RGB", (1008, 672), "green")
    figure, title = tiles.draw_in_tiles(picture, processor, get_features, projector, [0, 4 * 36 + 7, 6 * 36])
    assert title.startswith("1008x672 in 2x3 tiles")
    extents = [tuple(axis.images[1].get_extent()) for axis in figure.axes[1:4]]
    assert extents == [(0, 336, 336, 0), (336, 672, 672, 336), (0, 336, 1008, 672)]
    (found,) = (axis.images[1].get_array() for axis in figure.axes[2:3])
    rows, columns = (found.sum(dim).nonzero()[0].tolist() for dim in (1, 0))
    assert (rows, columns) == ([4, 5, 6, 7], [4, 5, 6, 7])  # token 7 of 6x6 regions of 4x4 patches
