"""The study's LLM: a small Llama that first learns the language of captions and questions, without pictures.

In the place of a picture it is given points of its objects, in any order, each the sum of the
embeddings of the words that describe it, blurred. So it knows the language, and how an answer is
found in what is seen, before the first visual token, as a large LLM does; to say what is where in
those words is left to the projector.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.spatial.optimize import Pause, minimize, mixed_precision
from benchmarks.spatial.questions import CELLS, FAMILIES, Turn, ask, caption
from benchmarks.spatial.scenes import (
    COLOURS,
    GLYPHS,
    IMAGE_SIZE,
    KINDS,
    MOST_OBJECTS,
    NUM_PATCHES_PER_SIDE,
    SHAPES,
    Scene,
    Thing,
    make_scene,
)
from benchmarks.spatial.sizes import SIZES

WIDTH, LAYERS = SIZES.llm_width, SIZES.llm_layers
HEADS, INTERMEDIATE = max(4, WIDTH // 64), 3 * WIDTH
IGNORE = -100  # label of a position without a loss, as in LLaVA
# No word before an answer: the last word of a question is the object it is about, and one step of
# attention finds that. With LLaVA's "ASSISTANT:" between, a model of this size learns much later.
SPECIAL = ("<pad>", "<s>", "</s>", "USER:")
# Tokens in the place of a picture; what is seen stands in any of them. The fewest hold the three points of each object
# that `scene_batch` shows then at most, and two more; the most are as many as the full grid has.
FEWEST_PLACES, MOST_PLACES = 3 * MOST_OBJECTS + 2, NUM_PATCHES_PER_SIDE**2
POSITIONS = 5  # words of position on each axis; what lies between two is a mixture of them
MOST_BLUR = 2.0  # of what is seen, in standard deviations

# The name of an object is one token, as a common word pair is in a large vocabulary.
_WORD = re.compile("|".join([*KINDS, r"\S+"]))
# Of the pre-training: scenes per step, and the highest rate.
BATCH, LEARNING_RATE = 16, 1e-3


def _words() -> list[str]:
    """Every word of the generator, found by asking it: fixed, because its seed is."""
    rng = random.Random("words")
    positions = {f"{axis}{number}" for axis in "xy" for number in range(POSITIONS)}
    words = {*positions, *COLOURS, *SHAPES, *GLYPHS, *map(str, range(max(CELLS, MOST_OBJECTS) + 1))}
    for _ in range(1000):
        scene = make_scene(rng)
        for text in (caption(scene), *(part for turn in ask(scene, rng).values() for part in turn)):
            words.update(_WORD.findall(text))
    return sorted(words)


VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *_words()])}


def encode(text: str) -> list[int]:
    """One number a word or name."""
    return [VOCABULARY[word] for word in _WORD.findall(text)]


def encode_dialogue(context: list[int], turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Token ids and labels: what stands before the questions, then question and answer in turn.

    Labels are the answers and their end.
    """
    ids = [VOCABULARY["<s>"], *context]
    labels = [IGNORE] * len(ids)
    for question, answer in turns:
        asked = [VOCABULARY["USER:"], *encode(question)]
        answered = [*encode(answer), VOCABULARY["</s>"]]
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
    return ids, labels


def pad(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of ids and labels as one batch, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [VOCABULARY["<pad>"]] * (longest - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [IGNORE] * (longest - len(row)) for _, row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row, _ in rows])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def config_values() -> dict[str, Any]:
    """For a LlamaConfig or LlavaConfig."""
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": WIDTH,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": SIZES.llm_positions,
        # About 1/sqrt(WIDTH). With transformers' 0.02, made for wide models, nothing is learned for a thousand steps.
        "initializer_range": 0.08 * (128 / WIDTH) ** 0.5,
        "attention_bias": True,
        "pad_token_id": VOCABULARY["<pad>"],
        "bos_token_id": VOCABULARY["<s>"],
        "eos_token_id": VOCABULARY["</s>"],
    }


