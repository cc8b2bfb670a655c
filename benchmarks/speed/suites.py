"""What is measured: groups of candidates that differ in the projector alone, and the sizes for each kind of machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Optional
from unittest import mock

import torch
from torch import nn

from benchmarks.speed import flops, models
from benchmarks.speed.candidates import NAIVE, PUBLISHED, REDUCING, STOCK, TRITON, Subject, subjects
from benchmarks.speed.models import NUM_PATCHES_PER_SIDE
from benchmarks.speed.naive import NaiveTokenPacker, PublishedTokenPacker
from llava_projectors import registry
from llava_projectors.projectors import tokenpacker

TOKENPACKERS = REDUCING[3:]
SCALED = subjects(STOCK, "saep:stride=2", "tokenpacker:scale_factor=3")  # of the suites that vary the load
# Text beside the images of a prompt; LLaVA's own training samples have a few times as much.
TEXT_TOKENS = 64
DECODED_TOKENS = 8  # one by one after a prompt
GENERATED_TOKENS = 32  # by LLaVA's `generate`, the prompt included in the time
# What is trained in a step beside the projector; of LoRA the rank that LLaVA's scripts have.
STAGE_1, LORA, STAGE_2 = "stage 1", "LoRA", "stage 2"
LORA_RANK, LORA_SCALE = 128, 2.0


@dataclass(frozen=True)
class Plan:
    """Sizes of one kind of run.

    Attributes:
        seconds: how long each candidate of a group is measured, about.
        graphs: whether CUDA graphs are replayed: all of the projector and tower suites, and prefill once more.
        dtypes: of the projector and tower suites.
        projector_widths: C and D of the projector suite.
        tokenpackers: implementations beside which TokenPacker's own stands there.
        batches: of the projector suite.
        tower: vision model of the tower suite.
        tower_batches: its batches.
        model_tower: vision model of the model suite.
        model_llama: LLM of the model suite.
        model_dtype: of the model suite.
        prefills: of the model suite, (prompts per batch, images per prompt).
        decode: whether the model suite decodes, at batch 1, where a GPU waits for the host.
        steps: what is trained in the training steps.
        step_batch: sequences in a training step.
        checkpointing: whether they run with gradient checkpointing, as LLaVA's scripts do.
        generate: batches of the generate suite.
        scaling: images per prompt, and prompts per batch.
    """

    seconds: float
    graphs: bool
    dtypes: tuple[torch.dtype, ...]
    projector_widths: tuple[int, int]
    tokenpackers: tuple[str, ...]
    batches: tuple[int, ...]
    tower: models.TowerShape
    tower_batches: tuple[int, ...]
    model_tower: models.TowerShape
    model_llama: models.LlamaShape
    model_dtype: torch.dtype
    prefills: tuple[tuple[int, int], ...]
    decode: bool
    steps: tuple[str, ...]
    step_batch: int
    checkpointing: bool
    generate: tuple[int, ...]
    scaling: tuple[int, ...]


LLAVA_7B_WIDTHS = (models.CLIP_LARGE.width, models.LLAVA_7B.width)
PLANS = {
    "quick": Plan(
        seconds=0.2,
        graphs=False,
        dtypes=(torch.float32,),
        projector_widths=LLAVA_7B_WIDTHS,
        tokenpackers=(NAIVE,),
        batches=(1,),
        tower=models.SMALL_TOWER,
        tower_batches=(1,),
        model_tower=models.TINY_TOWER,
        model_llama=models.TINY_LLAMA,
        model_dtype=torch.float32,
        prefills=((1, 1),),
        decode=True,
        steps=(STAGE_1, STAGE_2),
        step_batch=1,
        checkpointing=True,
        generate=(1, 2),
        scaling=(1, 2),
    ),
    "cpu": Plan(
        seconds=0.7,
        graphs=False,
        dtypes=(torch.float32, torch.bfloat16),
        projector_widths=LLAVA_7B_WIDTHS,
        tokenpackers=(NAIVE,),
        batches=(1, 8, 32),
        tower=models.CLIP_LARGE,
        tower_batches=(1, 4),
        model_tower=models.SMALL_TOWER,
        model_llama=models.SMALL_LLAMA,
        model_dtype=torch.float32,
        prefills=((1, 1),),
        decode=True,
        steps=(STAGE_1, STAGE_2),
        step_batch=4,
        checkpointing=False,
        generate=(),
        scaling=(1, 2, 4, 8),
    ),
    "cuda": Plan(
        seconds=0.4,
        graphs=True,
        dtypes=(torch.bfloat16,),
        projector_widths=LLAVA_7B_WIDTHS,
        tokenpackers=(PUBLISHED, TRITON),
        batches=(32, 8, 1),
        tower=models.CLIP_LARGE,
        tower_batches=(32, 8, 1),
        model_tower=models.CLIP_LARGE,
        model_llama=models.LLAVA_7B,
        model_dtype=torch.bfloat16,
        prefills=((1, 8), (8, 1), (1, 1)),
        decode=False,
        steps=(STAGE_1, LORA, STAGE_2),  # the last is what may not fit
        step_batch=16,
        checkpointing=True,
        generate=(1, 8, 32),
        scaling=(1, 2, 4, 8, 16, 32),
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
        generated: tokens that it gives.
    """

    function: Callable[[], Any]
    flops: int
    visual_tokens: int
    memory: Optional[Callable[[], Any]] = None
    generated: int = 0


