"""Checks and times what the kernels do: selection scores, attention to prompts, the best k in order.

  python benchmarks/bench_kernels.py RESULT.json --lengths=8192,32768,131072

Needs jax, einops and absl-py alone, no network, and no model but the one that --model names. Every implementation is
first compared with float64 NumPy on small random inputs. Times are medians; scores are told as a share of this device's
own copies at their best, attention as a share of its own matrix products. What an implementation does not serve is in
the result with the reason.
"""

import argparse
import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax import files
from gemfilter_jax.errors import UserError
from gemfilter_jax.methods import selection
from gemfilter_jax.ops import attention, key_scores
from gemfilter_jax.planning import ceilings
from gemfilter_jax.planning.ceilings import Ceilings

_WINDOW = 32
_LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}
_BAND, _FIRST = 512, 64


def _scoring() -> tuple[str, ...]:
    return ("xla",) if jax.default_backend() == "cpu" else ("xla", "pallas")


def _seconds(call: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _random(shape: Sequence[int], dtype: str, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), tuple(shape), jnp.float32).astype(dtype)


def _score(implementation: str, normalisation: str) -> Callable[..., jax.Array]:
    door = functools.partial(key_scores.score_keys, implementation=implementation, normalisation=normalisation)
    return jax.jit(lambda q, rows, k, weights: door(q, rows, k, head_weights=weights))


def _attend(implementation: str | None, tri_shape: bool) -> Callable[..., jax.Array]:
    def call(q, k, v, lengths, tails):
        pattern = attention.TriShape(tails, first=_FIRST, band=_BAND, room=_WINDOW) if tri_shape else None
        return attention.causal(q, k, v, lengths=lengths, pattern=pattern, implementation=implementation)

    return jax.jit(call)


def _qkv(length: int, shape: Sequence[int], dtype: str, rows: int | None = None) -> tuple[jax.Array, ...]:
    heads, groups, width = shape
    sizes = ((rows or length, heads), (length, groups), (length, groups))
    return tuple(_random((1, *size, width), dtype, seed) for seed, size in enumerate(sizes))


def _expected_scores(q: np.ndarray, rows: np.ndarray, k: np.ndarray, normalisation: str) -> np.ndarray:
    keys = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = np.einsum("whe,she->hws", q, keys) / q.shape[-1] ** 0.5
    logits = np.where(rows[:, None] >= np.arange(len(k)), logits, -np.inf)
    reference = logits[..., :1] if normalisation == "sink" else np.logaddexp.reduce(logits, axis=-1)[..., None]
    return np.exp(logits - reference).sum(axis=(0, 1))


def _expected_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, tail: int | None) -> np.ndarray:
    repeats, length = q.shape[1] // k.shape[1], len(q)
    logits = np.einsum("the,she->hts", q, np.repeat(k, repeats, axis=1)) / q.shape[-1] ** 0.5
    row, column = np.arange(length)[:, None], np.arange(length)
    seen = row >= column
    if tail is not None:
        seen &= (row - column < _BAND) | (column < _FIRST) | (row >= length - tail)
    logits = np.where(seen, logits, -np.inf)
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hts,she->the", shares / shares.sum(axis=-1, keepdims=True), np.repeat(v, repeats, axis=1))


