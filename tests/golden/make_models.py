"""Makes the folders named by VARIANTS beside this file: tiny random models and what PyTorch computes with them.

Run by hand where PyTorch is installed, after a change of VARIANTS: `python tests/golden/make_models.py [folder ...]`,
for all folders where none is named. Each is a Hugging Face model folder plus expected.npz with

  ids [S]                       a random prompt
  rows [R]                      the positions at which the following are kept; all of them would take too much space
  hidden [L + 1, R, D]          the residual stream that enters each layer, and last the one that leaves the last layer
  keys [L, G, R, E]             keys after rotary, and after their norm where there is one
  queries [L, W, H, E]          queries of the last W positions after the same
  logits [R, V]
  greedy [64]                   the greedy continuation of the prompt, which nothing ends
  short_rows [R2]               the positions kept for the prompt ids[SHORT] alone
  short_hidden [L + 1, R2, D]
  short_logits [R2, V]
  short_greedy [64]

The long prompt exceeds every window and every length that scaling starts from but llama3's; the short one is within
them, and its continuation leaves them.

Everything is float32. Seeds are tried in order until no greedy step is a near-tie, so that rounding flips no token.
"""

import pathlib
import sys
from unittest import mock

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NEW_TOKENS = 64
WINDOW = 8
PROMPT = 200
SHORT = slice(60, 133)
_ROWS = 16
_SHORT_ROWS = 8
_SMALLEST_MARGIN = 2e-3  # between the two largest logits of a greedy step
_FEWEST_DISTINCT = 16  # tokens of a continuation: one that repeats itself would hide mistakes
_SHARDS = {"llama_mha_untied": "100KB", "phi4_partial": "40KB", "qwen2_windows": "50KB"}  # the largest file

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_MISTRAL = _SMALL | {"model_type": "mistral", "rms_norm_eps": 1e-5}
_PHI3 = _SMALL | {"model_type": "phi3", "rms_norm_eps": 1e-5}
# As in the checkpoints, the attention factor is left to follow from the two lengths.
_LONGROPE = {"original_max_position_embeddings": 100, "max_position_embeddings": 1600}
VARIANTS = {
    "llama_mha_untied": _LLAMA | {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "llama_gqa_tied": _LLAMA
    | {
        "hidden_size": 48,
        "intermediate_size": 56,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    # Wavelengths run from 6 to 2649 positions: three are kept (below 64), two blended, three slowed (above 256).
    "llama_gqa_llama3": _LLAMA
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
    "llama_mqa_bias_linear": _LLAMA
    | {
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "mistral_sliding": _MISTRAL | {"sliding_window": 100},
    # As in Mistral Nemo, the heads together are narrower than the residual stream.
    "mistral_nemo": _MISTRAL
    | {
        "hidden_size": 36,
        "head_dim": 8,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "ministral_mixed": _SMALL
    | {
        "model_type": "ministral",
        "head_dim": 8,
        "sliding_window": 100,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "phi3_sliding": _PHI3 | {"num_key_value_heads": 4, "sliding_window": 100, "original_max_position_embeddings": 512},
    "phi3_longrope": _PHI3
    | _LONGROPE
    | {
        "num_key_value_heads": 4,
        "sliding_window": 3200,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.05, 1.3, 2.2],
            "long_factor": [1.1, 2.5, 7.0, 24.0],
        },
    },
    "phi4_partial": _PHI3
    | _LONGROPE
    | {
        "partial_rotary_factor": 0.75,
        "sliding_window": 3200,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.2, 1.6],
            "long_factor": [1.2, 4.0, 24.0],
        },
    },
    "qwen2_bias": _SMALL
    | {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 100,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2_windows": _SMALL
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1},
    "qwen3_norms": _SMALL
    | {
        "model_type": "qwen3",
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    # The ramp ends at 3.2 frequencies, so that the rounding up of it counts.
    "qwen3_bias_yarn": _SMALL
    | {
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "attention_bias": True,
        "max_position_embeddings": 400,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 100,
        },
    },
}


def random_model(seed: int, model_type: str, **fields) -> PreTrainedModel:
    """A model in which every parameter is random, norms and biases too, at a scale that keeps activations near one.

    Larger activations would only be rounded more coarsely; smaller weights would make attention uniform.
    """
    torch.manual_seed(seed)
    nothing_special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(model_type, **nothing_special, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def clear_cut(**fields) -> tuple[PreTrainedModel, dict[str, np.ndarray]]:
    """The first seed's model, prompt `ids`, `greedy` and `short_greedy` whose continuations are fit for comparison.

    `fields` are those of a config.json, `model_type` among them.
    """
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


def _greedy(model: PreTrainedModel, ids: np.ndarray) -> tuple[np.ndarray, float]:
    """The continuation, and the least margin by which one of its tokens was chosen.

    By generate(), which alone computes the cache anew where a longrope model changes its factors.
    """
    prompt = torch.tensor(ids, dtype=torch.long)[None]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2)
    tokens = out.sequences[0, len(ids) :]
    assert tokens.tolist() == best.indices[:, 0].tolist(), "something but the logits chose the tokens"
    return tokens.numpy().astype(np.int32), float((best.values[:, 0] - best.values[:, 1]).min())


@torch.no_grad()
def forward(model: PreTrainedModel, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`hidden`, `keys`, `queries` and `logits` as in expected.npz, but at all positions."""
    modeling = sys.modules[type(model).__module__]
    entering_final_norm, rotated = [], []

    def apply_rotary(*args, original=modeling.apply_rotary_pos_emb, **kwargs):
        rotated.append(original(*args, **kwargs))
        return rotated[-1]

    hook = model.model.norm.register_forward_pre_hook(lambda _, inputs: entering_final_norm.append(inputs[0]))
    with mock.patch.object(modeling, "apply_rotary_pos_emb", apply_rotary):
        out = model(torch.tensor(ids, dtype=torch.long)[None], output_hidden_states=True)
    hook.remove()
    queries, keys = (torch.cat(of_layers) for of_layers in zip(*rotated, strict=True))
    return {
        "hidden": torch.cat([*out.hidden_states[:-1], *entering_final_norm]).numpy(),
        "keys": keys.numpy(),
        "queries": queries.transpose(1, 2).numpy(),
        "logits": out.logits[0].numpy(),
    }


def _some_rows(count: int, length: int) -> np.ndarray:
    return np.unique(np.linspace(0, length - 1, count).astype(np.int32))


def _make(folder: pathlib.Path, fields: dict) -> None:
    model, prompt = clear_cut(**fields)
    short_ids = prompt["ids"][SHORT]
    rows, short_rows = _some_rows(_ROWS, PROMPT), _some_rows(_SHORT_ROWS, len(short_ids))
    out, short = forward(model, prompt["ids"]), forward(model, short_ids)
    model.save_pretrained(folder, max_shard_size=_SHARDS.get(folder.name, "1GB"))
    np.savez_compressed(
        folder / "expected.npz",
        rows=rows,
        hidden=out["hidden"][:, rows],
        keys=out["keys"][:, :, rows],
        queries=out["queries"][:, -WINDOW:],
        logits=out["logits"][rows],
        short_rows=short_rows,
        short_hidden=short["hidden"][:, short_rows],
        short_logits=short["logits"][short_rows],
        **prompt,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or VARIANTS:
        _make(pathlib.Path(__file__).parent / name, VARIANTS[name])
