"""A small part of `gemfilter evaluate`: hidden facts are kept and answered, within the context and beyond it."""

import pytest

from gemfilter_jax.evals import examples
from gemfilter_jax.evals.tasks import needles


@pytest.mark.parametrize("which", [0, 3])
def test_facts_in_2048_tokens(smollm2, which):
    case = list(needles.cases(smollm2.checkpoint.tokenizer, 2048, depths=(0.5,)))[which]
    outcome = examples.Asking(smollm2, smollm2.method(keep=512))(case)
    assert outcome.kept == 1.0
    assert outcome.right, outcome.answer


def test_a_fact_beyond_the_context(smollm2):
    case = next(needles.cases(smollm2.checkpoint.tokenizer, 12_000, depths=(0.3,)))
    outcome = examples.Asking(smollm2, smollm2.method(keep=512))(case)
    assert outcome.kept == 1.0
    assert outcome.right, outcome.answer
