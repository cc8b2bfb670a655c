"""`--image_aspect_ratio slice` beside videos, several pictures and text: only a picture by itself is cut."""

import copy

import family
import pytest
import torch
from drive import llm_input
from family import SQUARE, WIDE

from llava_projectors import ProjectorSpecError
from llava_projectors.slicing import choose_grid, visual_tokens

SLICE = {"image_aspect_ratio": "slice"}


def own_processor(built):
    """The processor as the package made it."""
    processor = copy.copy(built.model.get_vision_tower().image_processor)
    processor.__class__ = processor.processor_class
    return processor


@pytest.mark.parametrize("tower", [family.TOWER, family.CLIP])
def test_frames_of_a_video_are_what_the_packages_own_processor_makes_of_them(build, tower):
    built = build("saep", tower, **SLICE)
    video = family.video(4)
    found = built.model.get_vision_tower().image_processor.preprocess(video, return_tensors="pt")["pixel_values"]
    expected = own_processor(built).preprocess(video, return_tensors="pt")["pixel_values"]
    assert found.shape[0] == 4
    assert torch.equal(found, expected)


def test_only_a_picture_by_itself_is_cut(root, build):
    built = build("saep", **SLICE)
    batch = family.batch_of(root, built, image_aspect_ratio="slice")
    lengths, text = family.lengths_of(built, batch)
    cut = [visual_tokens(choose_grid(*size, patch_num=9, side=family.SIDE), 14**2) for size in (SQUARE, WIDE)]
    assert max(cut) > 14**2 + 1
    visual = [*cut, 2 * (14**2 + 1), family.FRAMES * 7**2, 0]
    assert lengths == [words + tokens for words, tokens in zip(text, visual)]


def test_the_dataset_gives_the_video_and_not_the_next_sample(root, build):
    batch = family.batch_of(root, build("saep", **SLICE), image_aspect_ratio="slice")
    assert batch["modalities"] == ["image", "image", "image", "image", "video", "text"]
    assert batch["images"][4].shape == (family.FRAMES, 3, family.SIDE, family.SIDE)


def test_a_video_is_to_the_llm_what_it_is_without_slice(root, build):
    ids = torch.tensor([[5, family.IMAGE_TOKEN, 6]])
    received = []
    for settings in (SLICE, {}):
        built = build("saep", **settings)
        pixels = built.model.get_vision_tower().image_processor.preprocess(family.video(3), return_tensors="pt")
        images = [pixels["pixel_values"]]
        received.append(llm_input(built.model, input_ids=ids, images=images, modalities=["video"]))
    assert torch.equal(*received)


def test_frames_that_come_as_pictures_are_seen_whole(build):
    """From a folder of frames the package's dataset makes a list of pictures."""
    built = build("saep", **SLICE)
    pictures = [family.picture(*WIDE, seed) for seed in range(3)]
    images = built.model.get_vision_tower().image_processor.preprocess(pictures, return_tensors="pt")["pixel_values"]
    ids = torch.tensor([[5, family.IMAGE_TOKEN, 6]])
    assert llm_input(built.model, input_ids=ids, images=[images], modalities=["video"]).shape[1] == 2 + 3 * 7**2


def test_slice_and_spatial_unpad_are_refused_before_the_first_step(root, tmp_path):
    with pytest.raises(ProjectorSpecError, match="--mm_patch_merge_type spatial_unpad must be flat"):
        family.train(root, tmp_path / "llava-qwen", "saep", image_aspect_ratio="slice")
