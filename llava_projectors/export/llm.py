"""The LLMs that can be exported, and what LLaVA's stack takes from their config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from llava_projectors.export.errors import ExportError
from llava_projectors.files import read_json
from llava_projectors.integration.llm_settings import READ_SINCE, contradictions


@dataclass(frozen=True)
class Llm:
    """A kind of LLM.

    Attributes:
        architecture: its class in transformers.
        fields: every setting that its config class reads in the versions that LLaVA runs on (4.31 to 4.41) ->
            what the class takes where `config.json` has none. Later classes have other defaults, so each is written.
        fused: layer -> Llama's layers that it holds, one below the other. But for them its weights are Llama's.
    """

    architecture: str
    fields: Mapping[str, Any]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_COMMON = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "hidden_act": "silu", "max_position_embeddings": 2048,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
LLMS = {
    "llama": Llm("LlamaForCausalLM", {**_COMMON, "rope_scaling": None, "attention_bias": False}),
    "mistral": Llm(
        "MistralForCausalLM",
        {
            **_COMMON, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Llm(
        "Qwen2ForCausalLM",
        {
            **_COMMON, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
            "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
            "max_window_layers": 28, "bos_token_id": None, "eos_token_id": None,
        },
    ),
    # ViP-LLaVA has the class in its own code: transformers has it from 4.41 on.
    "phi3": Llm(
        "Phi3ForCausalLM",
        {
            **_COMMON, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_scaling": None, "sliding_window": None, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "eos_token_id": 32000, "pad_token_id": 32000,
        },
        {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    ),
}  # fmt: skip
# `model_type` in LLaVA's config -> kind.
KINDS = {
    "llava_llama": "llama", "llava": "llama", "llama": "llama", "llava_mistral": "mistral", "mistral": "mistral",
    "llava_qwen": "qwen2", "llava_qwen2": "qwen2", "qwen2": "qwen2", "llava_phi3": "phi3", "phi3": "phi3",
}  # fmt: skip
# `model_type` -> why it cannot be exported.
REFUSED = {
    "llava_gemma": "LLaVA-NeXT's script does not import its Gemma, and LLaVA-MORE's Gemma 2 does not run on the "
    "transformers 4.45 that it asks for",
    "llava_phi": "LLaVA-MORE trains Phi-4-mini by it, which the transformers 4.45 that it asks for cannot load",
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Settings of generation that look at the tokens so far, or count them -> without effect. LLaVA's `generate` gets
# embeddings, so there they see the answer alone; transformers and vLLM show them the prompt too. An exported folder's
# own class keeps the prompt from `repetition_penalty`, which Qwen2's models have.
OF_TOKENS_SO_FAR = {
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0,
    "forced_bos_token_id": None, "forced_decoder_ids": None, "begin_suppress_tokens": None, "guidance_scale": 1.0,
    "penalty_alpha": 0.0, "num_beam_groups": 1, "diversity_penalty": 0.0, "sequence_bias": None,
    "force_words_ids": None, "constraints": None,
}  # fmt: skip
# `max_length` counts the prompt too. From here on it is the length of the context, which the files of LLMs have there.
LONG, USUAL_LENGTH = 2048, 20
# What transformers 4.37 takes from `config.json` where there is no `generation_config.json`, if it is not the usual.
OF_MODEL_CONFIG = {
    **OF_TOKENS_SO_FAR, "guidance_scale": None, "penalty_alpha": None, "max_length": USUAL_LENGTH,
    "max_new_tokens": None, "min_new_tokens": None, "max_time": None, "early_stopping": False, "do_sample": False,
    "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "bad_words_ids": None,
    "renormalize_logits": False, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None,
}  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Every setting of generation that LLaVA's stack reads. What only later versions read (`stop_strings`, `dola_layers`,
# `top_h`) changes no answer of LLaVA's, and would in the folder.
GENERATION_SETTINGS = {
    *OF_MODEL_CONFIG, *TOKENS, "use_cache", "num_return_sequences", "low_memory", "output_attentions",
    "output_hidden_states", "output_scores", "return_dict_in_generate",
}  # fmt: skip
GENERATION_SETTINGS_SINCE_4_41 = {"min_p"}


def text_config(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The LLM's part of an exported config: what the training stack used, every setting of it.

    Args:
        config: of the checkpoint.
        source: the checkpoint, for messages.

    Raises:
        ExportError: another kind of LLM, or settings that were not trained with and that a later reader obeys.
    """
    model_type = str(config.get("model_type"))
    if model_type not in KINDS:
        why = f". {REFUSED[model_type]}" if model_type in REFUSED else ""
        raise ExportError(f"{source} has an LLM of model_type {model_type!r}: {', '.join(KINDS)} can be exported{why}")
    kind = KINDS[model_type]
    _refuse_non_numbers(config, LLMS[kind].fields, source)
    read = settings_read(kind, config.get("transformers_version"))
    wrong = contradictions(config, read)
    if wrong:
        raise ExportError(
            f"the config.json of {source} has {'; '.join(wrong)}: transformers "
            f"{config.get('transformers_version', 'of an unknown version')}, which wrote it, did not read that, and "
            "later versions do. Remove it from config.json to export what was trained"
        )
    settings = {name: config.get(name, usual) for name, usual in LLMS[kind].fields.items()}
    settings.update({name: config[name] for name in read if name in config})
    if settings["num_key_value_heads"] is None:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    _refuse_windows(settings, config.get("tokenizer_model_max_length"), source)
    _refuse_dynamic_rotations(settings.get("rope_scaling") or {}, source)
    if kind == "phi3":
        _refuse_long_rotations(settings, config.get("tokenizer_model_max_length"), source)
    # The head is written out, also where the checkpoint shares it with the embeddings.
    return {
        "model_type": kind,
        "architectures": [LLMS[kind].architecture],
        **with_rotations(settings, "su", "longrope"),
        "tie_word_embeddings": False,
    }


