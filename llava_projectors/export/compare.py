"""Compare an exported folder with what LLaVA said, where transformers is current.

`python compare.py FOLDER REFERENCE [DEVICE]`; the device is the CPU unless it is given.

The reference is a file of `llava_projectors.export.verify`. This file imports nothing of the
package, because the environment that it runs in need not have it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import torch


def save_cases(cases: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a reference: pictures as uint8 [H, W, C], so that it can be read without unpickling any class."""
    import numpy

    saved = [{**case, "images": [torch.from_numpy(numpy.array(image)) for image in case["images"]]} for case in cases]
    torch.save({"cases": saved}, path)


def load_cases(path: Union[str, Path]) -> list[dict[str, Any]]:
    """Read a reference, with pictures as PIL images."""
    from PIL import Image

    cases: list[dict[str, Any]] = torch.load(path, weights_only=True)["cases"]
    return [{**case, "images": [Image.fromarray(image.numpy()) for image in case["images"]]} for case in cases]


def load(folder: str, trust_remote_code: bool = True) -> tuple[Any, Any]:
    """Model, in float32, and processor of a folder."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=trust_remote_code, dtype=torch.float32, local_files_only=True
    )
    return model.eval(), AutoProcessor.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )


def inputs_of(processor: Any, case: dict[str, Any]) -> Any:
    """The processor's output for one case of the reference."""
    return processor(text=case["prompt"], return_tensors="pt", **visual_inputs(case))


def visual_inputs(case: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a processor for the pictures of a case: as pictures, padded ones or a video."""
    pictures, given_as = case["images"], case.get("given_as", "pictures")
    if given_as == "video":
        return {"images": None, "videos": [pictures]}
    return {"images": pictures, **({"image_aspect_ratio": "pad"} if given_as == "pad" else {})}


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of logits of the same shape, as a part of the largest expected one; infinite for others, and for NaN."""
    if found.shape != expected.shape:
        return math.inf
    part = float((found - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(part) else part


@torch.no_grad()
def compare(model: Any, processor: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Logits, pixels, token ids and the answer against one case of the reference."""
    inputs = inputs_of(processor, case).to(model.device)
    logits = model(**inputs).logits[0, :, : case["logits"].shape[-1]].cpu()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=case["max_new_tokens"])
    answer = output[0, inputs["input_ids"].shape[1] :].tolist()
    text = processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    image_id = model.config.image_token_id
    ids = [token for token in inputs["input_ids"][0].tolist() if token != image_id]
    return result(case, logits, inputs["pixel_values"].cpu(), ids, answer, text)


def result(
    case: dict[str, Any],
    logits: torch.Tensor,
    pixels: torch.Tensor,
    ids: list[int],
    answer: list[int],
    text: str,
) -> dict[str, Any]:
    """How what was found differs from one case of the reference.

    Args:
        case: of the reference.
        logits: found, [positions, tokens that LLaVA knows].
        pixels: likewise, [tiles, 3, side, side].
        ids: of the prompt, without pictures.
        answer: ids of the answer.
        text: of the answer.
    """
    same_length = logits.shape == case["logits"].shape
    same_tiles = pixels.shape == case["pixel_values"].shape
    return {
        "positions": len(logits) - len(case["logits"]),
        "logits": largest_difference(logits, case["logits"]),
        "same_argmax": same_length and bool((logits.argmax(-1) == case["logits"].argmax(-1)).all()),
        "pixels": float((pixels - case["pixel_values"]).abs().max()) if same_tiles else math.inf,
        "same_ids": ids == [token for token in case["input_ids"] if token >= 0],
        "same_answer": answer == case["answer_ids"],
        "same_text": text == case["text"],
        "text": text,
    }


def main(folder: str, reference: str, device: str = "cpu") -> int:
    """Print one JSON object for each case."""
    model, processor = load(folder)
    model.to(device)
    for case in load_cases(reference):
        print(json.dumps(compare(model, processor, case)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
