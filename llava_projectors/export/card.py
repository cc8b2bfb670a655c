"""The model card of an exported folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from llava_projectors.serving.layout import OneTile

CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, llava-projectors]
---

# {name}

LLaVA with the projector `{type_string}` of llava-projectors: \
{tokens} visual tokens per {unit} instead of {patches}.

| | |
|---|---|
| made from | `{source}`{base} |
| projector | `{type_string}`, options {options} |
| hidden states of the vision tower | {layers} of {depth} |
| LLM | {llm}, width {width} |
| conversation | {conversation} |
| dtype | {dtype} |
| exported with | llava-projectors {version} |
| licence | that of the LLM and the training data, which this export does not know: ask where `{origin}` came from. \
The code in this folder is under the MIT licence |

## Use

transformers 4.57 or newer{needs}:

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

image = Image.open("picture.jpg")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code={trust})
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code={trust})
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

vLLM{second_template}:

```bash
vllm serve {name}{code_flag}{template_flag}{one_picture}
```
{several}{spaces}{travels}"""

SPACES = """
LLaVA's tokenizer was saved with `legacy: false`: it gives no space behind `</s>`, the one here does. Prompts \
of one turn are the same tokens; in those of several turns, one token after each `</s>` may differ.
"""
# Where a single picture is cut and several are seen whole, which vLLM's transformers backend cannot tell apart.
ONE_PICTURE = """ --limit-mm-per-prompt '{"image": 1}' --mm-processor-kwargs '{"image_aspect_ratio": "slice"}'"""
SEVERAL = """
This serves prompts of one picture, which is cut into tiles; several in a prompt are seen whole. Where \
llava-projectors is installed beside vLLM, leave the last two options out, and both are served.
"""
# By the kind of the LLM, where its recipe has a rule of its own.
OTHER_SPACES = {
    "phi3": """
Tokens are those of ViP-LLaVA's loader, whose fast tokenizer gives a space behind each special token. Its script \
trains with the slow one and `legacy: false`, which gives none there, and one before a prompt's first special token.
"""
}

TRAVELS_NOT = """
The code of this projector does not travel: {reason}. Install llava-projectors and the package that \
registers `{type_string}` wherever this folder is loaded.
"""


def public_name(source: str) -> str:
    """A hub name as it is, of a folder the last part: the card is published, and where it lay is nobody's business."""
    is_folder = os.path.isabs(source) or os.path.isdir(source) or source.startswith((".", "~"))
    return Path(source).absolute().name if is_folder else source


def model_card(
    config: Mapping[str, Any],
    source: str,
    base: Optional[str],
    name: str,
    conversation: Optional[str],
    travels_not: Optional[str],
    spaces_differ: bool,
) -> str:
    """The text of `README.md`.

    Args:
        config: the exported config.
        source: the checkpoint, as the user gave it.
        base: its base, likewise.
        name: of the folder.
        conversation: the template's name; None where the folder has the source's own and no second one for vLLM.
        travels_not: why the projector's code is not in the folder, or None.
        spaces_differ: see `tokenizer.spaces_differ`.
    """
    vision, text = config["vision_config"], config["text_config"]
    options = {key: value for key, value in config["mm_projector_options"].items() if value is not None}
    return CARD.format(
        name=name,
        type_string=config["mm_projector_type"],
        tokens=config["image_layout"]["token_side"] ** 2,
        unit="picture" if config["image_layout"]["kind"] == OneTile.kind else "tile",
        patches=(vision["image_size"] // vision["patch_size"]) ** 2,
        source=public_name(source),
        base=f" on `{public_name(base)}`" if base else "",
        origin=public_name(base or source),
        options=", ".join(f"`{key}={value}`" for key, value in options.items()),
        layers=", ".join(map(str, config["vision_feature_layer"])),
        depth=vision["num_hidden_layers"],
        llm=text["architectures"][0],
        width=text["hidden_size"],
        dtype=config["torch_dtype"],
        version=config["llava_projectors_version"],
        spaces=OTHER_SPACES.get(text["model_type"], SPACES) if spaces_differ else "",
        **_conversation(name, conversation),
        **_code(config["mm_projector_type"], travels_not),
        **_several(config["image_layout"], travels_not),
    )


def _conversation(name: str, conversation: Optional[str]) -> dict[str, str]:
    """What the card says of chats."""
    if conversation is None:
        return {"conversation": "the source's own", "second_template": "", "template_flag": ""}
    return {
        "conversation": f"`{conversation}` (`chat_template.jinja`)",
        "second_template": "; the second template adds the start token, which vLLM leaves out of chats",
        "template_flag": f" --chat-template {name}/chat_template_vllm.jinja",
    }


def _code(type_string: str, travels_not: Optional[str]) -> dict[str, Any]:
    """What the card says of the projector's code."""
    if travels_not:
        travels = TRAVELS_NOT.format(reason=travels_not, type_string=type_string)
        return {"needs": "", "trust": False, "code_flag": "", "travels": travels}
    needs = " (where llava-projectors is installed, leave `trust_remote_code` out)"
    return {"needs": needs, "trust": True, "code_flag": " --trust-remote-code", "travels": ""}


def _several(layout: Mapping[str, Any], travels_not: Optional[str]) -> dict[str, str]:
    """What the card says of several pictures in vLLM. Code that does not travel runs beside this package alone."""
    if travels_not or layout.get("cuts_several", True):
        return {"one_picture": "", "several": ""}
    return {"one_picture": ONE_PICTURE, "several": SEVERAL}
