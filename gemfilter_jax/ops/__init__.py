"""Operations on arrays: attention, key scores."""

from typing import Literal

Normalisation = Literal["none", "softmax", "sink"]
"""How logits are normalised into key scores; see `key_scores.score_keys`."""
