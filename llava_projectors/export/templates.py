"""Chat templates in Jinja for the conversations that LLaVA trains with (`llava/conversation.py`)."""

from __future__ import annotations

_TEXT = (
    "{% macro text(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
)


def _two_roles(system: str) -> str:
    return _TEXT + (
        "{% if messages[0]['role'] == 'system' %}{{ text(messages[0]['content']) }}{% else %}" + system + "{% endif %} "
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {{ text(message['content']) }} "
        "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ text(message['content']) }}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


_VICUNA = (
    "A chat between a curious {person} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
)

TEMPLATES = {
    "vicuna_v1": _two_roles(_VICUNA.format(person="user")),
    "llava_v1": _two_roles(_VICUNA.format(person="human")),
    "mistral_instruct": _TEXT
    + (
        "{% for message in messages %}"
        "{% if message['role'] == 'user' %}[INST] {{ text(message['content']) }} [/INST]"
        "{% elif message['role'] == 'assistant' %} {{ text(message['content']) }} </s>{% endif %}"
        "{% endfor %}"
    ),
}


def with_start_token(template: str) -> str:
    """The template for servers that add no special tokens to a chat, vLLM among them."""
    return "{{ bos_token }}" + template
