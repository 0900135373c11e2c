"""Makes smollm2_top1.npz beside this file: what PyTorch computes with the default model, and how its text is tokenised.

Run by hand where PyTorch and accelerate are: `PYTHONPATH=. python tests/golden/make_smollm2.py`. Weights, vocabulary
and merges come from the same GGUF file as ours, but through transformers' own reader. The file holds

  text, ids [1000]                      the start of the essays and its tokens
  top1 [1000]                           the likeliest next token at every position
  last_indices, last_logits [64]        the largest logits of the last position
  nasty_text, nasty_ids [N]             a text that is hard to tokenise and its tokens
"""

import importlib.resources
import pathlib

import numpy as np
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gemfilter_jax.checkpoints import embedded

_LENGTH = 1000
_LARGEST = 64
_NASTY = (
    "Call 1234567 or 007 at 3.14159e-10!\r\nline\r\n\r\n\tdef f(x):\n        return {x**2: 'it''s', "
    '"you\'ll": [0x1F]}  # two  and   three    spaces '
    "\u00e9\u0301 na\u00efve \u00df \u4e2d\u6587\u5b57 \u0440\u0443\u0441 \u0661\u0662\u0663 "
    "\u00bd \u2014 \u201cquoted\u201d\u00a0nbsp\u200bzero \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "<|im_start|>user\nhi<|im_end|>\n <|im_start|> <|endoftext|><repo_name>a/b<file_sep>  trailing  "
)


def _tokenizer(path: pathlib.Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer, plus the split at every number character that it leaves out.

    Its GGUF reader ignores `tokenizer.ggml.pre`. For "smollm" llama.cpp splits at \\p{N} first and as GPT-2 does then.
    """
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def _main() -> None:
    path = embedded.locate()
    tokenizer = _tokenizer(path)
    essays = importlib.resources.files("gemfilter_jax").joinpath("evaluation/essays.txt").read_text(encoding="utf-8")
    cut = tokenizer(essays, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][_LENGTH - 1][1]
    texts = {"text": essays[:cut], "nasty_text": _NASTY}
    ids = tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"]
    assert len(ids[0]) == _LENGTH
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(ids[:1]), use_cache=False).logits[0]
    last = logits[-1].topk(_LARGEST)
    np.savez_compressed(
        pathlib.Path(__file__).parent / "smollm2_top1.npz",
        ids=np.array(ids[0], np.int32),
        nasty_ids=np.array(ids[1], np.int32),
        top1=logits.argmax(dim=-1).int().numpy(),
        last_indices=last.indices.int().numpy(),
        last_logits=last.values.numpy(),
        **texts,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main()
