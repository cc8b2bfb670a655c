"""What a visual token was made from: maps whose truth is known, and the command."""

import dataclasses
import importlib
import json
import os
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_projectors import features_for, randomise

from llava_projectors import build_projector
from llava_projectors.commands import show
from llava_projectors.commands.cli import main
from llava_projectors.commands.show.draw import draw
from llava_projectors.commands.show.models import random_model
from llava_projectors.commands.show.picture import read_picture
from llava_projectors.commands.show.view import make_view, own_regions
from llava_projectors.integration.image_processor import to_pixels
from llava_projectors.projectors import tokenpacker


@pytest.mark.parametrize(("type_string", "side"), [("avg_pool:stride=3", 12), ("avg_pool", 7)])
def test_average_pooling_sees_its_region_evenly(type_string, side):
    torch.manual_seed(0)
    projector = build_projector(type_string, 8, 16)
    # One picture in which all patches are alike, so that the derivative by each is the same.
    features = torch.randn(1, 1, 8).expand(1, side * side, 8)
    s, token_side = projector.stride, -(-side // projector.stride)
    maps = show.token_maps(projector, features, range(token_side**2))
    for token, found in enumerate(maps):
        row, column = divmod(token, token_side)
        expected = torch.zeros(side, side)
        expected[row * s : row * s + s, column * s : column * s + s] = 1
        torch.testing.assert_close(found, expected / expected.sum())


@pytest.mark.parametrize(("blocks_before", "blocks_after", "reach"), [(0, 0, 0), (1, 0, 1), (0, 1, 2), (1, 1, 3)])
def test_saep_sees_as_far_as_its_kernels(blocks_before, blocks_after, reach):
    projector = randomise(
        build_projector(f"saep:kernel_size=5,blocks_before={blocks_before},blocks_after={blocks_after}", 8, 16)
    )
    (found,) = show.token_maps(projector, features_for(projector, batch=1), [3 * 6 + 2])
    rows, columns = (found.sum(dim).gt(0).nonzero().flatten().tolist() for dim in (1, 0))
    # Output pixel i of a 5x5 kernel with stride 2 and padding 2 reaches from 2i - 2 to 2i + 2; a block of 3x3 kernels
    # one patch further before the stride, one token of two patches behind it.
    sides = [range(max(0, 2 * i - 2 - reach), min(12, 2 * i + 3 + reach)) for i in (3, 2)]
    assert (rows, columns) == tuple(map(list, sides))


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
    torch.testing.assert_close(show.token_maps(projector, features, [5]), maps[:1, 5])


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
        ("../finetune.json", [], "cannot identify image file"),
        ("flower.jpg", ["--type", "mlp2x_gelu"], "is LLaVA's own, which gives every patch a token of its own"),
        ("flower.jpg", ["--model-path", "./llava-x"], "--model-path ./llava-x is no folder"),
        ("flower.jpg", ["--model-base", "vicuna"], "--model-base belongs to a --model-path"),
        ("flower.jpg", ["--html"], "--html writes a page, and --output"),
    ],
)
def test_bad_input_is_explained(tmp_path, capsys, tiny, image, arguments, message):
    target = tmp_path / "tokens.png"
    assert main(["show", str(tiny.images / image), *arguments, "--output", str(target)]) == 1
    assert message in one_line(capsys)
    assert not target.exists()


def one_line(capsys):
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def no_model(monkeypatch):
    """Fails when a model is made: what is wrong is said before."""
    monkeypatch.setattr("llava_projectors.commands.show.models.Model.__init__", None)
    monkeypatch.setattr("llava.model.builder.load_pretrained_model", None)


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        ("missing/tokens.png", [], "would lie in a folder that does not exist: make"),
        ("tokens.jxl", [], "must end in one of .html, "),
        ("picture.png", [], "would overwrite the picture itself"),
        ("pipe.png", [], "is a folder, a device or a pipe, no file"),
        ("", ["elsewhere/picture.jpg"], "two pictures would be written to"),
        ("tokens.png", ["other.png"], "two pictures would be written to"),
        ("tokens.html", ["--token", "3"], "a page has every token: leave --token out"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, capsys, no_model, output, arguments, message):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 40), "red").save(picture)
    os.mkfifo(tmp_path / "pipe.png")
    assert main(["show", str(picture), *arguments, "--output", str(tmp_path / output)]) == 1
    assert message in one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "pipe.png"]


