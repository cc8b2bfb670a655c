"""`--image_aspect_ratio slice` through LLaVA's own scripts: training, LoRA, ZeRO-2, loading, serving, evaluation."""

import base64
import dataclasses
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from drive import NO_CUDA, generate, llm_input, prompt, served
from PIL import Image
from safetensors.torch import load_file
from test_deepspeed import run_ranks, weights, zero_config
from test_serving import QUESTION
from test_slice_model import picture, prepare, reference_embeddings

from llava_projectors.tiny import assets
from llava_projectors.tiny import train as tiny_train
from llava_projectors.tiny.train import losses, training_command

OURS = ("saep", "tokenpacker")
IMAGE, SIDE = -200, 56
TOKENS = 2 * 2 + 1  # of a tile, and its separator
LINE = "llava_projectors: slice: a picture is cut into 1 to 9 tiles and, beside more than one, a thumbnail: 5 to 50 "


@pytest.fixture(scope="module")
def tiny(tiny):
    """With a tower of small pictures, because a picture is many tiles here."""
    small = assets.make_vision_tower(tiny.root / "clip-small", image_size=SIDE)
    return dataclasses.replace(tiny, tower=small, coarse_tower=small)


@pytest.fixture(scope="module")
def data(tiny):
    """Pictures of three shapes and a sample of text alone, so that batches mix grids; the file of each stage."""
    Image.new("RGB", (150, 640), "navy").save(tiny.images / "tower.png")
    files = []
    for path in (tiny.pretrain_data, tiny.finetune_data):
        samples = json.loads(path.read_text())
        question = samples[0]["conversations"][0]["value"].replace("<image>\n", "")
        samples.append(assets.conversation("tower.png", question, "a tall blue picture"))
        if path is tiny.finetune_data:
            samples.append(assets.conversation(None, QUESTION, "there is none"))
        files.append(path.with_name(f"slice-{path.name}"))
        files[-1].write_text(json.dumps(samples))
    return files


@pytest.fixture(scope="module")
def sliced(tiny, data):
    """type string -> adapter, checkpoint and output of a run with tiles, through both stages, with workers."""

    @cache
    def get(projector_type):
        name = projector_type + "-slice"
        options = {"image_aspect_ratio": "slice", "dataloader_num_workers": 4, "dataloader_persistent_workers": True}
        adapter, first = tiny.pretrain(f"{name}-pretrain", projector_type, data_path=data[0], **options)
        checkpoint, second = tiny.finetune(
            name, projector_type, adapter / "mm_projector.bin", data_path=data[1], max_steps=100, learning_rate=4e-3,
            **options,
        )  # fmt: skip
        return adapter, checkpoint, first + second

    return get


def load(checkpoint, base=None, name="llava"):
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(checkpoint), base and str(base), name, device="cpu", device_map="cpu"
    )
    model.float()
    model.get_vision_tower().float()
    assert processor is model.get_vision_tower().image_processor
    return tokenizer, model


@pytest.mark.parametrize("projector_type", OURS)
def test_training_learns(sliced, projector_type):
    adapter, checkpoint, output = sliced(projector_type)
    for folder, steps in ((adapter, 3), (checkpoint, 100)):
        curve = torch.tensor(losses(folder))
        assert len(curve) == steps
        assert curve.isfinite().all()
        assert (curve > 0.0).all()
    assert curve[-5:].mean() < curve[0] / 2
    assert output.count(LINE) == 2
    assert "llava_projectors: WARNING" not in output


@pytest.mark.parametrize("projector_type", OURS)
def test_a_checkpoint_says_what_published_ones_say(sliced, projector_type):
    for folder in sliced(projector_type)[:2]:
        config = json.loads((folder / "config.json").read_text())
        assert config["image_aspect_ratio"] == "slice"
        assert config["patch_num"] == 9
        assert config["mm_projector_type"] == projector_type


@pytest.mark.parametrize("projector_type", OURS)
def test_a_loaded_checkpoint_receives_the_reference_and_answers(sliced, tiny, can_generate, projector_type):
    tokenizer, model = load(sliced(projector_type)[1])
    ids = torch.tensor([[1, 5, IMAGE, 6, 7]])
    embed = model.get_model().embed_tokens.weight
    for grid in ((1, 1), (2, 3)):
        image = picture(grid, side=SIDE)
        images = prepare(model, image)
        with torch.no_grad():
            expected = torch.cat([embed[[1, 5]], reference_embeddings(model, tokenizer, image), embed[[6, 7]]])
            logits = model(input_ids=None, inputs_embeds=expected[None]).logits
            torch.testing.assert_close(
                llm_input(model, input_ids=ids, images=images)[0], expected, rtol=1e-4, atol=1e-5
            )
            torch.testing.assert_close(model(input_ids=ids, images=images).logits, logits, rtol=1e-3, atol=1e-4)

    from llava_projectors.commands.demo import ask

    answers = {name: ask(sliced(projector_type)[1], tiny.images / name) for name in ("flower.jpg", "tower.png")}
    assert answers["flower.jpg"].visual_tokens == 7 * TOKENS
    assert answers["tower.png"].visual_tokens == 5 * TOKENS
    assert answers["flower.jpg"].text == "a pink flower with green leaves"
    assert answers["tower.png"].text == "a tall blue picture"


