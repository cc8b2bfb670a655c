"""Checkpoints of every type, what LLaVA says on them, and their exports: `python make_folders.py FOLDER`.

Runs in LLaVA's environment. `check_folders.py` and `check_vllm.py` read the result in others. SAEP and
TokenPacker are trained by LLaVA's script; the other types get random weights, large ones in the LLM, so
that its answers depend on every number before them.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_projectors import build_projector
from llava_projectors.export import compare, verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.start import start
from llava_projectors.tiny import assets, train

TRAINED = ("saep", "tokenpacker")
UNTRAINED = (
    "saep:stride=3",
    "saep:order=depthwise_first,layers=2+5+7,stride=4",
    "tokenpacker:scale_factor=3",
    "avg_pool",
    "pixel_shuffle",
    "ldpv2:stride=4",
    "c_abstractor",
    "resampler:num_queries=49",
    "stf:layers=1+4+7",
    "delta:scale_factor=3",
    "corner:stride=5",
)
# The README's example of a type of one's own.
CORNER = '''
import llava_projectors
from torch import nn


@llava_projectors.register_projector("corner")
class Corner(llava_projectors.Projector):
    """The first patch of every region."""

    def __init__(self, mm_hidden_size, hidden_size, *, stride: int = 4):
        super().__init__(mm_hidden_size, hidden_size, layers=None, stride=stride)
        self.to_llm = nn.Linear(mm_hidden_size, hidden_size)

    def forward(self, features):
        return self.to_llm(self.to_grid(features)[:, :: self.stride, :: self.stride].flatten(1, 2))
'''
QUESTIONS = (assets.QUESTION, "Describe the colours, in one sentence.")
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: {} ASSISTANT:"
)


def folder_name(projector_type):
    return "".join(c if c.isalnum() else "-" for c in projector_type)


def train_checkpoint(root, projector_type, data):
    pretrain_data, finetune_data = data
    name, images = folder_name(projector_type), root / "data" / "images"

    def run(output, stage):
        command = train.training_command(output, root / "vicuna", root / "clip", projector_type, **stage)
        train.run(command, root / f"{output.name}.log")
        return output

    first = train.pretrain_arguments(pretrain_data, images, max_steps=3)
    adapter = run(root / f"llava-{name}-pretrain", first) / "mm_projector.bin"
    second = train.finetune_arguments(finetune_data, images, adapter, max_steps=60, learning_rate=4e-3)
    return run(root / f"llava-{name}", second)


def random_llm(weights):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(w.shape, generator=generator) * 3 / w.shape[-1] ** 0.5).to(w.dtype) if w.ndim == 2 else w
        for name, w in weights.items()
        if "mm_projector" not in name and "vision_tower" not in name
    }


def swap_projector(source, target, projector_type):
    """The checkpoint with a random projector of another type, and a random LLM."""
    config = json.loads((source / "config.json").read_text())
    config.pop("mm_projector_options", None)  # of the other type
    torch.manual_seed(0)
    projector = build_projector(projector_type, config["mm_hidden_size"], config["hidden_size"])
    weights = random_llm(load_file(source / "model.safetensors"))
    weights |= {f"model.mm_projector.{k}": v.to(torch.float16) for k, v in projector.state_dict().items()}
    target.mkdir()
    for file in source.glob("*token*"):
        (target / file.name).write_bytes(file.read_bytes())
    (target / "config.json").write_text(json.dumps({**config, "mm_projector_type": projector_type}))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def questions(images):
    """16 prompts with one picture each, then one with two."""
    pictures = [Image.open(path).convert("RGB") for path in sorted(images.iterdir())]
    asked = [(PROMPT.format(f"<image>\n{question}"), [p]) for p in pictures for question in QUESTIONS]
    return [*asked, (PROMPT.format(f"<image>\n<image>\n{QUESTIONS[0]}"), pictures[:2])]


def make_started(root):
    """A new projector in a model of transformers' own LLaVA, in `started`; nobody has trained it."""
    exported, stock = root / "exported" / "saep", root / "stock"
    settings = json.loads((exported / "config.json").read_text())
    tower, llm = CLIPVisionConfig.from_pretrained(root / "clip"), LlamaConfig(**settings["text_config"])
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(tower, llm, image_token_index=settings["image_token_index"]))
    for parameter in model.language_model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=3 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(stock)
    for file in [*exported.glob("*token*"), root / "clip" / "preprocessor_config.json"]:
        shutil.copyfile(file, stock / file.name)
    start(str(stock), root / "started" / "saep", "saep")


def main(root, types):
    root.mkdir(parents=True, exist_ok=True)
    data = assets.make_dataset(root / "data", num_scenes=6)
    assets.make_vision_tower(root / "clip", patch_size=28)
    assets.make_llm(root / "vicuna", hidden_size=64, head_width=32)
    (root / "corner.py").write_text(CORNER)
    sys.path.insert(0, str(root))
    importlib.import_module("corner")
    asked = questions(root / "data" / "images")
    for projector_type in types:
        if projector_type in TRAINED:
            checkpoint = train_checkpoint(root, projector_type, data)
        else:
            name = folder_name(projector_type)
            checkpoint = swap_projector(root / "llava-saep", root / f"llava-{name}", projector_type)
        folder = root / "exported" / folder_name(projector_type)
        export_checkpoint(str(checkpoint), folder, dtype="float16")
        cases = verify.reference(str(checkpoint), None, asked, dtype=torch.float16)
        compare.save_cases(cases, folder.with_suffix(".pt"))
        print(projector_type, "->", folder, flush=True)
    make_started(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or (*TRAINED, *UNTRAINED))