@pytest.mark.parametrize(
    ("name", "config", "files", "base", "message"),
    [
        ("llava-mlp", {"mm_projector_type": "mlp2x_gelu"}, [], None, "a projector of type 'mlp2x_gelu', none of ours"),
        (
            "vicuna",
            {"model_type": "llama"},
            [],
            None,
            "is no LLaVA checkpoint: its config.json has no mm_projector_type",
        ),
        ("mine", {"mm_projector_type": "saep"}, [], None, "'mine' lacks 'llava': rename the folder"),
        ("llava-prompts", {"mm_projector_type": "saep"}, [], None, "takes 'llava-prompts' for an MPT"),
        (
            "llava-g",
            {"mm_projector_type": "saep", "mm_vision_tower": "runs/demo/clip"},
            ["model.safetensors"],
            None,
            "llava-g has mm_vision_tower 'runs/demo/clip' in its config.json, which is no folder here",
        ),
        ("llava-a", {"mm_projector_type": "saep"}, ["mm_projector.bin"], None, "pass --model-base"),
        ("llava-b", {"mm_projector_type": "saep"}, ["adapter_config.json"], "own/vicuna", "'llava-b' lacks 'lora'"),
        ("llava-c", {"mm_projector_type": "saep"}, [], None, "has no weights"),
        (
            "llava-e",
            {"mm_projector_type": "saep"},
            ["model.safetensors"],
            "own/vicuna",
            "leave --model-base own/vicuna out",
        ),
        ("llava-f", {"mm_projector_type": "saep"}, [], "./vicuna", "--model-base ./vicuna is no folder"),
        ("llava-d", None, [], None, "config.json"),
    ],
)
def test_a_checkpoint_that_cannot_be_shown_is_refused_first(
    tmp_path, capsys, tiny, no_model, name, config, files, base, message
):
    folder = tmp_path / name
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for file in files:
        (folder / file).touch()
    arguments = ["--model-path", str(folder), "--output", str(tmp_path / "tokens.png")]
    arguments += ["--model-base", base] if base else []
    assert main(["show", str(tiny.images / "flower.jpg"), *arguments]) == 1
    assert message in one_line(capsys)


