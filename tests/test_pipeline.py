"""Results: short to look at, and each its own."""

from gemfilter_jax.results import KeptText, Result


def test_a_short_repr():
    kept = KeptText("long " * 10_000, prompt_tokens=10_000, indices=tuple(range(500)), spans=((0, 10), (20, 30)))
    assert repr(kept) == "KeptText(kept_tokens=500, prompt_tokens=10000, passages=2)"
    result = Result("yes", tokens=(1, 2), stop_reason="stop", selection=kept, timings={})
    assert repr(result) == f"Result(text='yes', stop_reason='stop', selection={kept!r})"


def test_results_of_a_batch_share_no_timings(smollm2):
    first, second = smollm2.generate_batch(["One is one.", "Two is two."], max_new_tokens=1)
    assert first.timings == second.timings
    first.timings["decode"] = 0.0
    assert second.timings["decode"] > 0
