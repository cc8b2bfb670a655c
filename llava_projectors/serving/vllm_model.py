"""vLLM's LLaVA with a projector of ours: more layers, fewer tokens, other layouts; the rest is vLLM's.

Imported by vLLM alone, after `vllm.py` has named it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
from vllm.multimodal.parse import ImageEmbeddingItems, ImageSize
from vllm.multimodal.processing import PromptReplacement

from llava_projectors.serving.image_processing import seen_whole
from llava_projectors.serving.layout import (
    Layout,
    Slices,
    layout_of,
    pack_pictures,
    positions_of,
    row_of_video,
    rows_of,
)
from llava_projectors.serving.modeling import projector_of
from llava_projectors.serving.processing import LlavaProjectorsProcessor

# Of the video that vLLM measures its memory with: as many as it takes from a file, unless told otherwise.
FRAMES = 32


class ProcessingInfo(LlavaProcessingInfo):  # type: ignore[misc]
    """What a picture or a video takes in the prompt."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        """This package's own."""
        return self.ctx.get_hf_processor(LlavaProjectorsProcessor, **kwargs)

    def get_supported_mm_limits(self) -> dict[str, Optional[int]]:
        """Any number of pictures; of videos, where they were trained."""
        return {"image": None} if self.layout().video is None else {"image": None, "video": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        """Most positions of a picture, and of the video that memory is measured with."""
        layout = self.layout()
        most = {"image": layout.positions(layout.largest_size())}
        if layout.video is not None:
            most["video"] = layout.video.positions(self.most_frames(seq_len))
        return {modality: most[modality] for modality in mm_counts}

    def most_frames(self, seq_len: int) -> int:
        """Of the video that memory is measured with."""
        video = self.layout().video
        fitting = (n for n in range(1, FRAMES + 1) if video is not None and video.positions(n) <= seq_len)
        return max(fitting, default=1)

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


class DummyInputs(LlavaDummyInputsBuilder):  # type: ignore[misc]
    """The pictures and the video that vLLM measures its memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A place for each."""
        text: str = self.info.get_hf_processor().image_token * sum(mm_counts.values())
        return text

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """As many as asked for."""
        side = self.info.get_hf_processor().image_processor.tile_side
        return {
            **super().get_dummy_mm_data(seq_len, mm_counts, mm_options),
            "video": self._get_dummy_videos(
                width=side, height=side, num_frames=self.info.most_frames(seq_len),
                num_videos=mm_counts.get("video", 0), overrides=mm_options.get("video"),
            ),
        }  # fmt: skip


class Processor(LlavaMultiModalProcessor):  # type: ignore[misc]
    """Tells vLLM which tiles are a picture's or a video's, and how many positions these take."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """As in vLLM. Where several pictures of a prompt are seen whole, vLLM, which prepares each alone, is told so.

        Raises:
            ValueError: pictures beside videos, whose places in the prompt look alike.
        """
        counts = inputs.mm_data_items.get_all_counts()
        if counts.get("image") and counts.get("video"):
            raise ValueError("a prompt takes pictures or videos: send those of the other kind in a request of its own")
        if counts.get("image", 0) > 1 and not self.info.layout().cuts_several:
            settings = {**inputs.hf_processor_mm_kwargs, "image_aspect_ratio": "pad"}
            inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=settings)
        return super().apply(inputs, timing_ctx)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> dict[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        rows = hf_inputs.get("image_sizes")
        if rows is not None:
            counts, start = [], 0
            while start < len(rows):
                counts.append(int(rows[start][2]))
                start += counts[-1]
            modality = "image" if int(rows[0][0]) else "video"
            of_items = MultiModalFieldConfig.flat_from_sizes(modality, torch.tensor(counts))
            fields.update(pixel_values=of_items, image_sizes=of_items)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        layout, image = self.info.layout(), self.info.get_hf_config().image_token_index
        settings = self.info.ctx.get_merged_mm_kwargs(hf_processor_mm_kwargs)
        (is_whole,) = seen_whole(layout, [1], settings.get("image_aspect_ratio"))

        def of_picture(number: int) -> list[int]:
            pictures = mm_items["image"]
            if isinstance(pictures, ImageEmbeddingItems):  # visual tokens, computed elsewhere
                return [image] * int(pictures.get_feature_size(number))
            width, height = pictures.get_image_size(number)
            (row,) = rows_of(layout, [(height, width)], [is_whole])
            return [image] * positions_of(layout, row)

        def of_video(number: int) -> list[int]:
            return [image] * positions_of(layout, row_of_video(mm_items["video"].get_num_frames(number)))

        replacements = {"image": of_picture, "video": of_video}
        return [PromptReplacement(modality, [image], replacements[modality]) for modality in mm_items]


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
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

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """Videos stand where LLaVA-NeXT has them, at `<image>`."""
        placeholder: str = super().get_placeholder_str("image" if modality.startswith("video") else modality, i)
        return placeholder

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        """[T, 3, H, W] -> [T, N, L*C]."""
        features: torch.Tensor = vision_tower(
            pixel_values,
            select_layers=list(self.config.vision_feature_layer),
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )
        return features

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """For each picture or video its tokens as the LLM gets them, [positions, D]."""
        if "pixel_values" not in kwargs:
            # Computed elsewhere, of any lengths; vLLM's own LLaVA takes those of one.
            return list(kwargs.get("image_embeds", ()))
        rows = kwargs.pop("image_sizes", None)
        tokens = super().embed_multimodal(**kwargs)
        extra = getattr(self, "image_newline", None)
        if isinstance(self.layout, Slices):
            extra = self.language_model.embed_input_ids(torch.tensor(self.layout.separators, device=tokens.device))
        return pack_pictures(self.layout, tokens, rows, extra)
