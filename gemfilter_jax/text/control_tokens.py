"""Encodes control tokens in user text as ordinary text."""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError

_MARKER = re.compile(r"<[|｜].*[|｜]>|\[/?[A-Z_]+\]", re.DOTALL)
_NAMES = ("input_ids", "offset_mapping", "special_tokens_mask")


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the control tokens.

    These are the added tokens that the tokenizer marks as special, those that occur in its chat template, such as
    "<think>", and those that look like markers, such as "<|file_sep|>" and "[INST]". Other added tokens, such as runs
    of spaces or HTML tags, are ordinary text.
    """
    template = str(tokenizer.chat_template or "")
    added: Any = tokenizer.added_tokens_decoder
    return frozenset(
        number
        for number, token in added.items()
        if (text := token.content.strip()) and (token.special or token.content in template or _MARKER.fullmatch(text))
    )


def spelled_out(
    tokenizer: PreTrainedTokenizerBase, text: str, encoded: Any, brought: Sequence[tuple[int, int]]
) -> dict[str, list]:
    """Replace control tokens in user text by the tokens of ordinary text; other tokens are unchanged.

    Args:
      encoded: `input_ids`, `offset_mapping` and `special_tokens_mask` of `text`.
      brought: (start, end) character ranges of `text` that come from the user.

    Returns:
      The same three lists, with separate tokens and offsets for the pieces of a control token.

    Raises:
      UserError: the tokenizer has no ordinary tokens for a control token's text.
    """
    control = control_ids(tokenizer)
    unknown: Any = tokenizer.unk_token_id
    unknown_text = str(tokenizer.unk_token)
    spell = functools.cache(functools.partial(_spell, tokenizer, control - {unknown}))
    ids, offsets, masks = (encoded[name] for name in _NAMES)
    spelled: tuple[list[int], list[tuple[int, int]], list[int]] = [], [], []
    done = 0
    for place in [place for place, token in enumerate(ids) if token in control]:
        start, end = offsets[place]
        is_unknown = ids[place] == unknown and unknown_text not in text[start:end]
        if masks[place] or is_unknown or not _holds(text, start, end, brought):
            continue
        letters, ranges = spell(text[start:end])
        between = slice(done, place)
        spelled[0].extend([*ids[between], *letters])
        spelled[1].extend([*offsets[between], *((start + first, start + last) for first, last in ranges)])
        spelled[2].extend([*masks[between], *([0] * len(letters))])
        done = place + 1
    return {
        name: [*made, *given[done:]] for name, made, given in zip(_NAMES, spelled, (ids, offsets, masks), strict=True)
    }


def _holds(text: str, start: int, end: int, brought: Sequence[tuple[int, int]]) -> bool:
    """Whether a token covers user text other than white space, which a template's token may include."""
    return any(text[max(start, first) : min(end, last)].strip() for first, last in brought)


def _spell(
    tokenizer: PreTrainedTokenizerBase, control: frozenset[int], marker: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and offsets of a control token's text, encoded as ordinary text: without `control`, the ids that steer."""
    plain = _without_control(tokenizer)
    encoding = plain.encode(marker, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    if not control.isdisjoint(ids):  # the base vocabulary contains the marker too
        letters = [plain.encode(letter, add_special_tokens=False).ids for letter in marker]
        ids = [token for tokens in letters for token in tokens]
        offsets = [(place, place + 1) for place, tokens in enumerate(letters) for _ in tokens]
    if not control.isdisjoint(ids):
        raise UserError(f"the prompt holds {marker!r}, for which the tokenizer has no ordinary tokens; remove it")
    return ids, offsets


@functools.lru_cache(maxsize=4)
def _without_control(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer without its control tokens."""
    control = control_ids(tokenizer)
    rules: Any = tokenizer.backend_tokenizer
    fields = json.loads(rules.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] not in control]
    return Tokenizer.from_str(json.dumps(fields))
