"""A document read once for many questions: its keys and values up to the filter layer, in memory and on disk."""

import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gemfilter_jax.buckets import bucket
from gemfilter_jax.config import LongRope, ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate.loop import pad
from gemfilter_jax.methods.base import Kept, Method, Progress, Reader
from gemfilter_jax.methods.gemfilter import filtering, scoring_pass, segments
from gemfilter_jax.methods.gemfilter.scoring_pass import ScoringPass
from gemfilter_jax.models.cache import KVCache
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.text.prompt import Prompt
from gemfilter_jax.timing import Stopwatch

if TYPE_CHECKING:
    from gemfilter_jax.methods.gemfilter.method import GemFilter

_VERSION = "3"  # of the saved format


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A segment without its suffix.

    Attributes:
      ids: int32 [S], the prompt's prefix and a piece of the document.
      long: whether `LongRope` uses its long table for the whole segment; False under any other scaling.
    """

    ids: np.ndarray
    long: bool


@dataclasses.dataclass(frozen=True)
class Reading:
    """Keys and values of a whole document or of its segments, up to the filter layer.

    Attributes:
      settings: see `_settings`.
      beginnings: the segments that have been read.
      states: one cache for each of the `segments.groups` of the beginnings, in order, with rows padded for the mesh.
    """

    settings: tuple
    beginnings: list[Beginning]
    states: list[KVCache]

    def fits(self, config: ModelConfig, prompt: Prompt, method: "GemFilter") -> bool:
        """Whether this model and method would read the same segments of the prompt."""
        wanted = _beginnings(config, prompt, method)
        if self.settings != _settings(config, method) or len(wanted) != len(self.beginnings):
            return False
        return all(
            one.long == other.long and np.array_equal(one.ids, other.ids)
            for one, other in zip(wanted, self.beginnings, strict=True)
        )

    def scores(self, model: Decoder, prompt: Prompt, method: "GemFilter") -> np.ndarray:
        """float32 [N, S], of each token of a prompt with this document; with segments, 0 for required tokens."""
        whole = len(prompt) <= segments.reach(model.config, method)
        question = prompt.ids[len(prompt) - prompt.suffix_length :]
        # The suffix attends to the whole document, whatever pattern the document was read with.
        scoring = dataclasses.replace(_pass(model, method, 0, len(self.beginnings), whole=whole), pattern=None)
        scores = np.zeros((len(scoring.layers), len(prompt)), np.float32)
        done = prompt.prefix_length
        for state, group in zip(self.states, _groups(model, method, self.beginnings), strict=True):
            ids, lengths = pad([question] * len(state.lengths), bucket(prompt.suffix_length))
            scored = collectives.to_host(scoring_pass.score_after(model, state, ids, lengths, scoring))
            if whole:
                return scored[0, :, : len(prompt)]
            for row, one in zip(scored, group, strict=False):
                part = row[:, prompt.prefix_length : len(one.ids)]
                scores[:, done : done + part.shape[1]] = part
                done += part.shape[1]
        return scores


def _settings(config: ModelConfig, method: "GemFilter") -> tuple:
    """The options of a method that a reading depends on."""
    how = (method.looks_at[-1], method.filter_attention, method.band, method.first_tokens, method.filter_precision)
    return (*how, segments.reach(config, method))


def _beginnings(config: ModelConfig, prompt: Prompt, method: "GemFilter") -> list[Beginning]:
    prefix = prompt.ids[: prompt.prefix_length]
    parts = segments.pieces(config, prompt, np.arange(len(prompt)), method)
    scaling = config.rope_scaling
    threshold = scaling.original_context if isinstance(scaling, LongRope) else None
    around = prompt.prefix_length + prompt.suffix_length
    return [
        Beginning(np.concatenate([prefix, prompt.ids[part]]), threshold is not None and around + len(part) > threshold)
        for part in parts
    ]


def _pass(model: Decoder, method: "GemFilter", document: int, rows: int, *, whole: bool = True) -> ScoringPass:
    """A scoring pass over `rows` prompts, for the beginnings or for the suffixes."""
    none = np.zeros(rows, np.int32)
    return ScoringPass.of(method, model.config.heads, document=document, suffix_lengths=none, whole=whole)


def _groups(model: Decoder, method: "GemFilter", beginnings: list[Beginning]) -> list[Sequence[Beginning]]:
    return segments.groups(model.config, method, beginnings, _rows(model))


def _rows(model: Decoder) -> int:
    """The number of batch shards on the mesh; the size of a batch must be a multiple of it."""
    return sharding.shape_of(model.mesh).rows


def key(model: Decoder, prompt: Prompt, method: "GemFilter") -> str:
    """Hexadecimal digest of everything a reading depends on: weights, filter pass, batches, the document's token ids.

    Of each weight array with several axes, only the last row enters the digest.
    """
    digest = hashlib.sha256(_VERSION.encode())
    digest.update(repr(model.config).encode())
    for parameter in jax.tree.leaves(model):
        digest.update(collectives.to_host(parameter[..., -1, :] if parameter.ndim > 1 else parameter).tobytes())
    digest.update(repr(_settings(model.config, method)).encode())
    beginnings = _beginnings(model.config, prompt, method)
    digest.update(repr(([len(group) for group in _groups(model, method, beginnings)], _rows(model))).encode())
    for one in beginnings:
        digest.update(repr((len(one.ids), one.long)).encode() + one.ids.tobytes())
    return digest.hexdigest()


def read(model: Decoder, prompt: Prompt, method: "GemFilter", *, progress: Progress | None = None) -> Reading:
    """Read a prompt's document, for this question and all others that leave its segments unchanged."""
    beginnings = _beginnings(model.config, prompt, method)
    longest = max(len(one.ids) for one in beginnings)
    width = segments.width(longest)
    states, done = [], 0
    for group in _groups(model, method, beginnings):
        rows = sharding.evenly(group, _rows(model))
        ids, lengths = pad([one.ids for one in rows], width)
        scoring = _pass(model, method, longest - prompt.prefix_length, len(rows))
        extents = lengths + prompt.suffix_length
        states.append(scoring_pass.read(model, ids, lengths, extents, scoring, filter_layer=method.looks_at[-1]))
        jax.block_until_ready(states[-1])
        done += sum(len(one.ids) for one in group)
        if progress:
            progress(done, sum(len(one.ids) for one in beginnings))
    return Reading(_settings(model.config, method), beginnings, states)


