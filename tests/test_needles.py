"""A small part of `gemfilter evaluate`: hidden facts are kept and answered, within the context and beyond it."""

import pytest

from gemfilter_jax.evaluation import needle, questions


@pytest.mark.parametrize("which", [0, 3])
def test_facts_in_2048_tokens(smollm2, which):
    case = list(needle.cases(smollm2.checkpoint.tokenizer, 2048, depths=(0.5,)))[which]
    outcome = questions.Asking(smollm2, smollm2.method(keep=512))(case)
    assert outcome.kept == 1.0
    assert outcome.right, outcome.answer


def test_a_fact_beyond_the_context(smollm2):
    case = next(needle.cases(smollm2.checkpoint.tokenizer, 12_000, depths=(0.3,)))
    outcome = questions.Asking(smollm2, smollm2.method(keep=512))(case)
    assert outcome.kept == 1.0
    assert outcome.right, outcome.answer
