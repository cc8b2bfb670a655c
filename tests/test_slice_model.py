"""`image_aspect_ratio slice` in the real LLaVA: what the LLM receives, against sequences put together here."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drive import llm_input, pad_rows
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader

import llava_projectors
from llava_projectors import ProjectorSpecError

IMAGE, IGNORE, SIDE = -200, -100, 336
NEWLINE = 0  # Llama's tokenizer has no "\n" in its vocabulary: as published, the id is that of the unknown token
TYPES = ("saep:stride=4", "tokenpacker:scale_factor=4", "avg_pool:stride=4", "resampler:num_queries=25")
GRIDS = {
    9: [(1, 1), (1, 3), (4, 1), (2, 3), (3, 3)],
    16: [(1, 1), (1, 8), (5, 1), (2, 8), (4, 4)],
    25: [(1, 2), (9, 1), (12, 2), (3, 8), (5, 5)],
}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    from transformers import LlamaTokenizer

    return LlamaTokenizer.from_pretrained(tiny.llm)


@pytest.fixture(scope="module")
def slice_model(tiny, build_model, model_args, tokenizer):
    """type string, setting -> a model set up as LLaVA's script does it."""
    made = {}

    def get(projector_type, setting="slice"):
        if (projector_type, setting) not in made:
            model = build_model(projector_type)
            model.config.image_aspect_ratio = setting
            model.config.tokenizer_model_max_length = 8192
            model.initialize_vision_tokenizer(model_args(projector_type, mm_use_im_patch_token=False), tokenizer)
            made[projector_type, setting] = model
        return made[projector_type, setting]

    return get


def picture(grid, seed=0, side=SIDE):
    """A picture that fills its grid, so that nothing has to be scaled."""
    rows, columns = grid
    noise = np.random.RandomState(seed).randint(0, 256, (rows * 4, columns * 4, 3), np.uint8)
    return Image.fromarray(noise).resize((columns * side, rows * side), Image.BICUBIC)


def prepare(model, *pictures):
    from llava.mm_utils import process_images

    return process_images(list(pictures), model.get_vision_tower().image_processor, model.config)


