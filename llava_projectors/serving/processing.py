"""The processor of an exported folder: prompts with pictures -> token ids and pixels, the same on every version."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from transformers import AutoTokenizer, BatchFeature, LlavaProcessor

from llava_projectors.serving.hook import PROCESSOR_AUTO_MAP, STOCK_NAMES
from llava_projectors.serving.image_processing import (
    LlavaProjectorsImageProcessor,
    flat,
    seen_whole,
    size_of,
    to_picture,
)
from llava_projectors.serving.layout import Row, Size, positions_of, row_of_video, rows_of

ONE_WAY = (
    "this model cuts a single picture into tiles and sees several of a prompt whole, which vLLM's transformers backend "
    "cannot tell apart. Install llava-projectors beside vLLM, or start it with --mm-processor-kwargs "
    """'{"image_aspect_ratio": "slice"}' --limit-mm-per-prompt '{"image": 1}' for prompts of one picture, or with """
    """--mm-processor-kwargs '{"image_aspect_ratio": "pad"}' for pictures that are seen whole"""
)


class LlavaProjectorsProcessor(LlavaProcessor):  # type: ignore[misc]
    """As in transformers, but the number of positions is counted by each picture's size."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.auto_map = PROCESSOR_AUTO_MAP

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, under the name of its own class, which gives way to this one."""
        parent: Any = super()
        settings: dict[str, Any] = parent.to_dict(*args, **kwargs)
        return {**settings, "processor_class": STOCK_NAMES["processor_class"]}

    @property
    def video_processor(self) -> LlavaProjectorsImageProcessor:
        """What prepares videos; no such attribute where none were trained."""
        processor: LlavaProjectorsImageProcessor = self.image_processor
        if processor.layout.video is None:
            raise AttributeError("video_processor: this model was not trained on videos")
        return processor

    @property
    def video_token(self) -> str:
        """Videos stand where pictures do."""
        token: str = self.image_token
        return token

    @classmethod
    def _get_arguments_from_pretrained(cls, source: Any, *_: Any, **kwargs: Any) -> list[Any]:
        """The two parts, of the classes that belong to the folder."""
        kwargs.pop("use_fast", None)  # an image processor of one kind only
        return [
            LlavaProjectorsImageProcessor.from_pretrained(source, **kwargs),
            AutoTokenizer.from_pretrained(source, **kwargs),
        ]

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """Prompts and their pictures, in one list or one list for each prompt -> what the model takes.

        Args:
            images: see `LlavaProjectorsImageProcessor.preprocess`; text with an address is fetched.
            text: a prompt or a list of them, with `<image>` where a picture or a video stands.
            videos: in the place of pictures: each a list of its frames, or an array of them.
            audio: refused.
            kwargs: of the tokenizer, `return_tensors`, `return_mm_token_type_ids` and
                `return_text_replacement_offsets`, as in transformers; `image_aspect_ratio` of the image processor.

        Raises:
            ValueError: prompts with more or fewer `<image>` than there are pictures, or pictures beside videos.
        """
        images, videos = (None if isinstance(one, (list, tuple)) and not one else one for one in (images, videos))
        if audio or (videos is not None and images is not None):
            raise ValueError("a call takes pictures or videos, and text")
        settings = dict(_flatten(kwargs))
        return_tensors = settings.pop("return_tensors", None)
        wants_offsets = settings.pop("return_text_replacement_offsets", False)
        aspect = settings.pop("image_aspect_ratio", None)
        prompts = [text] if isinstance(text, str) else list(text or ())
        rows, data = self._visual(images, videos, prompts, aspect)
        offsets: list[list[dict[str, Any]]] = []
        if text is not None:
            if rows:
                prompts, offsets = self._expand(prompts, rows, "image" if videos is None else "video")
            data = {**self._tokens(prompts, settings), **data}
        if wants_offsets and videos is not None:
            # vLLM's transformers backend asks, and knows the parts of videos by these names.
            data["pixel_values_videos"] = data.pop("pixel_values")
            data["video_grid_thw"] = [(frames, 1, 1) for *_, frames in rows]
            del data["image_sizes"]
        result = BatchFeature(data, tensor_type=return_tensors)
        if wants_offsets:
            result["text_replacement_offsets"] = offsets
        return result

    def _visual(
        self, images: Any, videos: Any, prompts: list[str], aspect: Optional[str]
    ) -> tuple[list[Row], dict[str, Any]]:
        """A row for each picture or video, and their pixels."""
        if videos is not None:
            videos = [flat(video) for video in videos]
            self._places(prompts, len(videos))
            return [row_of_video(len(frames)) for frames in videos], dict(self.image_processor(None, videos=videos))
        pictures = [] if images is None else [self._fetch(image) for image in flat(images)]
        if not pictures:
            return [], {}
        layout = self.image_processor.layout
        whole = seen_whole(layout, self._places(prompts, len(pictures)), aspect)
        rows = rows_of(layout, [size_of(picture) for picture in pictures], whole)
        return rows, dict(self.image_processor(pictures, whole=whole))

    def _places(self, prompts: list[str], count: int) -> list[int]:
        """How many pictures each prompt has; without prompts, each picture stands alone."""
        places = [prompt.count(self.image_token) for prompt in prompts] if prompts else [1] * count
        if sum(places) != count:
            raise ValueError(f"the text has {sum(places)} {self.image_token} for {count} pictures")
        return places

    def _fetch(self, image: Any) -> Any:
        return to_picture(self.image_processor.fetch_images(image) if isinstance(image, str) else image)

    def _expand(
        self, prompts: list[str], rows: Sequence[Row], kind: str
    ) -> tuple[list[str], list[list[dict[str, Any]]]]:
        """Each `<image>` as often as its picture takes positions, and where these stand, as transformers tells it."""
        token = self.image_token
        layout, remaining = self.image_processor.layout, iter(rows)
        expanded, offsets = [], []
        for prompt in prompts:
            pieces = prompt.split(token)
            result, start, entries = pieces[0], len(pieces[0]), []
            for piece in pieces[1:]:
                replacement = token * positions_of(layout, next(remaining))
                entries.append({
                    "type": kind,
                    "span": (start, start + len(token)),
                    "new_span": (len(result), len(result) + len(replacement)),
                    "text": token,
                    "replacement": replacement,
                })  # fmt: skip
                start += len(token) + len(piece)
                result += replacement + piece
            expanded.append(result)
            offsets.append(entries)
        return expanded, offsets

    def _tokens(self, prompts: list[str], settings: dict[str, Any]) -> dict[str, Any]:
        wants_types = settings.pop("return_mm_token_type_ids", False)
        known = inspect.signature(self.tokenizer.__call__).parameters
        given = {name: value for name, value in settings.items() if name in known}
        data = dict(self.tokenizer(prompts, **given))
        if wants_types:
            image = self.image_token_id
            data["mm_token_type_ids"] = [[int(token == image) for token in row] for row in data["input_ids"]]
        return data

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Optional[Sequence[Size]] = None,
        video_sizes: Optional[Sequence[Row]] = None,
        image_aspect_ratio: Optional[str] = None,
        **_: Any,
    ) -> Any:
        """Positions and tiles of pictures of these heights and widths, and positions of videos of these frames.

        vLLM's transformers backend asks, and prepares each picture without knowing of the others of its prompt.

        Raises:
            ValueError: several are seen whole and single ones cut, and `image_aspect_ratio` does not say which.
        """
        from transformers.processing_utils import MultiModalData

        layout, found = self.image_processor.layout, {}
        if image_sizes is not None:
            if not layout.cuts_several and image_aspect_ratio is None:
                raise ValueError(ONE_WAY)
            sizes = [(int(height), int(width)) for height, width in image_sizes]
            rows = rows_of(layout, sizes, seen_whole(layout, [1] * len(sizes), image_aspect_ratio))
            found["num_image_tokens"] = [positions_of(layout, row) for row in rows]
            found["num_image_patches"] = [count for *_, count in rows]
        if video_sizes is not None:
            found["num_video_tokens"] = [positions_of(layout, row_of_video(int(size[0]))) for size in video_sizes]
        return MultiModalData(**found)


def _flatten(kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Settings, also of the groups that transformers knows (`text_kwargs`, `processor_kwargs` and so on)."""
    for name, value in kwargs.items():
        if name.endswith("_kwargs") and isinstance(value, dict):
            yield from _flatten(value)
        else:
            yield name, value
