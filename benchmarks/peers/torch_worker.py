"""Peers in PyTorch, on weights that are dequantised from a GGUF file: worker of compare.py, see protocol.py.

  full     transformers, `generate` with scaled dot product attention
  paper    GemFilter as published (arXiv 2409.17422): layers 0 to r - 1 read the prompt, layer r's last query and keys
           choose its tokens, and all layers answer from those alone
  snapkv   SnapKV (arXiv 2404.14469): all layers read the prompt, and each key head keeps its own keys and values

The latter two are written here, on the modules of transformers' Llama. They leave out what the published code computes
and throws away: attention and MLP of layer r, the final norm and the logits of all tokens but the last.

Axes: S tokens, H query heads, G key heads, E head width, K kept tokens. The batch is one prompt.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.generation.streamers import BaseStreamer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, apply_rotary_pos_emb

OBSERVATION_WINDOW = 32  # of SnapKV
POOL_SIZE = 5  # neighbouring scores that are averaged, of both

Evict = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Answer(NamedTuple):
    """New tokens, and seconds by stage."""

    tokens: list[int]
    seconds: dict[str, float]


def read(path: pathlib.Path, dtype: str) -> LlamaForCausalLM:
    """The model of a GGUF file."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa",
        quantization_config=transformers.GgufConfig(dequantize=True),  # products of packed weights are slower
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def _project(block: LlamaDecoderLayer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [1, H, S, E], keys and values [1, G, S, E]."""
    attention, normed = block.self_attn, block.input_layernorm(hidden)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (one(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for one in projections)
    return *apply_rotary_pos_emb(q, k, *rotary), v


def _finish(block: LlamaDecoderLayer, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The layer's output from its queries, keys and values."""
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
    hidden = hidden + block.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def _embed(model: LlamaForCausalLM, ids: Sequence[int], first: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Embeddings [1, S, D], and the rotary tables of positions from `first` on."""
    hidden = model.model.embed_tokens(torch.tensor([ids]))
    return hidden, model.model.rotary_emb(hidden, torch.arange(first, first + len(ids))[None])


def _next(model: LlamaForCausalLM, hidden: Tensor) -> int:
    return int(model.lm_head(model.model.norm(hidden[:, -1])).argmax())


def generate(model: LlamaForCausalLM, ids: Sequence[int], new_tokens: int, evict: Evict | None = None) -> Answer:
    """Greedy tokens after a prompt, of whose keys and values each layer keeps those that `evict` returns."""
    started = time.perf_counter()
    hidden, rotary = _embed(model, ids)
    cache = []
    for block in model.model.layers:
        q, k, v = _project(block, hidden, rotary)
        hidden = _finish(block, hidden, q, k, v)
        cache.append(evict(q, k, v) if evict else (k, v))
    tokens = [_next(model, hidden)]
    prefilled = time.perf_counter()
    for position in range(len(ids), len(ids) + new_tokens - 1):
        hidden, rotary = _embed(model, tokens[-1:], position)
        for layer, block in enumerate(model.model.layers):
            q, *new = _project(block, hidden, rotary)
            cache[layer] = tuple(torch.cat(parts, dim=2) for parts in zip(cache[layer], new, strict=True))
            hidden = _finish(block, hidden, q, *cache[layer])
        tokens.append(_next(model, hidden))
    return Answer(tokens, {"prefill": prefilled - started, "decode": time.perf_counter() - prefilled})


def select(q: Tensor, k: Tensor, keep: int) -> Tensor:
    """Indices [K], in order, of the tokens that the paper's rule keeps.

    Args:
      q: the last query [H, E]. k: [G, S, E].
    """
    of_groups = q.float().unflatten(0, (len(k), -1)).sum(1)
    scores = torch.einsum("ge,gse->s", of_groups, k.float())
    pooled = functional.avg_pool1d(scores[None], POOL_SIZE, stride=1, padding=POOL_SIZE // 2)[0]
    return pooled.topk(min(keep, len(pooled))).indices.sort().values


def filtered(model: LlamaForCausalLM, ids: Sequence[int], layer: int, keep: int) -> Tensor:
    """Indices [K] of the tokens that layer r of the model picks."""
    hidden, rotary = _embed(model, ids)
    for block in model.model.layers[:layer]:
        hidden = _finish(block, hidden, *_project(block, hidden, rotary))
    q, k, _ = _project(model.model.layers[layer], hidden, rotary)
    return select(q[0, :, -1], k[0], keep)


def snapkv(q: Tensor, k: Tensor, v: Tensor, *, keep: int, window: int = OBSERVATION_WINDOW) -> tuple[Tensor, Tensor]:
    """The keys and values [1, G, K, E] that SnapKV keeps of a layer; query heads of a group share theirs."""
    groups, length = k.shape[1:3]
    if length <= keep:
        return k, v
    rows = q[0, :, -window:].unflatten(0, (groups, -1))
    logits = (rows @ k[0, :, None].transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    hidden = torch.ones(window, length, dtype=torch.bool).triu(length - window + 1)
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    scores = attention.sum((1, 2))[:, : length - window]
    pooled = functional.avg_pool1d(scores, POOL_SIZE, stride=1, padding=POOL_SIZE // 2)
    best = pooled.topk(keep - window).indices.sort().values
    kept = torch.cat([best, torch.arange(length - window, length).expand(groups, -1)], dim=1)
    chosen = kept[None, :, :, None].expand(-1, -1, -1, k.shape[-1])
    return k.gather(2, chosen), v.gather(2, chosen)


class _Clock(BaseStreamer):
    """Notes when `generate` has the prompt, and then each new token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Runs:
    """The actions of this worker."""

    def load(self, *, model: str, dtype: str, threads: int, new_tokens: int, keep: int, layer: int) -> dict[str, Any]:
        """Read the model."""
        torch.set_num_threads(threads)
        self._model = read(pathlib.Path(model), dtype)
        self._new_tokens, self._keep, self._layer = new_tokens, keep, layer
        return {"versions": {"torch": torch.__version__, "transformers beside torch": transformers.__version__}}

    @torch.no_grad()
    def run(self, *, method: str, ids: list[int]) -> dict[str, Any]:
        """Answer a prompt once."""
        started = time.perf_counter()
        made = {"full": self._full, "paper": self._paper, "snapkv": self._snapkv}[method](ids)
        made["seconds"]["total"] = time.perf_counter() - started
        return made

    warm_up = run

    def _full(self, ids: list[int]) -> dict[str, Any]:
        clock, started = _Clock(), time.perf_counter()
        prompt = torch.tensor([ids])
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=self._new_tokens,
            pad_token_id=0,
            streamer=clock,
        )
        _, first, *_, last = clock.times
        seconds = {"prefill": first - started, "decode": last - first}
        return {"seconds": seconds, "tokens": out[0, len(ids) :].tolist(), "held": len(ids)}

    def _paper(self, ids: list[int]) -> dict[str, Any]:
        started = time.perf_counter()
        kept = filtered(self._model, ids, self._layer, self._keep).tolist()
        seconds = {"filter": time.perf_counter() - started}
        answer = generate(self._model, [ids[index] for index in kept], self._new_tokens)
        return {"seconds": seconds | answer.seconds, "tokens": answer.tokens, "held": len(kept), "kept": kept}

    def _snapkv(self, ids: list[int]) -> dict[str, Any]:
        answer = generate(self._model, ids, self._new_tokens, functools.partial(snapkv, keep=self._keep))
        return {"seconds": answer.seconds, "tokens": answer.tokens, "held": min(self._keep, len(ids))}