@dataclass
class Group:
    """Candidates that are measured in one interleaved run; the first is what the others are held against.

    With `graph`, each is timed as the replay of a CUDA graph, if all of them can be captured.
    """

    suite: str
    measure: str
    dtype: torch.dtype
    batch: int
    candidates: dict[Subject, Candidate]
    images: int = 1
    graph: bool = False


def projector_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """Forward, and forward with backward, of projectors alone."""
    width, hidden = plan.projector_widths
    chosen = subjects(STOCK, *REDUCING)
    for implementation in plan.tokenpackers:
        if implementation != TRITON or importlib.util.find_spec("triton") is not None:
            chosen += subjects(*TOKENPACKERS, implementation=implementation)
    for dtype in plan.dtypes:
        with device:
            projectors = {subject: make_projector(subject, width, hidden).to(dtype) for subject in chosen}
        # Types that read equally many layers read the same tensor.
        levels = {subject: getattr(projector, "num_levels", 1) for subject, projector in projectors.items()}
        for batch in plan.batches:
            features = {
                count: torch.randn(batch, NUM_PATCHES_PER_SIDE**2, count * width, device=device).to(dtype)
                for count in set(levels.values())
            }
            for measure in ("forward", "forward+backward"):
                candidates = {}
                for subject, projector in projectors.items():
                    work = flops.projector(subject, NUM_PATCHES_PER_SIDE, width, hidden)
                    x = features[levels[subject]]
                    tokens = subject.visual_tokens
                    if measure == "forward":
                        candidates[subject] = Candidate(without_grad(projector, x), batch * work.forward, tokens)
                    else:
                        run, accumulate = forward_backward(projector, x)
                        candidates[subject] = Candidate(run, batch * work.both, tokens, memory=accumulate)
                yield Group("projector", measure, dtype, batch, candidates, graph=plan.graphs)


# A vision model -> the tower around it. The first is LLaVA's own.
TOWERS: dict[Subject, Callable[[Any], Any]] = {
    Subject(STOCK): partial(models.make_tower, STOCK),
    Subject("saep"): partial(models.make_tower, "saep"),
}


def tower_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """LLaVA's single-layer tower and what can stand in its place, on the same vision model."""
    shape = plan.tower
    for dtype in plan.dtypes:
        vision_model = models.make_vision_model(shape, device, dtype)
        towers = {subject: make(vision_model) for subject, make in TOWERS.items()}
        for batch in plan.tower_batches:
            images = torch.randn(batch, 3, models.IMAGE_SIZE, models.IMAGE_SIZE, device=device).to(dtype)
            candidates = {}
            for subject, tower in towers.items():
                layers = shape.layers if subject.type_string == STOCK else shape.selected
                work = batch * _tower_flops(shape, layers)
                candidates[subject] = Candidate(without_grad(tower, images), work, subject.visual_tokens)
            yield Group("tower", "forward", dtype, batch, candidates, graph=plan.graphs)


def model_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """Prefill, decoding and training steps of a LLaVA with random weights."""
    family = models.Family(plan.model_tower, plan.model_llama, device, plan.model_dtype)
    llavas = {subject: family.make(subject.type_string) for subject in subjects(STOCK, *REDUCING)}
    for batch, images in plan.prefills:
        for graph in (True, False)[1 - plan.graphs :]:
            yield prefill_group("model", family, llavas, batch, images, graph=graph)
    if plan.decode:
        yield decode_group(family, llavas)
    for step in plan.steps:
        with trained_part(family, step) as parameters, models.in_training(llavas.values(), plan.checkpointing):
            yield training_group(family, llavas, step, plan.step_batch, parameters, plan.checkpointing)


def generate_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """LLaVA's `generate` over prompts per batch, one image in each."""
    family = models.Family(plan.model_tower, plan.model_llama, device, plan.model_dtype)
    llavas = {subject: family.make(subject.type_string) for subject in SCALED}
    for batch in plan.generate:
        yield generate_group(family, llavas, batch)


