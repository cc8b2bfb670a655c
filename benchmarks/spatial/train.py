"""One run of the study: LLaVA's model class and our patched builder, two stages, then the questions of a split."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.spatial import vision
from benchmarks.spatial.language import answered_right, encode_dialogue, pad
from benchmarks.spatial.optimize import minimize
from benchmarks.spatial.questions import FAMILIES
from benchmarks.spatial.store import CachedTower, LookingTower, Split

Batch = dict[str, torch.Tensor]
IMAGE = -200  # the picture's place in LLaVA's token ids, llava.constants.IMAGE_TOKEN_INDEX


def build(projector_type: str, vision_folder: Path, language_folder: Path) -> Any:
    """A LlavaLlamaForCausalLM with tower and projector, as LLaVA's training script makes it."""
    from llava.model import LlavaLlamaForCausalLM
    from llava.train.train import ModelArguments

    import llava_projectors

    llava_projectors.patch()
    model = LlavaLlamaForCausalLM.from_pretrained(language_folder)
    arguments = ModelArguments(
        vision_tower=str(vision_folder),
        mm_vision_select_layer=vision.SELECT_LAYER,
        mm_projector_type=projector_type,
    )
    model.get_model().initialize_vision_modules(arguments)
    model.config.tokenizer_padding_side = "right"
    model.config.tokenizer_model_max_length = model.config.max_position_embeddings
    model.config.use_cache = False
    return model


def use_hidden_states(model: Any, split: Split) -> None:
    """From now on, the model's pictures are those of the split, by number."""
    tower = model.get_vision_tower()
    if isinstance(tower, CachedTower):
        layers, vision_model = tower.layers, tower.vision_model
    else:
        layers, vision_model = getattr(tower, "projector_layers", (vision.SELECTED,)), tower.vision_tower
    tower_class = CachedTower if split.path.exists() else LookingTower
    model.model.vision_tower = tower_class(split, layers, vision_model)


def to_batch(indices: list[int], dialogues: list[tuple[list[int], list[int]]]) -> Batch:
    """The arguments of LLaVA's forward; `images` are numbers of pictures."""
    return {**pad(dialogues), "images": torch.tensor(indices)}


def caption_batches(split: Split, seed: int, steps: int, size: int) -> Iterator[Batch]:
    """Stage 1: pictures and what is in them."""
    for indices, _ in _shuffled(split, seed, steps, size):
        dialogues = [encode_dialogue([IMAGE], [("", split.caption(index))]) for index in indices]
        yield to_batch(indices, dialogues)


def question_batches(split: Split, seed: int, steps: int, size: int) -> Iterator[Batch]:
    """Stage 2: pictures and a dialogue of one question of each family, in any order."""
    rng = random.Random(seed)
    for indices, epoch in _shuffled(split, seed, steps, size):
        dialogues = []
        for index in indices:
            turns = list(split.questions(index, epoch).values())
            dialogues.append(encode_dialogue([IMAGE], rng.sample(turns, len(turns))))
        yield to_batch(indices, dialogues)


def _shuffled(split: Split, seed: int, steps: int, size: int) -> Iterator[tuple[list[int], int]]:
    """Pictures of each step, and the number of the epoch; every epoch in another order."""
    rng = random.Random(seed)
    order: list[int] = []
    epoch = -1
    for _ in range(steps):
        if len(order) < size:
            order, epoch = rng.sample(range(split.size), split.size), epoch + 1
        yield order[:size], epoch
        del order[:size]


def fit(model: Any, batches: Iterable[Batch], steps: int, learning_rate: float) -> float:
    """Train what requires a gradient; returns the mean loss of the last tenth of the steps."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    iterator = iter(batches)
    losses = minimize(lambda _: model(**_on(model, next(iterator))).loss, parameters, steps, learning_rate)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


@torch.no_grad()
def evaluate(model: Any, split: Split, size: int = 64) -> dict[str, list[bool]]:
    """Each question by itself: for each family, whether the whole answer is right, picture by picture.

    A picture that has no question of the family is left out.
    """
    model.eval()
    use_hidden_states(model, split)
    asked = [(index, family, turn) for index in range(split.size) for family, turn in split.questions(index).items()]
    found: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        dialogues = [encode_dialogue([IMAGE], [turn]) for _, _, turn in part]
        batch = _on(model, to_batch([index for index, _, _ in part], dialogues))
        _, positions, mask, _, embeddings, labels = model.prepare_inputs_labels_for_multimodal(
            batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
        )
        logits = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions).logits
        for (_, family, _), right in zip(part, answered_right(logits, labels).tolist()):
            found[family].append(right)
    return found


def _on(model: Any, batch: Batch) -> Batch:
    return {name: value.to(model.device) for name, value in batch.items()}


@dataclass(frozen=True)
class Outcome:
    """Of a run: the loss at the end of each stage, and what `evaluate` found."""

    losses: list[float]
    correct: dict[str, list[bool]]


def run(
    projector_type: str,
    seed: int,
    vision_folder: Path,
    language_folder: Path,
    train: Split,
    judged: Split,
    steps: tuple[int, ...],
    batch: int,
    learning_rates: tuple[float, ...],
    device: str = "cpu",
) -> Outcome:
    """Build, train as many stages as there are numbers of steps, answer."""
    torch.manual_seed(seed)
    model = build(projector_type, vision_folder, language_folder)
    use_hidden_states(model, train)
    model.to(device)
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    losses = []
    for batches, number, rate in zip((caption_batches, question_batches), steps, learning_rates):
        losses.append(fit(model, batches(train, seed, number, batch), number, rate))
        model.requires_grad_(True)
    return Outcome(losses, evaluate(model, judged))