@dataclasses.dataclass
class DocumentReader(Reader):
    """Reads a document with the first question and keeps the reading for later questions.

    Attributes:
      folder: where readings are stored for other processes; None to store none.
    """

    method: "GemFilter"
    model: Decoder
    folder: pathlib.Path | None
    _reading: Reading | None = None

    def select(
        self,
        prompt: Prompt,
        *,
        method: Method | None = None,
        watch: Stopwatch,
        progress: Progress | None = None,
    ) -> Kept:
        """See `Reader.select`; `watch` has the stage "read" if the document was read."""
        chosen = cast("GemFilter", method or self.method)
        chosen.check_prompt(self.model, prompt)
        if len(prompt) <= chosen.keep:
            return Kept.everything(prompt)
        known = self._known(prompt, chosen, watch, progress)
        with watch.stage("filter"):
            return filtering.keep_tokens_of_document(self.model, prompt, chosen, known, progress=progress)

    def _known(self, prompt: Prompt, method: "GemFilter", watch: Stopwatch, progress: Progress | None) -> Reading:
        with watch.stage("filter"):
            if self._reading and self._reading.fits(self.model.config, prompt, method):
                return self._reading
        with watch.stage("read"):
            self._reading = None  # so that two readings are never in memory at once
            self._reading = self._read_anew(prompt, method, progress)
            return self._reading

    def _read_anew(self, prompt: Prompt, method: "GemFilter", progress: Progress | None) -> Reading:
        saved = load(self.model, prompt, method, self.folder) if self.folder else None
        if saved:
            return saved
        made = read(self.model, prompt, method, progress=progress)
        if self.folder:
            save(made, self.folder, key(self.model, prompt, method))
        return made


def save(reading: Reading, folder: pathlib.Path, name: str) -> None:
    """Write a reading atomically to a folder of readings, under its `key`.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.absolute(), prefix=".reading.") as aside:
            written = pathlib.Path(aside) / "states"
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(written, _as_tree(reading.states))
            if not (folder / name).exists():
                written.rename(folder.absolute() / name)
    except OSError as error:
        raise UserError(f"{folder}: the reading of the document cannot be written there ({error.strerror})") from error


def load(model: Decoder, prompt: Prompt, method: "GemFilter", folder: pathlib.Path) -> Reading | None:
    """The reading of a prompt's document from a folder of readings; None if it is missing or damaged."""
    path = folder.absolute() / key(model, prompt, method)
    if not path.is_dir():
        return None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            # Restored through the host, so that the arrays are not tied to the devices that wrote them.
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            stored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
        states = [KVCache(**jax.tree.map(jnp.asarray, one)) for one in stored]
    except Exception:  # Orbax and TensorStore raise many types for a damaged checkpoint; the document is read again
        return None
    return Reading(_settings(model.config, method), _beginnings(model.config, prompt, method), states)


def _as_tree(states: list[KVCache]) -> list[dict[str, jax.Array]]:
    return [{field.name: getattr(state, field.name) for field in dataclasses.fields(state)} for state in states]
