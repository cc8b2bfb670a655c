"""LLaVA in current transformers, with a projector of ours in place of the stock one.

An exported folder carries this file and the projector's own, with their imports rewritten (see
`llava_projectors.serving.travel`), so it loads where this package is not installed.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from transformers import AutoModel, RepetitionPenaltyLogitsProcessor
from transformers.models.auto import modeling_auto
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel

from llava_projectors.registry import projector_class
from llava_projectors.serving.layout import Slices, layout_of, pack_pictures, row_of_video
from llava_projectors.serving.travel import write_code

# What transformers does not save again.
KEPT = ("README.md", "chat_template_vllm.jinja")


def projector_of(config: Any) -> nn.Module:
    """The projector that an exported config describes, with fresh weights.

    Args:
        config: with `mm_projector_type`, `mm_projector_options`, `vision_config` and `text_config`.
    """
    cls: Any = projector_class(config.mm_projector_type)
    options = cls.options_from_record(config.mm_projector_options)
    return cls(config.vision_config.hidden_size, config.text_config.hidden_size, **options)


class WholeCheckpoint:
    """Mixed in before a class of transformers: loads all weights or none, and saves the code beside them."""

    _checkpoint_conversion_mapping: dict[str, str] = {}  # noqa: RUF012  names are saved as they are
    base_model_prefix = "model"
    config: Any

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, but weights that the folder lacks are an error: transformers would draw them at random.

        Raises:
            ValueError: weights are missing or of another shape; names them.
        """
        loader: Any = super()
        source = pretrained_model_name_or_path
        model, info = loader.from_pretrained(source, *args, output_loading_info=True, **kwargs)
        mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        lost = sorted({*info["missing_keys"], *mismatched})
        if lost:
            shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
            raise ValueError(
                f"{source} is not whole, these weights would be random: {shown}. "
                "Run `llava-projectors export` on the LLaVA checkpoint anew"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the folder carries the projector's code again, where that travels."""
        saver: Any = super()
        result = saver.save_pretrained(save_directory, *args, **kwargs)
        try:
            write_code(self.config.mm_projector_type, Path(save_directory))
        except ValueError as error:
            logging.getLogger(__name__).warning("%s carries no code of its projector: %s", save_directory, error)
        for name in KEPT:
            source = Path(self.config._name_or_path or "", name)
            if source.is_file() and not (Path(save_directory) / name).exists():
                shutil.copyfile(source, Path(save_directory) / name)
        return result


class LlavaProjectorsModel(WholeCheckpoint, LlavaModel):  # type: ignore[misc]
    """Vision tower, projector and LLM without its head."""

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)  # LlavaModel's own would build the stock projector
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = projector_of(config)
        # `device_map="auto"` puts it on one device: its forward uses weights of its parts together.
        unsplit: Any = getattr(self, "_no_split_modules", None) or ()
        self._no_split_modules = [*unsplit, type(self.multi_modal_projector).__name__]
        self.language_model = AutoModel.from_config(config.text_config)
        self.layout = layout_of(config.image_layout)
        if self.layout.newline:
            self.image_newline = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.post_init()

    def get_image_features(self, pixel_values: torch.Tensor, *args: Any, image_sizes: Any = None, **kwargs: Any) -> Any:
        """As in transformers: for each picture or video its tokens as the LLM gets them, [positions, D].

        Args:
            pixel_values: of all tiles, [T, 3, side, side].
            args: as in transformers.
            image_sizes: [T, 3] of the image processor, where the layout depends on the picture, and for videos.
            kwargs: as in transformers.
        """
        parent: Any = super()
        found = parent.get_image_features(pixel_values, *args, **kwargs)
        has_outputs = hasattr(found, "pooler_output")  # transformers 5
        tokens = found.pooler_output if has_outputs else found
        packed = pack_pictures(self.layout, tokens, image_sizes, self.embeddings_between())
        if not has_outputs:
            return packed
        found.pooler_output = packed
        return found

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, *args: Any, video_grid_thw: Any, **kwargs: Any
    ) -> Any:
        """For vLLM's transformers backend: for each video its tokens as the LLM gets them, [positions, D].

        Args:
            pixel_values_videos: of all frames, [T, 3, side, side].
            args: as in `get_image_features`.
            video_grid_thw: [videos, 3], frames first.
            kwargs: as in `get_image_features`.
        """
        rows = [row_of_video(int(frames)) for frames, *_ in video_grid_thw for _ in range(int(frames))]
        return self.get_image_features(pixel_values_videos, *args, image_sizes=rows, **kwargs)

    def embeddings_between(self) -> Optional[torch.Tensor]:
        """What stands between and behind tokens: `image_newline` [D], or the separators of tiles [2, D]."""
        if isinstance(self.layout, Slices):
            embedding = self.get_input_embeddings()
            ids = torch.tensor(self.layout.separators, device=next(self.multi_modal_projector.parameters()).device)
            separators: torch.Tensor = embedding(ids)
            return separators
        return getattr(self, "image_newline", None)


class LlavaProjectorsForConditionalGeneration(WholeCheckpoint, LlavaForConditionalGeneration):  # type: ignore[misc]
    """The whole model."""

    def __init__(self, config: Any) -> None:
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaProjectorsModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but `repetition_penalty` sees the answer alone: LLaVA generates from embeddings."""
        parent: Any = super()
        processors = parent._get_logits_processor(*args, **kwargs)
        given = [id(processor) for processor in kwargs.get("logits_processor") or ()]  # as its caller wants it
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and id(processor) not in given:
                processor.prompt_ignore_length = kwargs.get("input_ids_seq_length")
        return processors


# By the class of transformers that each takes the place of.
CLASSES: dict[str, Any] = {
    "LlavaModel": LlavaProjectorsModel,
    "LlavaForConditionalGeneration": LlavaProjectorsForConditionalGeneration,
}

# `transformers serve` refuses, and pipelines warn of, classes that these tables do not name. The key is the name of no
# other model.
for _table in ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"):
    _names = getattr(modeling_auto, _table, {})  # the second came with transformers 5
    _names.setdefault("llava_projectors", LlavaProjectorsForConditionalGeneration.__name__)
