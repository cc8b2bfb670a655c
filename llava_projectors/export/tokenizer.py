"""The tokenizer of an exported folder: splits text as LLaVA's slow `LlamaTokenizer` does, whatever loads it.

LLaVA tokenizes the text before and after each image on its own, so a word piece's leading space
comes back behind `<image>`. Of the fast tokenizers only one with the "legacy" normalizer does the same,
and transformers 5 has none; so `tokenizer.json` is written here, from the sentencepiece model,
and loaded as a plain `PreTrainedTokenizerFast`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_projectors.export.errors import ExportError
from llava_projectors.export.folders import write_json
from llava_projectors.files import read_json

IMAGE_TOKEN = "<image>"
# Of every exported tokenizer_config.json.
FIXED = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE_TOKEN,
    "extra_special_tokens": {"image_token": IMAGE_TOKEN},
    # LLaVA's LLMs take no token types.
    "model_input_names": ["input_ids", "attention_mask"],
    # Left, for batches that generate.
    "padding_side": "left",
}
# Of the prompts that tokenizers are compared on.
WORDS = (
    "the", "what", "picture", "show?", "<image>", "<image>\n", "\n", "\n\n", "  ", "\t", "USER:", "ASSISTANT:", "höhe",
    "日本", "🙂", ",a", "123", "4567.8", "don't", "I'LL", "e\u0301", "#!", "_x", "ﬁ½",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """What the rest of an export has to know of its tokenizer.

    Attributes:
        image: the id of `<image>`.
        count: how many ids there are.
        pieces: how many of them are no added tokens.
        tokens: all of them.
        adds_start: whether it puts a start token in front.
    """

    image: int
    count: int
    pieces: int
    tokens: Collection[str]
    adds_start: bool


def export_tokenizer(source: Path, target: Path) -> Exported:
    """Write the tokenizer's files, with `<image>` added.

    Args:
        source: folder of LLaVA's tokenizer, with `tokenizer.model`, `tokenizer.json` or `vocab.json`.
        target: folder to write to.

    Raises:
        ExportError: there is no tokenizer of a known format, or it has settings of which the export knows nothing.
    """
    from tokenizers import AddedToken

    settings = _read_json(source / "tokenizer_config.json")
    try:
        tokenizer = _read_tokenizer(source, settings)
    except ExportError:
        raise
    except Exception as error:  # the libraries raise a dozen kinds
        raise ExportError(f"cannot read the tokenizer of {source}: {error}. Copy it there from the base LLM") from error
    special = _special_tokens(tokenizer, settings, source)
    start = tokenizer.token_to_id(special.get("bos_token", ""))
    adds_start = start is not None and tokenizer.encode("a").ids[0] == start
    is_rebuilt = (source / "tokenizer.model").is_file()
    usual = {"add_bos_token": True, "add_eos_token": False} if is_rebuilt else {}  # of Llama's slow tokenizer
    _refuse_other_ends(tokenizer, {**usual, **settings}, adds_start, source)
    _refuse_other_tokens(tokenizer, special, settings, source)
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    tokenizer.save(str(target / "tokenizer.json"))
    cleans_up = settings.get("clean_up_tokenization_spaces", not is_rebuilt)
    written = {
        **FIXED,
        **special,
        "clean_up_tokenization_spaces": cleans_up,
        # Without it transformers 5 gives the first no effect, and " ." stays what LLaVA prints as ".".
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": cleans_up,
        "model_max_length": settings.get("model_max_length", 2048),
    }
    write_json(target / "tokenizer_config.json", written)
    write_json(target / "special_tokens_map.json", special)
    vocabulary = tokenizer.get_vocab()
    count, pieces = max(vocabulary.values()) + 1, tokenizer.get_vocab_size(with_added_tokens=False)
    return Exported(vocabulary[IMAGE_TOKEN], count, pieces, vocabulary.keys(), adds_start)


def _read_tokenizer(source: Path, settings: Mapping[str, Any]) -> Any:
    """A `tokenizers.Tokenizer` that splits text as the one that LLaVA loads from a folder."""
    from tokenizers import Tokenizer

    added = _added_tokens(source, settings)
    if (source / "tokenizer.model").is_file():
        tokenizer = from_sentencepiece(source / "tokenizer.model", {token.content for token in added.values()})
    elif (source / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        # The slow tokenizer that trains does not write this file, which may be older than the tokens added then.
        added = {number: token for number, token in added.items() if tokenizer.id_to_token(number) != token.content}
    elif (source / "vocab.json").is_file():  # as Qwen2's slow tokenizer is saved
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source, local_files_only=True).backend_tokenizer
    else:
        raise ExportError(
            f"{source} has no tokenizer: neither tokenizer.model, tokenizer.json nor vocab.json. Copy it there from "
            "the base LLM"
        )
    for number, token in sorted(added.items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ExportError(f"{source} gives the added token {token.content!r} the id {number}, which is not free")
    return tokenizer


def _special_tokens(tokenizer: Any, settings: Mapping[str, Any], source: Path) -> dict[str, str]:
    """`bos_token` and the like, those that the tokenizer has."""
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    found = {name: _content(settings.get(name)) or token for name, token in usual.items()}
    special = {name: token for name, token in found.items() if token and tokenizer.token_to_id(token) is not None}
    if "eos_token" not in special:
        raise ExportError(f"{source / 'tokenizer_config.json'} names no eos_token that the tokenizer has")
    special.setdefault("pad_token", special.get("unk_token") or special["eos_token"])
    return special


def _refuse_other_ends(tokenizer: Any, settings: Mapping[str, Any], adds_start: bool, source: Path) -> None:
    """Raise where the settings want a start or end token that the tokenizer does not put there, or the reverse."""
    found = {"add_bos_token": adds_start, "add_eos_token": len(tokenizer.encode("").ids) > adds_start}
    for name, does in found.items():
        if settings.get(name) not in (None, does):
            raise ExportError(
                f"{source / 'tokenizer_config.json'} has {name} {settings[name]!r}, and its tokenizer "
                f"{'puts one there' if does else 'puts none there'}: only {does!r} can be exported"
            )


def _trained_tokenizer(source: Path, settings: Mapping[str, Any]) -> Any:
    """The tokenizer that LLaVA's loader takes from a folder; None where this transformers has no slow ones."""
    import transformers

    if not issubclass(transformers.LlamaTokenizer, transformers.PreTrainedTokenizer):  # transformers 5
        return None
    if "tokenizer_class" in settings:
        loader: Any = transformers.AutoTokenizer
    elif (source / "tokenizer.model").is_file():
        loader = transformers.LlamaTokenizer
    else:
        return None  # LLaVA goes by a model_type that only its own code knows
    try:
        return loader.from_pretrained(source, use_fast=False, local_files_only=True)
    except Exception as error:  # the libraries raise a dozen kinds
        reason = " ".join(str(error).split())
        raise ExportError(f"LLaVA cannot load the tokenizer of {source}: {reason}. Copy the base LLM's") from error


