"""vLLM on a CPU at 576, 144 and 1 visual tokens a picture.

`python throughput.py make FOLDER` in LLaVA's environment, then `python throughput.py run FOLDER NAME` in vLLM's, once
for each name. It prints the seconds of 32 requests with 8 tokens of answer each, start and warm-up left out. With one
visual token it is what fewer of them cannot save: preparing the picture, the tower, the text, the answer.
"""

import os
import sys
import time
from pathlib import Path

TYPES = {number: f"resampler:num_queries={number}" for number in ("576", "144", "1")}
REQUESTS = 32


def make(root):
    import families

    from llava_projectors.export.convert import export_checkpoint
    from llava_projectors.tiny import assets

    assets.make_vision_tower(root / families.CLIP)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
    families.make_llm("llama", root / "llm-llama", **sizes, num_attention_heads=16, num_key_value_heads=16)
    for name, projector_type in TYPES.items():
        family = families.Family("llama", projector_type, {"image_aspect_ratio": "pad"})
        checkpoint, _ = families.make_checkpoint(root, name, family)
        export_checkpoint(str(checkpoint), root / name, dtype="float32")


def run(root, name):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, whose time can be taken
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(str(root / name), trust_remote_code=True, dtype="float32", max_model_len=1024, enforce_eager=True)
    asked = [
        {
            "prompt": "A chat. USER: <image>\nWhat is this? ASSISTANT:",
            "multi_modal_data": {"image": Image.new("RGB", (400, 300), (number * 7, 90, 200))},
        }
        for number in range(REQUESTS + 1)
    ]
    settings = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    llm.generate(asked[:1], settings)
    processor, wall = time.process_time(), time.perf_counter()
    llm.generate(asked[1:], settings)
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    print(f"{name} visual tokens: {processor:.1f} processor seconds, {wall:.1f} s by the clock", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        run(Path(sys.argv[2]), sys.argv[3])
