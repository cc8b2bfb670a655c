"""What transformers says on a folder that no LLaVA trained, for vLLM to be compared with.

`python ask_transformers.py FOLDER REFERENCE NEW_REFERENCE`; with `--merge ADAPTED` first a LoRA adapter with random
weights, and a projector that was changed beside it, are merged into a copy of the folder. It runs where vLLM does.
"""

import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "llava_projectors" / "export"))
compare = importlib.import_module("compare")


@torch.no_grad()
def merge(folder, target):
    import peft

    model, processor = compare.load(folder)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(model, settings)
    for name, parameter in wrapped.named_parameters():
        if "multi_modal_projector.modules_to_save" in name:
            parameter.mul_(1.5)
    wrapped.merge_and_unload().save_pretrained(target)
    processor.save_pretrained(target)


@torch.no_grad()
def answered(model, processor, case):
    inputs = compare.inputs_of(processor, case)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=case["max_new_tokens"])
    return {
        **case,
        "logits": model(**inputs).logits[0],
        "answer_ids": output[0, inputs["input_ids"].shape[1] :].tolist(),
    }


def main(folder, reference, new_reference, *option):
    if option:
        merge(folder, option[1])
        folder = option[1]
    model, processor = compare.load(folder)
    cases = [answered(model, processor, case) for case in compare.load_cases(reference)]
    compare.save_cases(cases, Path(new_reference))


if __name__ == "__main__":
    main(*sys.argv[1:])
