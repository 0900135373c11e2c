"""Makes compressed.npz beside this file: what PyTorch computes where the cache keeps only some of the prompt's keys.

Run by hand where PyTorch is installed, after make_models.py has changed one of VARIANTS: `python
tests/golden/make_compressed.py`. The methods are written here from their papers' definitions, and run on the tiny
models of the folders named by VARIANTS. For each of these, and prompts 0, 1 and 2 of LENGTHS, the file holds

  VARIANT/ids/PROMPT [n]                random tokens
  VARIANT/full/PROMPT/greedy [12]       their greedy continuation by full attention; nothing ends it
  VARIANT/full/PROMPT/margin            the least difference between the two largest logits of a step of it
  VARIANT/METHOD/PROMPT/kept [L, G, K]  positions of the keys that each layer and key/value head keeps, in order
  VARIANT/METHOD/PROMPT/logits [V]      of the prompt's last position
  VARIANT/METHOD/PROMPT/greedy [12]     the continuation that attends to the kept keys and to all new ones
  VARIANT/METHOD/PROMPT/margin          as above
  VARIANT/METHOD/PROMPT/gap             the least difference between the scores of the last kept and the first dropped
                                        key of a layer and head, as a share of its largest score; not for streaming_llm
                                        nor for a prompt within CAPACITY

where K = min(CAPACITY, n). The first token of a continuation comes from `logits`. Keys stay rotated by their positions
in the prompt, a new token's position follows from the prompt's length, and sliding windows count such positions. A
layer drops keys only when the whole prompt is through it. Attention is meant after the softmax, which is over all keys
that the layer lets a query see. Layers count from 0. METHOD is one of

  streaming_llm  the first 4 tokens and the last ones
  snapkv         the last 16 tokens, and those that they attend to most: summed over these 16 and over the query heads
                 of a key/value head, then averaged over 5 neighbouring keys, where missing neighbours count as zeros
  snapkv_max     the same with the last 8 tokens and the greatest of 7 neighbouring keys
  h2o            the last 24 tokens, and those that all tokens together attend to most, summed like snapkv's
  fastkv         snapkv's choice with the last 8 tokens and averages over 7 keys. Only the prompt's last 8 tokens and
                 those with the largest such averages in layer 1, summed over all query heads, go on to layer 2 and
                 later: ceil(n / 2) in all, or min(CAPACITY, n) if that is more. There, neighbours are those left.

A maximum over neighbours gives several keys the very same score. Of these, the earlier ones are kept. They count as
neither last kept nor first dropped, because rounding changes them alike.

Everything is float32. Seeds are tried in order until no greedy step and no choice is a near-tie, so that rounding flips
none, and until the methods' continuations differ from each other and from full attention's if keys are dropped.
"""

import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

VARIANTS = (
    "llama_mha_untied",
    "llama_gqa_tied",
    "llama_mqa_bias_linear",
    "mistral_sliding",
    "mistral_nemo",
    "ministral_mixed",
    "phi3_sliding",
    "qwen2_bias",
    "qwen3_norms",
)
LENGTHS = (121, 75, 25)
CAPACITY = 48
NEW_TOKENS = 12
_FEWEST_DISTINCT = 4  # tokens of a continuation: one that repeats itself would hide mistakes
_SMALLEST_MARGIN = 2e-3  # between the two largest logits of a greedy step
_SMALLEST_GAP = 1e-4  # as a share of the largest score of a layer and head
_TOLERANCE = 1e-4  # of logits that should be the same


class Scores(NamedTuple):
    """What keys are chosen by, [heads, keys]. Those of a head with the same source are the same number."""

    values: torch.Tensor
    sources: torch.Tensor


class Choice(NamedTuple):
    """The chosen keys' indices in order, [heads, chosen], and the `gap` as in the file."""

    indices: torch.Tensor
    gap: float


class Method(NamedTuple):
    """`choose` takes one layer's attention, [key/value heads, query heads of each, queries, keys].

    After layer `narrowing`, only the tokens that `choose` finds for all heads together go on.
    """

    choose: Callable[[torch.Tensor, int], Choice]
    narrowing: int | None = None


