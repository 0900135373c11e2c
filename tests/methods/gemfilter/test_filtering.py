"""Stage 1 on the host: what is kept of whole prompts, of prompts beyond the context, and what is refused."""

import dataclasses
import itertools
import re

import bounds
import numpy as np
import pytest
import tiny
from flax import nnx

from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import passages
from gemfilter_jax.methods.gemfilter import filtering, scoring_pass
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.text.prompt import Prompt

_PREFIX, _SUFFIX, _CHUNK = 7, 10, 8  # so that a segment holds part of a chunk more than its whole ones
_SEGMENT = tiny.CONTEXT * 9 // 16
_DEFAULT = GemFilter(
    filter_layer=2,
    keep=64,
    observation_window=16,
    lexical=0.0,
    pooling="none",
    pool_size=1,
    chunk=_CHUNK,
    sentences=False,
    order="text",
)
_FUSED = dataclasses.replace(_DEFAULT, heads=("0/1", "2/3:0.5"), lexical=0.7)
_PAPER = GemFilter.paper(filter_layer=2, keep=64)


def _kept(model: Decoder, prompts: list[Prompt], method: GemFilter, **options) -> list[np.ndarray]:
    """The kept tokens of each prompt."""
    return [one.indices for one in filtering.keep_tokens(model, prompts, method, **options)]


def _prompt(length: int, prefix: int = _PREFIX, suffix: int = _SUFFIX, seed: int = 0):
    return tiny.prompt_of(tiny.random_ids(length, seed), prefix, suffix)


def _check_kept(kept: np.ndarray, prompt, method: GemFilter) -> None:
    assert len(kept) == min(method.keep, len(prompt))
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < len(prompt)
    if method.keep_required:
        assert np.isin(np.flatnonzero(prompt.required), kept).all()


@pytest.mark.parametrize("method", [_DEFAULT, _FUSED, _PAPER], ids=["default", "fused", "paper"])
def test_whole_prompts(method):
    prompts = [_prompt(_SEGMENT), _prompt(64), _prompt(20), _prompt(70, prefix=0, suffix=64)]
    kept = _kept(tiny.decoder(), prompts, method)
    for rows, prompt in zip(kept, prompts, strict=True):
        _check_kept(rows, prompt, method)
        if len(prompt) <= method.keep:
            np.testing.assert_array_equal(rows, np.arange(len(prompt)))


@pytest.mark.parametrize("method", [_DEFAULT, _FUSED], ids=["default", "fused"])
def test_a_batch_keeps_what_its_prompts_keep_alone(method):
    prompts = [_prompt(128), _prompt(97), _prompt(700), _prompt(115), _prompt(200)]
    together = _kept(tiny.decoder(), prompts, method)
    for rows, prompt in zip(together, prompts, strict=True):
        np.testing.assert_array_equal(rows, _kept(tiny.decoder(), [prompt], method)[0])


@pytest.mark.parametrize("normalisation", ["softmax", "none"])
def test_no_row_before_the_question_observes(normalisation):
    prompt = _prompt(_SEGMENT, suffix=4)
    wide, exact = (
        scoring_pass.scores(
            tiny.decoder(),
            [prompt.ids],
            [prompt],
            dataclasses.replace(_DEFAULT, observation_window=window, normalisation=normalisation),
            whole=True,
            document=len(prompt),
            width=len(prompt),
        )
        for window in (16, 4)
    )
    bound = bounds.of_decoder(tiny.CONFIG, len(prompt), np.abs(exact).max())
    np.testing.assert_allclose(wide, exact, rtol=0, atol=bound)


def test_a_sliding_window_bounds_what_is_filtered_in_one_pass(monkeypatch):
    """Of a layer that slides; another layer and the rule without softmax see the whole prompt."""
    config = dataclasses.replace(tiny.CONFIG, sliding_windows=(None, 64, None, None))
    model, widths = Decoder(config, rngs=nnx.Rngs(0)), []
    scores = scoring_pass.scores

    def record(model, ids, prompts, method, **shape):
        widths.extend(map(len, ids))
        return scores(model, ids, prompts, method, **shape)

    monkeypatch.setattr(scoring_pass, "scores", record)
    prompt = tiny.prompt_of(tiny.random_ids(250), 2, 3)
    for method, longest in (
        (dataclasses.replace(_DEFAULT, filter_layer=1, keep=20, segment=250), 64),
        (dataclasses.replace(_DEFAULT, filter_layer=2, keep=20, segment=250), 250),
        (dataclasses.replace(_DEFAULT, filter_layer=2, keep=20), _SEGMENT),
        (GemFilter.paper(filter_layer=1, keep=20), 250),
    ):
        widths.clear()
        _check_kept(_kept(model, [prompt], method)[0], prompt, method)
        assert max(widths) <= longest
        assert longest < 250 or widths == [250]


