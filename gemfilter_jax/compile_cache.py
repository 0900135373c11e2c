"""Compiled programs kept in the user's cache folder, so that only the first run of a size waits for XLA."""

import os
import pathlib

import jax

_LEAST_SECONDS = 0.1  # of compilation; programs that take less are compiled anew


def folder() -> pathlib.Path:
    """The project's folder in the user's cache folder."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "gemfilter_jax"


def enable() -> None:
    """Keep compiled programs between processes, unless JAX has been told where to keep them."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder() / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
