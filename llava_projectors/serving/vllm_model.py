"""vLLM's LLaVA with a projector of ours: another projector, more layers, fewer tokens; the rest is vLLM's.

Imported by vLLM alone, after `vllm.py` has named it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from llava_projectors.serving.modeling import build_projector


class ProcessingInfo(LlavaProcessingInfo):  # type: ignore[misc]
    """What a picture takes in the prompt."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """The exported number, whatever the size: every picture becomes one grid."""
        return int(self.get_hf_config().image_seq_length)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=ProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaProjectorsForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """The model that an exported `config.json` names. Under tensor parallelism every rank holds the whole projector."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        config.projector_hidden_act = "gelu"  # of the stock projector, which is replaced at once
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        with self._mark_tower_model(vllm_config, "image"):
            self.multi_modal_projector = build_projector(config)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, L*C]."""
        features: torch.Tensor = vision_tower(
            pixel_values,
            select_layers=list(self.config.vision_feature_layer),
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )
        return features
