"""Questions about scenes in LLaVA's conversation format, in families, and the words they are made of."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Optional

from benchmarks.spatial.scenes import IMAGE_SIZE, KINDS, Scene, Thing

Turn = tuple[str, str]  # question, answer

# A picture is this many cells wide and high for questions about absolute position: neither 6 nor
# 4, the sides of the reduced grids, so that no cell is a visual token.
CELLS = 5
# How much further, in pixels, the second nearest object is: closer calls are not asked.
MARGIN = 8


def relative(scene: Scene, rng: random.Random) -> Optional[Turn]:
    """On which side of one object another is; the larger offset is at least 1.5 times the smaller."""
    pairs = [(a, b) for a in scene for b in scene if a is not b and _side(a, b) is not None]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return f"where is the {a.name} seen from the {b.name}", str(_side(a, b))


def _side(a: Thing, b: Thing) -> Optional[str]:
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= 1.5 * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def absolute(scene: Scene, rng: random.Random) -> Optional[Turn]:
    """Row and column of an object's centre, on a grid of 5 x 5 cells."""
    thing = rng.choice(scene)
    return f"in which row and column is the {thing.name}", _cell_of(thing)


def distance(scene: Scene, rng: random.Random) -> Optional[Turn]:
    """Which object is nearest to another, or farthest from it."""
    word, sign = rng.choice([("nearest to", 1), ("farthest from", -1)])
    for thing in rng.sample(scene, len(scene)):
        others = sorted((sign * math.dist((thing.x, thing.y), (o.x, o.y)), o.name) for o in scene if o is not thing)
        if others[1][0] - others[0][0] >= MARGIN:
            return f"what is {word} the {thing.name}", others[0][1]
    return None


def counting(scene: Scene, rng: random.Random) -> Optional[Turn]:
    """How many objects there are of a colour or a shape; never of one that is not there."""
    thing = rng.choice(scene)
    if rng.random() < 0.5:
        return f"how many are {thing.colour}", str(sum(other.colour == thing.colour for other in scene))
    return f"how many are a {thing.shape}", str(sum(other.shape == thing.shape for other in scene))


def existence(scene: Scene, rng: random.Random) -> Optional[Turn]:
    """Whether there is an object; one that is not there has a colour and a shape that are, where possible."""
    if rng.random() < 0.5:
        return f"is there a {rng.choice(scene).name}", "yes"
    names = {thing.name for thing in scene}
    mixed = [f"{a.colour} {b.shape}" for a in scene for b in scene]
    absent = [name for name in mixed if name not in names] or [name for name in KINDS if name not in names]
    return f"is there a {rng.choice(absent)}", "no"


def detail(scene: Scene, rng: random.Random) -> Optional[Turn]:
    """Which letter, seven pixels high, is on an object."""
    thing = rng.choice(scene)
    return f"which letter is on the {thing.name}", thing.letter


FAMILIES: dict[str, Callable[[Scene, random.Random], Optional[Turn]]] = {
    "relative": relative,
    "absolute": absolute,
    "distance": distance,
    "counting": counting,
    "existence": existence,
    "detail": detail,
}
POSITION_FAMILIES = ("relative", "absolute", "distance")


def ask(scene: Scene, rng: random.Random) -> dict[str, Turn]:
    """One question of every family that the scene allows."""
    turns = {family: question(scene, rng) for family, question in FAMILIES.items()}
    return {family: turn for family, turn in turns.items() if turn is not None}


def caption(scene: Scene) -> str:
    """What there is, in reading order: the text of stage 1."""
    things = sorted(scene, key=lambda thing: (thing.y, thing.x))
    return " , ".join(f"{thing.name} {thing.letter} at {_cell_of(thing)}" for thing in things)


def _cell_of(thing: Thing) -> str:
    """Row and column of its centre, from 1."""
    return f"{1 + thing.y * CELLS // IMAGE_SIZE} {1 + thing.x * CELLS // IMAGE_SIZE}"


def conversation(identifier: str, turns: list[Turn]) -> dict[str, Any]:
    """One record of LLaVA's JSON files."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": f"<image>\n{question}" if number == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    return {"id": identifier, "image": f"{identifier}.png", "conversations": messages}
