"""`--image_aspect_ratio slice` in LLaVA: pictures cut into tiles, encoded in chunks, laid out with separators.

The image processor cuts (`image_processor.py`); LLaVA carries each picture as one canvas. Where LLaVA
would join the pictures of a batch, a `CanvasBatch` takes their place. LLaVA hands it on untouched to
`encode_images`, which returns one tensor per picture, of its own length, as in LLaVA's own high resolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from llava_projectors import slicing
from llava_projectors.integration import layout
from llava_projectors.integration.gate import Function, Package
from llava_projectors.integration.image_processor import tile_side
from llava_projectors.integration.log import log, logger
from llava_projectors.integration.tower import ReducedTower, find_tower
from llava_projectors.integration.weights import partitioned_parameters
from llava_projectors.projectors.recompute import inside_checkpoint
from llava_projectors.spec import ProjectorSpecError

# Where LLaVA's config keeps the ids of "," and "\n".
SEPARATORS = "slice_separator_ids"


@dataclass
class CanvasBatch:
    """The pictures of a batch on their way through `prepare_inputs_labels_for_multimodal`.

    Attributes:
        places: for each `<image>` of the batch its canvases [3, H, W], one as a rule.
        uncut: the places whose pictures are seen whole, one tile each: frames of a video, several pictures of a sample.
        videos: those of them that are frames of a video.
        ndim: what LLaVA asks of a batch of plain pictures.
    """

    places: list[list[torch.Tensor]]
    uncut: frozenset[int] = frozenset()
    videos: frozenset[int] = frozenset()
    ndim: ClassVar[int] = 4

    def canvases(self, side: int) -> list[torch.Tensor]:
        """The canvases of all places, place by place, with tiles of this side; of uncut places the one whole tile."""
        return [
            slicing.to_whole(canvas, side) if number in self.uncut else canvas
            for number, place in enumerate(self.places)
            for canvas in place
        ]


def complete(model: Any, tokenizer: Any) -> None:
    """Make the image processor of a model's tower follow its config, and complete the config.

    Called when LLaVA's script or loader has set up everything; the setting may have changed since the
    checkpoint was written. The config gets the settings of published ones, and the ids of the separators.

    Args:
        model: LLaVA's model; without a projector of ours, nothing happens.
        tokenizer: its tokenizer.

    Raises:
        ProjectorSpecError: a bad setting, or one that something else in the model rules out.
    """
    tower = find_tower(model)
    if not isinstance(tower, ReducedTower):
        return
    config = model.config
    wanted = slicing.slicing_of(config)
    if wanted is None and tower.slicing is None:
        return
    tower.set_slicing(wanted)
    if wanted is None:
        return
    refuse_other_layout(model)
    config.image_aspect_ratio = slicing.NAME
    for option, attribute in slicing.CONFIG_OPTIONS.items():
        setattr(config, attribute, getattr(wanted, option))
    if getattr(config, SEPARATORS, None) is None:
        setattr(config, SEPARATORS, separator_ids(tokenizer))
    tokens = tower.num_patches_per_side**2
    log(
        f"{slicing.NAME}: a picture is cut into 1 to {wanted.patch_num} tiles and, beside more than one, a thumbnail: "
        f"{tokens + 1} to {wanted.most_tokens(tokens)} visual tokens with the separators"
    )


def refuse_other_layout(model: Any) -> None:
    """Raise for a model whose pictures could not be laid out in tiles."""
    merge_type = getattr(model.config, "mm_patch_merge_type", "flat")
    if merge_type != "flat":
        raise ProjectorSpecError(
            f"image_aspect_ratio {slicing.NAME!r} lays out the tiles itself: "
            f"--mm_patch_merge_type {merge_type} must be flat"
        )
    for name in ("prepare_inputs_labels_for_multimodal", "encode_images"):
        if not hasattr(getattr(type(model), name, None), "__wrapped__"):
            raise ProjectorSpecError(
                f"image_aspect_ratio {slicing.NAME!r} cannot be used with {type(model).__name__}: its {name} is not "
                "patched, so it would not know of tiles; pass --image_aspect_ratio pad"
            )


def separator_ids(tokenizer: Any) -> list[int]:
    """Ids of "," and "\\n" as the published code takes them.

    It looks the strings up in the vocabulary: with Llama's tokenizer, which has no "\\n", the second
    is the unknown token, and the released models were trained so. A tokenizer without an unknown
    token gives none; there, our choice, it is the last token of the string as text.
    """
    ids = []
    for text in (",", "\n"):
        found = tokenizer.convert_tokens_to_ids(text)
        ids.append(tokenizer(text, add_special_tokens=False).input_ids[-1] if found is None else found)
    return ids


def to_canvas_batch(images: Any) -> CanvasBatch:
    """What LLaVA calls `images` -> one list of canvases a place.

    Args:
        images: [B, 3, H, W], [B, n, 3, H, W], or a list of [3, H, W] and [n, 3, H, W]; n pictures of
            one place come one after the other, as LLaVA joins them.
    """
    return CanvasBatch([[image] if image.ndim == 3 else list(image) for image in images])


def places_of(input_ids: torch.Tensor, image_token: int) -> list[int]:
    """The number of places in each place's sample: a sample has as many as `<image>` tokens, or one without any.

    Example:
        >>> places_of(torch.tensor([[-200, 1], [1, 2], [-200, -200]]), -200)
        [1, 1, 2, 2]
    """
    counts = [max(1, count) for count in (input_ids == image_token).sum(1).tolist()]
    return [count for count in counts for _ in range(count)]


def encode(model: Any, batch: CanvasBatch) -> list[torch.Tensor]:
    """The input embeddings of each place: tokens of each tile, followed by a separator.

    The frames of a video are pooled as the model's class pools them, and have no separators.

    Returns:
        for each place [positions, D].
    """
    tower, projector = find_tower(model), model.get_model().mm_projector
    side = tile_side(tower.image_processor)
    canvases = batch.canvases(side)
    grids = [slicing.canvas_grid(canvas, side) for canvas in canvases]
    tiles = [tile for canvas in canvases for tile in slicing.to_tiles(canvas, side)]
    tokens = encode_tiles(tower, projector, tiles, tower.slicing.chunk_size)
    warn_of_length(model, grids, tokens.shape[1])

    sequence = torch.cat([tokens, embed_separators(model, grids, tokens.device)[:, None]], dim=1)
    counts = iter(map(slicing.tile_count, grids))
    lengths = [sum(next(counts) for _ in place) for place in batch.places]
    places = list(sequence.split(lengths))
    for video in batch.videos:
        places[video] = pool_frames(model, tokens.split(lengths)[video])
    return [tiles_of_place.flatten(0, 1) for tiles_of_place in places]


def embed_separators(model: Any, grids: Sequence[slicing.Grid], device: torch.device) -> torch.Tensor:
    """The input embedding of the separator after each tile of these grids, [tiles, D]."""
    comma, newline = separators_of(model.config)
    ids = [newline if ends else comma for grid in grids for ends in slicing.ends_line(grid)]
    embedded: torch.Tensor = model.get_model().embed_tokens(torch.tensor(ids, device=device)).to(device)
    return embedded


def pool_frames(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens of a video's frames, [frames, M, D], as LLaVA-NeXT's own code pools them.

    Raises:
        ProjectorSpecError: the model's class has no such method.
    """
    if not hasattr(model, "get_2dPool"):
        raise ProjectorSpecError(
            f"image_aspect_ratio {slicing.NAME!r} cannot be used with videos and {type(model).__name__}, which has no "
            "get_2dPool to pool their frames; pass --image_aspect_ratio pad"
        )
    pooled: torch.Tensor = model.get_2dPool(tokens)
    return pooled


