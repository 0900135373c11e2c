"""A document read once for many questions: what the filter's layers keep of it, in memory and on disk."""

import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from gemfilter_jax.buckets import bucket
from gemfilter_jax.config import LongRope, ModelConfig
from gemfilter_jax.errors import UserError
from gemfilter_jax.generate import programs
from gemfilter_jax.methods.gemfilter import scoring_pass, segments
from gemfilter_jax.methods.gemfilter.method import GemFilter
from gemfilter_jax.methods.gemfilter.scoring_pass import Progress
from gemfilter_jax.models.cache import KVCache
from gemfilter_jax.models.transformer import Decoder
from gemfilter_jax.parallel import collectives, sharding
from gemfilter_jax.text.prompt import Prompt

_VERSION = "3"  # of what is saved


@dataclasses.dataclass(frozen=True)
class Beginning:
    """A segment up to where the question begins.

    Attributes:
      ids: int32 [S], the template's head included.
      long: whether `LongRope` uses its long table for the whole segment; False under any other scaling.
    """

    ids: np.ndarray
    long: bool


@dataclasses.dataclass(frozen=True)
class Reading:
    """Keys and values of a document's segments, or of all of it at once, up to the layer that filters.

    Attributes:
      beginnings: what has been read.
      states: of the beginnings in `segments.groups`, in order, each with the rows that a mesh wants.
    """

    beginnings: list[Beginning]
    states: list[KVCache]

    def fits(self, config: ModelConfig, prompt: Prompt, method: GemFilter) -> bool:
        """Whether this model and method would read the same of the prompt, whatever its question."""
        wanted = _beginnings(config, prompt, method)
        return len(wanted) == len(self.beginnings) and all(
            one.long == other.long and np.array_equal(one.ids, other.ids)
            for one, other in zip(wanted, self.beginnings, strict=True)
        )

    def scores(self, model: Decoder, prompt: Prompt, method: GemFilter) -> np.ndarray:
        """float32 [S], a score for each token of a prompt with this document; 0 for required ones."""
        whole = len(prompt) <= segments.reach(model.config, method)
        question = prompt.ids[len(prompt) - prompt.suffix_length :]
        scores = np.zeros(len(prompt), np.float32)
        done = prompt.prefix_length
        for state, group in zip(self.states, _groups(model, method, self.beginnings), strict=True):
            ids, lengths = scoring_pass.pad([question] * len(state.lengths), bucket(prompt.suffix_length))
            scored = programs.score_after(
                scoring_pass.filtering(model, method),
                state,
                ids,
                lengths,
                scoring_pass.head_weights(model, method),
                window=method.window,
                normalisation=scoring_pass.normalisation(method, whole),
            )
            for row, one in zip(collectives.to_host(scored), group, strict=False):
                part = row[prompt.prefix_length : len(one.ids)]
                scores[done : done + len(part)] = part
                done += len(part)
        return scores


def _beginnings(config: ModelConfig, prompt: Prompt, method: GemFilter) -> list[Beginning]:
    head = prompt.ids[: prompt.prefix_length]
    parts = segments.pieces(config, prompt, np.arange(len(prompt)), method)
    scaling = config.rope_scaling
    threshold = scaling.original_context if isinstance(scaling, LongRope) else None
    around = prompt.prefix_length + prompt.suffix_length
    return [
        Beginning(np.concatenate([head, prompt.ids[part]]), threshold is not None and around + len(part) > threshold)
        for part in parts
    ]


def _groups(model: Decoder, method: GemFilter, beginnings: list[Beginning]) -> list[Sequence[Beginning]]:
    return segments.groups(model.config, method, beginnings, _rows(model))


def _rows(model: Decoder) -> int:
    """The number of rows that the mesh wants a batch to be a multiple of."""
    return sharding.shape_of(model.mesh).rows


def key(model: Decoder, prompt: Prompt, method: GemFilter) -> str:
    """Hexadecimal digest of all that a reading depends on: weights, filter pass, batches, and the document's token ids.

    Of the weights, one row of each array stands for the whole of it.
    """
    digest = hashlib.sha256(_VERSION.encode())
    digest.update(repr(model.config).encode())
    for parameter in jax.tree.leaves(model):
        digest.update(collectives.to_host(parameter[..., -1, :] if parameter.ndim > 1 else parameter).tobytes())
    how = (method.filter_layer, method.filter_attention, method.band, method.first_tokens, method.filter_precision)
    digest.update(repr((*how, segments.reach(model.config, method))).encode())
    beginnings = _beginnings(model.config, prompt, method)
    digest.update(repr(([len(group) for group in _groups(model, method, beginnings)], _rows(model))).encode())
    for one in beginnings:
        digest.update(repr((len(one.ids), one.long)).encode() + one.ids.tobytes())
    return digest.hexdigest()


def read(model: Decoder, prompt: Prompt, method: GemFilter, *, progress: Progress | None = None) -> Reading:
    """Read a prompt's document, for this and any other question that leaves its segments as they are."""
    beginnings = _beginnings(model.config, prompt, method)
    longest = max(len(one.ids) for one in beginnings)
    width = segments.width(longest)
    states, done = [], 0
    for group in _groups(model, method, beginnings):
        rows = sharding.evenly(group, _rows(model))
        ids, lengths = scoring_pass.pad([one.ids for one in rows], width)
        pattern = scoring_pass.pattern(method, longest - prompt.prefix_length, np.zeros(len(rows), np.int32))
        states.append(
            programs.read(
                scoring_pass.filtering(model, method),
                ids,
                lengths,
                lengths + prompt.suffix_length,
                filter_layer=method.filter_layer,
                pattern=pattern,
            )
        )
        jax.block_until_ready(states[-1])
        done += sum(len(one.ids) for one in group)
        if progress:
            progress(done, sum(len(one.ids) for one in beginnings))
    return Reading(beginnings, states)


def save(reading: Reading, folder: pathlib.Path, name: str) -> None:
    """Write a reading into a folder of readings, where it appears whole or not at all, under its `key`.

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


def load(model: Decoder, prompt: Prompt, method: GemFilter, folder: pathlib.Path) -> Reading | None:
    """The reading of a prompt's document from a folder of readings; None if it holds none, or a damaged one."""
    path = folder.absolute() / key(model, prompt, method)
    if not path.is_dir():
        return None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            # Through the host, so that they are bound to no device and go where the model's weights are.
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            stored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
        states = [KVCache(**jax.tree.map(jnp.asarray, one)) for one in stored]
    except Exception:  # Orbax and TensorStore raise many kinds for a damaged checkpoint; the document is read again
        return None
    return Reading(_beginnings(model.config, prompt, method), states)


def _as_tree(states: list[KVCache]) -> list[dict[str, jax.Array]]:
    return [{field.name: getattr(state, field.name) for field in dataclasses.fields(state)} for state in states]