def test_sixteen_tiles_from_the_command_line(tiny, data, sliced):
    """The option stands in the flag; a later run on the checkpoint keeps it, or changes it."""
    adapter = sliced(OURS[0])[0] / "mm_projector.bin"
    run = {"data_path": data[1], "max_steps": 1}
    folder, output = tiny.finetune("slice16", OURS[0], adapter, image_aspect_ratio="slice:patch_num=16", **run)
    assert "cut into 1 to 16 tiles and, beside more than one, a thumbnail: 5 to 85 visual tokens" in output
    config = json.loads((folder / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["patch_num"]) == ("slice", 16)
    for setting, patch_num in (("slice", 16), ("slice:patch_num=9", 9)):
        options = {"model_name_or_path": folder, "image_aspect_ratio": setting, **run}
        again, output = tiny.finetune(f"slice16-then-{patch_num}", OURS[0], **options)
        assert json.loads((again / "config.json").read_text())["patch_num"] == patch_num
        assert f"cut into 1 to {patch_num} tiles" in output.splitlines()[-1] or f"1 to {patch_num} tiles" in output
    again, output = tiny.finetune("slice-then-pad", OURS[0], **{**options, "image_aspect_ratio": "pad"})
    assert json.loads((again / "config.json").read_text())["image_aspect_ratio"] == "pad"
    _, model = load(again)
    assert prepare(model, picture((1, 2), side=SIDE)).shape == (1, 3, SIDE, SIDE)


def test_a_picture_that_is_too_long_is_warned_of(tiny, data, sliced):
    adapter = sliced(OURS[0])[0] / "mm_projector.bin"
    options = {"data_path": data[1], "max_steps": 2, "image_aspect_ratio": "slice", "model_max_length": 48}
    _, output = tiny.finetune("slice-short", OURS[0], adapter, **options)
    assert output.count("tiles takes") == 1
    assert "WARNING: a picture of 3x3 tiles takes 50 visual tokens, but model_max_length is 48" in output


def test_a_stock_projector_with_slice_trains_bit_for_bit_as_without_the_plugin(tiny, data):
    adapter, _ = tiny.pretrain("stock-slice-pretrain", "mlp2x_gelu", image_aspect_ratio="slice")
    runs = []
    for name, disabled in (("on", "0"), ("off", "1")):
        environment = {"LLAVA_PROJECTORS_DISABLE": disabled}
        options = {"image_aspect_ratio": "slice:patch_num=16", "data_path": data[1]}
        folder, output = tiny.finetune(
            f"stock-slice-{name}", "mlp2x_gelu", adapter / "mm_projector.bin", environment, **options
        )
        assert "llava_projectors" not in output.replace(sys.prefix, "")  # which a checkout may have given that name
        config = json.loads((folder / "config.json").read_text())
        runs.append((losses(folder), config, load_file(folder / "model.safetensors")))
    (losses_on, config_on, weights_on), (losses_off, config_off, weights_off) = runs
    assert losses_on == losses_off
    assert losses_on[0] > 0.0
    assert config_on == config_off
    assert config_on["image_aspect_ratio"] == "slice:patch_num=16"
    for name, value in weights_off.items():
        assert torch.equal(value, weights_on[name]), name


@pytest.mark.parametrize("projector_type", OURS)
def test_lora(tiny, data, sliced, projector_type):
    """From the base LLM: the merged model receives the reference, and its logits are those of the unmerged one."""
    adapter = sliced(projector_type)[0] / "mm_projector.bin"
    options = {
        "image_aspect_ratio": "slice", "data_path": data[1], "max_steps": 4, "lora_enable": True, "lora_r": 4,
        "lora_alpha": 8, "mm_projector_lr": 1e-3,
    }  # fmt: skip
    folder, output = tiny.finetune(f"lora-slice-{projector_type.partition(':')[0]}", projector_type, adapter, **options)
    assert all(0.0 < value < 20.0 for value in losses(folder))
    assert LINE in output
    tokenizer, model = load(folder, tiny.llm, "llava-lora")
    assert model.config.slice_separator_ids == [tokenizer.convert_tokens_to_ids(","), 0]
    image = picture((1, 3), side=SIDE)
    found = llm_input(model, input_ids=torch.tensor([[1, IMAGE]]), images=prepare(model, image))[0, 1:]
    with torch.no_grad():
        torch.testing.assert_close(found, reference_embeddings(model, tokenizer, image), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("projector_type", OURS)
def test_zero2_on_two_ranks_trains_as_one_process_does(tiny, data, sliced, projector_type):
    """Ranks with other numbers of tiles, in several chunks; SGD, whose steps are linear in the gradients."""
    samples = json.loads(data[1].read_text())[1:5]  # every step takes all of them
    for sample in samples:  # answers of equal length: the mean over ranks is the mean over samples
        sample["conversations"][1]["value"] = "a picture"
    path = data[1].with_name("slice-equal.json")
    path.write_text(json.dumps(samples))
    name = projector_type

    def train(ranks, stage=None):
        options = tiny_train.finetune_arguments(
            path, tiny.images, sliced(projector_type)[0] / "mm_projector.bin", max_steps=3, optim="sgd",
            learning_rate=0.05, max_grad_norm=1e9, per_device_train_batch_size=4 // ranks,
            image_aspect_ratio="slice:chunk_size=4",
        )  # fmt: skip
        output = tiny.root / "runs" / f"llava-slice-{name}-zero-{ranks}"
        log = tiny.root / "runs" / f"slice-{name}-zero-{ranks}.log"
        if stage is not None:
            options["deepspeed"] = zero_config(tiny.root / f"zero{stage}.json", stage)
        command = training_command(output, tiny.llm, tiny.tower, projector_type, **options)
        printed = tiny.execute(command, log) if stage is None else run_ranks(command, ranks, log, tiny.root)
        assert printed.count("llava_projectors: slice: ") == 1
        return output

    one, two = train(1), train(2, stage=2)
    assert losses(one)[0] > 0.0
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    start = torch.load(sliced(projector_type)[0] / "mm_projector.bin", weights_only=True)
    expected, found = weights(one), weights(two)
    for key, value in start.items():
        if key.endswith("ln_k_1.bias"):  # has no gradient
            continue
        step, expected_step = found[key] - value, expected[key] - value
        assert step.abs().max() > 0, key
        rounding = torch.finfo(torch.float32).eps * value.float().norm()
        assert (step - expected_step).norm() < 0.02 * expected_step.norm() + rounding, key


@pytest.mark.slow
def test_worker_answers_over_http(sliced, tiny, tmp_path):
    """LLaVA's controller and worker, with pictures of two grids in one prompt, and one that is not RGB."""
    checkpoint = sliced(OURS[1])[1]
    with served(checkpoint, tmp_path) as (_, worker, log):
        flower, tall = (
            base64.b64encode((tiny.images / name).read_bytes()).decode() for name in ("flower.jpg", "tower.png")
        )
        Image.open(tiny.images / "tower.png").convert("RGBA").save(tmp_path / "alpha.png")
        alpha = base64.b64encode((tmp_path / "alpha.png").read_bytes()).decode()
        answers = {}
        for name, images in {"flower": [flower], "tall": [tall], "alpha": [alpha], "both": [flower, tall]}.items():
            text = prompt("<image>\n" * len(images) + QUESTION)
            chunks = generate(worker, checkpoint.name, text, images)
            assert all(chunk["error_code"] == 0 for chunk in chunks), log.read_text()[-2000:]
            answers[name] = chunks[-1]["text"][len(text) :]
        assert all(answers.values())
        assert answers["alpha"] == answers["tall"]
        text = prompt(f"<image>\n{QUESTION}")
        (chunk,) = generate(worker, checkpoint.name, text, [flower[:2000]])  # a truncated file
        assert chunk["error_code"] == 1
        # The most tiles of a picture take 50 of the worker's 2048 positions.
        (refused,) = generate(worker, checkpoint.name, prompt("<image>\n" * 45 + QUESTION), [tall] * 45)
        assert "Exceeds max token length" in refused["text"]


@pytest.mark.slow
def test_command_line_chat(sliced, tiny, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llava.serve.cli", "--model-path", sliced(OURS[0])[1], "--image-file",
         tiny.images / "flower.jpg", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "6"],
        input=f"{QUESTION}\n\n", cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert LINE in done.stderr
    assert len(done.stdout.split("Assistant: ")[1].split()) > 1, done.stdout


@pytest.mark.slow
def test_evaluation_on_a_question_file(sliced, tiny, tmp_path):
    """With `model_vqa_loader`'s four workers, on pictures of three grids."""
    names = ("flower.jpg", "tower.png", "china.jpg")
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    rows = [{"question_id": n, "image": name, "text": QUESTION} for n, name in enumerate(names)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sitecustomize.py").write_text(NO_CUDA)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "llava.eval.model_vqa_loader", "--model-path", sliced(OURS[0])[1],
         "--image-folder", tiny.images, "--question-file", questions, "--answers-file", answers,
         "--temperature", "0", "--conv-mode", "vicuna_v1", "--max_new_tokens", "24"],
        env={**os.environ, "PYTHONPATH": paths}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    texts = [json.loads(line)["text"] for line in answers.read_text().splitlines()]
    assert texts[0] == "a pink flower with green leaves"
    assert texts[1] == "a tall blue picture"
