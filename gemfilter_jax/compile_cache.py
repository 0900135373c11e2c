"""Caches compiled programs in the user's cache folder, so that only the first run of a size waits for XLA."""

import os
import pathlib
import warnings

import jax

_LEAST_SECONDS = 0.1  # of compilation; faster programs are not cached


def folder() -> pathlib.Path:
    """The project's folder in the user's cache folder."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gemfilter_jax"


def enable() -> None:
    """Cache compiled programs across processes, unless JAX already has a cache folder."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
        # A cache that cannot be read or written costs time alone.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