def test_the_filter_is_not_run_where_everything_is_kept(monkeypatch):
    monkeypatch.setattr(scoring_pass, "scores", None)
    (rows,) = _kept(tiny.decoder(), [_prompt(64)], _DEFAULT)
    np.testing.assert_array_equal(rows, np.arange(64))


@pytest.mark.parametrize("keep", [_PREFIX + _SUFFIX, 18, 64, 100, 170, 201, 256, 300])
@pytest.mark.parametrize("length", [257, 1999])
def test_prompts_beyond_the_context(length, keep):
    """Budgets from the template and question alone to more than the context, in whole chunks or not."""
    method, prompt = dataclasses.replace(_DEFAULT, keep=keep), _prompt(length)
    _check_kept(_kept(tiny.decoder(), [prompt], method)[0], prompt, method)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(_PAPER, id="paper"),
        pytest.param(dataclasses.replace(_DEFAULT, normalisation="sink"), id="sink"),
        pytest.param(_FUSED, id="fused"),
        pytest.param(dataclasses.replace(_FUSED, rounds=(300, 100)), id="fused, in rounds"),
        pytest.param(dataclasses.replace(_DEFAULT, keep_required=False, keep=8), id="less than is required"),
        pytest.param(dataclasses.replace(_DEFAULT, chunk=32, pooling="max", pool_size=9), id="pooled chunks"),
    ],
)
def test_every_rule_reads_prompts_beyond_the_context(method):
    prompt = _prompt(1000)
    _check_kept(_kept(tiny.decoder(), [prompt], method)[0], prompt, method)


@pytest.fixture
def score_of_token(monkeypatch) -> dict[int, float]:
    """Scores by token id in place of the model's, 0 for ids that are not in it: what is best is then known."""
    scores: dict[int, float] = {}

    def look_up(model, ids, prompts, method, *, whole, document, width):
        found = np.zeros((len(ids), width), np.float32)
        for row, tokens in enumerate(ids):
            found[row, : len(tokens)] = [scores.get(int(token), 0.0) for token in tokens]
        return found[:, None]

    monkeypatch.setattr(scoring_pass, "scores", look_up)
    return scores


def test_segments_are_whole_chunks_between_prefix_and_suffix(monkeypatch):
    passed: list[np.ndarray] = []

    def record(model, ids, prompts, method, *, whole, document, width):
        passed.extend(ids)
        return np.zeros((len(ids), 1, width), np.float32)

    monkeypatch.setattr(scoring_pass, "scores", record)
    prompt = tiny.prompt_of(np.arange(1000, dtype=np.int32), _PREFIX, _SUFFIX)
    method = dataclasses.replace(_DEFAULT, keep=40, rounds=(50,))
    _kept(tiny.decoder(), [prompt], method)
    *cut, last = passed
    document = [segment[_PREFIX:-_SUFFIX] for segment in cut]
    np.testing.assert_array_equal(np.concatenate(document), np.arange(_PREFIX, 1000 - _SUFFIX))
    assert all((part[0] - _PREFIX) % _CHUNK == 0 for part in document)
    assert 2 * min(map(len, document)) > max(map(len, document))
    for ids in passed:
        assert len(ids) <= _SEGMENT
        np.testing.assert_array_equal(ids[:_PREFIX], np.arange(_PREFIX))
        np.testing.assert_array_equal(ids[-_SUFFIX:], np.arange(1000 - _SUFFIX, 1000))
    assert len(last) == 50


