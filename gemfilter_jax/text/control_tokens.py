"""Control tokens in text that a user brings, spelled out as ordinary text."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gemfilter_jax.errors import UserError


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokens that steer a model.

    These are the added tokens that the tokenizer calls special, and those that its chat template writes, such as
    "<think>". Other added tokens, runs of spaces or tags of HTML, are text like any other.
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
    """A tokenized text in which no control token stands for what a user brought; its other tokens are unchanged.

    Args:
      encoded: `input_ids`, `offset_mapping` and `special_tokens_mask` of `text`.
      brought: (start, end) characters of `text` that the user brought.

    Returns:
      The same three lists; the letters of a control token have their own tokens and offsets.

    Raises:
      UserError: the tokenizer has no other tokens for such letters.
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
    """Whether a token's text is the user's; a template's own token may take white space of the user's along."""
    return any(text[max(start, first) : min(end, last)].strip() for first, last in brought)


def _spell(tokenizer: PreTrainedTokenizerBase, marker: str) -> list[tuple[int, tuple[int, int]]]:
    """Ids and offsets of a marker as ordinary text."""
    unknown: Any = tokenizer.unk_token_id
    control, plain = control_ids(tokenizer) - {unknown}, _without_control(tokenizer)
    encoding = plain.encode(marker, add_special_tokens=False)
    found = list(zip(encoding.ids, encoding.offsets, strict=True))
    if any(token in control for token, _ in found):  # the model's own vocabulary has it as a piece of text
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
    """The tokenizer's rules without its control tokens."""
    control = control_ids(tokenizer)
    rules: Any = tokenizer.backend_tokenizer
    fields = json.loads(rules.to_str())
    fields["added_tokens"] = [token for token in fields["added_tokens"] if token["id"] not in control]
    return Tokenizer.from_str(json.dumps(fields))
