"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout as Hugging Face uses it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.config import FactorRope, LinearRope, Llama3Rope, LongRope, ModelConfig, YarnRope


def inverse_frequencies(config: ModelConfig, *, long: bool = False) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [rotated / 2], with the config's scaling applied.

    Args:
      long: for sequences longer than the scaling's original context; only `LongRope` uses it.
    """
    exponents = np.arange(0, config.rotated, 2, dtype=np.float32) / np.float32(config.rotated)
    frequencies = np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRope(factor):
            return frequencies / np.float32(factor)
        case FactorRope(factors):
            return frequencies / np.asarray(factors, np.float32)
        case Llama3Rope() as scaling:
            return _llama3(frequencies, scaling)
        case LongRope() as scaling:
            return frequencies / np.asarray(scaling.long_factors if long else scaling.short_factors, np.float32)
        case YarnRope() as scaling:
            return _yarn(frequencies, scaling, config)


def _llama3(frequencies: np.ndarray, scaling: Llama3Rope) -> np.ndarray:
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_context / scaling.high_freq_factor
    shortest_slowed = scaling.original_context / scaling.low_freq_factor
    ramp = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    slowed = frequencies / scaling.factor
    blended = (1 - ramp) * slowed + ramp * frequencies
    scaled = np.where(wavelengths > shortest_slowed, slowed, np.where(wavelengths < longest_kept, frequencies, blended))
    return scaled.astype(np.float32)


def _yarn(frequencies: np.ndarray, scaling: YarnRope, config: ModelConfig) -> np.ndarray:
    def pair_that_turns(times: float) -> float:
        """The (fractional) index of the pair that makes this many turns in the original context."""
        span = scaling.original_context / (times * 2 * math.pi)
        return config.rotated * math.log(span) / (2 * math.log(config.rope_theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotated - 1)
    last = last if last > first else first + 0.001
    slowed = np.clip((np.arange(len(frequencies)) - first) / (last - first), 0, 1)
    return (frequencies * (1 - slowed) + frequencies / scaling.factor * slowed).astype(np.float32)


def rotary_table(config: ModelConfig, positions: jax.Array, extents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, S, 1, rotated / 2], for int positions [B, S].

    Args:
      extents: int [B], the last position of each row's sequence plus one; `LongRope` chooses its factors by it.
    """
    frequencies, scale = jnp.asarray(inverse_frequencies(config)), 1.0
    match config.rope_scaling:
        case LongRope() as scaling:
            is_long = (extents > scaling.original_context)[:, None, None, None]
            frequencies = jnp.where(is_long, inverse_frequencies(config, long=True), frequencies)
            scale = scaling.attention_scaling
        case YarnRope() as scaling:
            scale = scaling.attention_scaling
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the leading values of each head of x [B, S, heads, E], as many as the `rotary_table` covers.

    Computed in float32, returned in x's dtype.
    """
    cos, sin = table
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
