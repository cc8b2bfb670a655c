"""Exported folders trained further in today's stack: `EXPORTED=… pytest --noconftest check_training.py`.

`make check-export` runs it with the newest transformers, peft and TRL, without this package.
"""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

EXPORTED = Path(os.environ["EXPORTED"])
# One picture in one tile, and one in several; LLaVA-NeXT's.
NAMES = [name for name in ("saep", "slice9", "qwen2-anyres") if (EXPORTED / name).is_dir()]
# All linear layers of the LLM, and the projector whole: `all-linear` would take the tower's and the projector's too,
# and vLLM loads no such adapter.
LORA = {
    "r": 4,
    "target_modules": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    "modules_to_save": ["multi_modal_projector"],
}


def load(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(params=NAMES)
def folder(request):
    return EXPORTED / request.param


@pytest.fixture
def chats(folder):
    """Questions about pictures, each with its answer, as TRL takes them."""
    from PIL import Image

    cases = torch.load(folder.with_suffix(".pt"), weights_only=True)["cases"][:4]
    return [
        {
            "images": [Image.fromarray(case["images"][0].numpy()).convert("RGB")],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
            "completion": [{"role": "assistant", "content": [{"type": "text", "text": f"number {number}"}]}],
        }
        for number, case in enumerate(cases)
    ]


def collate(processor):
    def batch(samples):
        texts = [processor.apply_chat_template(s["prompt"] + s["completion"], tokenize=False) for s in samples]
        inputs = processor(text=texts, images=[s["images"] for s in samples], padding=True, return_tensors="pt")
        hidden = (inputs["input_ids"] == processor.image_token_id) | (inputs["attention_mask"] == 0)
        return {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}

    return batch


def arguments(tmp_path, **settings):
    return {
        "output_dir": tmp_path / "run", "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 2e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, **settings,
    }  # fmt: skip


def train(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert 0 < losses[-1] < 0.9 * losses[0], losses


def logits(model, processor, chats):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in collate(processor)(chats).items() if k != "labels"}).logits


def test_trainer(folder, chats, tmp_path):
    model, processor = load(folder)
    before = {name: p.detach().clone() for name, p in model.model.multi_modal_projector.named_parameters()}
    settings = TrainingArguments(**arguments(tmp_path, remove_unused_columns=False))
    train(Trainer(model, settings, train_dataset=chats, data_collator=collate(processor)))
    assert any(not torch.equal(before[n], p) for n, p in model.model.multi_modal_projector.named_parameters())
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    for name in ("README.md", "chat_template_vllm.jinja", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (folder / name).read_text()
    ends = [json.loads((f / "generation_config.json").read_text())["eos_token_id"] for f in (folder, tmp_path / "out")]
    assert ends[0] == ends[1]
    torch.testing.assert_close(logits(*load(tmp_path / "out"), chats), logits(model, processor, chats))


def test_peft(folder, chats, tmp_path):
    model, processor = load(folder)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    settings = TrainingArguments(**arguments(tmp_path, remove_unused_columns=False, learning_rate=1e-2))
    train(Trainer(wrapped, settings, train_dataset=chats, data_collator=collate(processor)))
    expected = logits(wrapped, processor, chats)
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder)[0], tmp_path / "adapter")
    torch.testing.assert_close(logits(again, processor, chats), expected)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(*load(tmp_path / "merged"), chats), expected, rtol=1e-3, atol=1e-3)


def test_trl(folder, chats, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, processor = load(folder)
    trainer = SFTTrainer(
        model,
        SFTConfig(**arguments(tmp_path, max_length=None)),
        train_dataset=Dataset.from_list(chats),
        processing_class=processor,
        peft_config=peft.LoraConfig(**LORA),
    )
    train(trainer)


@pytest.mark.parametrize("how", ["bitsandbytes", "torchao"])
def test_eight_bits(folder, chats, how):
    """Projector and head stay as they are where the settings leave them out."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    left_out = ["model.multi_modal_projector", "lm_head"]
    settings = {
        "bitsandbytes": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out),
        "torchao": lambda: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left_out),
    }[how]()
    whole, processor = load(folder)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, device_map="cpu", quantization_config=settings
    )
    ours, theirs = (dict(m.model.multi_modal_projector.named_parameters()) for m in (whole, model))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    down = model.model.language_model.layers[0].mlp.down_proj
    assert type(down) is not torch.nn.Linear or type(down.weight.data) is not torch.Tensor
    assert logits(model, processor, chats).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("folder", [name for name in NAMES if name == "slice9"], indirect=True)
def test_four_bits(folder, chats):
    """The answer of the same model with its weights rounded; bitsandbytes on a CPU takes widths of 64 and the like."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    left_out = ["model.multi_modal_projector", "lm_head"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=left_out,
    )  # fmt: skip
    rounded, processor = load(folder)
    before = logits(rounded, processor, chats)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, device_map="cpu", quantization_config=settings
    )
    packed = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert len(packed) > 2 * 7
    assert not [name for name in packed if "multi_modal_projector" in name]
    for name, layer in packed.items():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        rounded.get_submodule(name).weight.copy_(weight)
    expected = logits(rounded, processor, chats)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-2)
    found = logits(model, processor, chats)
    # Its kernels compute in bfloat16.
    assert (found - expected).norm() < 0.1 * (expected - before).norm()