def settings_read(kind: str, version: Any) -> list[str]:
    """The settings that the class of an LLM reads in a version of transformers."""
    return [*LLMS[kind].fields, *(name for name, since in READ_SINCE.items() if _version(version) >= since)]


def with_rotations(settings: Mapping[str, Any], name: str, other: str) -> dict[str, Any]:
    """Settings with another name for the type of their rotations: Phi-3's `su` is `longrope` in later versions."""
    scaling = settings.get("rope_scaling") or {}
    return {**settings, "rope_scaling": {**scaling, "type": other}} if scaling.get("type") == name else dict(settings)


def _refuse_non_numbers(config: Mapping[str, Any], fields: Mapping[str, Any], source: Path) -> None:
    """Raise for text and the like in the place of a number; an id may be a list of them."""
    for name, usual in fields.items():
        value = config.get(name)
        is_number = isinstance(usual, (int, float)) and not name.endswith("_token_id")
        if is_number and value is not None and not isinstance(value, (int, float)):
            raise ExportError(f"the config.json of {source} has {name} {value!r}, not a number: copy it again")


def _refuse_windows(settings: Mapping[str, Any], most_tokens: Optional[int], source: Path) -> None:
    """Raise for a window of attention that sequences reach.

    4.37 and 4.41 let a token see up to two more than the window, by version and kind of attention; later versions do
    not. Qwen2 has it in other layers too and, without flash attention, even when it is switched off. Of a sequence of
    one token more than the window, the last would be touched: nothing is predicted from it.
    """
    window, longest = settings.get("sliding_window"), _longest(settings, most_tokens)
    if settings.get("use_sliding_window") or (window or longest) < longest - 1:
        raise ExportError(
            f"{source} has sliding_window {window}, and sequences of up to {longest} tokens: the versions of "
            "transformers that LLaVA runs on apply the window otherwise than later ones. To export it for sequences "
            f"that do not reach it, set tokenizer_model_max_length {window} (and use_sliding_window false) in its "
            "config.json"
        )


def _longest(settings: Mapping[str, Any], most_tokens: Optional[int]) -> int:
    """The tokens of the longest sequence that is trained."""
    longest: int = settings["max_position_embeddings"]
    return min(longest, most_tokens or longest)


