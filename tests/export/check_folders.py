"""Exported folders on current transformers, without this package: `EXPORTED=… pytest --noconftest check_folders.py`.

`make check-export` runs it, in environments of its own, on what `make_folders.py` and `families.py` made.
"""

import importlib
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

EXPORTED = Path(os.environ["EXPORTED"])
TRAINED = ("saep", "tokenpacker")
NAMES = sorted(path.name for path in EXPORTED.iterdir() if path.is_dir())
sys.path.insert(0, str(Path(__file__).parents[2] / "llava_projectors" / "export"))
compare = importlib.import_module("compare")

assert importlib.util.find_spec("llava_projectors") is None, "the folders have to load without the package"


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name):
    return EXPORTED / name


@pytest.fixture(scope="module")
def loaded(folder):
    return compare.load(str(folder))


@pytest.fixture(scope="module")
def cases(folder):
    return compare.load_cases(folder.with_suffix(".pt"))


def test_it_says_what_llava_says(name, loaded, cases):
    """Questions about one picture of several sizes, one about two."""
    results = [compare.compare(*loaded, case) for case in cases]
    assert len(results) >= 9
    assert all(result["positions"] == 0 for result in results)
    assert all(result["pixels"] <= 1e-6 for result in results)
    assert all(result["logits"] < 1e-4 for result in results)
    assert all(result["same_ids"] and result["same_argmax"] and result["same_answer"] for result in results)
    if (
        name in TRAINED
    ):  # the random LLM writes bytes that are no UTF-8; slow and fast tokenizers show those differently
        assert all(result["same_text"] for result in results)
    assert len({result["text"] for result in results}) > 1  # texts that are all alike would show nothing


@torch.no_grad()
def test_a_left_padded_batch_says_the_same(loaded, cases):
    model, processor = loaded
    picked = [cases[0], cases[3], cases[-1]]  # the last has two pictures
    texts, images = [case["prompt"] for case in picked], [case["images"] for case in picked]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    assert (inputs["attention_mask"][:, 0] == 0).any()  # padded, on the left
    rows = model(**inputs).logits
    for row, mask, case in zip(rows, inputs["attention_mask"], picked):
        expected = case["logits"]
        found = row[mask.bool()][:, : expected.shape[1]]
        # Sums of another order: with 967 positions and these large weights 1.6e-4 was seen.
        assert (found - expected).abs().max() / expected.abs().max() < 5e-4
    output = model.generate(**inputs, do_sample=False, max_new_tokens=picked[0]["max_new_tokens"])
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    settings = model.generation_config
    padding = settings.eos_token_id[0] if settings.pad_token_id is None else settings.pad_token_id
    for answer, case in zip(answers, picked):
        expected = case["answer_ids"]
        assert answer == expected + [padding] * (len(answer) - len(expected))


def test_chat_template(loaded, cases):
    _, processor = loaded
    if " ASSISTANT:" not in cases[0]["prompt"]:
        pytest.skip("the prompts were made by the template itself")
    question = cases[0]["prompt"].split("<image>")[1].split("\n")[1].split(" ASS")[0]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == cases[0]["prompt"]


def test_saved_again_it_is_whole(loaded, cases, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    result = compare.compare(*compare.load(str(tmp_path / "again")), cases[0])
    assert result["same_answer"]
    assert result["logits"] < 1e-4


def test_the_model_without_its_head(folder, loaded, cases):
    from transformers import AutoModel

    body = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    inputs = compare.inputs_of(loaded[1], cases[0])
    with torch.no_grad():
        states = body(**inputs).last_hidden_state
        assert torch.equal(loaded[0].lm_head(states), loaded[0](**inputs).logits)


def test_stock_classes_fail_and_say_why(folder):
    from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

    for cls in (LlavaForConditionalGeneration, AutoModelForImageTextToText):
        with pytest.raises(KeyError, match=r"trust_remote_code=True, or install llava-projectors"):
            cls.from_pretrained(folder, trust_remote_code=False)


def test_a_folder_that_lacks_a_weight_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    weights = load_file(broken / "model.safetensors")
    lost = next(key for key in weights if "multi_modal_projector" in key)
    del weights[lost]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"not whole, these weights would be random: {lost}"):
        AutoModelForImageTextToText.from_pretrained(broken, trust_remote_code=True)


def test_the_number_of_tokens(folder, loaded, cases):
    """By the pictures' sizes, as vLLM asks for it."""
    _, processor = loaded
    config = json.loads((folder / "config.json").read_text())
    alone = [case for case in cases if case["given_as"] == "pictures" and len(case["images"]) == 1]
    several = [case for case in cases if case["given_as"] == "pictures" and len(case["images"]) > 1]
    cuts_several = config["image_layout"].get("cuts_several", True)
    settings = {} if cuts_several else {"image_aspect_ratio": "slice"}
    for case in alone + (several if cuts_several else []):
        inputs = compare.inputs_of(processor, case)
        sizes = [(image.height, image.width) for image in case["images"]]
        counted = processor._get_num_multimodal_tokens(sizes, **settings)
        assert int((inputs["input_ids"] == config["image_token_index"]).sum()) == sum(counted["num_image_tokens"])
        assert len(inputs["pixel_values"]) == sum(counted["num_image_patches"])


