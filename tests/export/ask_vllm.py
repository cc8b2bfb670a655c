"""Ask vLLM what a reference asks: `python ask_vllm.py FOLDER REFERENCE [ASPECT [RANKS]]`, one JSON object a case.

ASPECT is one of `aspect_of`: vLLM is told that pictures are seen so, and asked about those that are; `all`, which is
usual, asks about all. With `embeddings` vLLM gets the visual tokens of single pictures, which transformers computed.
RANKS split the LLM, one processor core each.
"""

import importlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "llava_projectors" / "export"))
compare = importlib.import_module("compare")


def aspect_of(layout, case):
    """How the pictures of a case are seen, as vLLM's transformers backend has to be told; `None` if it need not be."""
    cuts_several = layout.get("cuts_several", True)
    several = case["given_as"] == "pictures" and len(case["images"]) > 1
    if case["given_as"] == "pad" or (several and not cuts_several):
        return "pad"
    return "None" if cuts_several else "slice"


def question(case):
    """What vLLM takes. It would lay transparency on white before any processor sees it."""
    pictures = [image.convert("RGB") for image in case["images"]]
    if case["given_as"] == "video":
        return {"prompt": case["prompt"], "multi_modal_data": {"video": pictures}}
    settings = {"image_aspect_ratio": "pad"} if case["given_as"] == "pad" else {}
    return {"prompt": case["prompt"], "multi_modal_data": {"image": pictures}, "mm_processor_kwargs": settings}


def embeddings_of(folder, cases):
    """What vLLM takes in the place of each case's picture."""
    model, processor = compare.load(folder)
    for case in cases:
        inputs = processor(case["images"], return_tensors="pt")
        yield model.model.get_image_features(**inputs).pooler_output[0].detach()[None]


def main(folder, reference, aspect="all", ranks="1"):
    if ranks != "1":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, sorted(os.sched_getaffinity(0))[: int(ranks)]))
    from vllm import LLM, SamplingParams

    layout = json.loads((Path(folder) / "config.json").read_text())["image_layout"]
    cases = compare.load_cases(reference)
    if aspect == "embeddings":
        cases = [case for case in cases if case["given_as"] == "pictures" and len(case["images"]) == 1]
    elif aspect != "all":
        cases = [case for case in cases if aspect_of(layout, case) == aspect]
    asked = [question(case) for case in cases]
    if aspect == "embeddings":
        for one, tokens in zip(asked, embeddings_of(folder, cases)):
            one["multi_modal_data"] = {"image": tokens}
    kinds = {"image", *("video" for case in cases if case["given_as"] == "video")}
    llm = LLM(
        folder, trust_remote_code=True, dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True,
        limit_mm_per_prompt=dict.fromkeys(kinds, 2), tensor_parallel_size=int(ranks), gpu_memory_utilization=0.3,
        enable_mm_embeds=aspect == "embeddings",
        mm_processor_kwargs={"image_aspect_ratio": aspect} if aspect in ("pad", "slice") else None,
    )  # fmt: skip
    settings = SamplingParams(temperature=0, max_tokens=cases[0]["max_new_tokens"])
    answers = llm.generate(asked, settings)  # vLLM batches them
    for case, answer in zip(cases, answers):
        expected = {"answer_ids": case["answer_ids"], "prompt_tokens": len(case["logits"])}
        found = {"answer_ids": list(answer.outputs[0].token_ids), "prompt_tokens": len(answer.prompt_token_ids)}
        print(json.dumps({"found": found, "expected": expected}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
