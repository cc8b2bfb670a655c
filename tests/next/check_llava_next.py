"""What is run by hand on LLaVA-NeXT itself, beside the tests of this folder: `make check-next LLAVA_NEXT=DIR`."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import family
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

COMMON_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
HERE = Path(__file__).parent
LLMS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 2}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 40}),
    "qwen-moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {"num_experts": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40},
    ),
}


@pytest.fixture(scope="module")
def checkpoint(root):
    return family.train(root, root / "llava-qwen-saep", "saep", save_strategy="steps", save_steps=1)


def same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_resumes_ends_as_one_that_was_not_interrupted(root, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # transformers 4.41 loads the optimizer so
    output = tmp_path / "llava-qwen-resumed"
    shutil.copytree(checkpoint / "checkpoint-1", output / "checkpoint-1")
    family.train(root, output, "saep", save_strategy="steps", save_steps=1)
    assert same_weights(checkpoint, output)


def environment(root):
    return {
        **os.environ,
        "HF_HOME": str(root),  # with `hub` in it
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]]),
        "OMP_NUM_THREADS": "1",
    }


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout + done.stderr


def run_ranks(ranks, script, root, folder, output, **settings):
    """A script of the package with ZeRO-2 in so many processes, one sample each; returns what they printed."""
    auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    stage = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    zero2 = folder / "zero2.json"
    zero2.write_text(json.dumps({**auto, **stage}))
    arguments = family.arguments_of(
        root, output, "saep", per_device_train_batch_size=1, deepspeed=zero2, use_cpu=None, **settings
    )
    launcher = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", str(ranks)]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, str(HERE / "ranks.py"), script, *arguments]
    return run(command, env={**environment(root), "DS_ACCELERATOR": "cpu"})


def test_zero2_on_two_ranks_takes_the_steps_of_one_process(root, tmp_path):
    """Each rank has one of two equal samples; SGD, whose steps are linear in the gradients."""
    first, *_ = json.loads((root / "data" / "mixture.json").read_text())
    data = tmp_path / "two.json"
    data.write_text(json.dumps([first, {**first, "id": 9}]))
    settings = {"data_path": data, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e9}
    one = family.train(root, tmp_path / "llava-qwen-one", "saep", per_device_train_batch_size=2, **settings)
    output = tmp_path / "llava-qwen-ranks"
    printed = run_ranks(2, "train.train", root, tmp_path, output, **settings)
    assert printed.count("llava_projectors: saep: 729 -> 196") == 1
    assert family.losses(output) == pytest.approx(family.losses(one), rel=0.02)


@pytest.mark.parametrize(
    ("model", "task", "arguments"),
    [
        ("llava_onevision", "pictures", ""),
        ("llava_onevision", "videos", ",max_frames_num=3"),
        ("llava_vid", "videos", ",conv_template=qwen_1_5,max_frames_num=3,mm_spatial_pool_mode=bilinear"),
    ],
)
def test_lmms_eval_gives_the_answers_of_the_packages_own_loader(root, checkpoint, tmp_path, model, task, arguments):
    files = {"pictures": [["square.png"], ["square.png", "wide.png"]], "videos": [["video.mp4"]]}[task]
    documents = [
        {"files": [str(root / "data" / name) for name in names], "question": "What is it?", "answer": "no"}
        for names in files
    ]
    (tmp_path / f"{task}.json").write_text(json.dumps(documents))
    command = [
        *(sys.executable, str(HERE / "ask_lmms_eval.py"), "--model", model, "--tasks", f"next_{task}"),
        *("--include_path", str(HERE), "--batch_size", "1", "--log_samples", "--output_path", "out"),
        *("--model_args", f"pretrained={checkpoint},device=cpu,device_map=auto,attn_implementation=sdpa{arguments}"),
    ]
    printed = run(command, cwd=tmp_path, env={**environment(root), "HF_DATASETS_OFFLINE": "1"})
    samples = list((tmp_path / "out").rglob("*samples*.jsonl"))
    assert len(samples) == 1, printed[-5000:]  # it logs a failure and ends well
    answers = [json.loads(line)["filtered_resps"] for line in samples[0].read_text().splitlines()]
    assert answers == [own_answer(checkpoint, root / "data", names) for names in files]


def own_answer(checkpoint, data, names):
    """What the package's own loader and `generate` say of the files, asked as lmms-eval asks."""
    tools = family.module("mm_utils")
    loader = family.module("model.builder").load_pretrained_model
    tokenizer, model, processor, _ = loader(
        str(checkpoint), None, checkpoint.name, device_map="auto", attn_implementation="sdpa"
    )
    is_video = names[0].endswith(".mp4")
    if is_video:
        images = [processor.preprocess(video_frames(data / names[0]), return_tensors="pt")["pixel_values"].half()]
        sizes, kinds = None, ["video"]
    else:
        pictures = [Image.open(data / name).convert("RGB") for name in names]
        if len(names) > 1:
            model.config.image_aspect_ratio = "pad"
        images = [pixels.half() for pixels in tools.process_images(pictures, processor, model.config)]
        sizes, kinds = [picture.size for picture in pictures], ["image"] * len(names)
    conversation = family.module("conversation").conv_templates[family.VERSION].copy()
    places = " ".join(["<image>"] * len(images))
    conversation.append_message(conversation.roles[0], f"{places}\nWhat is it?")
    conversation.append_message(conversation.roles[1], None)
    ids = tools.tokenizer_image_token(conversation.get_prompt(), tokenizer, family.IMAGE_TOKEN, return_tensors="pt")[
        None
    ]
    found = model.generate(ids, images=images, image_sizes=sizes, modalities=kinds, do_sample=False, max_new_tokens=6)
    return tokenizer.batch_decode(found, skip_special_tokens=True)[0].strip()


