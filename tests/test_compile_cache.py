"""Compiled programs are kept in the user's cache folder unless JAX was told of another."""

import jax
import pytest

from gemfilter_jax import compile_cache


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_a_folder_of_the_users_own_is_left_alone(given, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given)
        compile_cache.enable()
        assert jax.config.jax_compilation_cache_dir == (given or str(tmp_path / "gemfilter_jax" / "programs"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