def _refuse_long_rotations(settings: Mapping[str, Any], most_tokens: Optional[int], source: Path) -> None:
    """Raise for what ViP-LLaVA's copy of Phi-3 makes of `rope_scaling`, and later versions do not.

    Its `su`, later `longrope`, has other factors for sequences beyond the original length, and keeps those of the
    first sequence that a model sees. Its `yarn` scales by another rule; later versions read the name as `longrope`.
    """
    scaling = settings["rope_scaling"]
    if not scaling:
        return
    kind, longest = scaling.get("type"), _longest(settings, most_tokens)
    original = settings["original_max_position_embeddings"]
    if kind != "su":
        raise ExportError(
            f"{source} has rope_scaling of type {kind!r}: of Phi-3's, only 'su' can be exported. ViP-LLaVA's Phi-3 "
            "knows 'yarn' beside it, which later versions of transformers compute otherwise"
        )
    if longest > original:
        raise ExportError(
            f"{source} has rope_scaling of type 'su' and sequences of up to {longest} tokens, more than its "
            f"original_max_position_embeddings {original}: in ViP-LLaVA, answers then depend on the length of the "
            "first sequence after loading, in later versions of transformers not. To export it for sequences that do "
            f"not get that long, set tokenizer_model_max_length {original} in its config.json"
        )


def _refuse_dynamic_rotations(scaling: Mapping[str, Any], source: Path) -> None:
    """Raise for rotations that follow the length of the sequence.

    4.37 and 4.41 keep those of the longest sequence so far, for shorter ones too; later versions go back.
    """
    if "dynamic" in (scaling.get("type"), scaling.get("rope_type")):
        raise ExportError(
            f"{source} has rope_scaling {dict(scaling)!r}: in the versions of transformers that LLaVA runs on, answers "
            "then depend on the longest sequence before, in later ones not. Where no sequence is longer than "
            "max_position_embeddings it has no effect: remove it from config.json to export for those"
        )


def _version(text: Any) -> tuple[int, ...]:
    """`4.37.2` -> (4, 37); what is no version counts as older than all."""
    try:
        return tuple(int(part) for part in str(text).split(".")[:2])
    except ValueError:
        return (0,)


def generation_config(folder: Path, text: Mapping[str, Any], config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """What the exported `generation_config.json` holds: as LLaVA's own model generates, with all of its end tokens.

    Args:
        folder: that LLaVA's loader takes the LLM from.
        text: the LLM's config, from which the tokens are taken where the folder has no such file.
        config: of the checkpoint, from which all else is taken then.
        source: the checkpoint, for messages.

    Raises:
        ExportError: a setting that would act on the prompt too.
        ProjectorSpecError: the file is no JSON object.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        found = read_json(path)
    else:
        path = source / "config.json"
        found = {name: config[name] for name, usual in OF_MODEL_CONFIG.items() if config.get(name, usual) != usual}
    _refuse_settings_of_the_prompt(found, path)
    read = set(GENERATION_SETTINGS)
    if _version(config.get("transformers_version")) >= (4, 41):
        read |= GENERATION_SETTINGS_SINCE_4_41
    settings = {name: text.get(name) for name in TOKENS} | {name: found[name] for name in found.keys() & read}
    if not settings.get("do_sample"):
        # They have no effect then, but newer versions refuse to save them, and vLLM samples with them.
        for name in SAMPLING:
            settings.pop(name, None)
    return {name: value for name, value in settings.items() if value is not None}


def _refuse_settings_of_the_prompt(found: Mapping[str, Any], path: Path) -> None:
    """Raise for settings of generation that act on the answer in LLaVA, and on the prompt too elsewhere."""
    active = [name for name, idle in OF_TOKENS_SO_FAR.items() if found.get(name) not in (None, idle)]
    if any(len(ids) > 1 for ids in found.get("bad_words_ids") or ()):  # the first of them may end the prompt
        active.append("bad_words_ids")
    if (found.get("max_length") or LONG) < LONG and found["max_length"] != USUAL_LENGTH:
        active.append("max_length")
    for name in active:
        raise ExportError(
            f"{path} has {name} {found[name]!r}: LLaVA generates from embeddings, where it does not see the prompt; in "
            "transformers and vLLM it does. Remove it to export without it; LLaVA then answers without it as well"
        )


def end_tokens(ids: Any) -> frozenset[int]:
    """The set of what a config has as `eos_token_id`: nothing, one id or several."""
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])