def test_the_path_that_is_printed_is_the_file(tmp_path, capsys, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    for output, expected in ((["--output", "a.b/tokens"], "a.b/tokens.png"), (["--html"], "flower-tokens.html")):
        (tmp_path / expected).parent.mkdir(exist_ok=True)
        assert main(["show", str(tiny.images / "flower.jpg"), "--type", "tokenpacker:scale_factor=4", *output]) == 0
        assert capsys.readouterr().out.endswith(f"Written to {tmp_path / expected}\n")
        assert (tmp_path / expected).stat().st_size > 1000


def test_several_pictures_are_named_after_themselves(tmp_path, capsys, monkeypatch, tiny):
    made = []
    module = importlib.import_module("llava_projectors.commands.show.show")
    monkeypatch.setattr(module, "random_model", lambda *a: made.append(a) or random_model(*a))
    pictures = [str(tiny.images / name) for name in ("flower.jpg", "china.jpg")]
    assert main(["show", *pictures, "--type", "tokenpacker:scale_factor=4", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"flower-tokens.png", "china-tokens.png"}
    assert capsys.readouterr().out.count("Written to") == 2
    assert len(made) == 1


@pytest.mark.parametrize("name", ["tokens.png", "tokens.html"])
def test_a_full_disk_leaves_the_earlier_file(tmp_path, capsys, tiny, name):
    target = tmp_path / name
    target.write_text("earlier")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        arguments = ["--type", "tokenpacker:scale_factor=4", "--output", str(target)]
        assert main(["show", str(tiny.images / "flower.jpg"), *arguments]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot show" in one_line(capsys)
    assert target.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_followed_and_stays(tmp_path, tiny):
    target, link = tmp_path / "real.png", tmp_path / "link.png"
    link.symlink_to(target)
    assert main(["show", str(tiny.images / "flower.jpg"), "--type", "tokenpacker", "--output", str(link)]) == 0
    assert link.is_symlink()
    assert target.stat().st_size > 1000


@pytest.mark.parametrize(("tiles", "expected"), [(9, "2x3 tiles and a thumbnail"), (25, "2x3 tiles and a thumbnail")])
def test_command_draws_tiles(tmp_path, capsys, tiny, tiles, expected):
    target = tmp_path / "tiles.png"
    arguments = ["show", str(tiny.images / "flower.jpg"), "--type", "tokenpacker:scale_factor=4", "--tiles", str(tiles)]
    assert main([*arguments, "--token", "36", "--token", "251", "--output", str(target)]) == 0
    assert f"{expected} of 336 px: 7 x 36 visual tokens, 259 with the separators" in capsys.readouterr().out
    with Image.open(target) as drawn:
        assert drawn.width > 500
    assert main([*arguments, "--token", "252", "--output", str(target)]) == 1
    assert "token 252 does not exist: there are 252, 0 to 251" in one_line(capsys)


def test_a_tokens_map_lies_in_its_tile():
    """Three tokens of average pooling: each map covers its own region, at its own tile's place in the canvas."""
    view = make_view(random_model("avg_pool:stride=4", 9), Image.new("RGB", (1008, 672), "green"), [0, 151, 216])
    assert view.title.startswith("avg_pool:stride=4: 1008x672 in 2x3 tiles")
    assert view.name(151) == "token 151 (tile 4, row 1, column 1)"
    panels = draw(view).axes[1:4]
    assert [tuple(axis.images[1].get_extent()) for axis in panels] == [
        (0, 336, 336, 0), (336, 672, 672, 336), (0, 336, 1008, 672),
    ]  # fmt: skip
    found = torch.from_numpy(panels[1].images[1].get_array().data)
    rows, columns = (found.sum(dim).nonzero().flatten().tolist() for dim in (1, 0))
    assert (rows, columns) == ([4, 5, 6, 7], [4, 5, 6, 7])  # token 7 of 6x6 regions of 4x4 patches
    (outline,) = panels[1].patches
    assert outline.get_bbox().bounds == (336 + 56, 336 + 56, 56, 56)


def test_all_maps_are_drawn_on_one_scale():
    view = make_view(random_model("saep"), Image.new("RGB", (336, 336), "green"), [0, 40])
    figure = draw(view)
    limits = (0, pytest.approx(100 * view.maps.max().item()))
    assert [panel.images[1].get_clim() for panel in figure.axes[1:3]] == [limits, limits]
    assert figure.axes[-1].get_ylabel() == "share of the token that comes from a patch, %"
    assert figure.axes[-1].get_ylim() == limits


@pytest.mark.parametrize(
    "type_string", ["saep", "saep:stride=3", "ldpv2", "pixel_shuffle", "resampler", "c_abstractor"]
)
def test_other_random_directions_draw_the_same_map(tiny, type_string):
    model = random_model(type_string, hidden_size=128)  # more channels than directions
    with Image.open(tiny.images / "flower.jpg") as picture, torch.no_grad():
        features = model.features(model.pixels(picture)[None])
    first, second = (show.token_maps(model.projector, features, [0, 27, 40], seed).flatten(1) for seed in (0, 1))
    for pair in zip(first, second):
        assert torch.corrcoef(torch.stack(pair))[0, 1] > 0.997


@pytest.mark.parametrize("type_string", ["saep:stride=3", "saep:kernel_size=2", "resampler:num_queries=4"])
@pytest.mark.parametrize(("channels", "tolerance"), [(32, 1e-4), (64, 0.1)])
def test_a_receptive_field_is_the_norm_of_the_derivative(type_string, channels, tolerance):
    """Of all channels of a token; of more than 32, an estimate."""
    torch.manual_seed(0)
    projector = randomise(build_projector(type_string, 8, channels)).float()
    features = features_for(projector, side=7, batch=1).float()
    jacobian = torch.autograd.functional.jacobian(lambda x: projector(x)[0], features)[:, :, 0]
    exact = jacobian.square().sum((1, 3)).sqrt()
    exact /= exact.sum(1, keepdim=True)
    found = show.token_maps(projector, features, range(len(exact))).flatten(1)
    assert torch.equal(found > 0, exact > 0)
    assert (found - exact).abs().max() < tolerance * exact.max()


def test_channels_that_see_different_patches_are_all_counted():
    """A token of four patches side by side, in which no channel sees more than one of them."""
    projector = build_projector("avg_pool", 8, 32)
    projector.forward = lambda features: features.unflatten(1, (2, 2, 2, 2)).transpose(2, 3).reshape(-1, 4, 32)
    maps = show.token_maps(projector, torch.randn(1, 16, 8), [3])
    expected = torch.zeros(4, 4)
    expected[2:, 2:] = 0.25
    torch.testing.assert_close(maps[0], expected)


def test_own_regions():
    """Of tokens that have a place; a stride that does not divide the grid leaves less for the last ones."""
    regions = own_regions(build_projector("saep:stride=3", 8, 16), side=7, count=9)
    assert (len(regions), regions[0], regions[5], regions[8]) == (9, (0, 0, 3, 3), (3, 6, 6, 7), (6, 6, 7, 7))
    assert own_regions(build_projector("resampler:num_queries=49", 8, 16), side=7, count=49) is None


def saved(path, picture, **options):
    picture.save(path, **options)
    return np.asarray(read_picture(path))


def test_every_depth_of_a_picture(tmp_path):
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
    grey = Image.fromarray(ramp)
    assert (saved(tmp_path / "8.png", grey) == ramp[..., None]).all()
    assert (saved(tmp_path / "16.png", Image.fromarray(ramp * np.uint16(257))) == ramp[..., None]).all()
    big_endian = Image.frombytes("I;16B", (8, 8), (ramp * np.uint16(257)).astype(">u2").tobytes())
    assert (saved(tmp_path / "16.tiff", big_endian) == ramp[..., None]).all()
    assert (
        saved(tmp_path / "1.png", grey.point(lambda v: 255 * (v > 127), "1")) == (ramp > 127)[..., None] * 255
    ).all()
    colours = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], -1))
    assert (
        saved(tmp_path / "palette.png", colours.quantize(64)) == np.asarray(colours.quantize(64).convert("RGB"))
    ).all()
    cmyk = saved(tmp_path / "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    assert (cmyk.reshape(-1, 3) == [254, 0, 0]).all() or np.abs(cmyk.astype(int) - [255, 0, 0]).max() < 4
    with pytest.raises(ValueError, match="floating-point numbers of unknown range"):
        saved(tmp_path / "float.tiff", grey.convert("F"))


@pytest.mark.parametrize(
    ("numbers", "white", "num_lines"), [([0, 100, 255], 255, 0), ([0, 256, 300], 65535, 1), ([9, 9, 65535], 65535, 1)]
)
def test_the_range_of_32_bits_follows_the_data(tmp_path, messages, numbers, white, num_lines):
    """Scanners and image libraries write either depth into them."""
    picture = Image.fromarray(np.int32([numbers]))
    assert picture.mode == "I"
    found = saved(tmp_path / "a.tiff", picture)
    assert (found == np.round(np.array(numbers) * 255 / white)[None, :, None]).all()
    assert len(messages) == num_lines
    torch.testing.assert_close(to_pixels(picture)[1, 0], torch.tensor(numbers) / white)


def test_16_bits_are_16_bits_in_the_dark(tmp_path):
    dark = Image.fromarray(np.uint16([[0, 100, 255]]))
    assert saved(tmp_path / "a.png", dark).max() <= 1


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (np.int32([[-1, 7]]), "numbers from -1 to 7; save it with 8 or 16 bits"),
        (np.int32([[0, 70000]]), "numbers from 0 to 70000; save"),
        (np.float32([[0, 1]]), "floating-point numbers of unknown range"),
        (np.float32([[0, np.nan]]), "floating-point numbers of unknown range"),
    ],
)
def test_numbers_of_no_known_range_are_refused(tmp_path, numbers, message):
    picture = Image.fromarray(numbers)
    with pytest.raises(ValueError, match=message):
        saved(tmp_path / "a.tiff", picture)
    with pytest.raises(ValueError, match=message):
        to_pixels(picture)


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 1), (50, 3), (1, 50), (2, 2)])
def test_pictures_of_few_pixels(tmp_path, size):
    """transformers takes one or three rows for channels: an error, or other pixels."""
    picture = Image.new("RGB", size, "red")
    picture.putpixel((size[0] - 1, 0), (0, 0, 255))
    picture.save(tmp_path / "a.png")
    assert main(["show", str(tmp_path / "a.png"), "--output", str(tmp_path / "b.png")]) == 0
    model = random_model("avg_pool:stride=4")
    large = picture.resize((64 * size[0], 64 * size[1]), Image.Resampling.NEAREST)
    assert (model.pixels(picture) - model.pixels(large)).abs().mean() < 0.4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_lies_on_white(tmp_path, messages, mode):
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((0, 0, 0, 255) if mode != "RGB" else (9, 9, 9, 255), (4, 0, 8, 8))
    if mode == "P":
        indices = Image.fromarray(np.repeat(np.uint8([[0] * 4 + [1] * 4]), 8, 0))
        indices.putpalette([0, 0, 0, 0, 0, 0])
        found = saved(tmp_path / "a.png", indices, transparency=0)
    else:
        found = saved(tmp_path / "a.png", half.convert(mode), **({"transparency": (0, 0, 0)} if mode == "RGB" else {}))
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] < 10).all()
    (line,) = messages
    assert "transparent parts are laid on white here; LLaVA's own scripts drop the transparency" in line


