"""What each hidden state of the vision model knows, by ridge regression: does depth trade position for meaning?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy

from benchmarks.spatial.scenes import GLYPHS, KINDS, NUM_PATCHES_PER_SIDE, PATCH_SIZE, Thing
from benchmarks.spatial.store import Split
from benchmarks.spatial.vision import SELECTED, kind_labels

# How near, in pixels, an object's centre has to be read off the patch that holds it.
NEAR = 2.0
WHAT = {
    "position": f"centre of an object within {NEAR:g} px, from the patch that holds it",
    "letter": "the letter on an object, from that patch",
    "kind": "colour and shape of an object, from that patch",
    "contents": "which of two kinds is in the picture, from the mean of all patches",
}


def probe(train: Split, judged: Split) -> Iterator[tuple[int, str, list[bool]]]:
    """Hidden state, what was asked (a key of `WHAT`), and whether each answer was right."""
    for layer in range(SELECTED + 1):
        patches, pictures = _features(train, layer)
        ours, whole = _features(judged, layer)
        things = [thing for scene in judged.scenes for thing in scene]
        learn = [thing for scene in train.scenes for thing in scene]
        centres = _ridge(patches, numpy.array([_offset(t) for t in learn]), ours)
        error = numpy.abs(centres - numpy.array([_offset(t) for t in things])).max(1)
        yield layer, "position", (error <= NEAR).tolist()
        for what, values in (("letter", [t.letter for t in things]), ("kind", [t.name for t in things])):
            names = list(GLYPHS) if what == "letter" else KINDS
            known = [t.letter if what == "letter" else t.name for t in learn]
            scores = _ridge(patches, _one_hot([names.index(name) for name in known], len(names)), ours)
            yield layer, what, [names[best] == value for best, value in zip(scores.argmax(1), values)]
        present = [kind_labels(scene).tolist() for scene in train.scenes]
        scores = _ridge(pictures, numpy.array(present), whole)
        yield layer, "contents", [_ranks_right(row, judged, index) for index, row in enumerate(scores)]


def _features(split: Split, layer: int) -> tuple[Any, Any]:
    """The patch that holds each object's centre [objects, C], and the mean patch of each picture [pictures, C]."""
    patches, means = [], []
    for scene, states in zip(split.scenes, split.hidden_states):
        state = states[layer].astype(float)
        patches += [state[t.y // PATCH_SIZE * NUM_PATCHES_PER_SIDE + t.x // PATCH_SIZE] for t in scene]
        means.append(state.mean(0))
    return numpy.array(patches), numpy.array(means)


def _offset(thing: Thing) -> tuple[int, int]:
    return thing.x % PATCH_SIZE, thing.y % PATCH_SIZE


def _ridge(features: Any, targets: Any, others: Any, penalty: float = 1e-3) -> Any:
    """Predictions for `others` of a linear map fitted to the targets, on standardised features."""
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    x, y = (features - mean) / deviation, targets - targets.mean(0)
    weights = numpy.linalg.solve(x.T @ x + penalty * len(x) * numpy.eye(x.shape[1]), x.T @ y)
    return (others - mean) / deviation @ weights + targets.mean(0)


def _one_hot(indices: list[int], number: int) -> Any:
    return numpy.eye(number)[indices]


def _ranks_right(scores: Any, split: Split, index: int) -> bool:
    """Whether a kind that is there has a higher score than one that is not."""
    rng = random.Random(index)
    names = [thing.name for thing in split.scenes[index]]
    there = rng.choice(names)
    absent = rng.choice([kind for kind in KINDS if kind not in names])
    return bool(scores[KINDS.index(there)] > scores[KINDS.index(absent)])