def encode_tiles(tower: Any, projector: Any, tiles: list[torch.Tensor], chunk_size: int) -> torch.Tensor:
    """Tower and projector, at most `chunk_size` tiles at a time: tiles [3, side, side] -> [tiles, M, D].

    With several chunks, what the projector computes on the way is made again in the backward pass
    instead of kept; the tower's features are kept. ZeRO-3 takes all tiles at once: it gathers weights
    in every forward on all ranks together, and their numbers of chunks would differ.
    """
    if partitioned_parameters(projector):
        chunk_size = len(tiles)
    chunks = [tiles[start : start + chunk_size] for start in range(0, len(tiles), chunk_size)]
    if len(chunks) == 1:
        return projector(tower(torch.stack(chunks[0])))

    @inside_checkpoint()
    def project(features: torch.Tensor) -> torch.Tensor:
        return projector(features)

    encoded = []
    for chunk in chunks:
        features = tower(torch.stack(chunk))
        keeps_graph = torch.is_grad_enabled()
        encoded.append(checkpoint(project, features, use_reentrant=False) if keeps_graph else projector(features))
    return torch.cat(encoded)


def separators_of(config: Any) -> Sequence[int]:
    """Ids of "," and "\\n" in a config.

    Raises:
        ProjectorSpecError: neither LLaVA's loader nor its script has completed it.
    """
    ids = getattr(config, SEPARATORS, None)
    if ids is None:
        raise ProjectorSpecError(
            f"the config has image_aspect_ratio {slicing.NAME!r} but no {SEPARATORS}: load the checkpoint with LLaVA's "
            f"load_pretrained_model, which asks the tokenizer, or set model.config.{SEPARATORS} to the ids of ',' and "
            "the newline (29892 and 0 in the released models)"
        )
    return ids