class Cache(NamedTuple):
    """Of one layer: [key/value heads, keys, ...]."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


class Prefilled(NamedTuple):
    """What a prompt leaves behind. `logits` are those of all tokens that reach the last layer."""

    logits: torch.Tensor
    caches: list[Cache]
    gap: float


class Continuation(NamedTuple):
    tokens: list[int]
    margin: float


def _heaviest(scores: Scores, count: int) -> Choice:
    chosen, gaps = [], []
    for values, sources in zip(*scores, strict=True):
        order = values.argsort(descending=True, stable=True)
        kept, dropped = order[:count], order[count:]
        last_source = sources[kept[-1]]
        below = values[dropped[sources[dropped] != last_source]]
        gap = values[kept[-1]] - below.max()
        if (sources[dropped] == last_source).any():
            above = values[kept[sources[kept] != last_source]]
            gap = torch.minimum(gap, above.min() - values[kept[-1]])
        chosen.append(kept.sort().values)
        gaps.append(float(gap / values.max()))
    return Choice(torch.stack(chosen), min(gaps))


def _and_last(scores: Scores, last: int, count: int) -> Choice:
    """The last keys, which have no scores, and the heaviest others: `count` in all."""
    heads, others = scores.values.shape
    if others + last <= count:
        return Choice(torch.arange(others + last).expand(heads, -1), math.inf)
    choice = _heaviest(scores, count - last)
    window = torch.arange(others, others + last).expand(heads, -1)
    return Choice(torch.cat([choice.indices, window], dim=1), choice.gap)


def _streaming_llm(attention: torch.Tensor, count: int, sinks: int = 4) -> Choice:
    heads, keys = attention.shape[0], attention.shape[-1]
    indices = torch.arange(keys)
    if keys > count:
        indices = torch.cat([indices[:sinks], indices[keys - (count - sinks) :]])
    return Choice(indices.expand(heads, -1), math.inf)


def _h2o(attention: torch.Tensor, count: int, recent: int = 24) -> Choice:
    last = min(recent, attention.shape[-1])
    values = attention.double().sum((1, 2))[:, : attention.shape[-1] - last]
    return _and_last(Scores(values, torch.arange(values.shape[1]).expand(values.shape)), last, count)


def _snapkv(window: int, kernel: int, maximum: bool = False) -> Callable[[torch.Tensor, int], Choice]:
    def choose(attention: torch.Tensor, count: int) -> Choice:
        values = attention[:, :, -window:].double().sum((1, 2))[:, :-window]
        if maximum:
            values, sources = functional.max_pool1d(values, kernel, stride=1, padding=kernel // 2, return_indices=True)
        else:
            sources = torch.arange(values.shape[1]).expand(values.shape)
            values = functional.avg_pool1d(values, kernel, stride=1, padding=kernel // 2, count_include_pad=True)
        return _and_last(Scores(values, sources), window, count)

    return choose


_METHODS = {
    "streaming_llm": Method(_streaming_llm),
    "snapkv": Method(_snapkv(window=16, kernel=5)),
    "snapkv_max": Method(_snapkv(window=8, kernel=7, maximum=True)),
    "h2o": Method(_h2o),
    "fastkv": Method(_snapkv(window=8, kernel=7), narrowing=1),
}
_FULL = Method(lambda attention, _: Choice(torch.arange(attention.shape[-1]).expand(len(attention), -1), math.inf))


def _project(
    model: PreTrainedModel, layer: int, hidden: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, [heads, tokens, head_dim], the former two after rotary."""
    block = model.model.layers[layer]
    attn, normed = block.self_attn, block.input_layernorm(hidden)
    if hasattr(attn, "qkv_proj"):
        groups = model.config.num_key_value_heads
        heads = model.config.num_attention_heads, groups, groups
        joint = attn.qkv_proj(normed).split([count * attn.head_dim for count in heads], dim=-1)
    else:
        joint = attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)
    queries, keys, values = (flat.unflatten(-1, (-1, attn.head_dim)) for flat in joint)
    if hasattr(attn, "q_norm"):
        queries, keys = attn.q_norm(queries), attn.k_norm(keys)
    cos, sin = model.model.rotary_emb(hidden[None], positions[None])
    rotate = sys.modules[type(model).__module__].apply_rotary_pos_emb
    queries, keys = rotate(queries.transpose(0, 1)[None], keys.transpose(0, 1)[None], cos, sin)
    return queries[0], keys[0], values.transpose(0, 1)


def _sliding_window(model: PreTrainedModel, layer: int) -> float:
    types = getattr(model.config, "layer_types", None)
    if types is not None and types[layer] == "full_attention":
        return math.inf
    return getattr(model.config, "sliding_window", None) or math.inf


