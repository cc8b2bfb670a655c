"""Checkpoints of whole families with random weights, what their own stack says on them, and their exports.

`python families.py FOLDER [FAMILY ...]`, in LLaVA's environment or in LLaVA-NeXT's (see `tests/next`). The LLM's
weights are large, so that its answers depend on every number before them. `check_folders.py` reads the result.
"""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import sentencepiece
import torch
import transformers
from PIL import Image

from llava_projectors.export import compare, verify
from llava_projectors.export.convert import export_checkpoint
from llava_projectors.tiny import assets

# `llava` for LLaVA itself, or for a checkout of LLaVA-NeXT; `llavaction` for its family from the registry.
PACKAGE = os.environ.get("FAMILY_PACKAGE", "llava")
if PACKAGE == "llavaction":
    transformers.utils.import_utils.is_torchvision_available()  # False; a stand-in would be taken for the real one
    sys.path.insert(0, str(Path(__file__).parents[1] / "next"))
    os.environ.setdefault("LLAVA_NEXT_PACKAGE", PACKAGE)
    sys.meta_path.append(importlib.import_module("family").StandIns())
SIGLIP = "google/siglip-so400m-patch14-384"
CLIP = "clip-of-families"
SIGLIP_SIDE, CLIP_SIDE = 384, 336
ONE, WIDE, TALL, SMALL = (400, 390), (900, 330), (300, 800), (60, 40)
VIDEO = (320, 180)


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of checkpoint.

    Attributes:
        llm: of `LLMS`.
        projector_type: the type string.
        settings: of LLaVA's config, beside its own.
        siglip: whether the tower is LLaVA-NeXT's.
        conversation: for `--conv-mode`.
    """

    llm: str
    projector_type: str = "saep"
    settings: dict = dataclasses.field(default_factory=dict)
    siglip: bool = False
    conversation: str = "vicuna_v1"


SENTENCEPIECE = ("llama", "llama-other", "mistral", "phi3", "phi3-other")
PHI3_TOKENS = [
    "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>",
    "<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>",
]  # fmt: skip
# What readers take from a Llama's config, each otherwise than usual.
OTHER = {
    "hidden_act": "gelu", "rms_norm_eps": 1e-2, "attention_bias": True, "max_position_embeddings": 128,
    "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip


# What readers take from a Phi-3's config, likewise.
OTHER_PHI3 = {
    "hidden_act": "gelu", "rms_norm_eps": 1e-2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "original_max_position_embeddings": 2048, "sliding_window": 2047,
    "resid_pdrop": 0.1, "embd_pdrop": 0.1,
    "rope_scaling": {
        "type": "su", "short_factor": [1 + part / 16 for part in range(16)], "long_factor": [9.0] * 16
    },
}  # fmt: skip
OTHERS = {"llama-other": OTHER, "phi3-other": OTHER_PHI3}


def grid(side):
    return [[side * x, side * y] for x, y in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


LLAVA = {
    "llama-square": Family("llama", settings={"image_aspect_ratio": "square"}),
    "llama-other": Family("llama-other", settings={"image_aspect_ratio": "pad"}),
    "mistral": Family("mistral", "tokenpacker", {"image_aspect_ratio": "pad"}, conversation="mistral_instruct"),
    "llama3": Family("llama3", settings={"image_aspect_ratio": "pad"}, conversation="llava_llama_3"),
    "slice9": Family("llama", "tokenpacker:scale_factor=3", {"image_aspect_ratio": "slice:patch_num=9"}),
    "slice16": Family("llama", settings={"image_aspect_ratio": "slice:patch_num=16"}),
    "anyres-flat": Family("llama", settings={"image_aspect_ratio": "anyres", "image_grid_pinpoints": grid(CLIP_SIDE)}),
    "anyres-unpad": Family(
        "llama",
        settings={
            "image_aspect_ratio": "anyres", "image_grid_pinpoints": grid(CLIP_SIDE),
            "mm_patch_merge_type": "spatial_unpad",
        },
    ),
    "start-end": Family("llama", settings={"image_aspect_ratio": "pad", "mm_use_im_start_end": True}),
    "rope-scaling": Family(
        "llama", settings={"image_aspect_ratio": "pad", "rope_scaling": {"type": "linear", "factor": 2.0}}
    ),
}  # fmt: skip
NEXT = {
    "qwen2-pad": Family(
        "qwen2",
        settings={
            "image_aspect_ratio": "pad", "mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "average",
            "mm_newline_position": "frame",
        },
        siglip=True, conversation="qwen_1_5",
    ),
    "qwen2-anyres": Family(
        "qwen2", "tokenpacker",
        {
            "image_aspect_ratio": "anyres", "image_grid_pinpoints": grid(SIGLIP_SIDE),
            "mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "grid",
        },
        siglip=True, conversation="qwen_1_5",
    ),
    "qwen2-anyres-max": Family(
        "qwen2",
        settings={
            "image_aspect_ratio": "anyres_max_2", "image_grid_pinpoints": grid(SIGLIP_SIDE),
            "mm_patch_merge_type": "spatial_unpad", "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter",
            "mm_spatial_pool_mode": "max", "mm_newline_position": "one_token",
        },
        siglip=True, conversation="qwen_1_5",
    ),
    "qwen2-slice": Family(
        "qwen2",
        settings={
            "image_aspect_ratio": "slice:patch_num=9", "mm_patch_merge_type": "flat", "mm_spatial_pool_mode": "bilinear"
        },
        siglip=True, conversation="qwen_1_5",
    ),
}  # fmt: skip
# ViP-LLaVA's.
PHI3 = {
    "phi3": Family("phi3", settings={"image_aspect_ratio": "pad"}, conversation="llava_phi_3"),
    "phi3-other": Family(
        "phi3-other", "tokenpacker", {"image_aspect_ratio": "pad", "tokenizer_model_max_length": 2048},
        conversation="llava_phi_3",
    ),
}  # fmt: skip
FAMILIES = {**LLAVA, **NEXT, **PHI3}
CLASSES = {"mistral": "Mistral", "qwen2": "Qwen2", "phi3": "Phi3", "phi3-other": "Phi3"}


def module(name):
    return importlib.import_module(f"{PACKAGE}.{name}")


# The parts


def byte_level(folder, special, **settings):
    """A byte-level tokenizer that knows some pairs, as Llama 3 and Qwen2 have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    if "qwen" in folder.name:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    texts = [assets.QUESTION, "You are a helpful assistant.", "Which one is darker?"]
    tokenizer.train_from_iterator(texts * 4, trainer)
    tokenizer.add_special_tokens(special)
    if settings.get("bos_token"):
        start = settings["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **settings)
    fast.save_pretrained(folder)
    return fast


def phi3_tokenizer(folder, strips=True):
    """Makes a Llama's tokenizer a Phi-3's, as the hub has it: of two kinds, one of which strips what follows a token.

    Returns the ids of its ends.
    """
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    path = folder / "tokenizer_config.json"
    start = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    added = {number: {**plain, "content": token} for number, token in enumerate(["<unk>", "<s>", "</s>", *PHI3_TOKENS])}
    added = {number if number < 3 else start + number - 3: token for number, token in added.items()}
    for token in added.values():
        token["rstrip"] = strips and token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    added[2]["special"] = False
    settings = json.loads(path.read_text()) | {
        "added_tokens_decoder": added, "legacy": False, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "model_max_length": 4096,
    }  # fmt: skip
    path.write_text(json.dumps(settings))
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    ids = {token["content"]: number for number, token in added.items()}
    return [ids["<|endoftext|>"], ids["<|assistant|>"], ids["<|end|>"]]


def make_llm(kind, folder, **sizes):
    """An LLM's checkpoint with large random weights, two of whose tokens end an answer."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, **OTHERS.get(kind, {}), **sizes,
    }  # fmt: skip
    if kind in SENTENCEPIECE:
        assets.make_llm(folder, hidden_size=64, head_width=32)
        ends = phi3_tokenizer(folder) if kind.startswith("phi3") else [2, 300]
    elif kind == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        tokenizer = byte_level(folder, special, bos_token=special[0], eos_token=special[1])
        ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    else:
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokenizer = byte_level(folder, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    name = CLASSES.get(kind, "Llama")
    classes = module("model.language_model.modeling_phi3") if name == "Phi3" else transformers
    count = len(transformers.AutoTokenizer.from_pretrained(folder, use_fast=kind not in SENTENCEPIECE))
    if name == "Phi3":
        sizes["pad_token_id"] = ends[0]
    config = getattr(classes, f"{name}Config")(**sizes, vocab_size=count, eos_token_id=ends[0], rope_theta=5e4)
    if kind == "mistral":
        config.sliding_window = None
    torch.manual_seed(0)
    model = getattr(classes, f"{name}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=3 / parameter.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = ends
    if kind == "llama-other":
        model.generation_config.repetition_penalty = 10.0  # so large that answers tell; Qwen2's have 1.05 to 1.1
    model.save_pretrained(folder)
    return folder


def make_siglip(root):
    """Where the hub's client looks for it; LLaVA-NeXT ignores its config, so its class gets the sizes."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 1,
        "image_size": SIGLIP_SIDE, "patch_size": 48,
    }  # fmt: skip
    encoder = module("model.multimodal_encoder.siglip_encoder")
    init = encoder.SigLipVisionConfig.__init__
    names = init.__code__.co_varnames[1 : init.__code__.co_argcount]
    init.__defaults__ = tuple({**dict(zip(names, init.__defaults__)), **sizes}[name] for name in names)
    folder = root / "hub" / f"models--{SIGLIP.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0000000000000000000000000000000000000000"
    if not snapshot.is_dir():
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(snapshot.name)
        torch.manual_seed(0)
        encoder.SigLipVisionModel(encoder.SigLipVisionConfig()).save_pretrained(snapshot)
        transformers.SiglipImageProcessor(size={"height": SIGLIP_SIDE, "width": SIGLIP_SIDE}).save_pretrained(snapshot)
    transformers.utils.hub.TRANSFORMERS_CACHE = str(root / "hub")
    return snapshot


