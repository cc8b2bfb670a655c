"""Roads that need a GPU, packages that few machines have, or another environment: each says why it was not taken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llava_projectors
from llava_projectors.export import compare, verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.tiny import train
from llava_projectors.tiny.train import TrainingFailed, losses

pytestmark = pytest.mark.cuda

OURS = ("saep", "tokenpacker")
STOCK = "mlp2x_gelu"
IMAGE = -200
CURRENT = "LLAVA_PROJECTORS_TEST_TRANSFORMERS"


def finetune(tiny, name, projector_type, launch, environment=None, **arguments):
    """Stage 2 by LLaVA's script, started in another way: the folder."""
    options = train.finetune_arguments(tiny.finetune_data, tiny.images, None, max_steps=3, **arguments)
    output = tiny.root / "runs" / f"llava-{name}-{projector_type}"
    command = train.training_command(output, tiny.llm, tiny.coarse_tower, projector_type, **options)
    train.run(launch(command), tiny.root / "runs" / f"{name}-{projector_type}.log", environment)
    return output


def learns(tiny, name, projector_type, launch, **arguments):
    """Whether the road is open is shown by LLaVA's own projector, in a process that this package keeps out of."""
    try:
        finetune(tiny, name, STOCK, launch, {"LLAVA_PROJECTORS_DISABLE": "1"}, **arguments)
    except TrainingFailed as failure:
        pytest.skip(f"{STOCK} does not train on this road either: {failure}")
    finetune(tiny, name, STOCK, launch, **arguments)
    curve = losses(finetune(tiny, name, projector_type, launch, **arguments))
    assert len(curve) == 3
    assert all(0.0 < value < 20 for value in curve)


def with_flash_attention(command):
    at = command.index("llava.train.train")
    return [*command[:at], "llava.train.train_mem", *command[at + 1 :]]


def one_rank(command):
    launcher = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", "1"]
    return [sys.executable, "-m", "torch.distributed.run", *launcher, *command[1:]]


@pytest.mark.parametrize("projector_type", OURS)
def test_train_mem_with_flash_attention(gpu, tiny, projector_type):
    pytest.importorskip("flash_attn", reason="train_mem.py needs flash-attn, which is not installed")
    learns(tiny, "flash", projector_type, with_flash_attention)


def test_fsdp(gpu, tiny):
    sharding = {"fsdp": "full_shard auto_wrap", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
    learns(tiny, "fsdp", "tokenpacker", one_rank, **sharding)


@pytest.fixture(scope="module")
def stock_checkpoint(tiny):
    return tiny.finetune("stock-quantised", STOCK, max_steps=1)[0]


def quantised_logits(checkpoint, bits):
    from llava.model.builder import load_pretrained_model

    _, model, _, _ = load_pretrained_model(str(checkpoint), None, "llava", **{f"load_{bits}bit": True})
    images = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0)).to(model.device, torch.float16)
    ids = torch.tensor([[1, 5, IMAGE, 6, 7]], device=model.device)
    with torch.inference_mode():
        model.generate(ids, images=images, do_sample=False, max_new_tokens=4)
        return model(input_ids=ids, images=images).logits


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("projector_type", OURS)
def test_quantised_loading(gpu, trained, stock_checkpoint, projector_type, bits):
    pytest.importorskip("bitsandbytes", reason="8- and 4-bit loading needs bitsandbytes, which is not installed")
    llava_projectors.unpatch()
    try:
        quantised_logits(stock_checkpoint, bits)
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:  # of a library on the way
        pytest.skip(f"{STOCK} does not load and answer in {bits} bits here either: {error}")
    finally:
        llava_projectors.patch()
    quantised_logits(stock_checkpoint, bits)
    logits = quantised_logits(trained(projector_type).checkpoint, bits)
    assert logits.shape[1] == 4 + 36
    assert logits.isfinite().all()


@pytest.mark.parametrize("projector_type", OURS)
def test_the_exported_checkpoint_in_current_transformers(trained, device, tmp_path, projector_type):
    """In float32, by an interpreter that has a current transformers, against LLaVA on the CPU."""
    python = os.environ.get(CURRENT)
    if python is None:
        pytest.skip(f"needs {CURRENT}, the path of a Python with transformers 4.57 or 5, and is not given")
    source = str(trained(projector_type).checkpoint)
    export_checkpoint(source, tmp_path / "out", dtype="float16")
    cases = verify.reference(source, None, verify.default_questions(), 8, torch.float16)
    compare.save_cases(cases, tmp_path / "reference.pt")
    # What stands first on PYTHONPATH here is LLaVA's older transformers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, Path(compare.__file__), tmp_path / "out", tmp_path / "reference.pt", device]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases)
    tolerance = {"cpu": verify.TOLERANCE, "cuda": 1e-2}[device]  # convolutions on a GPU round to TF32
    for result in results:
        assert result["same_ids"]
        assert result["pixels"] == 0
        assert result["logits"] < tolerance
        assert result["same_answer"] or device == "cuda"
