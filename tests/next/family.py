"""Tiny parts in the formats that the LLaVA-NeXT family reads, its own script called with them, its LLM's input seen.

The package is `llavaction`, which the registry has, or, in the environment variable LLAVA_NEXT_PACKAGE, another of
the same family: `llava` of a checkout of LLaVA-NeXT. What a user would import is imported from it.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from llava_projectors.commands.trial_siglip import shrink, snapshot_folder
from llava_projectors.tiny.assets import make_vision_tower

PACKAGE = os.environ["LLAVA_NEXT_PACKAGE"]
# Its builder takes an existing path for CLIP, so SigLIP comes by a name from a cache of the hub.
TOWER = "google/siglip-so400m-patch14-384"
CLIP = "openai/clip-vit-large-patch14-336"
SIDE, PATCHES = 384, 27
IMAGE_TOKEN = -200
VERSION = "qwen_1_5"
FRAMES = 3  # that the script takes of a video
SQUARE, WIDE = (380, 380), (760, 250)  # which `anyres` cuts into one tile and two
# The script takes the range and makes the list of it.
PINPOINT_RANGE, PINPOINTS = "(1x1),...,(3x3)", [[SIDE * i, SIDE * j] for i in (1, 2, 3) for j in (1, 2, 3)]
ANYRES = {"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"}
TOWER_SIZES = {
    "hidden_size": 32,
    "image_mean": (0.5, 0.5, 0.5),
    "intermediate_size": 64,
    "num_hidden_layers": 8,  # one of which the class drops
    "num_attention_heads": 1,
}


def module(name):
    """A module of the package, by its place below it."""
    return importlib.import_module(f"{PACKAGE}.{name}")


# Packages that llavaction imports at once, for work that is not done here


class StandIn(types.ModuleType):
    """Any attribute is an empty class."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "cv2", "pandas", "decord", "av"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ == "decord":
            module.VideoReader, module.cpu = VideoReader, lambda index: None


class VideoReader:
    """A video whose file is the array of its frames [frames, height, width, 3], uint8, two a second."""

    def __init__(self, path, *_, **__):
        self.frames = np.load(path)

    def __len__(self):
        return len(self.frames)

    def get_avg_fps(self):
        return 2.0

    def get_batch(self, indices):
        return types.SimpleNamespace(asnumpy=lambda: self.frames[indices])

    def seek(self, position):
        pass


# Models and data


def prepare_process():
    """What every process that runs the package's code on these parts needs."""
    shrink_siglip()
    let_it_take_pictures()
    torch.cuda.synchronize = lambda *_: None  # the script calls it before it saves


def make_siglip(cache, name=TOWER):
    """A SigLIP vision checkpoint with random weights, where the hub's client looks for it."""
    encoder = module("model.multimodal_encoder.siglip_encoder")
    torch.manual_seed(0)
    config = encoder.SigLipVisionConfig()
    snapshot = snapshot_folder(cache, name)
    encoder.SigLipVisionModel(config).save_pretrained(snapshot)


def make_clip(cache):
    make_vision_tower(snapshot_folder(cache, CLIP))


def shrink_siglip():
    """The class ignores the checkpoint's config, so the tiny sizes become its defaults."""
    shrink(module("model.multimodal_encoder.siglip_encoder").SigLipVisionConfig, TOWER_SIZES)


def make_llm(folder):
    """A Qwen2 checkpoint with random weights, and a byte-level tokenizer in Qwen2's format."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import bytes_to_unicode

    folder.mkdir(parents=True)
    vocabulary = {character: number for number, character in enumerate(bytes_to_unicode().values())}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    assert tokenizer("\n").input_ids == [198]  # the package knows the newline by this number
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=80,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        use_sliding_window=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def picture(width, height, seed=0):
    """A picture of coarse random squares."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.BICUBIC)


def video(frames):
    """[frames, height, width, 3], uint8, as decoders give it."""
    return np.stack([np.asarray(picture(160, 120, seed)) for seed in range(frames)])


