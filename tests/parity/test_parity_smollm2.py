"""The default model, weights and tokenizer, against what PyTorch and transformers make of the same file."""

import bounds
import numpy as np
import pytest
from model_files import GOLDEN
from model_outputs import top1_and_last_logits


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """What make_smollm2.py stored."""
    with np.load(GOLDEN / "smollm2_top1.npz") as stored:
        return dict(stored)


def test_top1_and_logits(smollm2, expected):
    top1, last = top1_and_last_logits(smollm2.checkpoint.model, expected["ids"])
    agreement = np.mean(np.asarray(top1) == expected["top1"])
    assert agreement >= 0.99
    config, positions, logits = smollm2.checkpoint.model.config, len(expected["ids"]), expected["last_logits"]
    worst = bounds.of_decoder(config, positions, np.abs(logits).max())
    likely = bounds.likely(worst, bounds.terms_of_decoder(config, positions))
    np.testing.assert_allclose(last[expected["last_indices"]], logits, rtol=0, atol=likely)


@pytest.mark.parametrize(("text", "ids"), [("text", "ids"), ("nasty_text", "nasty_ids")])
def test_tokenizer(smollm2, expected, text, ids):
    tokenizer = smollm2.checkpoint.tokenizer
    assert tokenizer(str(expected[text]), add_special_tokens=False)["input_ids"] == expected[ids].tolist()
    assert tokenizer.decode(expected[ids]) == str(expected[text])
