"""A small part of `gemfilter evaluate`: hidden facts are kept and answered, within the context and beyond it."""

import pytest

from gemfilter_jax.evals import runner
from gemfilter_jax.evals.tasks.needles import Needles


@pytest.mark.parametrize("which", [0, 3])
def test_facts_in_2048_tokens(smollm2, which):
    task = Needles(depths=(0.5,))
    example = list(task.examples(smollm2.checkpoint.tokenizer, 2048))[which]
    assert_kept_and_right(smollm2, task, example)


def test_a_fact_beyond_the_context(smollm2):
    task = Needles(depths=(0.3,))
    assert_kept_and_right(smollm2, task, next(task.examples(smollm2.checkpoint.tokenizer, 12_000)))


def assert_kept_and_right(model, task, example):
    ((_, outcome),) = runner.run(model, task, {"default": model.method(keep=512)}, [example])
    assert outcome.scores["kept"] == 1.0
    assert outcome.scores["right"], outcome.answer
