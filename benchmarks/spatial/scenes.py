"""Pictures with exact ground truth: coloured shapes, a letter a few pixels high on each, things that distract."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from benchmarks.spatial.sizes import SIZES
from llava_projectors.tiny.assets import photographs

IMAGE_SIZE, PATCH_SIZE = SIZES.image_size, 14
NUM_PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 215),
    "yellow": (235, 205, 50),
    "purple": (140, 50, 170),
    "cyan": (60, 195, 205),
}
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
# Five columns and seven rows of pixels, a row a number.
GLYPHS = {
    "A": (14, 17, 17, 31, 17, 17, 17),
    "C": (15, 16, 16, 16, 16, 16, 15),
    "E": (31, 16, 16, 30, 16, 16, 31),
    "H": (17, 17, 17, 31, 17, 17, 17),
    "L": (16, 16, 16, 16, 16, 16, 31),
    "T": (31, 4, 4, 4, 4, 4, 4),
    "X": (17, 17, 10, 4, 10, 17, 17),
    "Z": (31, 1, 2, 4, 8, 16, 31),
}
GLYPH_WIDTH, GLYPH_HEIGHT = 5, 7
FEWEST_OBJECTS, MOST_OBJECTS = SIZES.objects


@dataclass(frozen=True)
class Thing:
    """One object of a scene: no two share colour and shape.

    Attributes:
        colour: a key of `COLOURS`.
        shape: one of `SHAPES`.
        letter: a key of `GLYPHS`, drawn on it.
        x: of its centre, pixels from the left.
        y: of its centre, pixels from the top.
        radius: half its width, pixels.
    """

    colour: str
    shape: str
    letter: str
    x: int
    y: int
    radius: int

    @property
    def name(self) -> str:
        """As questions call it."""
        return f"{self.colour} {self.shape}"

    def covers(self, x: float, y: float) -> bool:
        """Whether a pixel shows it, by its bounding box."""
        return abs(x - self.x) <= self.radius and abs(y - self.y) <= self.radius


Scene = tuple[Thing, ...]


def make_scene(rng: random.Random) -> Scene:
    """Objects at free positions and of free sizes, none over another."""
    things: list[Thing] = []
    for kind in rng.sample(KINDS, rng.randint(FEWEST_OBJECTS, MOST_OBJECTS)):
        while True:
            radius = rng.randint(*SIZES.radii)
            x, y = (rng.randint(radius, IMAGE_SIZE - 1 - radius) for _ in range(2))
            if all(max(abs(x - t.x), abs(y - t.y)) > radius + t.radius + 2 for t in things):
                break
        colour, shape = kind.split()
        things.append(Thing(colour, shape, rng.choice(list(GLYPHS)), x, y, radius))
    return tuple(things)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene: RGB, `IMAGE_SIZE` square. The background and what distracts are from `rng`."""
    image = _photograph(rng) if SIZES.has_photographs else _shade(rng)
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        _draw_shape(canvas, thing)
        _draw_glyph(canvas, thing)
    return image


def _shade(rng: random.Random) -> Image.Image:
    """One shade of grey, with grey lines and circles."""
    shade = rng.randint(90, 170)
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (shade, shade, shade))
    canvas = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 10)):
        grey = (rng.randint(60, 200),) * 3
        x, y = rng.randrange(IMAGE_SIZE), rng.randrange(IMAGE_SIZE)
        if rng.random() < 0.5:
            canvas.line((x, y, x + rng.randint(-40, 40), y + rng.randint(-40, 40)), fill=grey, width=rng.randint(1, 3))
        else:
            r = rng.randint(2, 6)
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=grey)
    return image


def _photograph(rng: random.Random) -> Image.Image:
    """A square of a photograph, as large as the picture or larger, mirrored or not."""
    whole = rng.choice(_photographs())
    side = rng.randint(IMAGE_SIZE, min(whole.size))
    left, top = rng.randint(0, whole.width - side), rng.randint(0, whole.height - side)
    part = whole.resize((IMAGE_SIZE, IMAGE_SIZE), box=(left, top, left + side, top + side))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


@cache
def _photographs() -> list[Image.Image]:
    """Those that scikit-learn ships."""
    return [Image.open(path).convert("RGB") for path in sorted(photographs().glob("*.jpg"))]


def _draw_shape(canvas: ImageDraw.ImageDraw, thing: Thing) -> None:
    x, y, r, fill = thing.x, thing.y, thing.radius, COLOURS[thing.colour]
    if thing.shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "square":
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=fill)
    else:
        arm = r // 2
        canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


def _draw_glyph(canvas: ImageDraw.ImageDraw, thing: Thing) -> None:
    """In black, in the middle of the object."""
    left, top = thing.x - GLYPH_WIDTH // 2, thing.y - GLYPH_HEIGHT // 2
    for row, bits in enumerate(GLYPHS[thing.letter]):
        for column in range(GLYPH_WIDTH):
            if bits >> (GLYPH_WIDTH - 1 - column) & 1:
                canvas.point((left + column, top + row), fill=(0, 0, 0))
