"""Words that passages share with questions: stems, function words, neighbours."""

import numpy as np

from gemfilter_jax.methods import lexical

_PASSAGES = (
    "The ferry sails at noon.",
    "Tickets are sold in the harbour office.",
    "What a day it was, and who would have thought so?",
    "Nobody sailed on Monday.",
)


def test_a_passage_without_a_word_of_the_question_scores_nothing():
    assert np.flatnonzero(lexical.bm25(_PASSAGES, "Where is the Harbour master?")).tolist() == [0, 1]
    assert not lexical.bm25(_PASSAGES, "Lighthouse keepers").any()


def test_stems_meet_and_function_words_do_not_count():
    plain = lexical.bm25(_PASSAGES, "Who was sailing?")
    stems = lexical.bm25(_PASSAGES, "Who was sailing?", stems=True)
    assert np.flatnonzero(plain).tolist() == [2]  # "who" and "was"
    assert np.flatnonzero(stems).tolist() == [0, 3]  # "sails" and "sailed"


def test_a_question_of_function_words_ranks_nothing():
    assert not lexical.scores(_PASSAGES, "What is it, and who was it?").any()


def test_the_passages_beside_a_match_share_in_it():
    scores = lexical.scores(_PASSAGES, "harbour")
    own = lexical.bm25(_PASSAGES, "harbour", stems=True)
    assert own[1] > 0
    np.testing.assert_allclose(scores, [0.3 * own[1], own[1], 0.3 * own[1], 0.0], rtol=1e-6)


def test_one_passage_has_no_neighbours():
    np.testing.assert_array_equal(
        lexical.scores(["a harbour"], "harbour"), lexical.bm25(["a harbour"], "harbour", stems=True)
    )
