"""Real DeepSpeed, on CPU ranks or one GPU, and resuming, through LLaVA's own script.

ZeRO-3 on two CPU ranks is not tested: it gives NaN features in the vision tower with LLaVA's own
projector as well. FSDP is not either: accelerate refuses it on a machine without an accelerator.
"""

import json
import os
import shutil
import sys
from functools import cache

import pytest
import torch
import warm
from drive import HOST, free_port
from safetensors.torch import load_file

from llava_projectors.tiny.train import finetune_arguments, losses, output_of, run, training_command

OURS = ("saep", "tokenpacker")
# LLaVA's script synchronises CUDA before it saves with DeepSpeed, also where there is none. It leaves
# the process group as it is, whose threads now and then abort a rank that exits before the other.
SHIM = """
import atexit
import os
import torch

torch.cuda.synchronize = lambda *_: None
if "RANK" in os.environ:  # not in the launcher
    import deepspeed.ops

    # An operator for sums among CPU ranks, which takes a minute to compile. Without it, gloo sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@atexit.register
def leave_together():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def equal_data(tiny):
    """Answers of equal length, so that the mean over ranks is the mean over samples."""
    samples = json.loads(tiny.finetune_data.read_text())
    for sample in samples:
        sample["conversations"][1]["value"] = "a picture"
    path = tiny.root / "equal.json"
    path.write_text(json.dumps(samples))
    return path


def run_ranks(command, ranks, log, root, device="cpu"):
    """Run a command of LLaVA's script with DeepSpeed in so many processes; returns the output."""
    environment = {}
    if device == "cpu":
        at = command.index("--no_cuda")  # which would keep DeepSpeed from starting its process group
        command = command[:at] + command[at + 2 :]
        # With more threads than cores, ranks wait for each other.
        environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if ranks == 1:
            return run_one_rank(command, log, environment)
        shim = root / "shim"
        shim.mkdir(exist_ok=True)
        (shim / "sitecustomize.py").write_text(SHIM)
        path = os.pathsep.join(filter(None, [str(shim), os.environ.get("PYTHONPATH")]))
        environment = {**environment, "PYTHONPATH": path}
    # A machine without network may not know its own name.
    launcher = ["--standalone", "--local-addr", "127.0.0.1", "--nproc_per_node", str(ranks)]
    return run([sys.executable, "-m", "torch.distributed.run", *launcher, *command[1:]], log, environment)


def run_one_rank(command, log, environment):
    """Without the launcher, which imports torch for itself and for the rank: its variables, in a warm process."""
    python, _, module, *arguments = command
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": HOST, "MASTER_PORT": str(free_port())}
    script = f"{SHIM}\nimport runpy\nrunpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
    status = warm.call([python, "-c", script, *arguments], log, log, env={**os.environ, **environment, **rank})
    return output_of(log, status)


@pytest.fixture(scope="module")
def train(tiny, equal_data, trained, device):
    """name, type, ranks, ZeRO stage -> the run's folder, made once; SGD, whose steps are linear in the gradients."""

    @cache
    def train_one(name, projector_type, ranks=1, stage=None, checkpoint=None, **arguments):
        options = finetune_arguments(
            equal_data,
            tiny.images,
            trained(projector_type).adapter / "mm_projector.bin" if checkpoint is None else None,
            **{
                "max_steps": 3,
                "optim": "sgd",
                "learning_rate": 0.05,
                "max_grad_norm": 1e9,  # LLaVA's DeepSpeed configurations do not clip
                "per_device_train_batch_size": 4 // ranks,
                **arguments,
            },
        )
        output = tiny.root / "runs" / f"llava-{name}-{projector_type}"
        log = tiny.root / "runs" / f"{name}-{projector_type}.log"
        if stage is not None:
            options["deepspeed"] = zero_config(tiny.root / f"zero{stage}.json", stage)
        command = training_command(output, checkpoint or tiny.llm, tiny.coarse_tower, projector_type, **options)
        printed = tiny.execute(command, log) if stage is None else run_ranks(command, ranks, log, tiny.root, device)
        assert printed.count("llava_projectors: ") == 1  # one line, from the first rank
        return output

    return train_one


def zero_config(path, stage):
    """LLaVA's zero2.json and zero3.json, less what concerns GPUs."""
    auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    zero = {"stage": stage, "contiguous_gradients": True, "stage3_gather_16bit_weights_on_model_save": True}
    precision = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    path.write_text(json.dumps({**auto, **precision, "zero_optimization": zero, "zero_allow_untested_optimizer": True}))
    return path


def weights(folder):
    safetensors = folder / "model.safetensors"
    if safetensors.exists():
        return load_file(safetensors)
    return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.parametrize("projector_type", OURS)
