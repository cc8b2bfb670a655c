"""What is measured: groups of candidates that differ in the projector alone, and the sizes for each kind of machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import torch
from torch import nn

from benchmarks.speed import flops, models
from benchmarks.speed.models import PATCHES_A_SIDE, STOCK
from benchmarks.speed.naive import NaiveTokenPacker
from llava_projectors import registry
from llava_projectors.projectors import kernels

REDUCING = tuple(f"{name}={stride}" for name in ("saep:stride", "tokenpacker:scale_factor") for stride in (2, 3, 4))
TOKENPACKERS = REDUCING[3:]
NAIVE = tuple(flops.NAIVE + name for name in TOKENPACKERS)
TRITON = tuple(flops.TRITON + name for name in TOKENPACKERS)
# Text beside the images of a prompt; LLaVA's own training samples have a few times as much.
TEXT_TOKENS = 64
DECODED_TOKENS = 8


@dataclass(frozen=True)
class Plan:
    """Sizes of one kind of run.

    Attributes:
        seconds: how long each candidate of a group is measured, about.
        dtypes: of the projector and tower suites.
        batches: of the projector suite.
        tower: vision model of the tower suite.
        tower_batches: its batches.
        model_tower: vision model of the model suite.
        model_llama: LLM of the model suite.
        model_dtype: of the model suite.
        step_batch: sequences in a training step.
        scaling: images a prompt, and prompts a batch.
    """

    seconds: float
    dtypes: tuple[torch.dtype, ...]
    batches: tuple[int, ...]
    tower: models.TowerShape
    tower_batches: tuple[int, ...]
    model_tower: models.TowerShape
    model_llama: models.LlamaShape
    model_dtype: torch.dtype
    step_batch: int
    scaling: tuple[int, ...]


PLANS = {
    "quick": Plan(
        seconds=0.2,
        dtypes=(torch.float32,),
        batches=(1,),
        tower=models.SMALL_TOWER,
        tower_batches=(1,),
        model_tower=models.TINY_TOWER,
        model_llama=models.TINY_LLAMA,
        model_dtype=torch.float32,
        step_batch=1,
        scaling=(1, 2),
    ),
    "cpu": Plan(
        seconds=0.7,
        dtypes=(torch.float32, torch.bfloat16),
        batches=(1, 8, 32),
        tower=models.CLIP_LARGE,
        tower_batches=(1, 4),
        model_tower=models.SMALL_TOWER,
        model_llama=models.SMALL_LLAMA,
        model_dtype=torch.float32,
        step_batch=4,
        scaling=(1, 2, 4, 8),
    ),
    "cuda": Plan(
        seconds=1,
        dtypes=(torch.float32, torch.bfloat16),
        batches=(1, 8, 32),
        tower=models.CLIP_LARGE,
        tower_batches=(1, 8, 32),
        model_tower=models.CLIP_LARGE,
        model_llama=models.LLAVA_7B,
        model_dtype=torch.bfloat16,
        step_batch=4,
        scaling=(1, 2, 4, 8),
    ),
}


@dataclass
class Candidate:
    """One thing to measure.

    Attributes:
        function: runs it once.
        flops: operations of that run.
        visual_tokens: that the LLM sees of one image.
        memory: what to measure the memory of, if not `function`.
    """

    function: Callable[[], Any]
    flops: int
    visual_tokens: int
    memory: Optional[Callable[[], Any]] = None


@dataclass
class Group:
    """Candidates that are measured in one interleaved run; the first is what the others are held against."""

    suite: str
    measure: str
    dtype: torch.dtype
    batch: int
    candidates: dict[str, Candidate]
    images: int = 1
    prepare: Callable[[], None] = field(default=lambda: None)


def projector_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """Forward, and forward with backward, of projectors at the sizes of CLIP-L and a 7B LLM."""
    width, hidden = models.CLIP_LARGE.width, models.LLAVA_7B.width
    for dtype in plan.dtypes:
        has_kernels = device.type == "cuda" and importlib.util.find_spec("triton") is not None
        names = (STOCK, *REDUCING, *NAIVE, *(TRITON if has_kernels else ()))
        projectors = {name: make_projector(name, width, hidden).to(device, dtype) for name in names}
        for batch in plan.batches:
            features = torch.randn(batch, PATCHES_A_SIDE**2, 4 * width, device=device).to(dtype)
            for measure in ("forward", "forward+backward"):
                candidates = {}
                for name, projector in projectors.items():
                    work = flops.projector(name, PATCHES_A_SIDE, width, hidden)
                    # LLaVA's own projector reads one layer.
                    x = features[..., -width:].contiguous() if name == STOCK else features
                    tokens = _visual_tokens(name)
                    if measure == "forward":
                        candidates[name] = Candidate(without_grad(projector, x), batch * work.forward, tokens)
                    else:
                        run, accumulate = forward_backward(projector, x)
                        candidates[name] = Candidate(run, batch * work.both, tokens, memory=accumulate)
                yield Group("projector", measure, dtype, batch, candidates)


def tower_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """LLaVA's single-layer tower and the multi-layer tower, on the same vision model."""
    shape = plan.tower
    for dtype in plan.dtypes:
        vision_model = models.make_vision_model(shape, device, dtype)
        towers = {name: models.make_tower(name, vision_model) for name in (STOCK, "saep")}
        for batch in plan.tower_batches:
            images = torch.randn(batch, 3, models.IMAGE_SIZE, models.IMAGE_SIZE, device=device).to(dtype)
            candidates = {}
            for name, tower in towers.items():
                layers = shape.layers if name == STOCK else shape.selected
                candidates[name] = Candidate(
                    without_grad(tower, images), batch * _tower_flops(shape, layers), _visual_tokens(name)
                )
            yield Group("tower", "forward", dtype, batch, candidates)