def video_frames(path):
    """Three frames, as lmms-eval takes them."""
    from decord import VideoReader

    reader = VideoReader(str(path))
    return reader.get_batch(np.linspace(0, len(reader) - 1, 3, dtype=int).tolist()).asnumpy()


def train_with(root, folder, name, projector_type):
    """Two steps on the two samples of one picture, with a tiny LLM of another kind and the same tokenizer."""
    import transformers

    config, model, sizes = LLMS[name]
    llm = folder / f"{name}-tiny"
    shutil.copytree(root / "qwen-tiny", llm)
    torch.manual_seed(1)
    settings = json.loads((root / "qwen-tiny" / "config.json").read_text())
    common = {key: settings[key] for key in COMMON_SIZES}
    getattr(transformers, model)(getattr(transformers, config)(**common, **sizes)).save_pretrained(llm)
    data = folder / "pictures.json"
    data.write_text(json.dumps(json.loads((root / "data" / "mixture.json").read_text())[:2]))
    settings = {"model_name_or_path": llm, "data_path": data, "version": "plain"}
    return family.train(root, folder / f"llava-{name}", projector_type, **settings)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_other_llms(root, name, tmp_path):
    losses = family.losses(train_with(root, tmp_path, name, "saep"))
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)


@pytest.mark.parametrize("projector_type", ["saep", "mlp2x_gelu"])
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("mistral", TypeError, "unexpected keyword argument 'modalities'"),
        ("gemma", NameError, "LlavaGemmaForCausalLM"),
        ("qwen-moe", NameError, "LlavaQwenMoeForCausalLM"),
    ],
)
def test_llms_that_its_script_does_not_train_with_its_own_type_either(
    root, name, error, message, projector_type, tmp_path
):
    with pytest.raises(error, match=message):
        train_with(root, tmp_path, name, projector_type)


def test_dpo(root, checkpoint, tmp_path):
    """At the first step the policy is the reference: the loss is log 2."""
    picture = {"image": "square.png", "prompt": "<image>\nWhat is it?", "chosen": "squares", "rejected": "a circle"}
    data = tmp_path / "preferences.json"
    data.write_text(json.dumps([{"id": number, "answer": "squares", **picture} for number in range(2)]))
    output = tmp_path / "llava-qwen-dpo"
    settings = {"model_name_or_path": checkpoint, "data_path": data, "mm_newline_position": None}
    run_ranks(1, "train.train_dpo", root, tmp_path, output, **settings)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert history[0]["losses/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[1]["losses/dpo"] < history[0]["losses/dpo"]


def test_siglip2_at_one_resolution_is_a_siglip(root, build):
    name = "google/siglip2-so400m-patch14-384"
    family.make_siglip(root / "hub", name)
    built = build("saep", name)
    assert built.model.get_vision_tower()(torch.zeros(1, 3, family.SIDE, family.SIDE)).shape == (1, 27**2, 2 * 32)


def test_mlcd_gives_its_hidden_states_side_by_side(root, build):
    """With rotary position embeddings in layers of its own, in a model that is built as CLIP's."""
    from transformers import CLIPImageProcessor

    name = "DeepGlint-AI/mlcd-vit-bigG-patch14-336"
    mlcd = family.module("model.multimodal_encoder.mlcd.vit_rope2d_hf")
    snapshot = family.snapshot_folder(root / "hub", name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 1}
    mlcd.MLCDVisionModel(mlcd.MLCDVisionConfig(**sizes, image_size=336, patch_size=14)).save_pretrained(snapshot)
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}).save_pretrained(snapshot)
    tower = build("saep", name).model.get_vision_tower()
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        states = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
        assert torch.equal(tower(pixels), torch.cat([states[4][:, 1:], states[7][:, 1:]], dim=-1))


@pytest.mark.parametrize(
    "name", ["OpenGVLab/InternViT-300M-448px", "apple/aimv2-large-patch14-336", "facebook/dinov2-large"]
)
def test_towers_that_its_builder_does_not_know_are_refused_by_it(build, name):
    with pytest.raises(ValueError, match=f"^Unknown vision tower: {name}$"):
        build("saep", name)
