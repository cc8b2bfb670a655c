"""The loader of LLaVA or of a fork, called so that the whole model is on one device."""

from __future__ import annotations

import importlib
import inspect
import os
from typing import Any, Optional


def load(source: str, base: Optional[str], name: str, device: str, package: str = "llava") -> tuple[Any, Any, Any]:
    """Tokenizer, model and image processor of a checkpoint.

    LLaVA-NeXT's loader takes no device, moves its tower to CUDA unless `device_map` is `auto`, and asks for flash
    attention unless it is told otherwise.

    Args:
        source: folder or hub name of the checkpoint.
        base: its base model, if any.
        name: by which the loader chooses a class.
        device: `cpu` or `cuda`.
        package: that LLaVA, or a fork of it, is imported as.

    Raises:
        ImportError: LLaVA is not installed.
    """
    load_pretrained_model = importlib.import_module(f"{package}.model.builder").load_pretrained_model
    parameters = inspect.signature(load_pretrained_model).parameters
    where = {"device": device, "device_map": device} if "device" in parameters else {"device_map": "auto"}
    if "attn_implementation" in parameters:
        where["attn_implementation"] = "sdpa"
    tokenizer, model, processor, *_ = load_pretrained_model(source, base, name, **where)
    return tokenizer, model.to(device), processor


def name_for(source: str) -> str:
    """A name by which LLaVA's loader chooses the class that a checkpoint's config.json names, whatever its folder is.

    Args:
        source: folder or hub name of the checkpoint.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(source)
    model_type = str(config.get("model_type"))
    name = model_type if "llava" in model_type else "llava"
    name = name.replace("phi3", "phi-3")  # what ViP-LLaVA's loader looks for
    return f"{name}-lora" if os.path.isfile(os.path.join(source, "adapter_config.json")) else name