def model_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """Prefill, decoding and both training stages of a LLaVA with random weights."""
    family = models.Family(plan.model_tower, plan.model_llama, device, plan.model_dtype)
    llavas = {name: family.make(name) for name in (STOCK, *REDUCING)}
    yield prefill_group("model", family, llavas, batch=1, images=1)
    yield decode_group(family, llavas)
    for measure, train_llm in (("training step, stage 1", False), ("training step, stage 2", True)):
        yield training_group(family, llavas, measure, plan.step_batch, train_llm)


def scaling_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """Prefill over images a prompt and over prompts a batch."""
    family = models.Family(plan.model_tower, plan.model_llama, device, plan.model_dtype)
    llavas = {name: family.make(name) for name in (STOCK, "saep:stride=2", "tokenpacker:scale_factor=3")}
    for images in plan.scaling:
        yield prefill_group("scaling", family, llavas, batch=1, images=images)
    for batch in plan.scaling[1:]:
        yield prefill_group("scaling", family, llavas, batch=batch, images=1)


SUITES: dict[str, Callable[[Plan, torch.device], Iterator[Group]]] = {
    "projector": projector_suite,
    "tower": tower_suite,
    "model": model_suite,
    "scaling": scaling_suite,
}


def prefill_group(suite: str, family: models.Family, llavas: dict[str, Any], batch: int, images: int) -> Group:
    """The prompt's images through tower and projector, and the whole prompt through the LLM, with a cache."""
    inputs = _prompt(family, batch, images)
    candidates = {}
    for name, llava in llavas.items():
        work = _sequence_flops(family, name, images, train_llm=False)
        candidates[name] = Candidate(
            without_grad(llava, **inputs, use_cache=True), batch * work.forward, _visual_tokens(name)
        )
    return Group(suite, "prefill", family.dtype, batch, candidates, images)


def decode_group(family: models.Family, llavas: dict[str, Any]) -> Group:
    """`DECODED_TOKENS` tokens after the prompt, one by one."""
    inputs = _prompt(family, 1, 1)
    candidates = {}
    for name, llava in llavas.items():
        with torch.no_grad():
            cache = llava(**inputs, use_cache=True).past_key_values
        past = TEXT_TOKENS + _visual_tokens(name)
        work = sum(_llama_flops(family, 1, train=False, past=past + n).forward for n in range(DECODED_TOKENS))
        candidates[name] = Candidate(_decode(llava, cache, family.device), work, _visual_tokens(name))
    return Group("model", f"decode {DECODED_TOKENS} tokens", family.dtype, 1, candidates)