def warn_of_length(model: Any, grids: Sequence[slicing.Grid], tokens_of_tile: int) -> None:
    """Once per model, say when a picture alone is longer than what LLaVA keeps of a sequence."""
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    longest = max(grids, key=slicing.tile_count)
    length, tower = slicing.visual_tokens(longest, tokens_of_tile), find_tower(model)
    if limit is None or length <= limit or tower.warned_of_length:
        return
    tower.warned_of_length = True
    logger().warning(
        f"WARNING: a picture of {longest[0]}x{longest[1]} tiles takes {length} visual tokens, but model_max_length is "
        f"{limit}: LLaVA cuts off the end of the picture and all text after it. Train with --model_max_length of more "
        f"than {tower.slicing.most_tokens(tokens_of_tile)} plus the text, with fewer tiles, or with a "
        "projector that gives fewer tokens"
    )


# What runs in the place of LLaVA's methods; see `wrappers.py`


def initialize_vision_tokenizer(original: Function, package: Package, model: Any, *args: Any, **kwargs: Any) -> Any:
    """For `initialize_vision_tokenizer(self, model_args, tokenizer)`, the last thing that LLaVA's script sets up.

    Before it, the script has put its `image_aspect_ratio` into the config; no earlier seam knows it.
    """
    result = original(model, *args, **kwargs)
    arguments = inspect.signature(original).bind(model, *args, **kwargs).arguments
    complete(model, arguments["tokenizer"])
    layout.announce_layout(model)
    return result


def prepare_inputs(original: Function, package: Package, model: Any, *args: Any, **kwargs: Any) -> Any:
    """For `prepare_inputs_labels_for_multimodal(self, ..., images, ...)`, where LLaVA joins the pictures of a batch."""
    tower = find_tower(model)
    if not isinstance(tower, ReducedTower) or tower.slicing is None:
        return original(model, *args, **kwargs)
    bound = inspect.signature(original).bind(model, *args, **kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    images, kinds = arguments.get("images"), arguments.get("modalities")
    if images is not None:
        arguments["images"] = batch = to_canvas_batch(images)
        if kinds is not None:  # LLaVA-NeXT, which cuts neither frames nor several pictures of a sample
            several = places_of(arguments["input_ids"], inspect.unwrap(original).__globals__["IMAGE_TOKEN_INDEX"])
            batch.uncut = frozenset(number for number, count in enumerate(several) if count > 1)
            if isinstance(images, list) or images.ndim == 5:  # else it takes each frame for a picture
                batch.videos = videos_among([kinds] if isinstance(kinds, str) else kinds)
                batch.uncut |= batch.videos
    return original(*bound.args, **bound.kwargs)


def videos_among(kinds: Sequence[str]) -> frozenset[int]:
    """The places that hold a video, by LLaVA-NeXT's `modalities`."""
    return frozenset(number for number, kind in enumerate(kinds) if kind == "video")


def encode_images(original: Function, package: Package, model: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
    """For `encode_images(self, images)`; only `prepare_inputs` makes a `CanvasBatch`."""
    if isinstance(images, CanvasBatch):
        return encode(model, images)
    return original(model, images, *args, **kwargs)
