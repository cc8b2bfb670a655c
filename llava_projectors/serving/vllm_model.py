"""vLLM's LLaVA with a projector of ours: more layers, fewer tokens, other layouts; the rest is vLLM's.

Imported by vLLM alone, after `vllm.py` has named it.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageSize

from llava_projectors.serving.layout import Layout, Slices, layout_of, pack_pictures
from llava_projectors.serving.modeling import projector_of
from llava_projectors.serving.processing import LlavaProjectorsProcessor


class ProcessingInfo(LlavaProcessingInfo):  # type: ignore[misc]
    """What a picture takes in the prompt."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """This package's own."""
        return self.ctx.get_hf_processor(LlavaProjectorsProcessor, **kwargs)

    def get_supported_mm_limits(self) -> dict[str, Optional[int]]:
        """One picture, where several of a prompt are laid out otherwise: vLLM prepares each by itself."""
        return {"image": None if self.layout().cuts_several else 1}

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """By the picture's size, as the exported layout has it."""
        return self.layout().positions((image_height, image_width))

    def get_image_size_with_most_features(self) -> ImageSize:
        """A picture with the most positions."""
        height, width = self.layout().largest_size()
        return ImageSize(width=width, height=height)

    def layout(self) -> Layout:
        """How visual tokens lie in the prompt."""
        return layout_of(self.get_hf_config().image_layout)


class Processor(LlavaMultiModalProcessor):  # type: ignore[misc]
    """Tells vLLM which tiles are a picture's."""

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> dict[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        rows = hf_inputs.get("image_sizes")
        if rows is not None:
            counts, start = [], 0
            while start < len(rows):
                counts.append(int(rows[start][2]))
                start += counts[-1]
            of_pictures = MultiModalFieldConfig.flat_from_sizes("image", torch.tensor(counts))
            fields.update(pixel_values=of_pictures, image_sizes=of_pictures)
        return fields


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class LlavaProjectorsForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """The model that an exported `config.json` names. Under tensor parallelism every rank holds the whole projector."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"model.image_newline": "image_newline"}
    )

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        config.projector_hidden_act = "gelu"  # of the stock projector, which is replaced at once
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.layout = layout_of(config.image_layout)
        with self._mark_tower_model(vllm_config, "image"):
            self.multi_modal_projector = projector_of(config)
        if self.layout.newline:
            self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """[T, 3, H, W] -> [T, N, L*C]."""
        features: torch.Tensor = vision_tower(
            pixel_values,
            select_layers=list(self.config.vision_feature_layer),
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )
        return features

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """For each picture its tokens as the LLM gets them, [positions, D]."""
        rows = kwargs.pop("image_sizes", None)
        tokens = super().embed_multimodal(**kwargs)
        if not len(tokens) or "pixel_values" not in kwargs:
            return tokens
        extra = getattr(self, "image_newline", None)
        if isinstance(self.layout, Slices):
            extra = self.language_model.embed_input_ids(torch.tensor(self.layout.separators, device=tokens.device))
        return pack_pictures(self.layout, tokens, rows, extra)
