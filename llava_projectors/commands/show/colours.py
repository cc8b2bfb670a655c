"""One scale of colours for drawings and pages, clear where a patch has no share, so that the picture shows through."""

from __future__ import annotations

Colour = tuple[int, int, int, int]  # red, green, blue, opacity, 0 to 255

# Bright and saturated: told apart on a grey photograph, on its dark and its light parts.
_STOPS: tuple[tuple[float, Colour], ...] = (
    (0.0, (255, 225, 60, 0)),
    (0.05, (255, 225, 60, 110)),
    (0.35, (255, 150, 20, 190)),
    (0.7, (225, 30, 60, 220)),
    (1.0, (130, 0, 110, 235)),
)


def table(size: int = 256) -> list[Colour]:
    """Colours of the shares from 0 to the largest, evenly spaced.

    Example:
        >>> table()[0], table()[255]
        ((255, 225, 60, 0), (130, 0, 110, 235))
    """
    return [_at(number / (size - 1)) for number in range(size)]


def _at(value: float) -> Colour:
    for (low, start), (high, end) in zip(_STOPS, _STOPS[1:]):
        if value <= high:
            part = (value - low) / (high - low)
            red, green, blue, opacity = (round(a + (b - a) * part) for a, b in zip(start, end))
            return red, green, blue, opacity
    return _STOPS[-1][1]


def faded(value: int) -> int:
    """What a shade of grey becomes beneath the colours: lighter, so that they are seen on dark parts too."""
    return round(90 + value * 165 / 255)
