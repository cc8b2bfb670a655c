"""LLaVA models with random weights, of LLaVA's own classes, that share everything but the projector."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llava_projectors.integration.tower import MultiLayerTower

IMAGE_SIZE, PATCH_SIZE = 336, 14
NUM_PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
STOCK = "mlp2x_gelu"
MAX_POSITIONS = 20480  # of the LLM: 32 images of 576 tokens in a prompt, and its text


@dataclass(frozen=True)
class TowerShape:
    """A CLIP vision model at 336 px with 14 px patches."""

    width: int
    intermediate: int
    layers: int

    @property
    def selected(self) -> int:
        """The hidden state that LLaVA's --mm_vision_select_layer -2 selects: so many layers have to run."""
        return self.layers - 1


@dataclass(frozen=True)
class LlamaShape:
    """A Llama with heads of 128 channels."""

    width: int
    intermediate: int
    layers: int
    vocabulary: int = 32000


CLIP_LARGE = TowerShape(1024, 4096, 24)
LLAVA_7B = LlamaShape(4096, 11008, 32)
SMALL_TOWER, SMALL_LLAMA = TowerShape(512, 2048, 12), LlamaShape(1024, 2816, 16)
TINY_TOWER, TINY_LLAMA = TowerShape(256, 512, 12), LlamaShape(256, 512, 4, 1000)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made within it have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_vision_model(shape: TowerShape, device: torch.device, dtype: torch.dtype) -> Any:
    """A frozen CLIPVisionModel."""
    from transformers import CLIPVisionModel

    with default_dtype(dtype), device:
        model = CLIPVisionModel(_clip_config(shape))
    return model.requires_grad_(False).eval()


def make_tower(projector_type: str, vision_model: Any) -> Any:
    """LLaVA's tower for the type, around a vision model that is there already."""
    from llava.model.multimodal_encoder.builder import build_vision_tower
    from transformers import CLIPImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        vision_model.config.save_pretrained(folder)
        CLIPImageProcessor().save_pretrained(folder)
        cfg = _settings(projector_type, folder)
        tower = build_vision_tower(cfg, delay_load=True)
    tower.vision_tower = vision_model
    tower.is_loaded = True
    if isinstance(tower, MultiLayerTower):
        tower.prepare()  # as its load_model does
    return tower


class Family:
    """One LLM and one vision model; a LLaVA of every projector type around them.

    Args:
        tower: shape of the vision model.
        llama: shape of the LLM.
        device: where the weights are.
        dtype: of all weights.
    """

    def __init__(self, tower: TowerShape, llama: LlamaShape, device: torch.device, dtype: torch.dtype) -> None:
        self.tower, self.llama = tower, llama
        self.device, self.dtype = device, dtype
        self.vision_model = make_vision_model(tower, device, dtype)
        self.shared = self._make(STOCK, device)

    def make(self, projector_type: str) -> Any:
        """A LlavaLlamaForCausalLM with a projector of its own; all else is shared."""
        if projector_type == STOCK:
            return self.shared
        model = self._make(projector_type, torch.device("meta"))
        for name in ("embed_tokens", "layers", "norm"):
            setattr(model.model, name, getattr(self.shared.model, name))
        model.lm_head = self.shared.lm_head
        model.model.mm_projector.to_empty(device=self.device)
        for parameter in model.model.mm_projector.parameters():
            nn.init.normal_(parameter, std=0.02)
        return model

    def _make(self, projector_type: str, device: torch.device) -> Any:
        from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

        config = LlavaConfig(
            hidden_size=self.llama.width,
            intermediate_size=self.llama.intermediate,
            num_hidden_layers=self.llama.layers,
            num_attention_heads=self.llama.width // 128,
            num_key_value_heads=self.llama.width // 128,
            vocab_size=self.llama.vocabulary,
            max_position_embeddings=MAX_POSITIONS,
        )
        config._attn_implementation = "sdpa"
        with default_dtype(self.dtype), device:
            model = LlavaLlamaForCausalLM(config)
            self._add_vision(model, projector_type)
        return model.eval()

    def _add_vision(self, model: Any, projector_type: str) -> None:
        """What LLaVA's `initialize_vision_modules` sets up for training."""
        from llava.model.multimodal_projector.builder import build_vision_projector

        for name, value in vars(_settings(projector_type, "")).items():
            setattr(model.config, name, value)
        model.config.mm_hidden_size = self.tower.width
        model.config.tune_mm_mlp_adapter = False
        model.config.tokenizer_padding_side = "right"
        model.config.tokenizer_model_max_length = MAX_POSITIONS
        model.model.mm_projector = build_vision_projector(model.config)
        with torch.device(self.device):
            model.model.vision_tower = make_tower(projector_type, self.vision_model)


@contextlib.contextmanager
def in_training(llavas: Collection[Any], checkpointing: bool) -> Iterator[None]:
    """Models as LLaVA's script trains them, with its `--gradient_checkpointing True` or without."""
    for llava in llavas:
        llava.train()
        if checkpointing:
            llava.gradient_checkpointing_enable()
            llava.enable_input_require_grads()
    try:
        yield
    finally:
        for llava in llavas:
            llava.eval()
            if checkpointing:
                llava.gradient_checkpointing_disable()
                llava.disable_input_require_grads()


def _clip_config(shape: TowerShape) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )


def _settings(projector_type: str, folder: str) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(
        mm_projector_type=projector_type,
        mm_vision_tower=folder,
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
    )