def reference_tiles(image, side):
    """Tiles and thumbnail [T, 3, side, side] of a picture that fills its grid."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((torch.from_numpy(np.array(image)).float() / 255 - mean) / std).permute(2, 0, 1)
    height, width = pixels.shape[1:]
    tiles = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            tiles.append(pixels[:, top : top + side, left : left + side])
    if len(tiles) > 1:
        thumbnail = torch.zeros(3, side, side)
        size = (side, round(width * side / height)) if height > width else (round(height * side / width), side)
        thumbnail[:, : size[0], : size[1]] = F.interpolate(pixels[None], size, mode="bilinear")[0]
        tiles.append(thumbnail)
    return torch.stack(tiles)


def reference_embeddings(model, tokenizer, image):
    """The published sequence of one picture, tile by tile."""
    side = model.get_vision_tower().config.image_size
    comma, newline = tokenizer.convert_tokens_to_ids(","), NEWLINE
    assert tokenizer.convert_ids_to_tokens(comma) == ","
    assert tokenizer.convert_tokens_to_ids("\n") == newline
    embed = model.get_model().embed_tokens.weight
    tiles, (rows, columns) = reference_tiles(image, side), (image.height // side, image.width // side)
    parts = []
    for row in range(rows):
        for column in range(columns):
            parts.append(model.encode_images(tiles[row * columns + column][None])[0])
            parts.append(embed[newline if column == columns - 1 else comma][None])
    if rows * columns > 1:
        parts += [model.encode_images(tiles[-1:])[0], embed[newline][None]]
    return torch.cat(parts)


@pytest.mark.parametrize("patch_num", GRIDS)
def test_the_llm_receives_the_published_sequence(slice_model, tokenizer, patch_num):
    model = slice_model("tokenpacker:scale_factor=4", f"slice:patch_num={patch_num}")
    embed = model.get_model().embed_tokens.weight
    for grid in GRIDS[patch_num]:
        image = picture(grid)
        found = llm_input(model, input_ids=torch.tensor([[1, 5, IMAGE, 6, 7]]), images=prepare(model, image))[0]
        with torch.no_grad():
            expected = torch.cat([embed[[1, 5]], reference_embeddings(model, tokenizer, image), embed[[6, 7]]])
        tiles = grid[0] * grid[1] + (grid != (1, 1))
        assert found.shape[0] == 4 + tiles * 37, grid
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projector_type", TYPES)
def test_every_reducing_type(slice_model, tokenizer, projector_type):
    model = slice_model(projector_type)
    image = picture((2, 3))
    found = llm_input(model, input_ids=torch.tensor([[1, IMAGE]]), images=prepare(model, image))[0, 1:]
    with torch.no_grad():
        torch.testing.assert_close(found, reference_embeddings(model, tokenizer, image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_mixed_batches_train(slice_model, monkeypatch, side):
    """One picture, two of other grids, text only, in one padded batch; each row gets the logits it gets alone."""
    model = slice_model("saep:stride=4")
    monkeypatch.setattr(model.config, "tokenizer_padding_side", side, raising=False)
    rows = [[1, IMAGE, 5, 6], [1, IMAGE, 7, IMAGE, 8, 9], [1, 9, 8, 7, 6]]
    ids, mask = pad_rows(rows)
    pictures = prepare(model, picture((1, 2), 1), picture((3, 1), 2), picture((1, 1), 3))
    images = [*pictures, torch.zeros(3, SIDE, SIDE)]  # LLaVA sends zeros along with text
    images_of_row = (images[:1], images[1:3], images[3:])
    labels = torch.where(mask & (ids != IMAGE), ids, IGNORE)

    model.zero_grad()
    out = model(input_ids=ids, attention_mask=mask, images=images, labels=labels)
    out.loss.backward()
    assert out.loss.isfinite()
    assert out.loss > 0.0
    gradients = [p.grad for p in model.get_model().mm_projector.parameters()]
    assert all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)

    places = [[3 * 37], [4 * 37, 37], []]
    lengths = [len(row) + sum(places) - len(places) for row, places in zip(rows, places)]
    assert out.logits.shape[1] == max(lengths)
    for row, own_images, length, logits in zip(rows, images_of_row, lengths, out.logits):
        alone = model(input_ids=torch.tensor([row]), images=own_images).logits[0]
        padded = logits[:length] if side == "right" else logits[-length:]
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


def test_labels_of_pictures_are_ignored(slice_model):
    model = slice_model("saep:stride=4")
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    labels = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, ids, prepare(model, picture((1, 2))))[5]
    assert labels[0].tolist() == [1, *[IGNORE] * (3 * 37), 5, 6]


def test_shapes_in_which_pictures_come(slice_model):
    """Stacked, as a list, each with an axis of one, and several for one place."""
    model = slice_model("saep:stride=4")
    ids = torch.tensor([[1, IMAGE], [2, IMAGE]])
    canvases = prepare(model, picture((1, 2), 1), picture((1, 2), 2))
    assert isinstance(canvases, torch.Tensor)
    expected = llm_input(model, input_ids=ids, images=canvases)
    for images in (list(canvases), [canvas[None] for canvas in canvases], canvases[:, None]):
        assert torch.equal(llm_input(model, input_ids=ids, images=images), expected)
    both = llm_input(model, input_ids=ids[:1], images=[canvases])
    assert torch.allclose(both[0, 1:], torch.cat([expected[0, 1:], expected[1, 1:]]), atol=1e-6)


@pytest.mark.parametrize("projector_type", ["saep:stride=4", "tokenpacker:scale_factor=4"])
def test_generation_with_the_kv_cache_equals_generation_without(slice_model, can_generate, projector_type):
    model = slice_model(projector_type)
    kwargs = {"images": prepare(model, picture((2, 3))), "do_sample": False, "max_new_tokens": 12, "eos_token_id": -1}
    ids = torch.tensor([[1, IMAGE, 5, 6, 7]])
    cached, full = (model.generate(ids, use_cache=cache, **kwargs) for cache in (True, False))
    assert cached.shape == (1, 1 + 12)
    assert torch.equal(cached, full)


@pytest.mark.parametrize("projector_type", TYPES[:2])
def test_chunks_give_the_same_values_and_gradients(slice_model, projector_type):
    """As one call of the projector on all tiles; the tower never sees more than a chunk."""
    model = slice_model(projector_type)
    tower, ids = model.get_vision_tower(), torch.tensor([[1, IMAGE, 5, IMAGE, 6]])
    images = prepare(model, picture((2, 3), 1), picture((1, 3), 2))
    results, batches = {}, []
    hook = tower.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    options = tower.slicing
    try:
        for size in (32, 4, 1):
            tower.slicing = llava_projectors.slicing.Slicing(chunk_size=size)
            model.zero_grad()
            loss = model(input_ids=ids, images=images, labels=torch.where(ids > 0, ids, IGNORE)).loss
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            results[size] = loss.detach(), gradients
    finally:
        hook.remove()
        tower.slicing = options
    assert batches == [11, 4, 4, 3, *[1] * 11]
    loss, gradients = results.pop(32)
    assert any("mm_projector" in name for name in gradients)
    for other_loss, other in results.values():
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        assert other.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("projector_type", [*TYPES, "stf:stride=4,layers=4+7", "delta:scale_factor=4"])
def test_chunks_keep_nothing_of_the_projector(slice_model, projector_type):
    """Of all that its modules put out, no storage is alive when the backward pass begins."""
    from llava_projectors.integration.high_resolution import encode_tiles

    model = slice_model(projector_type)
    projector, made = model.get_model().mm_projector, []
    tiles = list(torch.randn(6, 3, SIDE, SIDE))

    def note(module, args, output):
        made.extend((name_of[module], StorageWeakRef(o.untyped_storage())) for o in outputs_of(output))

    def outputs_of(output):
        return [o for o in (output if isinstance(output, tuple) else (output,)) if isinstance(o, torch.Tensor)]

    name_of = {module: name for name, module in projector.named_modules()}
    hooks = [module.register_forward_hook(note) for module in name_of]
    alive = {}
    try:
        for size in (2, 6):
            made.clear()
            tokens = encode_tiles(model.get_vision_tower(), projector, tiles, size)
            assert tokens.requires_grad
            alive[size] = {name for name, storage in made if not storage.expired()}
    finally:
        for hook in hooks:
            hook.remove()
    assert alive[2] == set()
    assert alive[6]


def test_under_zero3_all_tiles_go_at_once(slice_model):
    """It gathers weights in every forward on all ranks together, and their numbers of chunks would differ."""
    from llava_projectors.integration.high_resolution import encode_tiles

    model, batches = slice_model("saep:stride=4"), []
    tower, projector = model.get_vision_tower(), model.get_model().mm_projector
    hook = tower.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    tiles = list(torch.randn(6, 3, SIDE, SIDE))
    encode_tiles(tower, projector, tiles, 2)
    next(projector.parameters()).ds_id = 0  # as DeepSpeed marks what it holds in parts
    try:
        encode_tiles(tower, projector, tiles, 2)
    finally:
        hook.remove()
        del next(projector.parameters()).ds_id
    assert batches == [2, 2, 2, 6]


def test_one_line_says_what_a_picture_takes(slice_model, tokenizer, messages):
    from llava_projectors.integration.high_resolution import complete

    complete(slice_model("saep:stride=4"), tokenizer)
    assert f" {36 + 1} to {10 * 37} visual tokens" in messages[-1]


def test_what_the_config_says(slice_model, tokenizer):
    model = slice_model("saep:stride=4", "slice:patch_num=16,chunk_size=5")
    config = model.config
    assert (config.image_aspect_ratio, config.patch_num, config.slice_chunk_size) == ("slice", 16, 5)
    assert config.slice_separator_ids == [tokenizer.convert_tokens_to_ids(","), NEWLINE]
    assert model.get_vision_tower().num_patches == 17 * 37  # what LLaVA's server leaves room for


def test_the_image_processor_is_still_llavas(slice_model, tmp_path):
    """Its class has the old name, a saved file loads, copies cut pictures as well, workers too."""
    from transformers import CLIPImageProcessor

    processor = slice_model("saep:stride=4").get_vision_tower().image_processor
    assert isinstance(processor, CLIPImageProcessor)
    image = picture((1, 2))
    canvas = processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    assert canvas.shape == (3, 2 * SIDE, 2 * SIDE)
    for copied in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert torch.equal(copied(image, return_tensors="pt")["pixel_values"][0], canvas)
    loader = DataLoader(Pictures(processor), num_workers=2, multiprocessing_context="spawn")
    assert [tuple(batch.shape[1:]) for batch in loader] == [(3, 2 * SIDE, 2 * SIDE), (3, 3 * SIDE, SIDE)]
    processor.save_pretrained(tmp_path)
    loaded = CLIPImageProcessor.from_pretrained(tmp_path)
    assert loaded(image, return_tensors="pt")["pixel_values"].shape == (1, 3, SIDE, SIDE)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, processor):
        self.processor = processor

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.processor.preprocess(picture([(1, 2), (2, 1)][index]), return_tensors="pt")["pixel_values"][0]


def test_another_setting_gives_the_processor_its_class_back(slice_model, tokenizer, model_args, monkeypatch):
    """A checkpoint with tiles, trained on with `--image_aspect_ratio pad`."""
    from transformers import CLIPImageProcessor

    model = copy.deepcopy(slice_model("saep:stride=4"))
    model.config.image_aspect_ratio = "pad"
    model.initialize_vision_tokenizer(model_args("saep:stride=4", mm_use_im_patch_token=False), tokenizer)
    assert type(model.get_vision_tower().image_processor) is CLIPImageProcessor
    images = prepare(model, picture((1, 2)))
    assert images.shape == (1, 3, SIDE, SIDE)
    assert llm_input(model, input_ids=torch.tensor([[1, IMAGE]]), images=images).shape[1] == 1 + 36
    assert model.get_vision_tower().num_patches == 36


def test_stock_projectors_know_nothing_of_it(build_model, model_args, tokenizer):
    """`slice` is free text to LLaVA, and with its own types it stays so."""
    from transformers import CLIPImageProcessor

    model = build_model("mlp2x_gelu")
    model.config.image_aspect_ratio = "slice:patch_num=10"
    model.initialize_vision_tokenizer(model_args("mlp2x_gelu", mm_use_im_patch_token=False), tokenizer)
    assert model.config.image_aspect_ratio == "slice:patch_num=10"
    assert not hasattr(model.config, "patch_num")
    assert type(model.get_vision_tower().image_processor) is CLIPImageProcessor
    images = prepare(model, picture((1, 2)))
    assert images.shape == (1, 3, SIDE, SIDE)
    ids = torch.tensor([[1, IMAGE, 5]])
    logits = model(input_ids=ids, images=images).logits
    try:
        llava_projectors.unpatch()
        assert torch.equal(model(input_ids=ids, images=images).logits, logits)
    finally:
        llava_projectors.patch()


def test_one_warning_when_a_picture_alone_is_too_long(slice_model, messages, monkeypatch):
    model = slice_model("avg_pool:stride=4")
    messages.clear()
    ids = torch.tensor([[1, IMAGE, 5]])
    for limit, expected in ((8192, 0), (7 * 37, 0), (7 * 37 - 1, 1), (100, 1)):
        monkeypatch.setattr(model.config, "tokenizer_model_max_length", limit)
        llm_input(model, input_ids=ids, images=prepare(model, picture((2, 3))))
        assert len(messages) == expected, limit
    assert messages[0].startswith(
        "WARNING: a picture of 2x3 tiles takes 259 visual tokens, but model_max_length is 258"
    )


def test_tokenizers_without_an_unknown_token():
    from llava_projectors.integration.high_resolution import separator_ids

    class ByteLevel:
        def convert_tokens_to_ids(self, token):
            return {",": 11}.get(token)

        def __call__(self, text, add_special_tokens):
            assert (text, add_special_tokens) == ("\n", False)
            return type("Encoding", (), {"input_ids": [198]})

    assert separator_ids(ByteLevel()) == [11, 198]


MODES = {
    "RGB": (10, 200, 30), "L": 77, "1": 1, "P": 3, "CMYK": (10, 20, 30, 40), "RGBA": (10, 200, 30, 0), "LA": (77, 0),
    "I;16": 0x4D4D, "I": 0x4D4D,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_picture_modes(slice_model, mode):
    """Every mode gives the picture that PIL's RGB shows; 16 bits of grey are scaled, which PIL clips to white."""
    from llava_projectors.integration.image_processor import to_pixels

    image = Image.new(mode, (50, 40), MODES[mode])
    rgb = Image.new("RGB", (50, 40), (0x4D, 0x4D, 0x4D)) if mode.startswith("I") else image.convert("RGB")
    expected = torch.from_numpy(np.array(rgb)).permute(2, 0, 1) / 255
    torch.testing.assert_close(to_pixels(image), expected)
    model = slice_model("saep:stride=4")
    assert torch.equal(prepare(model, image), prepare(model, rgb))
    assert prepare(model, image).shape == (1, 3, 3 * SIDE, 3 * SIDE)  # 50x40 is enlarged to 2x3 tiles


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_pictures_reach_the_llm(slice_model, size):
    model = slice_model("saep:stride=4")
    hidden = llm_input(
        model, input_ids=torch.tensor([[1, IMAGE]]), images=prepare(model, Image.new("RGB", size, "red"))
    )
    assert hidden.shape[1] == 1 + (37 if size == (1, 1) else 10 * 37)
    assert hidden.isfinite().all()


