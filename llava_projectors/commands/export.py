"""What the command `llava-projectors export` does, and prints."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional

from llava_projectors.export.convert import export_checkpoint
from llava_projectors.export.errors import ExportError
from llava_projectors.export.tensors import Output
from llava_projectors.export.verify import LOOSE, TOLERANCE, verify


def export(
    checkpoint: str,
    output: Path,
    base: Optional[str],
    dtype: Optional[str],
    conversation: Optional[str],
    with_verification: bool,
    python: Optional[str],
) -> int:
    """Export, say what was written, verify if asked to; returns the exit status.

    Raises:
        ValueError: the checkpoint cannot be exported, or the folder cannot be compared; says why.
    """
    if with_verification and importlib.util.find_spec("llava") is None:
        raise ExportError("--verify compares with LLaVA, which is not installed here: export in LLaVA's environment")
    done = export_checkpoint(checkpoint, output, base, dtype, conversation, progress_bar)
    before = done.patches_per_side**2
    print(f"{done.resolved.type_string}: {before} -> {done.tokens} visual tokens, written to {output}")
    print(f"Its README.md says how to load and serve it, with transformers and vLLM: {output / 'README.md'}")
    if not with_verification:
        return 0
    largest = verify(output, checkpoint, base, python)
    # LLaVA's loader makes every weight float16.
    tolerance = TOLERANCE if done.dtype == "float16" and base is None else LOOSE
    print("equal" if largest <= tolerance else f"NOT equal: more than {tolerance:.0e}")
    return 0 if largest <= tolerance else 1


def progress_bar(outputs: Sequence[Output]) -> Iterable[Output]:
    """A bar on stderr, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return outputs
    return tqdm(outputs, desc="export", unit="tensor")
