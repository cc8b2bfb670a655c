"""The study's LLM: a small Llama that first learns the language of captions and questions, without pictures."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.spatial.questions import CELLS, FAMILIES, Turn, ask, caption
from benchmarks.spatial.scenes import COLOURS, GLYPHS, KINDS, MOST_OBJECTS, SHAPES, make_scene

WIDTH, LAYERS, HEADS, INTERMEDIATE = 128, 4, 4, 384
IGNORE = -100  # label of a position without a loss, as in LLaVA
SPECIAL = ("<pad>", "<s>", "</s>", "USER:", "ASSISTANT:")


# The name of an object is one token, as a common word pair is in a large vocabulary.
_WORD = re.compile("|".join([*KINDS, r"\S+"]))


def _words() -> list[str]:
    """Every word of the generator, found by asking it: fixed, because its seed is."""
    rng = random.Random("words")
    words = {*COLOURS, *SHAPES, *GLYPHS, *map(str, range(max(CELLS, MOST_OBJECTS) + 1))}
    for _ in range(1000):
        scene = make_scene(rng)
        for text in (caption(scene), *(part for turn in ask(scene, rng).values() for part in turn)):
            words.update(_WORD.findall(text))
    return sorted(words)


VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *_words()])}


def encode(text: str) -> list[int]:
    """One number a word or name."""
    return [VOCABULARY[word] for word in _WORD.findall(text)]


def encode_dialogue(context: list[int], turns: list[Turn], learn_context: bool) -> tuple[list[int], list[int]]:
    """Token ids and labels: what stands before the questions, then question and answer in turn.

    Labels are the answers and their end; the context as well, if it is to be learned.
    """
    ids = [VOCABULARY["<s>"], *context]
    labels = [IGNORE, *(context if learn_context else [IGNORE] * len(context))]
    for question, answer in turns:
        asked = [VOCABULARY["USER:"], *encode(question), VOCABULARY["ASSISTANT:"]]
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
        "max_position_embeddings": 512,
        # About 1/sqrt(WIDTH). With transformers' 0.02, made for wide models, nothing is learned for a thousand steps.
        "initializer_range": 0.08,
        "pad_token_id": VOCABULARY["<pad>"],
        "bos_token_id": VOCABULARY["<s>"],
        "eos_token_id": VOCABULARY["</s>"],
    }


def answered_right(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether greedy decoding gives every token of the answer and its end: bool [B], from [B, T, V] and [B, T]."""
    predicted, expected = logits[:, :-1].argmax(-1), labels[:, 1:]
    return ((predicted == expected) | (expected == IGNORE)).all(1)


def pretrain(folder: Path, steps: int, batch: int = 32, learning_rate: float = 1e-3) -> dict[str, float]:
    """Train on captions, each followed by its questions; returns the accuracy of each family, given a caption."""
    from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(0)
    rng = random.Random("language")
    model = LlamaForCausalLM(LlamaConfig(**config_values()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    progress = tqdm(range(steps), desc="language model", unit=" step")
    for step in progress:
        rows = []
        for _ in range(batch):
            scene = make_scene(rng)
            turns = [turn for _ in range(2) for turn in ask(scene, rng).values()]
            rng.shuffle(turns)
            # Captions are soon learned as far as they can be; answers take longer.
            rows.append(encode_dialogue(encode(caption(scene)), turns, learn_context=step % 4 == 0))
        loss = model(**pad(rows)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix_str(f"loss {loss.item():.3f}")
    model.save_pretrained(folder)
    return _accuracy(model, random.Random("language, held out"))


@torch.no_grad()
def _accuracy(model: Any, rng: random.Random, questions: int = 256) -> dict[str, float]:
    asked: dict[str, list[tuple[list[int], list[int]]]] = {family: [] for family in FAMILIES}
    for _ in range(questions):
        scene = make_scene(rng)
        for family, turn in ask(scene, rng).items():
            asked[family].append(encode_dialogue(encode(caption(scene)), [turn], learn_context=False))
    found = {}
    for family, rows in asked.items():
        batch = pad(rows)
        labels = batch.pop("labels")
        found[family] = answered_right(model(**batch).logits, labels).float().mean().item()
    return found
