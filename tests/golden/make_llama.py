"""Makes the folders llama_<variant> beside this file: tiny random Llama models and what PyTorch computes with them.

Run by hand where PyTorch is installed, after a change of VARIANTS: `python tests/golden/make_llama.py`. Each folder is
a Hugging Face model folder plus expected.npz with

  ids [S]               a random prompt
  rows [R]              the positions at which the following are kept; all of them would take too much space
  hidden [L + 1, R, D]  the residual stream that enters each layer, and last the one that leaves the last layer
  keys [L, G, R, E]     keys after rotary
  queries [L, W, H, E]  queries of the last W positions after rotary
  logits [R, V]
  greedy [64]           the greedy continuation of the prompt, which nothing ends
  short_greedy [64]     that of ids[SHORT]

Everything is float32. Seeds are tried in order until no greedy step is a near-tie, so that rounding flips no token.
"""

import pathlib

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

NEW_TOKENS = 64
WINDOW = 8
PROMPT = 200
SHORT = slice(60, 133)
_ROWS = 40
_SMALLEST_MARGIN = 2e-3  # between the two largest logits of a greedy step
_FEWEST_DISTINCT = 16  # tokens of a continuation: one that repeats itself would hide mistakes
_SHARD = "100KB"

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
VARIANTS = {
    "mha_untied": _SMALL | {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "gqa_tied": _SMALL
    | {
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    # Wavelengths run from 6 to 2649 positions: three are kept (below 64), two blended, three slowed (above 256).
    "gqa_llama3": _SMALL
    | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
    },
    "mqa_bias_linear": _SMALL
    | {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
}


def random_model(seed: int, **fields) -> LlamaForCausalLM:
    """A model in which every parameter is random, norms and biases too, at a scale that keeps activations near one.

    Larger activations would only be rounded more coarsely; smaller weights would make attention uniform.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager")).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def clear_cut(**fields) -> tuple[LlamaForCausalLM, dict[str, np.ndarray]]:
    """The first seed's model, prompt `ids`, `greedy` and `short_greedy` whose continuations are fit for comparison."""
    seed = 0
    while True:
        model = random_model(seed, **fields)
        ids = np.random.default_rng(seed).integers(fields["vocab_size"], size=PROMPT, dtype=np.int32)
        tokens, margin = _greedy(model, ids)
        short_tokens, short_margin = _greedy(model, ids[SHORT])
        distinct = min(len(set(tokens.tolist())), len(set(short_tokens.tolist())))
        if min(margin, short_margin) > _SMALLEST_MARGIN and distinct >= _FEWEST_DISTINCT:
            return model, {"ids": ids, "greedy": tokens, "short_greedy": short_tokens}
        seed += 1


@torch.no_grad()
def _greedy(model: LlamaForCausalLM, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """The continuation, and the least margin by which one of its tokens was chosen."""
    tokens, margins, cache = [], [], None
    fed = torch.tensor(ids, dtype=torch.long)[None]
    for _ in range(NEW_TOKENS):
        out = model(fed, past_key_values=cache, use_cache=True)
        best = out.logits[0, -1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        fed, cache = best.indices[None, :1], out.past_key_values
        tokens.append(int(fed))
    return np.array(tokens, np.int32), min(margins)


@torch.no_grad()
def forward(model: LlamaForCausalLM, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`hidden`, `keys`, `queries` and `logits` as in expected.npz, but at all positions."""
    entering_final_norm, queries = [], []
    hooks = [model.model.norm.register_forward_pre_hook(lambda _, inputs: entering_final_norm.append(inputs[0]))]
    for layer in model.model.layers:
        hooks.append(layer.self_attn.q_proj.register_forward_hook(lambda _, inputs, output: queries.append(output)))
    out = model(torch.tensor(ids, dtype=torch.long)[None], output_hidden_states=True, use_cache=True)
    for hook in hooks:
        hook.remove()
    q = torch.cat(queries).unflatten(-1, (model.config.num_attention_heads, -1))
    q, _ = apply_rotary_pos_emb(q, q, *model.model.rotary_emb(q, torch.arange(len(ids))[None]), unsqueeze_dim=2)
    return {
        "hidden": torch.cat([*out.hidden_states[:-1], *entering_final_norm]).numpy(),
        "keys": torch.cat([layer.keys for layer in out.past_key_values.layers]).numpy(),
        "queries": q.numpy(),
        "logits": out.logits[0].numpy(),
    }


def _make(folder: pathlib.Path, fields: dict) -> None:
    model, prompt = clear_cut(**fields)
    rows = np.unique(np.linspace(0, PROMPT - 1, _ROWS).astype(np.int32))
    out = forward(model, prompt["ids"])
    model.save_pretrained(folder, max_shard_size=_SHARD if folder.name.endswith("mha_untied") else "1GB")
    np.savez(
        folder / "expected.npz",
        rows=rows,
        hidden=out["hidden"][:, rows],
        keys=out["keys"][:, :, rows],
        queries=out["queries"][:, -WINDOW:],
        logits=out["logits"][rows],
        **prompt,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, fields in VARIANTS.items():
        _make(pathlib.Path(__file__).parent / f"llama_{name}", fields)
