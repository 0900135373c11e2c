"""Tokenizers from GGUF metadata: sentencepiece BPE (model "llama") and byte-level BPE (model "gpt2").

Names and defaults are those of llama.cpp, https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

import collections
import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gemfilter_jax.config import take, take_flag
from gemfilter_jax.errors import UserError
from gemfilter_jax.models import families

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # values of tokenizer.ggml.token_type
_NEVER_MERGED = {_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
_SPACE = "\u2581"  # how sentencepiece writes a space
_LONGEST_PIECE = 256  # characters; sentencepiece's default maximum is 16, and splitting is quadratic

_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unknown": 0}}
_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_STOPS = ("eos", "eot", "eom")
# Control tokens that end an answer even if the file gives them no role: Phi-3's files name only its first one.
_STOP_WORDS = {"<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>"}


@dataclasses.dataclass(frozen=True)
class _Split:
    """How text is split into words; byte pairs are then merged within each word.

    Attributes:
      patterns: applied in order, each to the words of the one before; matches and the text between them are words.
      composed: whether characters are composed (Unicode NFC) first.
      whole_words: whether a word that is a token is taken whole, without merges.
      add_bos: whether to begin texts with the BOS token if the file does not say.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    whole_words: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words_by_letters(digits: str) -> str:
    """Llama 3's and Qwen 2's pattern, as in the tokenizer.json published with them."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _words_by_case(ending: str, digits: str) -> str:
    """GPT-4o's and Tekken's pattern, as in tiktoken and in the tekken.json published with Mistral Nemo."""
    before = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{before}{_UPPER}*{_LOWER}+{ending}|{before}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_LLAMA3 = _Split((_words_by_letters(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_QWEN2 = _Split((_words_by_letters(r"\p{N}"),), composed=True)
_GPT4O = _Split((_words_by_case(rf"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))
_SPLITS = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Split((_GPT2,)),
    "smollm": _Split((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Split((_words_by_case("", r"\p{N}"),), whole_words=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
}


def build_tokenizer(metadata: Mapping[str, Any], source: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer with the file's chat template.

    Args:
      metadata: the fields of a GGUF file, arrays as lists.
      source: names the file in error messages.

    Raises:
      UserError: the tokenizer's kind is not supported, or a field is missing, malformed or contradicts another.
    """
    model = take(metadata, "tokenizer.ggml.model", source)
    if model not in ("gpt2", "llama"):
        raise UserError(
            f"{source}: tokenizer model {reprlib.repr(model)} is not supported; "
            "supported: gpt2 (byte-level BPE), llama (sentencepiece BPE)"
        )
    tokens = _take_tokens(metadata, source)
    kinds = _take_list(metadata, "tokenizer.ggml.token_type", int, source, len(tokens))
    ids = _take_ids(metadata, source, len(tokens))
    chat_template = metadata.get("tokenizer.chat_template")
    if not isinstance(chat_template, str | None):
        raise UserError(f"{source}: field 'tokenizer.chat_template' is {reprlib.repr(chat_template)}, expected text")
    if model == "llama":
        tokenizer, add_bos = _sentencepiece(metadata, source, tokens, kinds, ids), True
    else:
        split = _take_split(metadata, source)
        tokenizer, add_bos = _byte_level(metadata, source, tokens, split), split.add_bos
    family = families.by_gguf_architecture().get(str(metadata.get("general.architecture")))
    keeps_space = family.gguf_keeps_space if family and model == "llama" else None
    for kind, add in ((_CONTROL, tokenizer.add_special_tokens), (_USER_DEFINED, tokenizer.add_tokens)):
        chosen = [token for token, its_kind in zip(tokens, kinds, strict=True) if its_kind == kind]
        strips = {token: keeps_space is not None and token not in keeps_space for token in chosen}
        add([AddedToken(token, normalized=False, rstrip=strips[token]) for token in chosen])
    tokenizer.post_processor = _ends(metadata, source, tokens, ids, add_bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **{role: tokens[ids[name]] for role, name in _ROLES.items() if name in ids},
    )


def stop_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: end of sequence, turn or message. `build_tokenizer` must accept the metadata."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = _take_ids(metadata, "", len(tokens))
    named = [ids[name] for name in _STOPS if name in ids]
    known = [i for i, token in enumerate(tokens) if kinds[i] == _CONTROL and token in _STOP_WORDS]
    return tuple(dict.fromkeys(named + known))