def scaling_suite(plan: Plan, device: torch.device) -> Iterator[Group]:
    """Prefill over images per prompt and over prompts per batch."""
    family = models.Family(plan.model_tower, plan.model_llama, device, plan.model_dtype)
    llavas = {subject: family.make(subject.type_string) for subject in SCALED}
    for images in plan.scaling:
        yield prefill_group("scaling", family, llavas, batch=1, images=images)
    for batch in plan.scaling[1:]:
        yield prefill_group("scaling", family, llavas, batch=batch, images=1)


SUITES: dict[str, Callable[[Plan, torch.device], Iterator[Group]]] = {
    "projector": projector_suite,
    "tower": tower_suite,
    "model": model_suite,
    "generate": generate_suite,
    "scaling": scaling_suite,
}


def prefill_group(
    suite: str, family: models.Family, llavas: dict[Subject, Any], batch: int, images: int, *, graph: bool = False
) -> Group:
    """The prompt's images through tower and projector, and the whole prompt through the LLM, with a cache."""
    inputs = _prompt(family, batch, images)
    candidates = {}
    for subject, llava in llavas.items():
        work = _sequence_flops(family, subject, images, train_llm=False)
        run = partial(prefill_of_one_shape, llava) if graph else llava
        candidates[subject] = Candidate(
            without_grad(run, **inputs, use_cache=True), batch * work.forward, subject.visual_tokens
        )
    name = "prefill, graph" if graph else "prefill"
    return Group(suite, name, family.dtype, batch, candidates, images, graph)


def prefill_of_one_shape(llava: Any, input_ids: torch.Tensor, images: torch.Tensor, **arguments: Any) -> Any:
    """LLaVA's forward for prompts of `_prompt`, whose images have known places: nothing is read back to the host."""
    batch = len(input_ids)
    last = 1 + len(images) // batch
    embed = llava.get_model().embed_tokens
    visual = llava.encode_images(images).unflatten(0, (batch, -1)).flatten(1, 2)
    embeddings = torch.cat([embed(input_ids[:, :1]), visual, embed(input_ids[:, last:])], dim=1)
    return llava(inputs_embeds=embeddings, **arguments)


def generate_group(family: models.Family, llavas: dict[Subject, Any], batch: int) -> Group:
    """`GENERATED_TOKENS` tokens for each prompt; the last one is not run through the LLM again."""
    inputs = _prompt(family, batch, 1)
    count = GENERATED_TOKENS
    candidates = {}
    for subject, llava in llavas.items():
        work = _sequence_flops(family, subject, 1, train_llm=False)
        past = TEXT_TOKENS + subject.visual_tokens
        for number in range(count - 1):
            work += _llama_flops(family, 1, train=False, past=past + number)
        run = partial(llava.generate, inputs["input_ids"], images=inputs["images"])
        run = partial(run, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)
        candidates[subject] = Candidate(run, batch * work.forward, subject.visual_tokens, generated=batch * count)
    return Group("generate", f"generate {count} tokens", family.dtype, batch, candidates)


def decode_group(family: models.Family, llavas: dict[Subject, Any]) -> Group:
    """`DECODED_TOKENS` tokens after the prompt, one by one."""
    inputs = _prompt(family, 1, 1)
    candidates = {}
    for subject, llava in llavas.items():
        with torch.no_grad():
            cache = llava(**inputs, use_cache=True).past_key_values
        past = TEXT_TOKENS + subject.visual_tokens
        work = sum(_llama_flops(family, 1, train=False, past=past + n).forward for n in range(DECODED_TOKENS))
        candidates[subject] = Candidate(_decode(llava, cache, family.device), work, subject.visual_tokens)
    return Group("model", f"decode {DECODED_TOKENS} tokens", family.dtype, 1, candidates)


@contextmanager
def trained_part(family: models.Family, step: str) -> Iterator[list[nn.Parameter]]:
    """What of the LLM, shared by all types, is trained in a step; all else of it is frozen as long as this lasts."""
    shared = family.shared.named_parameters()
    llm = [p for name, p in shared if "mm_projector" not in name and "vision_tower" not in name]
    for parameter in llm:
        parameter.requires_grad_(step == STAGE_2)
    try:
        if step == LORA:
            with _lora(family) as added:
                yield added
        else:
            yield llm if step == STAGE_2 else []
    finally:
        for parameter in llm:
            parameter.requires_grad_(True)


