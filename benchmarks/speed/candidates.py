"""What is measured against what: a projector type, and the implementation of it."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.speed.models import NUM_PATCHES_PER_SIDE, STOCK
from llava_projectors import registry

__all__ = ["EAGER", "NAIVE", "PUBLISHED", "REDUCING", "STOCK", "TRITON", "Subject", "subjects"]

# The library's own code, the published algorithm written plainly, the published code's operations, the fused kernel.
EAGER, NAIVE, PUBLISHED, TRITON = "eager", "naive", "published", "triton"
REDUCING = tuple(f"{name}={stride}" for name in ("saep:stride", "tokenpacker:scale_factor") for stride in (2, 3, 4))


class Subject(NamedTuple):
    """A projector type and the implementation that runs it."""

    type_string: str
    implementation: str = EAGER

    @property
    def visual_tokens(self) -> int:
        """That the LLM sees of one image."""
        side = NUM_PATCHES_PER_SIDE
        return (side if self.type_string == STOCK else registry.resolve(self.type_string).output_side(side)) ** 2


def subjects(*type_strings: str, implementation: str = EAGER) -> list[Subject]:
    """One for each type."""
    return [Subject(type_string, implementation) for type_string in type_strings]
