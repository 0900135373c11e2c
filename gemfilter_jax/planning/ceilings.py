"""The speeds that this device reaches, measured: ceilings for what programs do. Needs jax alone."""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemfilter_jax.precision import precision_of

_REPEATS = 5
_SIDE, _SIDE_ON_CPU = 8192, 1024  # of the square matrices that are multiplied
_BYTES, _BYTES_ON_CPU = 2**30, 2**28  # of the array that is copied, beyond the caches


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Speeds of one device.

    Attributes:
      product_flops_per_second: of a large matrix product in the dtype asked for.
      int8_product_flops_per_second: of one of int8 with int32 sums.
      copy_bytes_per_second: bytes read and written by a program that changes a large array in place. In a new array the
        pages that a CPU's system has to map would cost more than the copy.
    """

    product_flops_per_second: float
    int8_product_flops_per_second: float
    copy_bytes_per_second: float

    def seconds(self, flops: int, int8_flops: int) -> float:
        """The least time for matrix products of so many FLOPs, `int8_flops` of them in int8."""
        of_floats = (flops - int8_flops) / self.product_flops_per_second
        return of_floats + int8_flops / self.int8_product_flops_per_second


def measure(dtype: jax.typing.DTypeLike) -> Ceilings:
    """The ceilings of the default device, each the best of several runs."""
    on_cpu = jax.default_backend() == "cpu"
    side, size = (_SIDE_ON_CPU, _BYTES_ON_CPU) if on_cpu else (_SIDE, _BYTES)
    floats = jax.random.normal(jax.random.key(0), (side, side), jnp.float32).astype(dtype)
    whole_numbers = jax.random.randint(jax.random.key(1), (side, side), -127, 128, jnp.int8)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=precision_of(x)))
    multiply_int8 = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.int32))
    change = functools.partial(jax.jit, donate_argnums=0)(lambda x: x + 1)
    return Ceilings(
        product_flops_per_second=2 * side**3 / _fastest(multiply, floats),
        int8_product_flops_per_second=2 * side**3 / _fastest(multiply_int8, whole_numbers),
        copy_bytes_per_second=2 * size / _fastest(change, jnp.zeros(size // 4, jnp.float32), in_place=True),
    )


def _fastest(program: Callable[[jax.Array], jax.Array], x: jax.Array, *, in_place: bool = False) -> float:
    """The least seconds that a program takes; one that works in place is given its own result again."""
    made, times = jax.block_until_ready(program(x)), []
    for _ in range(_REPEATS):
        given = made if in_place else x
        started = time.perf_counter()
        made = jax.block_until_ready(program(given))
        times.append(time.perf_counter() - started)
    return min(times)
