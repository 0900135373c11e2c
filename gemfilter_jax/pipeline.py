"""The pipeline from a text and a question to an answer and kept passages."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax import calls, compile_cache, methods
from gemfilter_jax.buckets import bucket
from gemfilter_jax.checkpoints import Checkpoint, Opened, load_checkpoint, mesh_for, open_checkpoint
from gemfilter_jax.checkpoints.weights import BytesRead
from gemfilter_jax.errors import UserError, check_text
from gemfilter_jax.generate import loop
from gemfilter_jax.generate.answering import MAX_NEW_TOKENS, SEED, Answering
from gemfilter_jax.generate.sampling import GREEDY, Sampling
from gemfilter_jax.methods.base import Kept, Method, Progress, Reader
from gemfilter_jax.methods.presets import Preset, preset_for
from gemfilter_jax.ops.attention import check_runs_here
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.results import KeptText, Result
from gemfilter_jax.settings import plain
from gemfilter_jax.text.prompt import MESSAGE_FORMAT, Prompt, check_format, encode
from gemfilter_jax.timing import Stopwatch


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A loaded model that answers questions about long texts.

    Attributes:
      checkpoint: model, tokenizer and stop tokens.
      preset: the model's filter settings.
      chat_template: wrap prompts in the tokenizer's chat template, if it has one.
      message_format: see `prompt.encode`.
    """

    checkpoint: Checkpoint
    preset: Preset
    chat_template: bool = True
    message_format: str = MESSAGE_FORMAT

    def method(self, rule: str = "default", **options: Any) -> Method:
        """A method by its name; the model's preset supplies the options that are not given.

        Args:
          rule: one of `methods.VARIANTS`: "default", "paper", "full", "streaming_llm" and so on.
          options: such as `filter_layer`, or `keep`: the number of tokens to keep, or under the default rule "auto", as
            many as probably hold the answer (`recall`), up to the preset's number.

        Raises:
          UserError: there is no such method, or it has no such option.
        """
        if not isinstance(rule, str) or rule not in methods.VARIANTS:
            raise UserError(f"method {rule!r} is unknown; one of {', '.join(methods.VARIANTS)}")
        known = [one.name for one in methods.VARIANTS[rule].options()]
        if strangers := [name for name in options if name not in known]:
            raise UserError(f"method {rule!r} has no option {strangers[0]!r}; it has {', '.join(known) or 'none'}")
        return methods.make(rule, self.preset, **options)

    def _method(self, given: Method | str | None) -> Method:
        """A method that may be given by name; the preset's default rule if None."""
        if isinstance(given, Method):
            return given
        return self.method() if given is None else self.method(str(given))

    def check(self, method: Method, max_new_tokens: int) -> None:
        """Raise a `UserError` if these settings are invalid for every prompt."""
        MAX_NEW_TOKENS.check(max_new_tokens, f"max_new_tokens is {max_new_tokens!r}, ")
        method.check(self.checkpoint.model)
        check_format(self.checkpoint.tokenizer, self.chat_template, self.message_format)
        self._check_context(max_new_tokens)

    def check_prompt(self, text: str, question: str | None, method: Method, max_new_tokens: int) -> None:
        """Raise a `UserError` if `generate` would find these settings, or the prompt's length, invalid."""
        self.check(method, max_new_tokens)
        prompt = self._encode(text, question, method)
        method.check_prompt(self.checkpoint.model, prompt)
        self._check_room([prompt], method, max_new_tokens)

    def _check_context(self, max_new_tokens: int) -> None:
        context = self.checkpoint.model.config.context
        if max_new_tokens >= context:
            raise UserError(f"max_new_tokens is {max_new_tokens}, but the model's context is {context}")

    def select(
        self,
        text: str,
        question: str | None = None,
        *,
        method: Method | str | None = None,
        progress: Progress | None = None,
    ) -> tuple[KeptText, dict[str, float]]:
        """Run stage 1 alone; returns the kept tokens and passages of `text` for `question`, and seconds per stage.

        Raises:
          UserError: the text is empty, or the method does not fit the model or the prompt.
        """
        watch = Stopwatch()
        method = self._method(method)
        _check_selects(method)
        prompts, kept = self._filter([text], [question], method, watch, progress)
        return _kept_text(prompts[0], kept[0]), watch.timings

    def generate(
        self,
        text: str,
        question: str | None = None,
        *,
        method: Method | str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Answer `question` about `text`, or continue a text that ends with the question.

        Args:
          method: how to choose the kept tokens; None for the preset's default rule.
          on_text: called with each piece of the answer as soon as it is generated.
          progress: called with (tokens read, tokens to read) during stage 1.

        Raises:
          UserError: the text is empty, the method does not fit the model or the prompt, or the kept tokens and the
            answer exceed the model's context.
        """
        watch, method = Stopwatch(), self._method(method)
        answering = Answering(max_new_tokens, sampling, [seed], on_text)
        prompts, kept = self._filter([text], [question], method, watch, progress, answering)
        return self._answer(prompts, kept, method, answering, watch)[0]

    def generate_batch(
        self,
        texts: Iterable[str],
        questions: Iterable[str | None] | None = None,
        *,
        method: Method | str | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int | Sequence[int] = 0,
        progress: Progress | None = None,
    ) -> list[Result]:
        """Answer one question about each text in one batch; otherwise like `generate`.

        Args:
          seed: one seed, and row i uses seed + i, or one seed for each row.
        """
        for name, values in (("texts", texts), ("questions", [] if questions is None else questions)):
            if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
                raise UserError(f"{name} is of type {type(values).__name__}, expected a list of strings")
        texts = list(texts)
        questions = [None] * len(texts) if questions is None else list(questions)
        if len(questions) != len(texts):
            raise UserError(f"{len(texts)} texts but {len(questions)} questions were given; give one for each text")
        given = plain(seed)
        if not isinstance(given, Sequence):
            SEED.check(given, f"seed is {seed!r}, ")
        seeds = given if isinstance(given, Sequence) else [given + row for row in range(len(texts))]
        if len(seeds) != len(texts):
            raise UserError(f"{len(texts)} texts but {len(seeds)} seeds were given; give one, or one for each text")
        if not texts:
            return []
        watch, method = Stopwatch(), self._method(method)
        answering = Answering(max_new_tokens, sampling, seeds)
        prompts, kept = self._filter(texts, questions, method, watch, progress, answering)
        return self._answer(prompts, kept, method, answering, watch)

    def document(
        self, text: str, *, method: Method | str | None = None, cache: str | os.PathLike | None = None
    ) -> "Document":
        """A text for many questions; see `Document`.

        Args:
          method: how to choose the kept tokens for each question; None for the preset's default rule.
          cache: folder in which GemFilter stores the keys and values of the layers up to the filter layer, so that
            other processes can reuse them; created if it does not exist. Its size is about that of the arrays.
        """
        method = self._method(method)
        check_text(text, "the text")
        if cache is not None and (not isinstance(cache, str | os.PathLike) or not os.fspath(cache)):
            raise UserError(f"cache is {cache!r}, expected a folder")
        reader = method.reader(self.checkpoint.model, None if cache is None else pathlib.Path(cache))
        return Document(self, text, method, reader)

    def _encode(self, text: str, question: str | None, method: Method) -> Prompt:
        prompt = encode(
            self.checkpoint.tokenizer,
            text,
            question,
            observation_rows=method.observation_rows,
            chat_template=self.chat_template,
            message_format=self.message_format,
        )
        vocab, largest = self.checkpoint.model.config.vocab, int(prompt.ids.max())
        if largest >= vocab:
            token = self.checkpoint.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(f"the tokenizer gives token {largest}, {token!r}, and the model knows 0 to {vocab - 1}")
        return prompt

    def _filter(
        self,
        texts: Sequence[str],
        questions: Sequence[str | None],
        method: Method,
        watch: Stopwatch,
        progress: Progress | None,
        answering: Answering | None = None,
    ) -> tuple[list[Prompt], list[Kept]]:
        """Stage 1; what is known to be wrong with the answer that follows is told before."""
        if answering:
            answering.check()
        with watch.stage("tokenize"):
            prompts = [self._encode(text, question, method) for text, question in zip(texts, questions, strict=True)]
        if answering:
            self._check_room(prompts, method, answering.max_new_tokens)
        return prompts, method.select(self.checkpoint.model, prompts, watch=watch, progress=progress)

    def _answer(
        self,
        prompts: list[Prompt],
        kept: list[Kept],
        method: Method,
        answering: Answering,
        watch: Stopwatch,
    ) -> list[Result]:
        model = self.checkpoint.model
        max_new_tokens, on_text = answering.max_new_tokens, answering.on_text
        longest = max(len(one.indices) for one in kept)
        self._check_room(prompts, method, max_new_tokens, kept=longest)
        width = bucket(longest)
        parts = sharding.shape_of(model.mesh).generating(model.config).data
        rows = sharding.evenly(list(zip(prompts, kept, strict=True)), parts)
        ids, lengths = loop.pad([prompt.ids[one.indices] for prompt, one in rows], width)
        positions = jnp.arange(width, dtype=jnp.int32)[None].repeat(len(rows), axis=0)
        if method.keeps_positions:
            positions, _ = loop.pad([one.indices for _, one in rows], width)
        with watch.stage("prefill"):
            state = calls.call(
                loop.prefill,
                model,
                ids,
                lengths,
                positions,
                stop_tokens=jnp.asarray(self.checkpoint.stop_tokens or (-1,), jnp.int32),
                sampling=jax.tree.map(jnp.float32, answering.sampling),
                seeds=jnp.asarray(
                    np.array([int(seed) % 2**32 for seed in sharding.evenly(answering.seeds, parts)], np.uint32)
                ),
                limit=jnp.int32(max_new_tokens),
                capacity=bucket(max_new_tokens),
                gaps=method.keeps_positions,
                eviction=method.eviction,
            )
            jax.block_until_ready(state.tokens)
        if method.eviction is not None:
            held = collectives.to_host(state.cache.positions)
            rows = [(prompt, _still_held(one, held[:, row])) for row, (prompt, one) in enumerate(rows)]
        with watch.stage("decode"):
            state = calls.call(loop.decode, model, state) if on_text is None else self._stream(state, on_text)
            tokens, counts, stopped = collectives.to_host((state.tokens, state.lengths, state.stopped))
        return [
            self._result(*row, row_tokens[:count], bool(ended), dict(watch.timings))
            for row, row_tokens, count, ended in list(zip(rows, tokens, counts, stopped, strict=True))[: len(prompts)]
        ]

    def _check_room(
        self, prompts: list[Prompt], method: Method, max_new_tokens: int, *, kept: int | None = None
    ) -> None:
        """Raise a `UserError` if prompts, or what is kept of them, and the answer exceed the model's context.

        Args:
          kept: tokens kept of the prompt of which most are; None before stage 1, where methods whose budget is "auto"
            may yet keep any number.
        """
        self._check_context(max_new_tokens)
        if method.eviction is not None:
            loop.check_eviction(self.checkpoint.model.config, map(len, prompts), max_new_tokens)
        context, longest = self.checkpoint.model.config.context, max(map(len, prompts))
        of_prompts = method.budget is None or method.eviction is not None or method.keeps_positions
        budget = method.keep_shown if isinstance(method.keep_shown, int) else 0
        needed = longest if of_prompts else min(longest, budget) if kept is None else kept
        if needed + max_new_tokens > context:
            what, advice = ("prompt", "give a shorter text") if of_prompts else ("kept", "keep fewer")
            raise UserError(
                f"{needed} {what} tokens and {max_new_tokens} new ones exceed the model's context of {context}; "
                f"{advice}, or ask for a shorter answer"
            )

    def _stream(self, state: loop.DecodeState, on_text: Callable[[str], None]) -> loop.DecodeState:
        """Decode a batch of one, step by step from the host; text is held back while a character is incomplete."""
        told = ""
        while True:
            made = collectives.to_host((state.tokens, state.lengths, state.stopped, state.running))
            tokens, count, stopped, running = (of_rows[0] for of_rows in made)
            text = self._decoded(tokens[:count], bool(stopped))
            if not running or not text.endswith("\ufffd"):
                on_text(text[len(told) :])
                told = text
            if not running:
                return state
            state = loop.decode_step(self.checkpoint.model, state)

    def _decoded(self, tokens: np.ndarray, stopped: bool) -> str:
        return str(self.checkpoint.tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True))

    def _result(
        self, prompt: Prompt, kept: Kept, tokens: np.ndarray, stopped: bool, timings: dict[str, float]
    ) -> Result:
        return Result(
            text=self._decoded(tokens, stopped),
            tokens=tuple(map(int, tokens[:-1] if stopped else tokens)),
            stop_reason="stop" if stopped else "length",
            selection=_kept_text(prompt, kept),
            timings=timings,
        )


class Document:
    """A text for many questions, which methods that support it read only once.

    GemFilter does: the first question reads the text, and the keys and values of the layers up to the filter layer
    (2 * r * G * E numbers per token) stay in memory. For each later question, the filter reads only the question's own
    tokens. The results are those of `Pipeline.generate`.
    """

    def __init__(self, model: Pipeline, text: str, method: Method, reader: Reader):
        self._model, self._text, self._method, self._reader = model, text, method, reader

    def ask(
        self,
        question: str,
        *,
        method: Method | None = None,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Answer a question as `Pipeline.generate` does; if the text was read for it, `timings` contains "read".

        Args:
          method: the document's method with other options for this question; another budget reads nothing anew.
        """
        watch, method = Stopwatch(), self._variant(method)
        answering = Answering(max_new_tokens, sampling, [seed], on_text)
        prompt, kept = self._filter(question, method, watch, progress, answering)
        return self._model._answer([prompt], [kept], method, answering, watch)[0]

    def select(
        self, question: str, *, method: Method | None = None, progress: Progress | None = None
    ) -> tuple[KeptText, dict[str, float]]:
        """The kept tokens and passages for a question, and seconds per stage; see `Pipeline.select` and `ask`."""
        watch, method = Stopwatch(), self._variant(method)
        _check_selects(method)
        prompt, kept = self._filter(question, method, watch, progress)
        return _kept_text(prompt, kept), watch.timings

    def _variant(self, method: Method | None) -> Method:
        if method is not None and type(method) is not type(self._method):
            raise UserError(f"the document was opened for {type(self._method).__name__}; give options of that method")
        return method or self._method

    def _filter(
        self,
        question: str,
        method: Method,
        watch: Stopwatch,
        progress: Progress | None,
        answering: Answering | None = None,
    ) -> tuple[Prompt, Kept]:
        check_text(question, "the question")
        if answering:
            answering.check()
        with watch.stage("tokenize"):
            prompt = self._model._encode(self._text, question, method)
        if answering:
            self._model._check_room([prompt], method, answering.max_new_tokens)
        return prompt, self._reader.select(prompt, method=method, watch=watch, progress=progress)


def _check_selects(method: Method) -> None:
    """Raise a `UserError` if a method keeps no text."""
    if method.eviction is not None:
        raise UserError(f"{type(method).__name__} keeps keys and values, not tokens: there is no text to select")


def _still_held(kept: Kept, positions: np.ndarray) -> Kept:
    """The kept tokens that at least one layer and key head still holds, from one row's positions [L, G, C]."""
    return Kept(kept.indices[np.unique(positions[positions >= 0])])


def _kept_text(prompt: Prompt, kept: Kept) -> KeptText:
    rows = np.sort(kept.indices)
    return KeptText(prompt.text, len(prompt), tuple(map(int, rows)), tuple(prompt.spans(rows)), kept.recall)


def load(
    source: str | os.PathLike | Opened = "smollm2",
    *,
    dtype: str = "auto",
    weights: str = "float",
    filter_layers: int | None = None,
    mesh: jax.sharding.Mesh | str | None = None,
    many_prompts: bool = False,
    preset: Preset | None = None,
    chat_template: bool = True,
    message_format: str = MESSAGE_FORMAT,
    attention: str | None = None,
    progress: BytesRead | None = None,
) -> Pipeline:
    """Load a model for answering questions about long texts.

    Args:
      source: a model folder, a .gguf file, a Hugging Face hub id, or "smollm2", the default model.
      dtype: "float32", "bfloat16", or "auto": bfloat16 on accelerators, float32 on CPU.
      weights: "float", or "int8": matrices as int8, about half the bytes of bfloat16.
      filter_layers: load only this many first layers, which is enough for `select` at a filter layer below this number.
      mesh: devices to run on: a mesh made by `sharding.make_mesh`, a shape such as "seq:4,model:2", or "auto" for all
        devices; None for one device.
      many_prompts: whether "auto" prefers sharding the batch to sharding prompts.
      preset: filter settings; None for the model's built-in preset.
      chat_template: wrap prompts in the tokenizer's chat template, if it has one.
      message_format: see `prompt.encode`.
      attention: one of `attention.IMPLEMENTATIONS`; None to choose one by model and device.
      progress: called with (bytes read, bytes to read).

    Raises:
      UserError: the model cannot be loaded, or the attention implementation does not run here.
    """
    for name, value, kind in (("chat_template", chat_template, bool), ("message_format", message_format, str)):
        if not isinstance(value, kind):
            raise UserError(f"{name} is {value!r}, expected a {kind.__name__}")
    if preset is not None and not isinstance(preset, Preset):
        raise UserError(f"preset is of type {type(preset).__name__}, expected a Preset")
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh | str | None):
        raise UserError(f"mesh is of type {type(mesh).__name__}, expected a mesh or a shape such as 'seq:4,model:2'")
    compile_cache.enable()
    if isinstance(mesh, str):
        source = source if isinstance(source, Opened) else open_checkpoint(source)
        mesh = mesh_for(
            source, mesh, dtype=dtype, weights=weights, filter_layers=filter_layers, many_prompts=many_prompts
        )
    _check_attention(mesh, attention)
    checkpoint = load_checkpoint(
        source, dtype, weights=weights, filter_layers=filter_layers, mesh=mesh, progress=progress
    )
    model = checkpoint.model.replace(attention_implementation=attention)
    if jax.default_backend() == "gpu":
        model = model.unstacked()
    checkpoint = dataclasses.replace(checkpoint, model=model)
    preset = preset or preset_for(checkpoint.model.config)
    return Pipeline(checkpoint, preset, chat_template, message_format)


def _check_attention(mesh: jax.sharding.Mesh | None, attention: str | None) -> None:
    """Raise a `UserError` if the requested attention implementation does not run here."""
    if attention is None:
        return
    if not isinstance(attention, str):
        raise UserError(f"attention is {attention!r}, expected a name")
    try:
        check_runs_here(attention)
    except NotImplementedError as error:
        raise UserError(f"attention {attention!r} {error}") from error
    shape = sharding.shape_of(mesh)
    if attention != "xla" and shape.seq > 1:
        raise UserError(f"attention {attention!r} reads whole prompts, which mesh {shape} cuts; 'xla' reads parts")