@contextmanager
def _lora(family: models.Family) -> Iterator[list[nn.Parameter]]:
    """LoRA beside every linear layer of the decoder; yields its weights."""
    layers = family.shared.model.layers
    found = [
        (parent, name, child)
        for parent in layers.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    added: list[Any] = []
    with models.default_dtype(family.dtype), family.device:
        for parent, name, linear in found:
            wrapped = WithLora(linear, LORA_RANK, LORA_SCALE)
            added += [wrapped.down.weight, wrapped.up.weight]
            setattr(parent, name, wrapped)
    try:
        yield added
    finally:
        for parent, name, linear in found:
            setattr(parent, name, linear)


class WithLora(nn.Module):
    """A linear layer and two of low rank beside it, computed as peft does without dropout."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.linear(x) + self.up(self.down(x)) * self.scale


def training_group(
    family: models.Family,
    llavas: dict[Subject, Any],
    step_name: str,
    batch: int,
    parameters: Sequence[nn.Parameter],
    checkpointing: bool = False,
) -> Group:
    """Forward, backward and AdamW step of projector and `parameters`; the vision model is frozen."""
    inputs = _prompt(family, batch, 1)
    labels = inputs["input_ids"]
    projectors = [p for llava in llavas.values() for p in llava.model.mm_projector.parameters()]
    # One optimiser for all: parameters without a gradient, the other types' projectors, are passed over.
    optimizer = torch.optim.AdamW([*projectors, *parameters], lr=1e-5, fused=True)
    rank = LORA_RANK if step_name == LORA else 0

    def step(llava: Any) -> Callable[[], None]:
        def run() -> None:
            try:
                llava(**inputs, labels=labels, use_cache=False).loss.backward()
                optimizer.step()
            finally:  # where memory ran out, the next candidate needs it
                optimizer.zero_grad(set_to_none=True)

        return run

    candidates = {}
    for subject, llava in llavas.items():
        work = _sequence_flops(
            family, subject, 1, train_llm=step_name == STAGE_2, lora_rank=rank, checkpointing=checkpointing
        )
        candidates[subject] = Candidate(step(llava), batch * work.both, subject.visual_tokens)
    name = f"training step, {step_name}" + ", checkpointing" * checkpointing
    return Group("model", name, family.dtype, batch, candidates)


class _WithKernels(nn.Module):
    """TokenPacker with the fused kernel in the place of its region attention, in its backward pass too."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.num_levels = projector.num_levels

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        from benchmarks.speed.region_attention import FusedAttend  # imports Triton

        with mock.patch.object(tokenpacker, "_attend", FusedAttend.apply):
            return self.projector(features)


def make_projector(subject: Subject, mm_hidden_size: int, hidden_size: int) -> nn.Module:
    """The module, with fresh weights."""
    if subject.type_string == STOCK:
        return nn.Sequential(nn.Linear(mm_hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size))
    references = {NAIVE: NaiveTokenPacker, PUBLISHED: PublishedTokenPacker}
    if subject.implementation in references:
        scale_factor = registry.resolve(subject.type_string).options["scale_factor"]
        return references[subject.implementation](mm_hidden_size, hidden_size, scale_factor)
    projector = registry.build_projector(subject.type_string, mm_hidden_size, hidden_size)
    return _WithKernels(projector) if subject.implementation == TRITON else projector


def forward_backward(projector: nn.Module, features: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """A pass as in training, and one that adds to gradients that are there, so that theirs is no part of its memory."""
    gradients: list[torch.Tensor] = []  # of the tokens, made by the first call

    def accumulate() -> None:
        tokens = projector(features)
        if not gradients:
            gradients.append(torch.ones_like(tokens))
        tokens.backward(gradients[0])

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
    return flops.vision_tower(NUM_PATCHES_PER_SIDE, models.PATCH_SIZE, shape.width, shape.intermediate, layers)


def _llama_flops(family: models.Family, positions: int, **how: Any) -> flops.Flops:
    shape = family.llama
    return flops.llama(positions, shape.width, shape.intermediate, shape.layers, shape.vocabulary, **how)


def _sequence_flops(
    family: models.Family, subject: Subject, images: int, *, train_llm: bool, **how: Any
) -> flops.Flops:
    """One prompt through tower, projector and LLM, forward, and backward as far as the projector."""
    layers = family.tower.layers if subject.type_string == STOCK else family.tower.selected
    tower = _tower_flops(family.tower, layers)
    projector = flops.projector(subject, NUM_PATCHES_PER_SIDE, family.tower.width, family.llama.width)
    positions = TEXT_TOKENS + images * subject.visual_tokens
    return (flops.Flops(tower) + projector) * images + _llama_flops(family, positions, train=train_llm, **how)