def test_as_vllm_asks_for_a_video(loaded, cases):
    """Its transformers backend, under names of its own: the same tokens, at the same places."""
    model, processor = loaded
    video = next((case for case in cases if case["given_as"] == "video"), None)
    assert hasattr(processor, "video_processor") == (video is not None)
    if video is None:
        return
    frames = video["images"]
    size = len(frames), frames[0].height, frames[0].width
    prompt = f"{processor.video_token} a {processor.video_token}"
    asked = {"text": prompt, "videos": [frames, frames[:1]], "return_tensors": "pt"}
    plain, found = processor(**asked), processor(**asked, return_text_replacement_offsets=True)
    assert torch.equal(found["input_ids"], plain["input_ids"])
    (entries,) = found["text_replacement_offsets"]
    counted = processor._get_num_multimodal_tokens(video_sizes=[size, (1, 8, 8)])["num_video_tokens"]
    assert [(one["type"], one["replacement"].count("<image>")) for one in entries] == [("video", n) for n in counted]
    expected = model.model.get_image_features(plain["pixel_values"], image_sizes=plain["image_sizes"])
    features = model.model.get_video_features(found["pixel_values_videos"], video_grid_thw=found["video_grid_thw"])
    for one, other, count in zip(of_version(expected), of_version(features), counted, strict=True):
        assert len(one) == count
        assert torch.equal(one, other)


def of_version(features):
    """transformers 5 puts them beside other outputs."""
    return getattr(features, "pooler_output", features)


def test_several_pictures_that_are_seen_whole(loaded, cases):
    """One after another they are what they are together, for a server that prepares each alone."""
    _, processor = loaded
    layout = processor.image_processor.layout
    if layout.cuts_several:
        pytest.skip(f"{layout.kind} cuts several pictures of a prompt as it cuts one")
    several = next(case for case in cases if case["given_as"] == "pictures" and len(case["images"]) > 1)
    together = compare.inputs_of(processor, several)["pixel_values"]
    alone = [processor(one, "<image>", return_tensors="pt", image_aspect_ratio="pad") for one in several["images"]]
    assert torch.equal(torch.cat([one["pixel_values"] for one in alone]), together)
    sizes = [(image.height, image.width) for image in several["images"]]
    counted = processor._get_num_multimodal_tokens(sizes, image_aspect_ratio="pad")["num_image_tokens"]
    assert [int((one["input_ids"] == processor.image_token_id).sum()) for one in alone] == counted
    with pytest.raises(ValueError, match="sees several of a prompt whole, which vLLM's .* --mm-processor-kwargs"):
        processor._get_num_multimodal_tokens(sizes)


def test_spaces_before_punctuation(name, loaded):
    """LLaVA's tokenizer of Llama 3 takes them away, its other ones do not."""
    tokenizer = loaded[1].tokenizer
    text = "Hello , it 's a dog . He does n't !"
    cleaned = {"llama3": "Hello, it's a dog. He doesn't!"}
    if "qwen2" not in name:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == cleaned.get(name, text)


def test_the_processor_fails_without_its_code(folder):
    """The stock one would prepare pictures otherwise, and count other tokens."""
    from transformers import AutoProcessor

    with pytest.raises(ValueError, match=r"trust_remote_code=True, or install llava-projectors"):
        AutoProcessor.from_pretrained(folder, trust_remote_code=False)


def test_through_the_template_with_pictures(loaded, cases):
    """`apply_chat_template` prepares the pictures as well."""
    _, processor = loaded
    picture = cases[0]["images"][0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    chat = [{"role": "user", "content": content}]
    found = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    expected = processor(images=picture, text=text, return_tensors="pt", add_special_tokens="<|begin" not in text)
    assert {*found} == {*expected}
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_prompts_without_their_pictures_are_refused(loaded, cases):
    _, processor = loaded
    with pytest.raises(ValueError, match="the text has 2 <image> for 1 pictures"):
        processor(images=cases[0]["images"], text="<image><image>")


def test_what_the_folder_has_no_layout_for_is_refused(folder, loaded, cases):
    _, processor = loaded
    layout = json.loads((folder / "config.json").read_text())["image_layout"]
    picture = cases[0]["images"][0]
    if layout.get("video") is None:
        with pytest.raises(ValueError, match="not trained on videos: pass their frames as pictures"):
            processor(videos=[[picture]], text="<image>")
    known = ["'pad'"] * (layout["kind"] == "anyres") + ["'pad'", "'slice'"] * (not layout.get("cuts_several", True))
    for asked in {"'pad'", "'slice'", "'anyres'"} - {*known}:
        shown = " or ".join(known) or "none"
        with pytest.raises(ValueError, match=f"{asked}: a folder with this image_layout, .*takes {shown} in a call"):
            processor(images=[picture], text="<image>", image_aspect_ratio=asked.strip("'"))
    with pytest.raises(ValueError, match="a call takes pictures or videos, and text"):
        processor(images=[picture], videos=[[picture]], text="<image><image>")


def test_the_class_that_pipelines_load_through(folder, loaded, cases):
    """`pipeline("any-to-any")` and `transformers serve`; the first needs torchvision, which is not here."""
    import transformers

    if not hasattr(transformers, "AutoModelForMultimodalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no AutoModelForMultimodalLM")
    model = transformers.AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    assert compare.compare(model, loaded[1], cases[0])["same_answer"]