def make_checkpoint(root, name, family):
    """What LLaVA's script would leave, without its steps."""
    llm = root / f"llm-{family.llm}"
    if not llm.is_dir():
        make_llm(family.llm, llm)
    tower = SIGLIP if family.siglip else str(root / CLIP)
    snapshot = make_siglip(root) if family.siglip else None
    if not (root / CLIP).is_dir():
        assets.make_vision_tower(root / CLIP, hidden_size=64, patch_size=28)  # two heads, for two ranks of vLLM
    models = module("model")
    cls = CLASSES.get(family.llm, "Llama").replace("Qwen2", "Qwen")
    torch.manual_seed(1)
    of_llm = {key: value for key, value in family.settings.items() if key == "rope_scaling"}
    model = getattr(models, f"Llava{cls}ForCausalLM").from_pretrained(llm, **of_llm)
    arguments = SimpleNamespace(
        vision_tower=tower, mm_vision_select_layer=-2, mm_vision_select_feature="patch", pretrain_mm_mlp_adapter=None,
        mm_patch_merge_type=family.settings.get("mm_patch_merge_type", "flat"), mm_projector_type=family.projector_type,
        mm_use_im_patch_token=False, mm_use_im_start_end=family.settings.get("mm_use_im_start_end", False),
        tune_mm_mlp_adapter=False, mm_resampler_type=None, add_faster_video=False,
        image_aspect_ratio=family.settings["image_aspect_ratio"], vision_tower_pretrained=None,
    )  # fmt: skip
    for key, value in {"mm_use_im_patch_token": False, "mm_use_im_start_end": False, **family.settings}.items():
        setattr(model.config, key, value)
    model.get_model().initialize_vision_modules(arguments)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llm, use_fast=family.llm not in SENTENCEPIECE)
    model.initialize_vision_tokenizer(arguments, tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.get_model().mm_projector.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
        if "mm_vision_tower" in family.settings.get("mm_tunable_parts", ""):
            for parameter in model.get_vision_tower().parameters():
                parameter.mul_(1.5)
    folder = root / f"llava-{name}"
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, snapshot


def pictures():
    """Of several sizes, one with transparency, one with a palette."""
    generator = np.random.default_rng(0)
    found = []
    for width, height in (ONE, WIDE, TALL, SMALL):
        coarse = generator.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
        found.append(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    found[1].putalpha(Image.linear_gradient("L").resize(WIDE))
    found[3] = found[3].quantize(16)
    return [*found[:3], found[3].convert("RGB")]


def questions(jinja_start, jinja_end, family):
    """About each picture; where the stack trains them, about a video and pictures that are padded; about two."""
    image = "<im_start><image><im_end>" if family.settings.get("mm_use_im_start_end") else "<image>"
    asked = [(f"{jinja_start}{image}\n{question}{jinja_end}", [picture])
             for picture in pictures() for question in (assets.QUESTION, "Which one is darker?")]  # fmt: skip
    both = (f"{jinja_start}{image}\n{image}\nWhich one is darker?{jinja_end}", pictures()[1:3])
    if family.settings.get("mm_spatial_pool_mode"):
        frames = [pictures()[number].resize(VIDEO) for number in (0, 2, 1)]
        asked.append((f"{jinja_start}<image>\nWhat moves?{jinja_end}", frames, "video"))
        if family.settings["image_aspect_ratio"].startswith("anyres"):
            asked.append((*both, "pad"))
    return [*asked, both]


def prompt_parts(tokenizer_folder):
    """What stands before and behind a user's text, by the exported template."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = (tokenizer_folder / "chat_template.jinja").read_text()
    chat = [{"role": "user", "content": "TEXT"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text.split("TEXT")


def main(root, names):
    root.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    for name in names:
        family = FAMILIES[name]
        checkpoint, tower = make_checkpoint(root, name, family)
        folder = root / "exported" / name
        export_checkpoint(str(checkpoint), folder, vision_tower=tower and str(tower))
        asked = questions(*prompt_parts(folder), family)
        cases = verify.reference(str(checkpoint), None, asked, 12, torch.float16, PACKAGE)
        compare.save_cases(cases, folder.with_suffix(".pt"))
        print(name, [len(case["logits"]) for case in cases], [case["text"][:12] for case in cases[:3]], flush=True)
        for case, result in zip(cases, verify.compare_on_this_stack(folder, cases)):
            found = [result[key] for key in ("positions", "logits", "pixels", "same_ids", "same_answer")]
            print("   ", len(case["images"]), case["given_as"], json.dumps(found), flush=True)


if __name__ == "__main__":
    has_siglip = importlib.util.find_spec(f"{PACKAGE}.model.multimodal_encoder.siglip_encoder")
    main(Path(sys.argv[1]).resolve(), sys.argv[2:] or (NEXT if has_siglip else LLAVA))