def test_pictures_that_cannot_be(slice_model, tmp_path):
    model = slice_model("saep:stride=4")
    path = tmp_path / "cut.png"
    picture((1, 2)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(OSError, match="truncated"):
        prepare(model, Image.open(path))
    with pytest.raises(ValueError, match=r"a PIL image or uint8 \[height, width, 3\], not float64 \[40, 50\]"):
        prepare(model, np.zeros((40, 50)))
    with pytest.raises(ValueError, match=r"shape \[3, 400, 400\] is no canvas of 336 px tiles"):
        model(input_ids=torch.tensor([[1, IMAGE]]), images=torch.zeros(1, 3, 400, 400))


@pytest.mark.parametrize(
    ("setting", "arguments", "message"),
    [
        (
            "slice:patch_num=10",
            {},
            "bad value '10' for option 'patch_num' in image_aspect_ratio.*valid values are 9, 16, 25",
        ),
        ("slice:patchnum=9", {}, "unknown option 'patchnum'.*did you mean 'patch_num'"),
        ("slice", {"mm_patch_merge_type": "spatial"}, "--mm_patch_merge_type spatial must be flat"),
    ],
)
def test_bad_settings_stop_training_before_it_starts(llava_train, setting, arguments, message):
    with pytest.raises(ProjectorSpecError, match=message):
        llava_train("saep", image_aspect_ratio=setting, **arguments)


def test_a_tower_that_cannot(build_model, model_args, tokenizer):
    for attribute, value, message in (
        ("crop_size", {"height": 336, "width": 448}, "tiles need a square crop_size, not 336x448"),
        ("crop_size", {"shortest_edge": 336}, "tiles need a crop_size with height and width"),
        ("image_mean", None, "tiles need image_mean and image_std"),
    ):
        model = build_model("saep:stride=4")
        model.config.image_aspect_ratio = "slice"
        setattr(model.get_vision_tower().image_processor, attribute, value)
        with pytest.raises(ProjectorSpecError, match=f"CLIPImageProcessor: {message}.*pass --image_aspect_ratio pad"):
            model.initialize_vision_tokenizer(model_args("saep:stride=4", mm_use_im_patch_token=False), tokenizer)


def test_a_config_without_separators_says_what_to_do(slice_model):
    model = copy.deepcopy(slice_model("saep:stride=4"))
    del model.config.slice_separator_ids
    with pytest.raises(ProjectorSpecError, match="no slice_separator_ids: load the checkpoint with LLaVA's load_pretr"):
        model(input_ids=torch.tensor([[1, IMAGE]]), images=prepare(model, picture((1, 2))))