def test_zero_trains_as_one_process_does(train, trained, device, projector_type):
    """On a GPU with one rank, for NCCL refuses two on one card, and in bfloat16, in which small steps are lost."""
    on_cpu = device == "cpu"
    start = torch.load(trained(projector_type).adapter / "mm_projector.bin", weights_only=True)
    reference = train("one", projector_type)
    runs = {
        "ZeRO-2, 2 ranks": train("zero2", projector_type, ranks=2 if on_cpu else 1, stage=2),
        # On a CPU the gathered tensors share one storage, of which safetensors keeps only the first.
        "ZeRO-3, 1 rank": train("zero3", projector_type, stage=3, save_safetensors=False),
    }
    expected, names = weights(reference), list(start)
    assert losses(reference)[0] > 0.0
    for road, folder in runs.items():
        assert losses(folder) == pytest.approx(losses(reference), rel=1e-3 if on_cpu else 0.03), road
        found = weights(folder)
        assert {name for name in found if "mm_projector" in name} == set(names), road
        for name in names:
            if name.endswith("ln_k_1.bias"):  # has no gradient
                continue
            if not on_cpu:
                torch.testing.assert_close(found[name].float(), expected[name].float(), rtol=0.05, atol=5e-3)
                continue
            step, expected_step = found[name] - start[name], expected[name] - start[name]
            assert step.abs().max() > 0, (road, name)
            # A weight near 1 moves by whole float32 steps of 1e-7, which may fall the other way.
            rounding = torch.finfo(torch.float32).eps * start[name].float().norm()
            assert (step - expected_step).norm() < 0.02 * expected_step.norm() + rounding, (road, name)


@pytest.mark.slow
def test_a_zero3_checkpoint_loads(train, tiny):
    from llava.model.builder import load_pretrained_model

    folder = train("zero3", "saep", stage=3, save_safetensors=False)
    _, model, _, _ = load_pretrained_model(str(folder), None, "llava", device="cpu", device_map="cpu")
    saved = weights(folder)
    for name, value in model.get_model().mm_projector.state_dict().items():
        assert torch.equal(value, saved[f"model.mm_projector.{name}"].half()), name


@pytest.mark.slow
@pytest.mark.parametrize("projector_type", OURS)
def test_zero3_goes_on_from_a_full_checkpoint(train, trained, projector_type):
    """Its projector is built inside DeepSpeed's `zero.Init`, which leaves every weight empty until it is gathered."""
    checkpoint = trained(projector_type).checkpoint
    # With larger steps, the rounding that an over-fitted TokenPacker amplifies grew to 1.1e-3 of the loss once.
    slow = {"checkpoint": checkpoint, "learning_rate": 0.02}
    reference = train("on", projector_type, **slow)
    folder = train("on-zero3", projector_type, stage=3, save_safetensors=False, **slow)
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-3)
    expected, found = weights(reference), weights(folder)
    names = {name for name in expected if "mm_projector" in name}
    assert names == {name for name in found if "mm_projector" in name}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 3])
def test_resuming_continues_the_loss_curve(tiny, trained, monkeypatch, stage):
    """`checkpoint-2` of a run of 4 steps: steps 3 and 4 come out as they did, steps 1 and 2 are not run again.

    Of ZeRO-3, the checkpoint's own weights are empty tensors; the numbers are in its optimizer's files.
    """
    # The trainer's random-number state is no plain tensor file, which newer torch refuses by default.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    options = finetune_arguments(
        tiny.finetune_data,
        tiny.images,
        trained("saep").adapter / "mm_projector.bin",
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        save_safetensors=False,  # on a CPU ZeRO-3's gathered tensors share one storage
    )
    if stage is not None:
        options["deepspeed"] = zero_config(tiny.root / f"zero{stage}-resume.json", stage)
    folder = tiny.root / "runs" / f"llava-resume-{stage}"
    command = training_command(folder, tiny.llm, tiny.coarse_tower, "saep", **options)

    def train():
        log = tiny.root / "runs" / f"resume-{stage}.log"
        return tiny.execute(command, log) if stage is None else run_ranks(command, 1, log, tiny.root)

    train()
    whole, final = losses(folder), weights(folder)
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "pytorch_model.bin").unlink()
    state_file = folder / "checkpoint-2" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    state["log_history"][0]["loss"] = 99.0  # what a resumed run takes over, and a new one has not
    state_file.write_text(json.dumps(state))
    train()
    assert losses(folder) == pytest.approx([99.0, *whole[1:]], rel=1e-5)
    resumed = weights(folder)
    assert all(torch.allclose(resumed[name], value, atol=1e-6) for name, value in final.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_lora_run_goes_on(tiny, trained, monkeypatch, stage):
    """From `checkpoint-1` of 2 steps: DeepSpeed saves it without what is frozen, and loads it again."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    start = trained("saep").adapter / "mm_projector.bin"
    lora = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "learning_rate": 5e-3}
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    options = finetune_arguments(tiny.finetune_data, tiny.images, start, **lora, **saving)
    options["deepspeed"] = zero_config(tiny.root / f"zero{stage}-lora.json", stage)
    folder = tiny.root / "runs" / f"llava-lora-resume-{stage}"
    command = training_command(folder, tiny.llm, tiny.coarse_tower, "saep", **options)

    def train():
        run_ranks(command, 1, tiny.root / "runs" / f"lora-resume-{stage}.log", tiny.root)
        return torch.load(folder / "non_lora_trainables.bin", weights_only=True)

    whole, curve = train(), losses(folder)
    at_checkpoint = torch.load(folder / "checkpoint-1" / "non_lora_trainables.bin", weights_only=True)
    assert at_checkpoint.keys() == whole.keys()
    assert all(at_checkpoint[name].shape == value.shape for name, value in whole.items())
    shutil.rmtree(folder / "checkpoint-2")
    (folder / "non_lora_trainables.bin").unlink()
    again = train()
    assert losses(folder) == curve
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert not all(torch.equal(at_checkpoint[name], value) for name, value in whole.items())
