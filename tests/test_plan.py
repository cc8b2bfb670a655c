"""The calculator against peaks that the benchmark measured."""

import csv
import re
from pathlib import Path

import pytest
import torch

from llava_projectors.commands.cli import main
from llava_projectors.commands.plan import LLM_SIZES, LlmSizes, activation_bytes, plan

ROOT = Path(__file__).parent.parent
# The LLM of the benchmark on a CPU, and the text beside one picture; see benchmarks/speed.
SMALL, TEXT, BATCH = LlmSizes(1024, 2816, 16), 64, 4


def measured():
    with (ROOT / "benchmarks" / "results" / "cpu.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["measure"].startswith("training step")]
    return [(row["measure"], int(row["visual_tokens"]), float(row["peak_mib"]) * 2**20) for row in rows]


@pytest.mark.parametrize(("measure", "tokens", "peak"), measured())
def test_activations_are_the_measured_peak(measure, tokens, peak):
    """At the end of the forward pass; or, where that is more, of the backward pass, the largest gradient twice."""
    train_llm = measure.endswith("2")
    one = activation_bytes(SMALL, TEXT + tokens, train_llm=train_llm, bytes_each=4, checkpointing=False)
    gradients = 4 * (SMALL.parameters + SMALL.vocabulary * SMALL.width) * train_llm
    assert max(BATCH * one, gradients) == pytest.approx(peak, rel=0.1)


def test_there_is_something_measured():
    assert len(measured()) >= 10
    assert {tokens for _, tokens, _ in measured()} >= {576, 144, 64, 36}


@pytest.mark.parametrize(("name", "billions"), [("7b", 6.738), ("13b", 13.016), ("mistral-7b", 7.242)])
def test_parameters(name, billions):
    assert LLM_SIZES[name].parameters / 1e9 == pytest.approx(billions, abs=1e-3)


def test_checkpointing_keeps_the_layers_inputs():
    for positions in (100, 1000):
        arguments = {"train_llm": True, "bytes_each": 2}
        whole = activation_bytes(SMALL, positions, checkpointing=False, **arguments)
        kept = activation_bytes(SMALL, positions, checkpointing=True, **arguments)
        assert kept < whole / 2


def test_fewer_tokens_leave_room_for_a_larger_batch():
    full, reduced = (plan(t, LLM_SIZES["7b"], gpus=8) for t in ("mlp2x_gelu", "saep"))
    assert (full.positions, reduced.positions) == (676, 244)
    assert reduced.batch > 2 * full.batch > 0
    assert abs(reduced.resident / full.resident - 1) < 0.01
    assert reduced.batch * reduced.per_sample + reduced.resident < 0.9 * 80e9


def test_zero_shards():
    resident = [plan("saep", LLM_SIZES["7b"], zero=stage).resident for stage in range(4)]
    assert resident == sorted(resident, reverse=True)
    # The well-known figures: 16 bytes a parameter without ZeRO, an eighth of them with stage 3 on 8 GPUs.
    assert resident[0] / LLM_SIZES["7b"].parameters == pytest.approx(16, rel=0.02)
    assert (resident[3] - 2 * 304e6) / LLM_SIZES["7b"].parameters == pytest.approx(2, rel=0.02)
    assert plan("saep", LLM_SIZES["7b"], zero=0).batch == 0  # 107 GB do not fit


def test_the_command(capsys):
    command = ["plan", "--llm", "13b", "--gpus", "32", "--memory", "80", "--zero", "3", "--type", "tokenpacker"]
    assert main([*command, "--text", "64"]) == 0
    header, stock, ours = capsys.readouterr().out.splitlines()
    assert header.startswith("type")
    assert stock.split()[:3] == ["mlp2x_gelu", "576", "640"]
    assert ours.split()[:3] == ["tokenpacker", "144", "208"]
    assert main(["plan", "--type", "seap"]) == 1
    assert "did you mean 'saep'" in capsys.readouterr().err


def test_activations_of_a_real_step():
    """A Llama of transformers in this process: what autograd keeps, by hooks, is what is counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2}
    llm, positions = LlmSizes(64, 160, 3, 500), 40
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes, attn_implementation="sdpa"))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own and tensor.is_floating_point():
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(500, (1, positions))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(input_ids=ids, labels=ids)
        kept[out.logits.untyped_storage().data_ptr()] = out.logits.untyped_storage().nbytes()
        counted = activation_bytes(llm, positions, train_llm=True, bytes_each=4, checkpointing=False)
        assert sum(kept.values()) == pytest.approx(counted, rel=0.15)


def test_what_does_not_fit_is_said(capsys):
    assert main(["plan", "--memory", "30"]) == 0
    fits = capsys.readouterr().out
    assert main(["plan", "--memory", "8", "--type", "saep"]) == 1
    stock, saep = capsys.readouterr().out.splitlines()[-2:]
    assert "does not fit" not in fits
    assert stock.startswith("mlp2x_gelu does not fit: ")
    assert re.fullmatch(
        r"saep does not fit: 1\d\.\d GiB for weights, gradients and optimizer states and 0\.\d\d GiB for a sequence, "
        r"in nine tenths of 8 GB",
        saep,
    )
