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
    cases = compare.load_cases(reference)
    asked = [{"prompt": case["prompt"], "multi_modal_data": {"image": case["images"]}} for case in cases]
    settings = SamplingParams(temperature=0, max_tokens=cases[0]["max_new_tokens"])
    for case, answer in zip(cases, llm.generate(asked, settings)):  # vLLM batches them
        expected = {"answer_ids": case["answer_ids"], "ids": [token for token in case["input_ids"] if token >= 0]}
        found = {"answer_ids": list(answer.outputs[0].token_ids), "prompt_tokens": len(answer.prompt_token_ids)}
        print(json.dumps({"found": found, "expected": expected, "images": len(case["images"])}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