def _tried(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a measurement returns, or why there is none."""
    try:
        return measure(*arguments)
    except (NotImplementedError, UserError) as error:
        return {"refused": str(error).splitlines()[0]}
    except Exception as error:  # a kernel that the compiler rejects must not end the others' measurements
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def _checked(call: Callable[..., jax.Array], arguments: Sequence[jax.Array], want: np.ndarray) -> dict[str, Any]:
    dtype = str(arguments[0].dtype)
    error = float(np.abs(np.asarray(call(*arguments)[0], np.float64) - want).max() / np.abs(want).max())
    return {"error": error, "right": error <= _LARGEST_ERROR[dtype]}


def _checks(shape: Sequence[int], dtype: str) -> list[dict[str, Any]]:
    length, tails, found = 1_500, jnp.asarray([_WINDOW], jnp.int32), []
    q, k, v = _qkv(length, shape, dtype)
    exact = [np.asarray(one[0], np.float64) for one in (q, k, v)]
    rows = np.arange(length - _WINDOW, length)
    for name in _scoring():
        for normalisation in ("softmax", "sink"):
            arguments = (q[:, -_WINDOW:], jnp.asarray(rows[None]), k, jnp.ones(shape[0]))
            want = _expected_scores(exact[0][-_WINDOW:], rows, exact[1], normalisation)
            outcome = _tried(_checked, _score(name, normalisation), arguments, want)
            found.append({"of": f"scores, {normalisation}", "implementation": name, **outcome})
    for name in attention.IMPLEMENTATIONS:
        for tri_shape in (False, True):
            want = _expected_attention(*exact, _WINDOW if tri_shape else None)
            arguments = (q, k, v, jnp.asarray([length], jnp.int32), tails)
            outcome = _tried(_checked, _attend(name, tri_shape), arguments, want)
            of = f"attention, {'tri_shape' if tri_shape else 'dense'}"
            found.append({"of": of, "implementation": name, **outcome})
    return found


def _times_of_scores(length: int, shape: Sequence[int], dtype: str, speeds: Ceilings, repeats: int):
    q, k, _ = _qkv(length, shape, dtype, rows=_WINDOW)
    rows = jnp.arange(length - _WINDOW, length)[None]
    read = 2 * k.nbytes  # the keys once for the reference and once for the masses

    def measure(name: str) -> dict[str, Any]:
        seconds = _seconds(_score(name, "softmax"), q, rows, k, jnp.ones(shape[0]), repeats=repeats)
        return {"ms": seconds * 1e3, "share_of_copy": read / seconds / speeds.copy_bytes_per_second}

    return [{"tokens": length, "implementation": name, **_tried(measure, name)} for name in _scoring()]


def _times_of_attention(
    length: int, shape: Sequence[int], dtype: str, speeds: Ceilings, repeats: int, longest_dense: int
):
    q, k, v = _qkv(length, shape, dtype)
    lengths, tails = jnp.asarray([length], jnp.int32), jnp.asarray([_WINDOW], jnp.int32)
    heads, _, width = shape
    seen = {False: length * (length + 1) // 2, True: length * (_BAND + _FIRST) + _WINDOW * length}

    def measure(name: str, tri_shape: bool) -> dict[str, Any]:
        seconds = _seconds(_attend(name, tri_shape), q, k, v, lengths, tails, repeats=repeats)
        flops = 4 * heads * width * seen[tri_shape] / seconds
        return {"ms": seconds * 1e3, "share_of_product": flops / speeds.product_flops_per_second}

    return [
        {"tokens": length, "of": form, "implementation": name, **_tried(measure, name, form == "tri_shape")}
        for name in attention.IMPLEMENTATIONS
        for form in ("dense", "tri_shape")
        if form == "tri_shape" or length <= longest_dense
    ]


def _growth_of_tri_shape(
    lengths: Sequence[int], shape: Sequence[int], dtype: str, repeats: int
) -> list[dict[str, Any]]:
    """The platform's own choice; lengths take turns, so that whatever else the machine does meets all of them alike."""
    call, tails = _attend(None, True), jnp.asarray([_WINDOW], jnp.int32)
    inputs = {length: (*_qkv(length, shape, dtype), jnp.asarray([length], jnp.int32), tails) for length in lengths}
    times = [[_seconds(call, *inputs[length], repeats=1) for length in lengths] for _ in range(repeats)]
    ms = [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]
    return [
        {"tokens": length, "ms": of, "times_the_one_before": of / before}
        for length, of, before in zip(lengths[1:], ms[1:], ms, strict=False)
    ]


def _times_of_best(length: int, keep: int, repeats: int) -> dict[str, Any]:
    ranked, kept = _random((1, length), "float32", 0), jnp.asarray([keep], jnp.int32)
    ways = {"sorting": selection.best_by_sorting, "bisection": selection.best_by_bisection}
    ms = {
        name: _seconds(jax.jit(functools.partial(way, width=keep)), ranked, kept, repeats=repeats) * 1e3
        for name, way in ways.items()
    }
    return {"tokens": length, "keep": keep, "ms": ms}


def _share_of_filter_pass(source: str, length: int, repeats: int) -> dict[str, Any]:
    """Scoring alone, beside the whole pass of a model's preset that it ends."""
    import gemfilter_jax
    from gemfilter_jax.methods.gemfilter import scoring_pass

    model = gemfilter_jax.load(source)
    decoder, method = model.checkpoint.model, model.method()
    config, window = decoder.config, method.observation_window
    suffix_lengths = np.asarray([window], np.int32)
    whole = _seconds(
        scoring_pass.score_prompt,
        decoder,
        jax.random.randint(jax.random.key(0), (1, length), 0, config.vocab),
        jnp.asarray([length], jnp.int32),
        jnp.asarray(suffix_lengths),
        scoring_pass.ScoringPass.of(method, config.heads, document=length, suffix_lengths=suffix_lengths),
        repeats=repeats,
    )
    q, k, _ = _qkv(length, (config.heads, config.kv_heads, config.head_width), str(decoder.dtype), rows=window)
    rows = jnp.arange(length - window, length)[None]
    alone = _seconds(_score("xla", "softmax"), q, rows, k, jnp.ones(config.heads), repeats=repeats)
    return {
        "model": source,
        "tokens": length,
        "filter_pass_ms": whole * 1e3,
        "scores_ms": alone * 1e3,
        "share": alone / whole,
    }


def _main(arguments: argparse.Namespace) -> int:
    try:
        files.check_writable(arguments.output, "output")
    except UserError as error:
        sys.exit(str(error))
    shape, dtype, repeats = arguments.shape, arguments.dtype, arguments.repeats
    result: dict[str, Any] = {
        "command": f"python benchmarks/bench_kernels.py RESULT.json {' '.join(sys.argv[2:])}",
        "environment": {
            "device": jax.devices()[0].device_kind,
            "backend": jax.default_backend(),
            "python": platform.python_version(),
            "jax": jax.__version__,
        },
        "shape": dict(zip(("heads", "kv_heads", "width"), shape, strict=True)) | {"rows": _WINDOW, "dtype": dtype},
        "checks": _checks(shape, dtype),
    }
    speeds = ceilings.measure(dtype)
    result["device"] = dataclasses.asdict(speeds)
    if arguments.model:
        result["filter_pass"] = _share_of_filter_pass(arguments.model, 8192, repeats)
    attended = [length for length in arguments.lengths if length <= arguments.longest_attention]
    result["growth_of_tri_shape"] = _growth_of_tri_shape(attended, shape, dtype, repeats)
    result |= {"scores": [], "attention": [], "best_in_order": []}
    for length in arguments.lengths:
        print(f"{length:,} tokens", flush=True)
        result["scores"] += _times_of_scores(length, shape, dtype, speeds, repeats)
        if length in attended:
            result["attention"] += _times_of_attention(length, shape, dtype, speeds, repeats, arguments.longest_dense)
        result["best_in_order"].append(_times_of_best(length, min(1024, length), repeats))
        files.write_whole(arguments.output, json.dumps(result, indent=1) + "\n")
    wrong = [check for check in result["checks"] if check.get("right") is False or "failed" in check]
    for check in wrong:
        print(f"WRONG: {check}", file=sys.stderr)
    print(f"{len(result['checks']) - len(wrong)} of {len(result['checks'])} checks are right or refused with a reason")
    return bool(wrong)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the result, JSON")
    parser.add_argument("--lengths", type=_numbers, default="8192,32768,131072", help="tokens, comma-separated")
    parser.add_argument("--shape", type=_numbers, default="32,8,128", help="heads, key heads, width")
    parser.add_argument("--dtype", choices=list(_LARGEST_ERROR), default="bfloat16")
    parser.add_argument("--model", help="tell what share of this model's filter pass its scores take, at 8,192 tokens")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--longest_attention", type=int, default=131_072, help="no attention beyond so many tokens")
    parser.add_argument("--longest_dense", type=int, default=131_072, help="no dense attention beyond so many tokens")
    sys.exit(_main(parser.parse_args()))
