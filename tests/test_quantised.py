"""8 and 4 bits by bitsandbytes, which from 0.50 on runs on a CPU: every type beside LLaVA's own `mlp2x_gelu`."""

import copy
import json
import sys

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from benchmarks.quantised import BITS, RESULTS, STOCK, quantised, relative_errors
from benchmarks.table import read_rows
from llava_projectors import build_projector

bnb = pytest.importorskip("bitsandbytes", minversion="0.50", reason="before 0.50, bitsandbytes needs a GPU")

TYPES = (
    "saep",
    "saep:order=depthwise_first",
    "saep:preset=plain,stride=3",
    "tokenpacker",
    "tokenpacker:scale_factor=3,head_size=32",
    "avg_pool",
    "pixel_shuffle:stride=3",
    "ldpv2",
    "c_abstractor",
    "resampler:num_queries=36",
    "stf:layers=3+7",
    "delta",
)
WIDTHS = (64, 128)
IMAGE = -200
# Convolutions, norms and attention pass errors of a layer on to the next; LLaVA's MLP has two layers.
TIMES_STOCK = 2.5


@pytest.fixture(scope="module")
def stock_errors():
    return relative_errors(STOCK, WIDTHS)


@pytest.mark.parametrize("projector_type", TYPES)
def test_every_type_is_about_as_exact_as_llavas_own(projector_type, stock_errors):
    """On a grid that no stride divides."""
    errors = relative_errors(projector_type, WIDTHS, side=13)
    for bits in BITS:
        assert 0 < errors[bits] < TIMES_STOCK * stock_errors[bits]


def test_the_table_in_the_documents_is_what_was_measured():
    rows = read_rows(RESULTS / "quantised.csv", "error_8bit")
    text = (RESULTS.parents[1] / "docs" / "serving.md").read_text()
    for row in rows:
        shown = " | ".join(f"{100 * float(row[f'error_{bits}bit']):.1f} %" for bits in BITS)
        assert f"| `{row['type']}` | {shown} |" in text
    again = relative_errors("avg_pool")
    (measured,) = (row for row in rows if row["type"] == "avg_pool")
    assert [again[bits] for bits in BITS] == pytest.approx(
        [float(measured[f"error_{bits}bit"]) for bits in BITS], rel=0.05
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("projector_type", TYPES)
def test_gradients_flow_through_quantised_layers(projector_type, bits):
    """As in QLoRA on a whole model: what is before the projector learns, and it is frozen."""
    torch.manual_seed(0)
    projector = build_projector(projector_type, *WIDTHS).half()
    features = torch.randn(2, 144, projector.num_levels * WIDTHS[0]).half()
    gradients = []
    for module, x in ((copy.deepcopy(projector).float(), features.float()), (quantised(projector, bits), features)):
        tokens = module(x.requires_grad_())
        tokens.backward(torch.ones_like(tokens))
        gradients.append(x.grad.float())
    exact, ours = gradients
    assert (ours - exact).norm() < {8: 0.15, 4: 0.6}[bits] * exact.norm()


@pytest.fixture
def loads_without_a_gpu(monkeypatch):
    """transformers 4.37 asks for CUDA before it lets bitsandbytes run, and imports it only then."""
    from transformers.integrations import bitsandbytes as integration
    from transformers.pytorch_utils import Conv1D

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in {"bnb": bnb, "torch": torch, "nn": nn, "Conv1D": Conv1D}.items():
        monkeypatch.setattr(integration, name, value, raising=False)
    # On CPUs with these instructions, layers in 4 bits take multiples of 32 output channels only.
    monkeypatch.setattr(sys.modules["bitsandbytes.nn.modules"], "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def checkpoint(build_model, tiny, tmp_path_factory):
    """A projector type -> its model, in float32 and on random weights, and the folder that it was saved in."""

    def make(projector_type):
        model = build_model(projector_type)
        folder = tmp_path_factory.mktemp("quantised") / f"llava-{projector_type}"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny.llm, use_fast=False).save_pretrained(folder)
        return model, folder

    return make


def tokens_error(model, folder, bits):
    """Of the visual tokens, in what LLaVA's own `--load-8bit` or `--load-4bit` loads; it has to answer too."""
    from llava.model.builder import load_pretrained_model

    _, loaded, _, _ = load_pretrained_model(
        str(folder), None, "llava", device="cpu", device_map="cpu", **{f"load_{bits}bit": True}
    )
    kind = {8: bnb.nn.Linear8bitLt, 4: bnb.nn.Linear4bit}[bits]
    linear = [module for module in loaded.get_model().mm_projector.modules() if isinstance(module, nn.Linear)]
    assert linear
    assert all(isinstance(module, kind) for module in linear)
    images = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, IMAGE, 6, 7]])
    with torch.inference_mode():
        exact, ours = model.encode_images(images), loaded.encode_images(images.half())
        answer = loaded.generate(ids, images=images.half(), do_sample=False, max_new_tokens=2)
        assert loaded(input_ids=ids, images=images.half()).logits.isfinite().all()
    assert answer.numel()
    return ((ours.float() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("bits", BITS)
def test_llavas_own_loader(checkpoint, can_generate, loads_without_a_gpu, bits):
    stock = tokens_error(*checkpoint(STOCK), bits)
    for projector_type in ("saep", "tokenpacker"):
        # On a tower of 32 channels, TokenPacker's initial weights of 0.02 make signals that small errors change more.
        assert tokens_error(*checkpoint(projector_type), bits) < 2 * TIMES_STOCK * stock


def test_qlora_by_llavas_own_script(llava_train, loads_without_a_gpu, tmp_path, monkeypatch):
    """`--bits 4`: the LLM in 4 bits, the projector whole, trained and saved."""
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "prepare_model", lambda self, model, **_: model)  # which it puts on a GPU
    layers = []
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", counted(bnb.nn.Linear4bit.forward, layers))
    settings = {"lora_enable": True, "lora_r": 4, "bits": 4, "max_steps": 2, "no_cuda": True, "bf16": True}
    llava_train("saep", **settings)
    assert len(set(layers)) == 2 * 7 + 1  # two layers of Llama and its head; the projector has further linear layers
    history = json.loads((tmp_path / "llava-x" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["loss"] > 0 for entry in history if "loss" in entry)
    saved = torch.load(tmp_path / "llava-x" / "non_lora_trainables.bin", weights_only=True)
    found = {name.split("mm_projector.")[1]: value for name, value in saved.items() if "mm_projector." in name}
    expected = build_projector("saep", 32, 80).state_dict()
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    assert all(value.is_floating_point() and value.isfinite().all() for value in found.values())


def counted(forward, layers):
    """The forward of a class, which notes the modules that it is called on."""

    def noting(self, *args, **kwargs):
        layers.append(id(self))
        return forward(self, *args, **kwargs)

    return noting