def _ranked_chunks(score_of_token: dict[int, float], document: int, ranks: np.ndarray):
    """A prompt whose token ids are their places, each scored by the rank of its chunk."""
    places = np.arange(_PREFIX + document + _SUFFIX, dtype=np.int32)
    score_of_token.update({int(place): float(ranks[(place - _PREFIX) // _CHUNK]) for place in places[_PREFIX:-_SUFFIX]})
    return tiny.prompt_of(places, _PREFIX, _SUFFIX)


@pytest.mark.parametrize("best", [3, 20], ids=["less than a segment", "more than a segment"])
def test_the_best_chunks_of_all_segments_are_kept(score_of_token, best):
    ranks = np.random.default_rng(0).permutation(248)
    prompt = _ranked_chunks(score_of_token, 248 * _CHUNK, ranks)
    method = dataclasses.replace(_DEFAULT, keep=_PREFIX + best * _CHUNK + _SUFFIX)
    (kept,) = _kept(tiny.decoder(), [prompt], method)
    document = (_PREFIX + np.flatnonzero(ranks >= 248 - best)[:, None] * _CHUNK + np.arange(_CHUNK)).ravel()
    ends = np.flatnonzero(prompt.required)
    np.testing.assert_array_equal(kept, np.sort(np.concatenate([ends, document])))


@pytest.mark.parametrize("document", [14, 240], ids=["in one pass", "in segments"])
def test_the_best_passage_is_read_last(score_of_token, document):
    ranks = np.arange(document)
    ranks[[3, 4, 8, 12]] = 1001, 1000, 1003, 1002
    prompt = _ranked_chunks(score_of_token, document * _CHUNK, ranks)
    method = dataclasses.replace(_DEFAULT, keep=_PREFIX + 4 * _CHUNK + _SUFFIX, order="best_last")
    (kept,) = _kept(tiny.decoder(), [prompt], method)
    chunks = [_PREFIX + chunk * _CHUNK + np.arange(_CHUNK) for chunk in (3, 4, 12, 8)]
    ends = np.flatnonzero(prompt.required)
    np.testing.assert_array_equal(kept, np.concatenate([ends[:_PREFIX], *chunks, ends[_PREFIX:]]))


def test_chunks_stay_whole_through_the_rounds(score_of_token):
    """The document ends in part of a chunk, the best of all: it must not shift where the next round cuts."""
    ranks = np.append(np.random.default_rng(0).permutation(248), 999)
    prompt = _ranked_chunks(score_of_token, 248 * _CHUNK + 3, ranks)
    method = dataclasses.replace(_DEFAULT, keep=_PREFIX + 35 + _SUFFIX, rounds=(300, 51))
    (kept,) = _kept(tiny.decoder(), [prompt], method)
    document = kept[~prompt.required[kept]] - _PREFIX
    want = [248, *np.argsort(-ranks[:248])[:4]]
    np.testing.assert_array_equal(np.unique(document // _CHUNK), np.sort(want))


@pytest.mark.parametrize("length", [200, 1999])
def test_recall_is_estimated_from_the_share_of_the_evidence(length):
    """In one pass and in segments; without a fit, or where all is kept, there is none."""
    prompt = _prompt(length)
    (known,) = filtering.keep_tokens(tiny.decoder(), [prompt], _FUSED)
    assert known.recall is None
    share_itself = dataclasses.replace(_FUSED, recall_fit=(0.0, 1.0, 0.0))
    estimates = [
        filtering.keep_tokens(tiny.decoder(), [prompt], dataclasses.replace(share_itself, keep=keep))[0].recall
        for keep in (40, 80, 160, 2000)
    ]
    assert 0 < estimates[0] < estimates[1] < estimates[2] < 1
    assert estimates[3] is None
    doubtful = dataclasses.replace(share_itself, keep=80, recall_fit=(-1.0, 1.0, 0.0))
    assert filtering.keep_tokens(tiny.decoder(), [prompt], doubtful)[0].recall < estimates[1]


@pytest.mark.parametrize("fit", [None, (0.0, 1.0, 0.0), (-0.4, 0.5, -0.1)])
def test_the_share_for_a_recall_has_that_recall(fit):
    method = dataclasses.replace(_FUSED, recall_fit=fit)
    for recall in (0.1, 0.5, 0.9):
        share = method.share_for(recall, 300)
        assert (share if fit is None else method.recall_of(share, 300)) == pytest.approx(recall, rel=1e-6)


@pytest.mark.parametrize("fit", [(-1e9, 1e-9, -1e9), (1e9, 1e-9, 1e9)])
def test_the_wildest_fit_gives_probabilities(fit):
    method = dataclasses.replace(_FUSED, recall_fit=fit)
    for share in (0.0, 0.5, 1.0):
        assert 0 <= method.recall_of(share, 300) <= 1
        assert 0 <= method.share_for(share, 300) <= 1


@pytest.mark.parametrize("fit", [None, (0.0, 1.0, 0.0)])
def test_a_higher_recall_keeps_more(fit):
    def kept(**options) -> int:
        method = dataclasses.replace(_FUSED, keep=180, least=20, recall_fit=fit, **options)
        return len(_kept(tiny.decoder(), [_prompt(200)], method)[0])

    sizes = [kept(recall=recall) for recall in (0.05, 0.5, 0.99)]
    assert 20 <= sizes[0] < sizes[1] < sizes[2] <= kept() == 180


class TestChunks:
    TEXT = "One two too. Three four five? Six alone here\n\nseven eight nine ten eleven."
    SENTENCES = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3)

    def prompt(self, prefix: int, suffix: int) -> Prompt:
        outside = [(0, 0)]
        words = [match.span() for match in re.finditer(r"\n\n| ?\w+|[.?]", self.TEXT)]
        offsets = np.array(outside * prefix + words + [(len(self.TEXT), len(self.TEXT))] * suffix)
        return Prompt(self.TEXT, np.zeros(len(offsets), np.int32), offsets, prefix, suffix)

    def test_sentences(self):
        assert self.prompt(2, 3).passages[2:-3].tolist() == list(self.SENTENCES)

    @pytest.mark.parametrize(
        ("sentences", "chunk", "document"),
        [
            (True, 64, SENTENCES),
            (True, 4, (*SENTENCES[:12], 3, 3, 3, 4, 4, 4)),  # the last one of 6 in halves, not 4 and 2
            (False, 4, (*SENTENCES[:12], 3, 3, 3, 3, 4, 4)),
        ],
    )
    def test_chunks_never_reach_out_of_the_document(self, sentences, chunk, document):
        method = dataclasses.replace(_DEFAULT, chunk=chunk, sentences=sentences)
        chunks = passages.chunks(self.prompt(2, 3), passages.PassageRule.of(method))
        assert (np.diff(chunks) >= 0).all()
        first = chunks[2]
        assert (chunks[2:-3] - first).tolist() == list(document)
        assert chunks[1] < first
        assert chunks[-3] > chunks[-4]


def test_one_great_token_is_found_in_any_segment(score_of_token):
    prompt = tiny.prompt_of(np.arange(1500, dtype=np.int32), _PREFIX, _SUFFIX)
    for place in range(_PREFIX, len(prompt) - _SUFFIX, 97):
        score_of_token.clear()
        score_of_token[place] = 9.0
        (kept,) = _kept(tiny.decoder(), [prompt], dataclasses.replace(_DEFAULT, keep=25))
        assert place in kept


@pytest.mark.parametrize("lengths", [[200], [1999], [1999, 700, 200, 50]])
def test_progress_grows_to_one_total(lengths):
    """Each segment is told of, the whole prompts and the last pass once."""
    told: list[tuple[int, int]] = []
    prompts = [_prompt(length) for length in lengths]
    _kept(tiny.decoder(), prompts, _DEFAULT, progress=lambda *counts: told.append(counts))
    reads, totals = zip(*told, strict=True)
    assert all(before < after for before, after in itertools.pairwise(reads))
    assert set(totals) == {reads[-1]}
    passes = 2 * (_SEGMENT - _PREFIX - _SUFFIX)
    assert len(told) > sum(length // passes for length in lengths if length > _SEGMENT)


@pytest.mark.parametrize(
    ("change", "length", "prefix", "words"),
    [
        pytest.param({"filter_layer": 4}, 90, _PREFIX, "filter layer 4 .* 0 to 3", id="layer too high"),
        pytest.param({"filter_layer": -1}, 90, _PREFIX, "filter layer -1 .* 0 to 3", id="layer negative"),
        pytest.param({"keep": 0}, 90, _PREFIX, "keep is 0.* at least 1", id="keep nothing"),
        pytest.param(
            {"observation_window": 0}, 90, _PREFIX, "observation_window is 0.* at least 1", id="no observation rows"
        ),
        pytest.param({"pool_size": 0}, 90, _PREFIX, "pool_size is 0.* at least 1", id="no neighbours"),
        pytest.param({"segment": 0}, 90, _PREFIX, "segment is 0.* at least 1", id="empty segments"),
        pytest.param({"chunk": 0}, 300, _PREFIX, "chunk is 0.* at least 1", id="empty chunks"),
        pytest.param({"head_weights": (1.0,)}, 90, _PREFIX, "1 head weights .* 4 query heads", id="head weights"),
        pytest.param({"keep": 16}, 90, _PREFIX, "keep is 16, .* question alone are 17 tokens", id="keep too little"),
        pytest.param({"keep": 200}, 300, 130, "take 140 tokens.* no room .* of 144 tokens", id="long question"),
        pytest.param({"positions": "original"}, 300, _PREFIX, "original positions .* 256.* 300", id="positions"),
        pytest.param({"positions": "original", "order": "best_last"}, 90, _PREFIX, "need order 'text'", id="order"),
    ],
)
def test_what_does_not_fit_is_refused(change, length, prefix, words):
    method = dataclasses.replace(_DEFAULT, **change)
    with pytest.raises(UserError, match=words) as error:
        _kept(tiny.decoder(), [_prompt(90), _prompt(length, prefix)], method)
    assert "\n" not in str(error.value)
