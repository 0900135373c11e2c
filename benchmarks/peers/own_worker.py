"""This project: worker of compare.py, see protocol.py.

Its `load` also makes the prompt of all peers and names the model's file; `decode` turns new tokens into text.
"""

import dataclasses
import time
from typing import Any

import gemfilter_jax
from gemfilter_jax.checkpoints import embedded
from gemfilter_jax.errors import UserError
from gemfilter_jax.evals import bench
from gemfilter_jax.evals.tasks.needles import Needles
from gemfilter_jax.methods.base import Method
from gemfilter_jax.text.prompt import encode
from gemfilter_jax.timing import COMPILE


class Runs:
    """The actions of this worker."""

    def load(self, *, tokens: int, new_tokens: int, keep: int, options: dict[str, str]) -> dict[str, Any]:
        """Read the model with options of `gemfilter_jax.load`, and make the prompt of a text of so many tokens."""
        model = gemfilter_jax.load(embedded.NAME, **options)
        tokenizer, config = model.checkpoint.tokenizer, model.checkpoint.model.config
        self._model = dataclasses.replace(model, checkpoint=dataclasses.replace(model.checkpoint, stop_tokens=()))
        self._case = next(Needles(depths=(0.5,)).examples(tokenizer, tokens))
        self._new_tokens, self._keep = new_tokens, keep
        prompt = encode(tokenizer, self._case.text, self._case.question, observation_rows=0)
        ids = prompt.ids.tolist()
        if len(ids) + new_tokens > config.context:
            raise UserError(
                f"a prompt of {len(ids)} tokens and {new_tokens} new ones exceed the context of {config.context}; "
                "give fewer --tokens"
            )
        if keep >= len(ids):
            raise UserError(f"--keep={keep} keeps all of a prompt of {len(ids)} tokens; give less, or more --tokens")
        self._method("default").check_required(prompt, keep)
        environment, shape = bench.environment(), bench.shape(model.checkpoint.model)
        del environment["memory"]
        return {
            "versions": environment,
            "model": str(embedded.locate()),
            "bits": 8 * shape["weight_bytes"] / shape["parameters"],
            "layer": self._method("paper").filter_layer,
            "ids": ids,
        }

    def _method(self, name: str) -> Method:
        return self._model.method(name) if name == "full" else self._model.method(name, keep=self._keep)

    def run(self, *, method: str) -> dict[str, Any]:
        """Answer the prompt once."""
        chosen, started = self._method(method), time.perf_counter()
        result = self._model.generate(
            self._case.text, self._case.question, method=chosen, max_new_tokens=self._new_tokens
        )
        total, seconds = time.perf_counter() - started, dict(result.timings)
        seconds["total"] = total - seconds.pop(COMPILE)
        kept = result.selection.indices
        answer = {"seconds": seconds, "tokens": result.tokens, "held": len(kept), "settings": chosen.fields}
        return answer | ({"kept": kept} if method == "paper" else {})

    warm_up = run

    def decode(self, *, answers: list[list[int]]) -> dict[str, Any]:
        """The texts of new tokens."""
        return {"texts": [self._model.checkpoint.tokenizer.decode(answer) for answer in answers]}
