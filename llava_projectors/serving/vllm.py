"""A plugin of vLLM (entry point group `vllm.general_plugins`): exported folders run in vLLM's own tower and LLM.

Without it vLLM runs the folder through its transformers backend, which needs `--trust-remote-code`.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM where the class for an exported folder is; vLLM calls this in each of its processes."""
    from vllm import ModelRegistry

    name = "LlavaProjectorsForConditionalGeneration"
    if name not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(name, f"llava_projectors.serving.vllm_model:{name}")