def _refuse_other_tokens(tokenizer: Any, special: Mapping[str, str], settings: Mapping[str, Any], source: Path) -> None:
    """Raise where LLaVA's tokenizer has other special or added tokens, or splits text otherwise."""
    trained = _trained_tokenizer(source, settings)
    if trained is None:
        return
    named = trained.special_tokens_map
    for name in ("bos_token", "eos_token", "unk_token"):
        if named.get(name, special.get(name)) != special.get(name):
            raise ExportError(
                f"{source} has {name} {named[name]!r} in LLaVA, and {special.get(name)!r} by its "
                "tokenizer_config.json: name it there"
            )
    ours = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    theirs = trained.get_added_vocab()
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise ExportError(
                f"the tokenizer of {source} has the token {token!r}, which LLaVA's gives the id {theirs.get(token)} "
                f"and the exported one {ours.get(token)}: its tokenizer_config.json, special_tokens_map.json and "
                "vocabulary disagree. Remove it where it is named, or copy the tokenizer from the base LLM"
            )
    # What follows a special token is another rule in "legacy: false"; the card says so.
    words = WORDS if getattr(trained, "legacy", None) is False else [*WORDS, *sorted(theirs)]
    for prompt in prompts_of(words, 200):
        if tokenizer.encode(prompt).ids != trained(prompt).input_ids:
            raise ExportError(
                f"LLaVA splits {prompt!r} otherwise than an exported tokenizer would: the settings of {source} "
                f"({type(trained).__name__}) cannot be exported. Copy the tokenizer from the base LLM"
            )


