"""A document read once for many questions: its keys and values up to the filter layer, in memory and on disk."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open

from gemfilter_jax import files
from gemfilter_jax.buckets import bucket
from gemfilter_jax.config import LongRope, ModelConfig
from gemfilter_jax.errors import reason
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

_VERSION = "4"  # of the saved format
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int32": "I32"}  # of types in safetensors
_PRIVATE = 0o700, 0o600  # modes of the folder and of a reading, from which the text could be told


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
    """Hexadecimal digest of all that a reading depends on: weights, filter pass, batches, the document's token ids."""
    digest = hashlib.sha256(_VERSION.encode())
    digest.update(repr(model.config).encode())
    leaves = jax.tree.leaves(model)
    digest.update(repr([(leaf.shape, leaf.dtype) for leaf in leaves]).encode())
    digest.update(np.asarray(_sums(leaves)).tobytes())
    digest.update(repr(_settings(model.config, method)).encode())
    beginnings = _beginnings(model.config, prompt, method)
    digest.update(repr(([len(group) for group in _groups(model, method, beginnings)], _rows(model))).encode())
    for one in beginnings:
        digest.update(repr((len(one.ids), one.long)).encode() + one.ids.tobytes())
    return digest.hexdigest()


@jax.jit
def _sums(leaves: Sequence[jax.Array]) -> jax.Array:
    """uint32 [n, 2], two sums over the bits of each array, made on its devices; the order of adding does not matter.

    Each value is multiplied by an odd number that depends on its place, so that a change of one value changes the first
    sum; the second one is mixed (MurmurHash3's finaliser).
    """
    sums = []
    for leaf in leaves:
        bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        mixed = _mixed(place)
        sums.append(jnp.stack([jnp.sum(bits * (mixed | 1)), jnp.sum(_mixed(bits ^ mixed))]))
    return jnp.stack(sums)


def _mixed(bits: jax.Array) -> jax.Array:
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13), (1, 16)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits


def read(model: Decoder, prompt: Prompt, method: "GemFilter", *, progress: Progress | None = None) -> Reading:
    """Read a prompt's document, for this question and all others that leave its segments unchanged."""
    beginnings = _beginnings(model.config, prompt, method)
    total = sum(len(one.ids) for one in beginnings)
    states, done = [], 0
    for inputs, tokens in _inputs(model, prompt, method, beginnings):
        states.append(scoring_pass.read(model, *inputs, filter_layer=method.looks_at[-1]))
        jax.block_until_ready(states[-1])
        done += tokens
        if progress:
            progress(done, total)
    return Reading(_settings(model.config, method), beginnings, states)


def _inputs(
    model: Decoder, prompt: Prompt, method: "GemFilter", beginnings: list[Beginning]
) -> Iterator[tuple[tuple[Any, ...], int]]:
    """For each group of beginnings the inputs of `scoring_pass.read` after the model, and their tokens."""
    longest = max(len(one.ids) for one in beginnings)
    for group in _groups(model, method, beginnings):
        rows = sharding.evenly(group, _rows(model))
        ids, lengths = pad([one.ids for one in rows], segments.width(longest))
        scoring = _pass(model, method, longest - prompt.prefix_length, len(rows))
        yield (ids, lengths, lengths + prompt.suffix_length, scoring), sum(len(one.ids) for one in group)


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
        if self.folder is None:
            return read(self.model, prompt, method, progress=progress)
        path = self.folder / key(self.model, prompt, method)
        saved = load(self.model, prompt, method, path)
        if saved:
            return saved
        made = read(self.model, prompt, method, progress=progress)
        save(made, path)
        return made


def save(reading: Reading, path: pathlib.Path) -> None:
    """Write a reading to a file named by its `key`, whole or not at all; a file that cannot be written is told of."""
    tensors = _tensors(reading.states)
    try:
        path.parent.mkdir(_PRIVATE[0], parents=True, exist_ok=True)
        files.sweep(path.parent)
        with files.aside(path, mode=_PRIVATE[1]) as file:
            _write(file, tensors)
    except OSError as error:
        logging.warning("%s: the reading of the document is not kept there (%s)", path.parent, reason(error))


def _write(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file. The library's own writer makes a copy in memory or another file beside this one."""
    header: dict[str, Any] = {"__metadata__": {"digest": _digest(tensors)}}
    done = 0
    for name, array in tensors.items():
        place = [done, done := done + array.nbytes]
        header[name] = {"dtype": _CODES[array.dtype.name], "shape": array.shape, "data_offsets": place}
    encoded = json.dumps(header).encode()
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for array in tensors.values():
        file.write(_bytes(array))


def load(model: Decoder, prompt: Prompt, method: "GemFilter", path: pathlib.Path) -> Reading | None:
    """The reading of a prompt's document from a file; None if it is missing, damaged or of another shape."""
    beginnings = _beginnings(model.config, prompt, method)
    run = functools.partial(scoring_pass.read, filter_layer=method.looks_at[-1])
    shapes = [jax.eval_shape(run, model, *inputs) for inputs, _ in _inputs(model, prompt, method, beginnings)]
    wanted = _tensors(shapes)
    try:
        if not path.is_file():
            return None
        with safe_open(path, framework="numpy") as file:
            held = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
            if held != {name: one.shape for name, one in wanted.items()}:
                return None
            tensors = {name: file.get_tensor(name) for name in wanted}
            sound = (file.metadata() or {}).get("digest") == _digest(tensors)
    except (OSError, SafetensorError):
        return None
    if not sound or any(tensors[name].dtype != one.dtype for name, one in wanted.items()):
        return None
    fields = [field.name for field in dataclasses.fields(KVCache)]
    states = [
        KVCache(**{field: jnp.asarray(tensors[f"{number}.{field}"]) for field in fields})
        for number in range(len(shapes))
    ]
    return Reading(_settings(model.config, method), beginnings, states)


def _tensors(states: Sequence[KVCache]) -> dict[str, Any]:
    """The arrays of states by name, on the host if they are on a device."""
    return {
        f"{number}.{name}": jax.device_get(value) if isinstance(value, jax.Array) else value
        for number, state in enumerate(states)
        for name, value in vars(state).items()
    }


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape} {tensors[name].dtype} ".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