def answered_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether greedy decoding gives every token of the answer and its end: bool [B], from [B, T, V] and [B, T]."""
    predicted, expected = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((predicted == expected) | (expected == IGNORE)).all(1)


def scene_batch(
    model: Any, scenes: Sequence[Scene], turns: Sequence[list[Turn]], rng: random.Random, difficulty: float = 0.0
) -> dict[str, Any]:
    """The arguments of the model's forward: what is seen of each scene, then a dialogue about it.

    `difficulty`, 0 to 1, blurs what is seen and spreads it over more places. Random numbers are drawn on the CPU,
    so that they are the same on every device.
    """
    places = rng.randint(FEWEST_PLACES, FEWEST_PLACES + round(difficulty * (MOST_PLACES - FEWEST_PLACES)))
    batch = pad([encode_dialogue([VOCABULARY["<pad>"]] * places, dialogue) for dialogue in turns])
    words = torch.zeros(len(scenes), places, len(VOCABULARY))
    for row, scene in zip(words, scenes):
        seen = [point for thing in scene for point in points(thing, rng, 1 + places // 16)]
        for place, point in zip(rng.sample(range(places), len(seen)), seen):
            for word, weight in point.items():
                row[place, VOCABULARY[word]] = weight
    embed = model.get_input_embeddings()
    device = embed.weight.device
    words, batch = words.to(device), {name: value.to(device) for name, value in batch.items()}
    sums = words @ embed.weight
    blur = MOST_BLUR * difficulty * torch.rand(len(scenes), 1, 1).to(device) * sums.detach()[words.any(2)].std()
    text = embed(batch.pop("input_ids"))
    sums = sums + blur * torch.randn(sums.shape).to(device)
    return {"inputs_embeds": torch.cat([text[:, :1], sums, text[:, 1 + places :]], dim=1), **batch}


def points(thing: Thing, rng: random.Random, most_others: int) -> Iterator[dict[str, float]]:
    """What there is to say, and how much of it, of an object's centre, which has the letter, and of other points."""
    yield {**_look(thing, thing.x, thing.y), thing.letter: 1.0}
    for _ in range(rng.randint(0, most_others)):
        yield _look(thing, *(centre + rng.randint(-thing.radius, thing.radius) for centre in (thing.x, thing.y)))


def _look(thing: Thing, x: int, y: int) -> dict[str, float]:
    """Colour, shape and position, which is between two words of each axis."""
    found = {thing.colour: 1.0, thing.shape: 1.0}
    for axis, value in (("x", x), ("y", y)):
        exact = value / IMAGE_SIZE * (POSITIONS - 1)
        found[f"{axis}{int(exact)}"] = 1 - exact % 1
        found[f"{axis}{int(exact) + 1}"] = exact % 1
    return found


def _some_turns(scene: Scene, rng: random.Random) -> list[Turn]:
    """Two questions of each family, in any order."""
    turns = [turn for _ in range(2) for turn in ask(scene, rng).values()]
    return rng.sample(turns, len(turns))


def pretrain(
    folder: Path,
    steps: int,
    device: str = "cpu",
    deadline: float = math.inf,
) -> dict[str, float]:
    """Train on dialogues about scenes; returns the accuracy of each family, given what is seen.

    Raises:
        TimeIsUp: at the deadline; another call goes on.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rng = random.Random("language")
    model = LlamaForCausalLM(LlamaConfig(**config_values())).to(device)
    pause = Pause(folder.with_suffix(".unfinished"), rng, deadline)
    minimize(
        lambda step: _loss(model, step, steps, [make_scene(rng) for _ in range(BATCH)], rng),
        list(model.parameters()),
        steps,
        LEARNING_RATE,
        weight_decay=0.01,
        description="language model",
        pause=pause,
    )
    model.save_pretrained(folder)
    return _accuracy(model, random.Random("language, held out"))


def _loss(model: Any, step: int, steps: int, scenes: list[Scene], rng: random.Random) -> torch.Tensor:
    turns = [_some_turns(scene, rng) for scene in scenes]
    # Captions are soon learned as far as they can be; answers take longer.
    if step % 4 == 0:
        turns = [[("", caption(scene)), *dialogue] for scene, dialogue in zip(scenes, turns)]
    # Exact at first, or nothing is learned; then ever less so, or no projector comes near enough to begin with.
    difficulty = min(1.0, max(0.0, (step / steps - 0.4) / 0.3))
    batch = scene_batch(model, scenes, turns, rng, difficulty)
    with mixed_precision(model.device):
        loss: torch.Tensor = model(**batch).loss
    return loss


@torch.no_grad()
def _accuracy(model: Any, rng: random.Random, questions: int = 256) -> dict[str, float]:
    """How often all of an answer is right, for each family, given the objects."""
    asked: dict[str, list[tuple[Scene, list[Turn]]]] = {family: [] for family in FAMILIES}
    for _ in range(questions):
        scene = make_scene(rng)
        for family, turn in ask(scene, rng).items():
            asked[family].append((scene, [turn]))
    found = {}
    for family, pairs in asked.items():
        scenes, turns = zip(*pairs)
        batch = scene_batch(model, scenes, turns, rng)
        labels = batch.pop("labels")
        found[family] = answered_right(model(**batch).logits, labels).float().mean().item()
    return found
