"""Chat templates in Jinja for the conversations that LLaVA trains with (`llava/conversation.py`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

from llava_projectors.export.errors import ExportError
from llava_projectors.export.pictures import MORE_SETTING
from llava_projectors.files import read_json

# Around each picture, where `mm_use_im_start_end` is set.
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
_TEXT = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] in ('image', 'video') %}<image>\n{% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
)


_NO_SUCH_ROLE = "{{ raise_exception('this conversation has no ' + message['role'] + ' at this place') }}"
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


def _two_roles(system: str) -> str:
    return _TEXT + (
        "{% if messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) }}{% else %}" + system + "{% endif %} "
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {{ text(message['content']) }} "
        "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ text(message['content']) }}</s>"
        "{% elif message['role'] != 'system' or loop.index0 %}" + _NO_SUCH_ROLE + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


_VICUNA = (
    "A chat between a curious {person} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
)


def _chatml(system: str) -> str:
    start, end = "<|im_start|>", "<|im_end|>\n"
    return (
        _TEXT + start + "system\n"
        "{% if messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) }}{% else %}"
        + system
        + "{% endif %}"
        + end
        + "{% for message in messages %}{% if message['role'] != 'system' %}"
        + start
        + "{{ message['role'] }}\n{{ text(message['content']) }}"
        + end
        + "{% elif loop.index0 %}"
        + _NO_SUCH_ROLE
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + start
        + "assistant\n{% endif %}"
    )


_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_LLAMA_3_ROLE = "<|start_header_id|>{}<|end_header_id|>\n\n"


def _llama_3(dates: str = "") -> str:
    return (
        _TEXT
        + "<|begin_of_text|>"
        + _LLAMA_3_ROLE.format("system")
        + dates
        + "{% if messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) | trim }}{% else %}"
        + _ASSISTANT
        + "{% endif %}<|eot_id|>{% for message in messages %}{% if message['role'] != 'system' %}"
        + _LLAMA_3_ROLE.format("{{ message['role'] }}")
        + "{{ text(message['content']) | trim }}<|eot_id|>{% elif loop.index0 %}"
        + _NO_SUCH_ROLE
        + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}"
        + _LLAMA_3_ROLE.format("assistant")
        + "{% endif %}"
    )


_PHI_3_TURN = "<|{}|>\n{}<|end|>\n"

TEMPLATES = {
    "vicuna_v1": _two_roles(_VICUNA.format(person="user")),
    "llava_v1": _two_roles(_VICUNA.format(person="human")),
    "mistral_instruct": _TEXT
    + (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}[INST] "
        "{% if loop.index0 == 1 and messages[0]['role'] == 'system' and text(messages[0]['content']) %}"
        "<<SYS>>\n{{ text(messages[0]['content']) }}\n<</SYS>>\n\n{% endif %}"
        "{{ text(message['content']) }} [/INST]"
        "{% elif message['role'] == 'assistant' %} {{ text(message['content']) }} </s>"
        "{% elif message['role'] != 'system' or loop.index0 %}" + _NO_SUCH_ROLE + "{% endif %}{% endfor %}"
    ),
    "qwen_1_5": _chatml("You are a helpful assistant."),
    "qwen_2_5": _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "llava_llama_3": _llama_3(),
    "llama_3_1": _llama_3("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"),
    "llava_phi_3": _TEXT
    + "{% if messages[0]['role'] == 'system' %}{% set system = text(messages[0]['content']) %}{% else %}"
    + "{% set system = '"
    + _ASSISTANT
    + "' %}{% endif %}{% if system %}"
    + _PHI_3_TURN.format("system", "{{ system }}")
    + "{% endif %}{% for message in messages %}{% if message['role'] != 'system' %}"
    + _PHI_3_TURN.format("{{ message['role'] }}", "{{ text(message['content']) }}")
    + "{% elif loop.index0 %}"
    + _NO_SUCH_ROLE
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}
# The conversation that a kind of LLM is trained in by the recipe of LLaVA, LLaVA-NeXT or ViP-LLaVA, by the token that
# answers end in; the first whose token the tokenizer has.
USUAL = {
    "llama": (("</s>", "vicuna_v1"), ("<|eot_id|>", "llava_llama_3")),
    "mistral": (("</s>", "mistral_instruct"),),
    "qwen2": (("<|im_end|>", "qwen_1_5"),),
    "phi3": (("<|end|>", "llava_phi_3"),),
}


@dataclass(frozen=True)
class ChatTemplate:
    """How a chat becomes a prompt.

    Attributes:
        name: of LLaVA's conversation, or of the file.
        jinja: the template.
    """

    name: str
    jinja: str


def choose(llm: str, tokens: Collection[str], name: Optional[str], file: Optional[Path], source: Path) -> ChatTemplate:
    """The chat template of an export.

    Args:
        llm: its kind.
        tokens: of its tokenizer.
        name: in `TEMPLATES`, where the user gave one.
        file: in Jinja, likewise.
        source: the checkpoint, for messages.

    Raises:
        ExportError: the file cannot be read, or nothing says which conversation it is.
    """
    if file is not None:
        return ChatTemplate(file.name, _read(file))
    usual = next((found for end, found in USUAL.get(llm, ()) if end in tokens), None)
    chosen = name or usual
    if chosen is None:
        ends = ", ".join(repr(end) for end, _ in USUAL.get(llm, ())) or "token"
        raise ExportError(
            f"{source} has a {llm} LLM and a tokenizer without a {ends} by which its conversation would be known: pass "
            f"--conv-mode with the one that it was trained in ({', '.join(TEMPLATES)}), or --chat-template with a file"
        )
    return ChatTemplate(chosen, TEMPLATES[chosen])


def by_own_template(config: Mapping[str, Any], source: Path, folder: Path) -> Optional[str]:
    """The conversation that LLaVA-MORE trains a Llama in: its prompts come from the tokenizer's own chat template.

    Args:
        config: of the checkpoint.
        source: folder of its tokenizer.
        folder: with the exported tokenizer.

    Returns:
        a name in `TEMPLATES`; None for what LLaVA-MORE did not train.

    Raises:
        ExportError: that template gives other prompts.
    """
    if "llama_3" not in str(config.get(MORE_SETTING)):
        return None
    import jinja2
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    path = source / "chat_template.jinja"  # where newer versions of transformers write it
    own = path.read_text() if path.is_file() else read_json(source / "tokenizer_config.json").get("chat_template")
    chat = [{"role": role, "content": f"say {role}"} for role in ("user", "assistant", "user")]
    try:
        asked = [{"role": "system", "content": _ASSISTANT}, *chat]
        prompt = tokenizer.apply_chat_template(asked, chat_template=own, tokenize=False) if own else None
    except jinja2.TemplateError:
        prompt = None
    for name in ("llava_llama_3", "llama_3_1"):
        if tokenizer.apply_chat_template(chat, chat_template=TEMPLATES[name], tokenize=False) == prompt:
            return name
    raise ExportError(
        f"{source} was trained by LLaVA-MORE, whose prompts come from the tokenizer's own chat_template. It gives "
        "others than llava_llama_3 and llama_3_1: pass --chat-template with a file, or --conv-mode"
    )


def between_marks(template: ChatTemplate, tokens: Collection[str], source: Path) -> ChatTemplate:
    """The template for `mm_use_im_start_end`: pictures stand between two tokens of their own.

    Args:
        template: of the export; a user's own has the tokens already.
        tokens: of the tokenizer.
        source: the checkpoint, for messages.

    Raises:
        ExportError: the tokenizer lacks them, or the user's template.
    """
    missing = [mark for mark in (IMAGE_START, IMAGE_END) if mark not in tokens]
    if missing:
        raise ExportError(
            f"{source} has mm_use_im_start_end and a tokenizer without {' and '.join(missing)}: copy the tokenizer "
            "that LLaVA's script saved"
        )
    if template.name in TEMPLATES:
        return replace(template, jinja=template.jinja.replace("<image>", marked("<image>")))
    if not {IMAGE_START, IMAGE_END} <= {*re.findall(f"{IMAGE_START}|{IMAGE_END}", template.jinja)}:
        raise ExportError(
            f"{source} has mm_use_im_start_end, so that a picture stands as {marked('<image>')}: write it so in "
            f"--chat-template {template.name}"
        )
    return template


def marked(image: str) -> str:
    """`<image>` as `mm_use_im_start_end` writes it."""
    return f"{IMAGE_START}{image}{IMAGE_END}"


def _read(file: Path) -> str:
    """A user's template; errors as `choose`."""
    import jinja2  # with torch

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ExportError(f"--chat-template {file} cannot be read: {error}") from error
    if not text.strip():
        raise ExportError(f"--chat-template {file} is empty")
    try:  # with what transformers adds to Jinja: loop controls, and marks around the assistant's words
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise ExportError(
            f"--chat-template {file} is no Jinja template: line {error.lineno}: {error.message}"
        ) from error
    return text


def write_templates(template: ChatTemplate, adds_start: bool, folder: Path) -> None:
    """Write the template, and the one for servers that add no special tokens to a chat, vLLM among them.

    Args:
        template: of the export.
        adds_start: whether the tokenizer puts a start token in front.
        folder: to write to.
    """
    for_server = "{{ bos_token }}" + template.jinja if adds_start else template.jinja
    (folder / "chat_template.jinja").write_text(template.jinja, encoding="utf-8")
    (folder / "chat_template_vllm.jinja").write_text(for_server, encoding="utf-8")