def prompts_of(words: Sequence[str], count: int) -> Iterator[str]:
    """The same random prompts each time, of words with and without spaces between them."""
    generator = random.Random(0)
    for _ in range(count):
        picked = generator.choices(words, k=12)
        yield "A chat. USER: " + "".join(word + " " * generator.randrange(2) for word in picked)


def spaces_differ(source: Path) -> bool:
    """Whether LLaVA's tokenizer gives no space behind special tokens, as the exported one does."""
    is_rebuilt = (source / "tokenizer.model").is_file()
    return is_rebuilt and _read_json(source / "tokenizer_config.json").get("legacy") is False


def from_sentencepiece(path: Path, added: Collection[str] = ()) -> Any:
    """A `tokenizers.Tokenizer` with the pieces of a sentencepiece BPE model and Llama's "legacy" rules for spaces.

    Each stretch of text between special tokens gets a leading space; byte fallback; `<s>` in front.

    Args:
        path: of the model.
        added: tokens that are added later, which are split off before the model sees them.

    Raises:
        ExportError: it splits text by other rules.
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
    _refuse_other_rules(tokenizer, model, added, path)
    control = [piece for number, piece in enumerate(pieces) if model.is_control(number) or number == model.unk_id()]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    begin = pieces[model.bos_id()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}:0 $A:0", pair=f"{begin}:0 $A:0 {begin}:1 $B:1", special_tokens=[(begin, model.bos_id())]
    )
    return tokenizer


def _refuse_other_rules(tokenizer: Any, model: Any, added: Collection[str], path: Path) -> None:
    """Raise for a sentencepiece model that is no BPE, changes characters or has symbols of its user's."""
    pieces = {model.id_to_piece(number): number for number in _ordinary(model)}
    # BPE makes each piece of two others.
    whole = [piece for piece in pieces if len(piece) > 1 and piece not in added and not _pairs(piece, pieces)]
    for text in ("a  b", *whole, *_glued(pieces, 50), *prompts_of(WORDS, 50)):
        if tokenizer.encode(text).ids != model.encode(text):
            raise ExportError(
                f"{path} splits {text!r} otherwise than its pieces do by the BPE of Llama's tokenizer, the only one "
                "that can be exported: no unigram model, user-defined symbols or normaliser. Take another base LLM"
            )


def _ordinary(model: Any) -> list[int]:
    """Ids of the pieces of text: no control symbols, no bytes."""
    every = range(model.get_piece_size())
    return [n for n in every if not (model.is_control(n) or model.is_unknown(n) or model.is_byte(n))]


def _glued(pieces: Collection[str], count: int) -> list[str]:
    """The same random texts each time, of words that are pieces put together."""
    letters = [piece for piece in pieces if piece.isascii() and piece.isalpha()]
    generator = random.Random(0)
    words = ["".join(generator.choices(letters, k=3)) for _ in range(12 * count)] if letters else []
    return [" ".join(words[start : start + 12]) for start in range(0, len(words), 12)]


def merges(pieces: list[str], model: Any) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, the likeliest result first, as sentencepiece joins them.

    Among pairs with one result, the order is that of their ids.
    """
    ids = {piece: number for number, piece in enumerate(pieces)}
    found = [(-model.get_score(number), pair) for number in _ordinary(model) for pair in _pairs(pieces[number], ids)]
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]  # the sort keeps the order of equal scores


def _pairs(piece: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The pairs of pieces that make a piece, in the order of their ids."""
    splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    found = [(left, right) for left, right in splits if left in ids and right in ids]
    return sorted(found, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _added_tokens(source: Path, settings: Mapping[str, Any]) -> dict[int, Any]:
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
    if "added_tokens_decoder" in settings:
        return added  # transformers reads no added_tokens.json then
    for content, number in _read_json(source / "added_tokens.json").items():
        added.setdefault(number, AddedToken(content, normalized=False, special=True))
    return added


def _content(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
