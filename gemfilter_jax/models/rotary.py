"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout as Hugging Face uses it."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gemfilter_jax.config import FactorRope, LinearRope, Llama3Rope, ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [E/2], with the config's scaling applied."""
    exponents = np.arange(0, config.head_width, 2, dtype=np.float32) / np.float32(config.head_width)
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


def rotary_table(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [B, S, 1, E/2], for int positions [B, S]."""
    angles = positions[..., None, None].astype(jnp.float32) * inverse_frequencies(config)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate heads x [B, S, heads, E] by a table from `rotary_table`; computed in float32, returned in x's dtype."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