def training_group(family: models.Family, llavas: dict[str, Any], measure: str, batch: int, train_llm: bool) -> Group:
    """Forward, backward and AdamW step; the vision model is frozen, the LLM only in stage 1."""
    inputs = _prompt(family, batch, 1)
    labels = inputs["input_ids"]
    projectors = [p for llava in llavas.values() for p in llava.model.mm_projector.parameters()]
    llm = [
        p for name, p in family.shared.named_parameters() if "mm_projector" not in name and "vision_tower" not in name
    ]
    # One optimiser for all: parameters without a gradient, the other types' projectors, are passed over.
    optimizer = torch.optim.AdamW(projectors + (llm if train_llm else []), lr=1e-5, fused=True)

    def prepare() -> None:
        for parameter in llm:
            parameter.requires_grad_(train_llm)

    def step(llava: Any) -> Callable[[], None]:
        def run() -> None:
            llava(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    candidates = {}
    for name, llava in llavas.items():
        work = _sequence_flops(family, name, 1, train_llm=train_llm)
        candidates[name] = Candidate(step(llava), batch * work.both, _visual_tokens(name))
    return Group("model", measure, family.dtype, batch, candidates, prepare=prepare)


class _WithKernels(nn.Module):
    """A projector whose forward has the fused kernels switched on; they choose its backward too."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        before = os.environ.get(kernels.VARIABLE, "0")
        os.environ[kernels.VARIABLE] = "1"
        try:
            return self.projector(features)
        finally:
            os.environ[kernels.VARIABLE] = before


def make_projector(name: str, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """A projector by its name in the tables: `mlp2x_gelu`, a type string, or one after `NAIVE` or `TRITON`."""
    if name == STOCK:
        return nn.Sequential(nn.Linear(mm_hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
    if name.startswith(flops.TRITON):
        return _WithKernels(make_projector(flops.bare(name), mm_hidden_size, hidden_size))
    if name.startswith(flops.NAIVE):
        scale_factor = registry.resolve(name[len(flops.NAIVE) :]).options["scale_factor"]
        return NaiveTokenPacker(mm_hidden_size, hidden_size, scale_factor)
    return registry.build_projector(name, mm_hidden_size, hidden_size)


def _visual_tokens(name: str) -> int:
    side = PATCHES_A_SIDE if name == STOCK else registry.resolve(flops.bare(name)).output_side(PATCHES_A_SIDE)
    return side**2


def forward_backward(projector: nn.Module, features: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A pass as in training, and one that adds to gradients that are there, so that theirs is no part of its memory."""
    with torch.no_grad():
        gradient = torch.ones_like(projector(features))

    def accumulate() -> None:
        projector(features).backward(gradient)

    def run() -> None:
        projector.zero_grad(set_to_none=True)
        accumulate()

    return run, accumulate


def without_grad(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], None]:
    """The call, to be made later, as in inference."""

    def run() -> None:
        with torch.no_grad():
            function(*args, **kwargs)

    return run


def _decode(llava: Any, cache: Any, device: torch.device) -> Callable[[], None]:
    token = torch.ones(1, 1, dtype=torch.long, device=device)

    def run() -> None:
        past = cache
        with torch.no_grad():
            for _ in range(DECODED_TOKENS):
                past = llava(input_ids=token, past_key_values=past, use_cache=True).past_key_values

    return run


def _prompt(family: models.Family, batch: int, images: int) -> dict[str, Any]:
    from llava.constants import IMAGE_TOKEN_INDEX

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, family.llama.vocabulary, (batch, TEXT_TOKENS), generator=generator)
    places = torch.full((batch, images), IMAGE_TOKEN_INDEX)
    size = models.IMAGE_SIZE
    pictures = torch.randn(batch * images, 3, size, size, generator=generator)
    return {
        "input_ids": torch.cat([text[:, :1], places, text[:, 1:]], dim=1).to(family.device),
        "images": pictures.to(family.device, family.dtype),
    }


def _tower_flops(shape: models.TowerShape, layers: int) -> int:
    return flops.vision_tower(PATCHES_A_SIDE, models.PATCH_SIZE, shape.width, shape.intermediate, layers)


def _llama_flops(family: models.Family, positions: int, *, train: bool, past: int = 0) -> flops.Flops:
    shape = family.llama
    return flops.llama(
        positions, shape.width, shape.intermediate, shape.layers, shape.vocabulary, train=train, past=past
    )


def _sequence_flops(family: models.Family, name: str, images: int, *, train_llm: bool) -> flops.Flops:
    """One prompt through tower, projector and LLM, forward, and backward as far as the projector."""
    tower = _tower_flops(family.tower, family.tower.layers if name == STOCK else family.tower.selected)
    projector = flops.projector(name, PATCHES_A_SIDE, family.tower.width, family.llama.width)
    positions = TEXT_TOKENS + images * _visual_tokens(name)
    return (flops.Flops(tower) + projector) * images + _llama_flops(family, positions, train=train_llm)
