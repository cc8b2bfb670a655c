"""What each fork needs to be run on a CPU. Whether it works is found out, not written here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

# What pip puts into a folder, without dependencies, for each version of transformers that a fork pins.
COMPANIONS = {
    "4.31.0": ("tokenizers==0.13.3", "accelerate==0.21.0"),
    "4.37.2": (),
    "4.39.3": (),
    "4.41.2": ("tokenizers==0.19.1",),
    "4.45.2": ("tokenizers==0.20.3",),
    "4.46.0": ("tokenizers==0.20.3",),
    "4.51.0": ("tokenizers==0.21.4",),
}

# Imported by one fork or another, without dependencies of their own.
EXTRAS = (
    "timm==0.9.16", "torchvision==0.28.0", "einops", "einops-exts", "open_clip_torch", "opencv-python-headless",
    "decord", "pytorchvideo", "fvcore", "iopath", "parameterized", "yacs", "portalocker", "ftfy", "wcwidth",
    "ezcolorlog", "coloredlogs", "humanfriendly", "colorama", "loguru", "hydra-core", "omegaconf",
    "antlr4-python3-runtime==4.9.3", "tiktoken", "av", "six", "imageio", "imgaug", "scikit-image", "shapely",
    "networkx", "tifffile", "lazy_loader", "easydict", "termcolor", "pycocotools", "tabulate",
    "tyro", "docstring-parser", "shtab", "typeguard", "rich", "markdown-it-py", "mdurl", "pygments",
)  # fmt: skip

USUAL_TYPE = "saep"


@dataclass(frozen=True)
class Row:
    """One checkout below the folder of forks.

    Attributes:
        folder: its name there.
        repository: on GitHub.
        package: that it is imported as.
        transformers: version that it is run with.
        below: folder in the checkout that goes on PYTHONPATH.
        arguments: settings of its training command, where its defaults do not suit.
        config: settings that its training script copies into the model's config by itself.
        stand_ins: packages that it imports and these checks never call.
        tower: its usual one is another than CLIP, and was not tried.
        type_string: the projector it is tried with; a tower without hidden states needs one layer.
        width: channels of the tower, where its own projector has them written into its code.
        types: of its own, that its builder has under a name of ours and no script names.
        train: module of its training script; None when it cannot run here.
        train_arguments: what its script needs beyond LLaVA's.
    """

    folder: str
    repository: str
    package: str
    transformers: str = "4.37.2"
    below: str = "."
    arguments: dict[str, str] = field(default_factory=dict)
    config: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()
    tower: str = "CLIP"
    type_string: str = USUAL_TYPE
    width: int = 32
    types: tuple[str, ...] = ()
    train: Optional[str] = "train.train"
    train_arguments: dict[str, str] = field(default_factory=dict)


ROWS = (
    Row("LLaVA", "haotian-liu/LLaVA", "llava"),
    Row("LLaVA-NeXT", "LLaVA-VL/LLaVA-NeXT", "llava", "4.41.2", stand_ins=("av", "decord", "cv2", "datasets"),
        tower="SigLIP, tried by doctor and in [llava_next.md](llava_next.md)",
        train_arguments={"attn_implementation": "sdpa", "bf16": "True"}),
    Row("ShareGPT4V", "ShareGPT4Omni/ShareGPT4V", "share4v", "4.31.0"),
    Row("LLaVA-Med", "microsoft/LLaVA-Med", "llava", train=None),
    Row("MGM", "dvlab-research/MGM", "mgm", stand_ins=("paddleocr",),
        tower="CLIP and an auxiliary ConvNeXt"),
    Row("DenseConnector", "HJYao00/DenseConnector", "dc", arguments={"mm_dense_connector_type": "none"},
        train_arguments={"bf16": "True"}),
    Row("ViP-LLaVA", "WisconsinAIVision/ViP-LLaVA", "llava", arguments={"vision_tower": "clip_4layers_336"},
        train_arguments={"vision_tower": "TOWER"}),
    Row("TinyLLaVABench", "DLCV-BUAA/TinyLLaVABench", "tinyllava", types=("resampler",)),
    Row("RLAIF-V", "RLHF-V/RLAIF-V", "llava", train=None),
    Row("LLaVA-MORE", "aimagelab/LLaVA-MORE", "src.llava", "4.45.2"),
    Row("Bunny", "BAAI-DCAI/Bunny", "bunny", "4.39.3", stand_ins=("xformers", "s2wrapper")),
    Row("ml-fastvlm", "apple/ml-fastvlm", "llava", type_string="saep:layers=-1",
        arguments={"vision_tower": "mobileclip_l_512", "mm_vision_select_layer": "-1",
                   "unfreeze_mm_vision_tower": "True"},
        config=("unfreeze_mm_vision_tower",), train_arguments={"bf16": "True"}),
    Row("MobileVLM", "Meituan-AutoML/MobileVLM", "mobilevlm", "4.31.0", config=("vision_tower_type",)),
    Row("Video-LLaVA", "PKU-YuanGroup/Video-LLaVA", "videollava", "4.31.0", tower="LanguageBind"),
    Row("GeoChat", "mbzuai-oryx/GeoChat", "geochat", "4.31.0"),
    Row("LLaVA-HR", "luogen1996/LLaVA-HR", "llava_hr", "4.31.0", tower="MultiPath",
        arguments={"input_image_size": "448"},
        config=("freeze_vision", "input_image_size", "is_multipath_encoder", "vision_tower_slow")),
    Row("LLaVA-PruMerge", "42Shawn/LLaVA-PruMerge", "llava", "4.31.0"),
    Row("VCoder", "SHI-Labs/VCoder", "vcoder_llava", "4.31.0"),
    Row("Table-LLaVA", "SpursGoZmy/Table-LLaVA", "llava", "4.31.0"),
    Row("Math-LLaVA", "HZQ950419/Math-LLaVA", "llava", "4.31.0"),
    Row("LLaVA-Plus", "LLaVA-VL/LLaVA-Plus-Codebase", "llava", "4.31.0"),
    Row("TinyLLaVA_Factory", "TinyLLaVA/TinyLLaVA_Factory", "tinyllava", "4.41.2"),
    Row("mPLUG-DocOwl", "X-PLUG/mPLUG-DocOwl", "tinychart", below="TinyChart", tower="SigLIP with merging"),
    Row("VideoChat-Flash", "OpenGVLab/VideoChat-Flash", "llava", "4.41.2", below="llava-train_videochat",
        stand_ins=("flash_attn", "av", "torchaudio", "apex", "decord", "imageio", "cv2", "s2wrapper")),
    Row("LLaVA-Mini", "ictnlp/LLaVA-Mini", "llavamini"),
    Row("MoE-LLaVA", "PKU-YuanGroup/MoE-LLaVA", "moellava"),
    Row("cambrian", "cambrian-mllm/cambrian", "cambrian", stand_ins=("diffusers",)),
    Row("VILA", "NVlabs/VILA", "llava", "4.46.0",
        stand_ins=("flash_attn", "ps3", "datasets", "xgrammar", "wandb", "s2wrapper")),
    Row("LLaVA-UHD", "thunlp/LLaVA-UHD", "llava", "4.51.0"),
    Row("Osprey", "CircleRadon/Osprey", "osprey", "4.31.0"),
    Row("Oryx", "Oryx-mllm/Oryx", "oryx", "4.41.2", stand_ins=("flash_attn",)),
    Row("Ola", "Ola-Omni/Ola", "ola", "4.45.2", stand_ins=("flash_attn", "whisper", "torchaudio", "soundfile")),
    Row("Chat-UniVi", "PKU-YuanGroup/Chat-UniVi", "ChatUniVi", "4.31.0"),
    Row("VideoGPT-plus", "mbzuai-oryx/VideoGPT-plus", "videogpt_plus", "4.41.2", stand_ins=("flash_attn",)),
    Row("LISA", "dvlab-research/LISA", "model.llava", "4.31.0"),
    Row("groundingLMM", "mbzuai-oryx/groundingLMM", "model.llava", "4.31.0", stand_ins=("mmcv", "mmdet")),
    Row("llava-phi", "zhuyiche/llava-phi", "llava_phi"),
    Row("TokenPacker", "CircleRadon/TokenPacker", "llava", "4.31.0", width=1024),
    Row("Delta-LLaVA", "mzamini92/Delta-LLaVA", "llava", width=1024),
    Row("LLaVA-STF", "visresearch/LLaVA-STF", "llava", width=1024),
    Row("LongVA", "EvolvingLMMs-Lab/LongVA", "longva", "4.41.2", below="longva"),
    Row("FastV", "pkunlp-icler/FastV", "llava", "4.31.0", below="src/LLaVA"),
    Row("SparseVLMs", "Gumpest/SparseVLMs", "llava"),
    Row("PyramidDrop", "Cooperx521/PyramidDrop", "llava"),
    Row("EAGLE", "NVlabs/EAGLE", "eagle", "4.45.2"),
    Row("Open-LLaVA-NeXT", "xiaoachen98/Open-LLaVA-NeXT", "llava"),
    Row("ShareGPT4Video", "ShareGPT4Omni/ShareGPT4Video", "llava"),
    Row("quilt-llava", "aldraus/quilt-llava", "llava", "4.31.0"),
    Row("Vitron", "SkyworkAI/Vitron", "vitron", "4.31.0"),
    Row("CuMo", "SHI-Labs/CuMo", "cumo", arguments={"scales": "1, 3", "num_experts": "4", "num_selected": "2"}),
    Row("TRIM", "FreedomIntelligence/TRIM", "llava"),
    Row("HiDe-LLaVA", "Ghy0501/HiDe-LLaVA", "llava", "4.31.0", stand_ins=("bitsandbytes",)),
    Row("VideoLLaMA2", "DAMO-NLP-SG/VideoLLaMA2", "videollama2", "4.41.2"),
    Row("vstar", "penghao-wu/vstar", "LLaVA.llava", "4.31.0"),
    Row("ml-slowfast-llava", "apple/ml-slowfast-llava", "llava", "4.39.3", below="slowfast_llava"),
    Row("conv-llava", "alibaba/conv-llava", "llava", "4.39.3"),
    Row("DoRA", "NVlabs/DoRA", "llava", "4.31.0", below="visual_instruction_tuning"),
    Row("LLaVA-Rad", "microsoft/LLaVA-Rad", "llava", "4.31.0"),
    Row("LLaVA-Align", "yfzhang114/LLaVA-Align", "llava", "4.31.0", below="experiments"),
    Row("InternVL", "OpenGVLab/InternVL", "llava", below="internvl_chat_llava"),
    Row("LLaVAction", "AdaptiveMotorControlLab/LLaVAction", "llavaction", "4.41.2"),
    Row("matryoshka-mm", "mu-cai/matryoshka-mm", "llava"),
    Row("dynamic_llava", "Osilly/dynamic_llava", "llava", types=("tokenpacker",)),
    Row("Inverse-LLaVA", "xuhuizhan5/Inverse-LLaVA", "llava", stand_ins=("torch_geometric",)),
    Row("MQT-LLaVA", "gordonhu608/MQT-LLaVA", "llava"),
    Row("LITA", "NVlabs/LITA", "lita", "4.31.0"),
    Row("VTimeLLM", "huangb23/VTimeLLM", "vtimellm", "4.31.0"),
)  # fmt: skip