def _attend(
    model: PreTrainedModel,
    layer: int,
    hidden: torch.Tensor,
    queries: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output, [tokens, D], and its attention, [key/value heads, query heads of each, tokens, keys]."""
    block = model.model.layers[layer]
    grouped = queries.unflatten(0, (len(cache.keys), -1))
    distance = positions[:, None] - cache.positions[:, None, None, :]
    visible = (distance >= 0) & (distance < _sliding_window(model, layer))
    scores = grouped @ cache.keys[:, None].transpose(-1, -2) * block.self_attn.scaling
    attention = scores.masked_fill(~visible, -math.inf).softmax(-1)
    mixed = (attention @ cache.values[:, None]).flatten(0, 1).transpose(0, 1).flatten(1)
    hidden = hidden + block.self_attn.o_proj(mixed)
    return hidden + block.mlp(block.post_attention_layernorm(hidden)), attention


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return model.lm_head(model.model.norm(hidden))


def _prefill(model: PreTrainedModel, ids: np.ndarray, method: Method) -> Prefilled:
    hidden = model.model.embed_tokens(torch.tensor(ids, dtype=torch.long))
    positions = torch.arange(len(ids))
    caches, gaps = [], []
    for layer in range(model.config.num_hidden_layers):
        queries, keys, values = _project(model, layer, hidden, positions)
        everything = Cache(keys, values, positions.expand(len(keys), -1))
        hidden, attention = _attend(model, layer, hidden, queries, positions, everything)
        kept, gap = method.choose(attention, CAPACITY)
        heads = torch.arange(len(keys))[:, None]
        caches.append(Cache(*(whole[heads, kept] for whole in everything)))
        gaps.append(gap)
        if layer == method.narrowing:
            count = max(math.ceil(len(ids) / 2), min(CAPACITY, len(ids)))
            (left,), gap = method.choose(attention.flatten(0, 1)[None], count)
            hidden, positions = hidden[left], positions[left]
            gaps.append(gap)
    return Prefilled(_logits(model, hidden), caches, min(gaps))


def _continue(model: PreTrainedModel, length: int, prefilled: Prefilled) -> Continuation:
    logits, caches = prefilled.logits[-1], list(prefilled.caches)
    tokens, margins = [], []
    for position in range(length, length + NEW_TOKENS):
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        hidden, positions = model.model.embed_tokens(best.indices[:1]), torch.tensor([position])
        for layer, cache in enumerate(caches):
            queries, keys, values = _project(model, layer, hidden, positions)
            new = Cache(keys, values, positions.expand(len(keys), -1))
            caches[layer] = Cache(*(torch.cat(parts, dim=1) for parts in zip(cache, new, strict=True)))
            hidden, _ = _attend(model, layer, hidden, queries, positions, caches[layer])
        logits = _logits(model, hidden)[0]
    return Continuation(tokens, min(margins))


def _check_full(model: PreTrainedModel, ids: np.ndarray, prefilled: Prefilled, continuation: Continuation) -> None:
    """Full attention's results here have to be the model's own."""
    prompt = torch.tensor(ids, dtype=torch.long)[None]
    torch.testing.assert_close(prefilled.logits, model(prompt).logits[0], rtol=0, atol=_TOLERANCE)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW_TOKENS)
    assert out[0, len(ids) :].tolist() == continuation.tokens, "the continuation is not generate()'s"


def _is_fit(continuation: Continuation) -> bool:
    return continuation.margin > _SMALLEST_MARGIN and len(set(continuation.tokens)) >= _FEWEST_DISTINCT


def _one_prompt(model: PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray] | None:
    """What the file holds for one prompt; nothing if it is unfit for comparison."""
    length = len(ids)
    full = _prefill(model, ids, _FULL)
    greedy = _continue(model, length, full)
    if not _is_fit(greedy):
        return None
    _check_full(model, ids, full, greedy)
    arrays = {"full/greedy": np.array(greedy.tokens, np.int16), "full/margin": np.float32(greedy.margin)}
    tokens = [greedy.tokens]
    for name, method in _METHODS.items():
        prefilled = _prefill(model, ids, method)
        continuation = _continue(model, length, prefilled)
        if prefilled.gap < _SMALLEST_GAP or not _is_fit(continuation):
            return None
        kept = torch.stack([cache.positions for cache in prefilled.caches])
        assert kept.shape[-1] == min(CAPACITY, length)
        if length <= CAPACITY:
            assert (kept == torch.arange(length)).all(), "a key was dropped without need"
            torch.testing.assert_close(prefilled.logits, full.logits, rtol=0, atol=_TOLERANCE)
            assert continuation.tokens == greedy.tokens
        elif continuation.tokens in tokens:
            return None
        tokens.append(continuation.tokens)
        arrays[f"{name}/kept"] = kept.numpy().astype(np.int16)
        arrays[f"{name}/logits"] = prefilled.logits[-1].numpy()
        arrays[f"{name}/greedy"] = np.array(continuation.tokens, np.int16)
        arrays[f"{name}/margin"] = np.float32(continuation.margin)
        if prefilled.gap < math.inf:
            arrays[f"{name}/gap"] = np.float32(prefilled.gap)
    return arrays


def _one_variant(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for number, length in enumerate(LENGTHS):
        for seed in itertools.count():
            generator = np.random.default_rng([number, seed])
            ids = generator.integers(model.config.vocab_size, size=length, dtype=np.int16)
            arrays = _one_prompt(model, ids)
            if arrays is not None:
                break
        yield f"{folder.name}/ids/{number}", ids
        for name, array in arrays.items():
            method, what = name.split("/")
            yield f"{folder.name}/{method}/{number}/{what}", array


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = pathlib.Path(__file__).parent
    with torch.no_grad():
        contents = dict(itertools.chain.from_iterable(_one_variant(here / name) for name in VARIANTS))
    np.savez_compressed(here / "compressed.npz", **contents)
