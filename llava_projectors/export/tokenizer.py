"""The tokenizer of an exported folder: splits text as LLaVA's slow `LlamaTokenizer` does, whatever loads it.

LLaVA tokenizes the text before and after each image on its own, so a word piece's leading space
comes back behind `<image>`. Of the fast tokenizers only one with the "legacy" normalizer does the same,
and transformers 5 has none; so `tokenizer.json` is written here, from the sentencepiece model,
and loaded as a plain `PreTrainedTokenizerFast`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_projectors import files
from llava_projectors.export.errors import ExportError

IMAGE_TOKEN = "<image>"
END_TOKEN = "</s>"


def export_tokenizer(source: Path, target: Path, chat_template: str) -> tuple[int, int, bool]:
    """Write the tokenizer's files, with `<image>` added.

    Args:
        source: folder of LLaVA's tokenizer, with `tokenizer.model` or `tokenizer.json`.
        target: folder to write to.
        chat_template: in Jinja.

    Returns:
        the id of `<image>`, how many ids there are, and whether `</s>` is a token.

    Raises:
        ExportError: there is no tokenizer of a known format, or it has settings of which the export knows nothing.
    """
    from tokenizers import AddedToken, Tokenizer

    settings = _read_json(source / "tokenizer_config.json")
    if (source / "tokenizer.model").is_file():
        for name, usual in (("add_bos_token", True), ("add_eos_token", False)):
            if settings.get(name) not in (None, usual):
                raise ExportError(
                    f"{source / 'tokenizer_config.json'} has {name} {settings[name]!r}: only {usual!r} can be exported"
                )
        tokenizer = from_sentencepiece(source / "tokenizer.model")
        for number, token in sorted(_added_tokens(source, settings).items()):
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            if tokenizer.token_to_id(token.content) != number:
                raise ExportError(
                    f"{source} gives the added token {token.content!r} the id {number}, which is not free"
                )
    elif (source / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    else:
        raise ExportError(
            f"{source} has no tokenizer: neither tokenizer.model nor tokenizer.json. Copy it there from the base LLM"
        )
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    tokenizer.save(str(target / "tokenizer.json"))
    special = {
        name: _content(settings.get(name)) or default
        for name, default in (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"), ("pad_token", None))
    }
    special = {name: token for name, token in special.items() if token and tokenizer.token_to_id(token) is not None}
    special.setdefault("pad_token", special.get("unk_token") or special["eos_token"])
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "image_token": IMAGE_TOKEN,
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "clean_up_tokenization_spaces": False,
        # Llama takes no token types.
        "model_input_names": ["input_ids", "attention_mask"],
        # Left, for batches that generate.
        "padding_side": "left",
        "model_max_length": settings.get("model_max_length", 2048),
        "processor_class": "LlavaProcessor",
    }
    (target / "tokenizer_config.json").write_text(json.dumps(written, indent=2), encoding="utf-8")
    (target / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")
    (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    has_end = tokenizer.token_to_id(END_TOKEN) is not None
    return int(tokenizer.token_to_id(IMAGE_TOKEN)), max(tokenizer.get_vocab().values()) + 1, has_end


def spaces_differ(source: Path) -> bool:
    """Whether LLaVA's tokenizer gives no space behind special tokens, as the exported one does."""
    is_rebuilt = (source / "tokenizer.model").is_file()
    return is_rebuilt and _read_json(source / "tokenizer_config.json").get("legacy") is False


def from_sentencepiece(path: Path) -> Any:
    """A `tokenizers.Tokenizer` with the pieces of a sentencepiece BPE model and Llama's "legacy" rules for spaces.

    Each stretch of text between special tokens gets a leading space; byte fallback; `<s>` in front.
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [model.id_to_piece(number) for number in range(model.get_piece_size())]
    ids = {piece: number for number, piece in enumerate(pieces)}
    unknown = pieces[model.unk_id()]
    tokenizer = Tokenizer(models.BPE(ids, merges(pieces, model), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [piece for number, piece in enumerate(pieces) if model.is_control(number) or number == model.unk_id()]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    begin = pieces[model.bos_id()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0", pair=f"{begin}:0 $A:0 {begin}:1 $B:1", special_tokens=[(begin, model.bos_id())]
    )
    return tokenizer


def merges(pieces: list[str], model: Any) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, the likeliest result first, as sentencepiece joins them.

    Among pairs with one result, the order is that of their ids.
    """
    ids = {piece: number for number, piece in enumerate(pieces)}
    ordinary = [n for n in range(len(pieces)) if not (model.is_control(n) or model.is_unknown(n) or model.is_byte(n))]
    found: list[tuple[float, int, tuple[str, str]]] = []
    for number in ordinary:
        piece = pieces[number]
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in splits if left in ids and right in ids]
        found.extend(
            (-model.get_score(number), order, pair)
            for order, pair in enumerate(sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]])))
        )
    return [pair for *_, pair in sorted(found, key=lambda entry: entry[0])]


def _added_tokens(source: Path, settings: dict[str, Any]) -> dict[int, Any]:
    """Id -> token of the tokens beyond the sentencepiece model."""
    from tokenizers import AddedToken

    added = {
        int(number): AddedToken(
            token["content"],
            **{name: token.get(name, False) for name in ("single_word", "lstrip", "rstrip", "special")},
            normalized=False,
        )
        for number, token in settings.get("added_tokens_decoder", {}).items()
    }
    for content, number in _read_json(source / "added_tokens.json").items():
        added.setdefault(number, AddedToken(content, normalized=False, special=True))
    return added


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}
