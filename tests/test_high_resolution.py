"""`image_aspect_ratio=anyres` on stock LLaVA: tiles are laid out on the reduced grid."""

import pytest
import torch
from PIL import Image

PINPOINTS = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
SIDES = {"mlp2x_gelu": 24, "saep": 12, "tokenpacker:scale_factor=3": 8}
SIZES = [(640, 427), (427, 640), (500, 500), (900, 250), (200, 800)]


@pytest.fixture(scope="module")
def models(tiny, model_args):
    from llava.model import LlavaLlamaForCausalLM

    made = {}

    def get(projector_type, merge_type):
        if (projector_type, merge_type) not in made:
            model = LlavaLlamaForCausalLM.from_pretrained(tiny.llm)
            args = model_args(projector_type, mm_patch_merge_type=merge_type)
            model.get_model().initialize_vision_modules(args)
            model.config.image_aspect_ratio = "anyres"
            model.config.image_grid_pinpoints = PINPOINTS
            made[projector_type, merge_type] = model.eval()
        return made[projector_type, merge_type]

    return get


def expected_tokens(size, side, merge_type):
    """Visual tokens of an image, from the geometry: one overview and a grid of tiles, less their padding."""
    width, height = size

    def fit(pinpoint):
        """Usable pixels, then the least waste: LLaVA's rule for the best resolution."""
        scale = min(pinpoint[0] / width, pinpoint[1] / height)
        usable = min(int(width * scale) * int(height * scale), width * height)
        return usable, usable - pinpoint[0] * pinpoint[1]

    columns, rows = (pixels // 336 for pixels in max(PINPOINTS, key=fit))
    if merge_type != "spatial_unpad":
        return side**2 * (1 + columns * rows)
    grid_width, grid_height = columns * side, rows * side
    if width / height > grid_width / grid_height:  # padded above and below
        padding = (grid_height - int(height * grid_width / width)) // 2
        grid_height -= 2 * padding
    else:
        padding = (grid_width - int(width * grid_height / height)) // 2
        grid_width -= 2 * padding
    return side**2 + grid_height * (grid_width + 1)  # a newline token ends each row


@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("projector_type", SIDES)
def test_token_counts(models, projector_type, merge_type):
    from llava.mm_utils import process_images

    model, side = models(projector_type, merge_type), SIDES[projector_type]
    processor = model.get_vision_tower().image_processor
    for size in SIZES:
        image = Image.effect_noise(size, 50).convert("RGB")
        tiles = process_images([image], processor, model.config)
        received = []
        hook = model.get_model().layers[0].register_forward_pre_hook(lambda _, args, to=received: to.append(args[0]))
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([[1, 5, -200, 6]]), images=tiles, image_sizes=[size], do_sample=False, max_new_tokens=2
            )
        hook.remove()
        assert received[0].shape[1] - 3 == expected_tokens(size, side, merge_type), size
        assert out.shape[0] == 1


def test_tiles_keep_their_places(models):
    """With spatial merging, a token of the merged grid is that of its tile at its place."""
    model = models("saep", "spatial")
    tiles = torch.randn(1, 1 + 4, 3, 336, 336)
    image_sizes = [(672, 672)]
    features = model.encode_images(tiles[0])
    merged = model.prepare_inputs_labels_for_multimodal(
        torch.tensor([[1, -200]]), None, None, None, None, tiles, image_sizes
    )[4][0, 1:]
    assert torch.equal(merged[:144], features[0])
    grid = merged[144:].view(24, 24, -1)
    for row in range(2):
        for column in range(2):
            tile = features[1 + 2 * row + column].view(12, 12, -1)
            torch.testing.assert_close(grid[12 * row : 12 * row + 12, 12 * column : 12 * column + 12], tile)
