"""Ask vLLM what a reference asks: `python ask_vllm.py FOLDER REFERENCE`; one JSON object for each case."""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "llava_projectors" / "export"))
compare = importlib.import_module("compare")


def main(folder, reference):
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, trust_remote_code=True, dtype="float32", max_model_len=1024, max_num_seqs=4, enforce_eager=True,
        limit_mm_per_prompt={"image": 2},
    )  # fmt: skip
    # vLLM takes pictures, each as the folder's config says.
    cases = [case for case in compare.load_cases(reference) if case["given_as"] == "pictures"]
    # vLLM would lay transparency on white before any processor sees it.
    pictures = [[image.convert("RGB") for image in case["images"]] for case in cases]
    asked = [{"prompt": case["prompt"], "multi_modal_data": {"image": p}} for case, p in zip(cases, pictures)]
    settings = SamplingParams(temperature=0, max_tokens=cases[0]["max_new_tokens"])
    for case, answer in zip(cases, llm.generate(asked, settings)):  # vLLM batches them
        expected = {"answer_ids": case["answer_ids"], "prompt_tokens": len(case["logits"])}
        found = {"answer_ids": list(answer.outputs[0].token_ids), "prompt_tokens": len(answer.prompt_token_ids)}
        print(json.dumps({"found": found, "expected": expected}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