def write_video(folder):
    """Eight frames, two a second; returns the file's name."""
    if PACKAGE == "llavaction":
        np.save(folder / "video.npy", video(8))
        return "video.npy"
    import cv2

    writer = cv2.VideoWriter(str(folder / "video.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 2.0, (160, 120))
    for frame in video(8):
        writer.write(frame)
    writer.release()
    return "video.mp4"


def sample(number, answer, images=0, **media):
    prompt = "<image>\n" * images + f"What is in number {number}?"
    return {
        "id": number,
        "conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}],
        **media,
    }


def make_mixture(folder):
    """A picture, a wide one, two in one sample, a video, and text alone; returns the JSON file."""
    folder.mkdir(parents=True)
    picture(*SQUARE).save(folder / "square.png")
    picture(*WIDE, 1).save(folder / "wide.png")
    name = write_video(folder)
    samples = [
        sample(0, "squares", 1, image="square.png"),
        sample(1, "a wide one", 1, image="wide.png"),
        sample(2, "two of them", 2, image=["square.png", "wide.png"]),
        sample(3, "they move", 1, video=name, dataset_name="."),
        sample(4, "nothing but text"),
    ]
    path = folder / "mixture.json"
    path.write_text(json.dumps(samples))
    return path


# The package's own script


def arguments_of(root, output, projector_type, **options):
    """The command line of a run on the mixture: all parts but the tower are trained, unless the options say less."""
    settings = {
        "model_name_or_path": root / "qwen-tiny",
        "version": VERSION,
        "data_path": root / "data" / "mixture.json",
        "image_folder": root / "data",
        "video_folder": root / "data",
        "vision_tower": TOWER,
        "mm_projector_type": projector_type,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_grid_pinpoints": PINPOINT_RANGE,
        **ANYRES,
        "mm_newline_position": "one_token",
        "frames_upbound": FRAMES,
        "mm_tunable_parts": "mm_mlp_adapter,mm_language_model",
        "bf16": True,
        "output_dir": output,
        "max_steps": 2,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "model_max_length": 8192,
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "lazy_preprocess": True,
        "report_to": "none",
        "attn_implementation": "sdpa",
        "use_cpu": True,
        **options,
    }
    return [text for name, value in settings.items() if value is not None for text in (f"--{name}", str(value))]


def train(root, output, projector_type, script="train.train", **options):
    """Run the package's `train()` in this process; returns the folder."""
    script = module(script)
    before = sys.argv, module("conversation").default_conversation
    sys.argv = ["train.py", *arguments_of(root, output, projector_type, **options)]
    torch.manual_seed(0)
    try:
        script.train()
    finally:
        sys.argv, module("conversation").default_conversation = before
    return output


def losses(output):
    history = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def let_it_take_pictures():
    """llavaction's dataset asks for tables that it is not given, its collator for an action beside each picture."""
    script = module("train.train")
    if not hasattr(script, "EK100EvalArguments"):
        return

    class Dataset(script.LazySupervisedDataset):
        def __init__(self, data_path, tokenizer, data_args, eval_args):
            self.list_data_dict = json.loads(Path(data_path).read_text())
            self.tokenizer, self.data_args, self.eval_args = tokenizer, data_args, eval_args

        def _get_item(self, index):
            item = super()._get_item(index)
            no_action = torch.full((3,), -1)
            item["image"] = [(*entry[:3], no_action) for entry in item["image"]]
            return item

    script.LazySupervisedDataset = Dataset


def batch_of(root, built, **settings):
    """The whole mixture as the package's own dataset and collator make a batch of it."""
    script = module("train.train")
    conversation = module("conversation")
    arguments = script.DataArguments(
        data_path=str(root / "data" / "mixture.json"),
        image_folder=str(root / "data"),
        video_folder=str(root / "data"),
        frames_upbound=FRAMES,
        image_grid_pinpoints=PINPOINTS,
        **settings,
    )
    arguments.image_processor = built.model.get_vision_tower().image_processor
    arguments.is_multimodal, arguments.mm_use_im_start_end = True, False
    more = [script.EK100EvalArguments()] if hasattr(script, "EK100EvalArguments") else []
    before, conversation.default_conversation = conversation.default_conversation, conversation.conv_templates[VERSION]
    try:
        data = script.make_supervised_data_module(built.tokenizer, arguments, *more)
        return data["data_collator"]([data["train_dataset"][number] for number in range(len(data["train_dataset"]))])
    finally:
        conversation.default_conversation = before


def lengths_of(built, batch):
    """Positions of each sample at the LLM's input, and how many of them are text."""
    text = (batch["attention_mask"].bool() & (batch["input_ids"] != IMAGE_TOKEN)).sum(1)
    prepared = built.model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"],
        None,
        batch["attention_mask"],
        None,
        batch["labels"],
        batch["images"],
        batch["modalities"],
        batch["image_sizes"],
    )
    return prepared[2].sum(1).tolist(), text.tolist()