def _sentencepiece(
    metadata: Mapping[str, Any], source: str, tokens: Sequence[str], kinds: Sequence[int], ids: Mapping[str, int]
) -> Tokenizer:
    scores = _take_list(metadata, "tokenizer.ggml.scores", int | float, source, len(tokens))
    pieces = {t: i for i, t in enumerate(tokens) if kinds[i] not in _NEVER_MERGED}
    unknown = tokens[ids["unknown"]] if "unknown" in ids else None
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=_merges_by_score(pieces, scores, source),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _take_flag(metadata, "tokenizer.ggml.add_space_prefix", True, source)
    if prefix and "[INST]" in tokens and kinds[tokens.index("[INST]")] == _CONTROL:
        # Mistral's template already writes the space after this token, and the model was trained with only one.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=False)
    else:
        steps = [normalizers.Prepend(_SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_by_score(pieces: Mapping[str, int], scores: Sequence[float], source: str) -> list[tuple[str, str]]:
    """All pairs that join into a piece, in sentencepiece's merge order: those of the best piece first.

    If scores are equal, the lower id counts as better: some converters write no real scores, and ids follow the order
    of training.
    """
    ranked = []
    for piece, i in pieces.items():
        if len(piece) > _LONGEST_PIECE or math.isnan(scores[i]):
            raise UserError(f"{source}: token {i} is of {len(piece)} characters with score {scores[i]}")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                ranked.append((-scores[i], i, cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _take_split(metadata: Mapping[str, Any], source: str) -> _Split:
    name = take(metadata, "tokenizer.ggml.pre", source, "default")
    if not isinstance(name, str) or name not in _SPLITS:
        raise UserError(
            f"{source}: pre-tokenizer {reprlib.repr(name)} is not supported; supported: {', '.join(_SPLITS)}"
        )
    return _SPLITS[name]


def _byte_level(metadata: Mapping[str, Any], source: str, tokens: Sequence[str], split: _Split) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for merge in _take_list(metadata, "tokenizer.ggml.merges", str, source):
        left, space, right = merge.partition(" ")
        if not (space and left in vocab and right in vocab and left + right in vocab):
            raise UserError(f"{source}: merge {reprlib.repr(merge)} is not of two tokens that make a third")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.whole_words))
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _ends(
    metadata: Mapping[str, Any], source: str, tokens: Sequence[str], ids: Mapping[str, int], add_bos: bool
) -> processors.TemplateProcessing | None:
    """A post-processor that adds BOS and EOS to every text; None if the file asks for neither."""
    added = {}
    for name, default in (("bos", add_bos and "bos" in ids), ("eos", False)):
        if _take_flag(metadata, f"tokenizer.ggml.add_{name}_token", default, source):
            if name not in ids:
                raise UserError(f"{source}: add_{name}_token without {name}_token_id")
            added[name] = ids[name]
    if not added:
        return None
    return processors.TemplateProcessing(
        single=[name for name in ("bos", "$A", "eos") if name == "$A" or name in added],
        special_tokens=[{"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in added.items()],
    )


def _take_tokens(metadata: Mapping[str, Any], source: str) -> list[str]:
    """The vocabulary. As in llama.cpp, an empty token gets a placeholder name, to which no text encodes."""
    stored = _take_list(metadata, "tokenizer.ggml.tokens", str, source)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(stored)]
    if not tokens:
        raise UserError(f"{source}: no tokens")
    if len(set(tokens)) != len(tokens):
        twice, _ = collections.Counter(tokens).most_common(1)[0]
        raise UserError(f"{source}: token {reprlib.repr(twice)} is there more than once")
    return tokens


def _take_ids(metadata: Mapping[str, Any], source: str, vocab: int) -> dict[str, int]:
    """Role name -> token id, for the roles that the file or its defaults assign."""
    defaults = _DEFAULT_IDS.get(metadata["tokenizer.ggml.model"], {})
    ids = {name: i for name, i in defaults.items() if i < vocab}
    for name in dict.fromkeys((*_ROLES.values(), *_STOPS)):
        i = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if i is None:
            continue
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab:
            raise UserError(f"{source}: {name}_token_id is {reprlib.repr(i)}, expected one of the {vocab} tokens' ids")
        ids[name] = i
    return ids


def _take_list(metadata: Mapping[str, Any], name: str, kind: Any, source: str, length: int | None = None) -> list:
    values = take(metadata, name, source)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        what = "texts" if kind is str else "numbers"
        raise UserError(f"{source}: field {name!r} is {reprlib.repr(values)}, expected a list of {what}")
    if length is not None and len(values) != length:
        raise UserError(f"{source}: {length} tokens but {len(values)} entries in field {name!r}")
    return values


def _take_flag(metadata: Mapping[str, Any], name: str, default: bool, source: str) -> bool:
    return take_flag({name: take(metadata, name, source, default)}, name, source)