def test_orientation_is_left_as_llava_leaves_it(tmp_path):
    picture = Image.new("RGB", (20, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert saved(tmp_path / "a.jpg", picture, exif=exif).shape == (10, 20, 3)


def test_anyres_is_drawn_on_its_overview(messages):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[336, 672], [672, 336]])
    model = dataclasses.replace(random_model("avg_pool"), config=config)
    picture = Image.new("RGB", (800, 400), "blue")
    picture.paste("red", (0, 0, 400, 400))
    drawn = make_view(model, picture, [0]).picture
    assert drawn.size == (336, 336)
    assert (drawn.getpixel((60, 168)), drawn.getpixel((276, 168))) == ((255, 0, 0), (0, 0, 255))
    (line,) = messages
    assert "drawn on the overview of the whole picture" in line


def test_the_picture_is_padded_where_llava_pads_it():
    model = random_model("avg_pool")
    padded = dataclasses.replace(model, config=SimpleNamespace(image_aspect_ratio="pad"))
    picture = Image.new("RGB", (400, 200), "red")
    assert make_view(model, picture, [0]).picture.getcolors() == [(336 * 336, (255, 0, 0))]
    drawn = make_view(padded, picture, [0]).picture
    assert drawn.getpixel((168, 168)) == (255, 0, 0)
    assert drawn.getpixel((168, 10)) == drawn.getpixel((168, 325)) == (122, 116, 104)  # CLIP's mean
