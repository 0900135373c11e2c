"""Encodes control tokens in user text as ordinary text."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the control tokens.

    These are the added tokens that the tokenizer marks as special, and those that occur in its chat template, such as
    "<think>". Other added tokens, such as runs of spaces or HTML tags, are ordinary text.
    """
    template = str(tokenizer.chat_template or "")
    added: Any = tokenizer.added_tokens_decoder
    return frozenset(
        number
        for number, token in added.items()
        if token.content.strip() and (token.special or token.content in template)
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
    columns = [encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask")]
    rows: list[tuple[int, tuple[int, int], int]] = []
    for token, (start, end), added in zip(*columns, strict=True):
        unknown = token == tokenizer.unk_token_id and str(tokenizer.unk_token) not in text[start:end]
        if added or unknown or token not in control or not _holds(text, start, end, brought):
            rows.append((token, (start, end), added))
            continue
        spelled = _spell(tokenizer, text[start:end])
        rows += [(letter, (start + first, start + last), 0) for letter, (first, last) in spelled]
    names = ("input_ids", "offset_mapping", "special_tokens_mask")
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


def _holds(text: str, start: int, end: int, brought: Sequence[tuple[int, int]]) -> bool:
    """Whether a token covers user text other than white space, which a template's token may include."""
    return any(text[max(start, first) : min(end, last)].strip() for first, last in brought)


def _spell(tokenizer: PreTrainedTokenizerBase, marker: str) -> list[tuple[int, tuple[int, int]]]:
    """Ids and offsets of a control token's text, encoded as ordinary text."""
    unknown: Any = tokenizer.unk_token_id
    control, plain = control_ids(tokenizer) - {unknown}, _without_control(tokenizer)
    encoding = plain.encode(marker, add_special_tokens=False)
    found = list(zip(encoding.ids, encoding.offsets, strict=True))
    if any(token in control for token, _ in found):  # the base vocabulary contains the marker too
        found = [
            (token, (place, place + 1))
            for place, letter in enumerate(marker)
            for token in plain.encode(letter, add_special_tokens=False).ids
        ]
    if any(token in control for token, _ in found):
        raise UserError(f"the prompt holds {marker!r}, for which the tokenizer has no ordinary tokens; remove it")
    return found


@functools.lru_cache(maxsize=4)
def _without_control(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizer without its control tokens."""
    control = control_ids(tokenizer)
    rules: Any = tokenizer.backend_tokenizer
    fields = json.loads(rules.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] not in control]
    return Tokenizer.from_str(json.dumps(fields))
