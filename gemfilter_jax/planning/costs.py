"""Costs of a program on one device, counted in its jaxpr: matrix products and collectives.

The walk counts each loop for as many iterations as it runs. It computes the values that control loops (lengths, the
filter layer, block indices) as the first device of the mesh would. All other values stay unknown.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from gemfilter_jax.errors import UserError

Known = np.ndarray | None
"""A value, or None if it is unknown."""

_LARGEST = 4096  # elements of the largest array that the walk computes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind over one mesh axis.

    Attributes:
      count: number of collectives. bytes: total size of one device's operands.
      sent: total bytes that one device sends in a ring algorithm.
    """

    count: int
    bytes: int
    sent: int


@dataclasses.dataclass(frozen=True)
class Costs:
    """Costs of a program on one device.

    Attributes:
      flops: FLOPs of matrix products. int8_flops: those among them whose factors are int8.
      exchanges: collectives by kind and mesh axis, such as ("psum", "model").
    """

    flops: int = 0
    exchanges: dict[tuple[str, str], Exchange] = dataclasses.field(default_factory=dict)
    int8_flops: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        exchanges = dict(self.exchanges)
        for kind, more in other.exchanges.items():
            had = exchanges.get(kind, Exchange(0, 0, 0))
            exchanges[kind] = Exchange(had.count + more.count, had.bytes + more.bytes, had.sent + more.sent)
        return Costs(self.flops + other.flops, exchanges, self.int8_flops + other.int8_flops)

    def __mul__(self, times: int) -> "Costs":
        exchanges = {
            kind: Exchange(one.count * times, one.bytes * times, one.sent * times)
            for kind, one in self.exchanges.items()
        }
        return Costs(self.flops * times, exchanges, self.int8_flops * times)

    @property
    def exchanged(self) -> int:
        """Size in bytes of one device's operands of all collectives."""
        return sum(one.bytes for one in self.exchanges.values())

    @property
    def sent(self) -> int:
        """Bytes that one device sends in all collectives, in ring algorithms."""
        return sum(one.sent for one in self.exchanges.values())


def of_program(function: Any, *arguments: Any, **options: Any) -> Costs:
    """The costs of a jitted function.

    Args:
      arguments, options: NumPy arrays for known values, `jax.ShapeDtypeStruct`s for unknown ones; static options.

    Raises:
      UserError: a loop's bounds are arrays that are too large to follow.
    """
    jaxpr = function.trace(*arguments, **options).jaxpr
    leaves = [leaf for leaf in jax.tree.leaves((arguments, options)) if hasattr(leaf, "shape")]
    try:
        return _Walk({}).through(jaxpr, [_small(leaf) if isinstance(leaf, np.ndarray) else None for leaf in leaves])[1]
    except _UnknownError as error:
        raise UserError("the program's loops are too long to be counted; give fewer tokens") from error


class _UnknownError(Exception):
    """A loop's length or a branch depends on an unknown value."""


_Step = Callable[[Sequence[Known]], tuple[list[Known], Costs]]


class _Walk:
    """A walk through a program on a mesh with the given axis sizes."""

    def __init__(self, axes: dict[str, int]):
        self._axes = axes
        self._constant: dict[int, Costs | None] = {}  # by jaxpr id; None if the costs depend on inputs

    def through(self, closed: Any, values: Sequence[Known]) -> tuple[list[Known], Costs]:
        """The outputs and costs of a jaxpr for given inputs."""
        jaxpr, costs = closed.jaxpr, Costs()
        known: dict[Any, Known] = dict(zip(jaxpr.invars, values, strict=True))
        known |= {var: _small(value) for var, value in zip(jaxpr.constvars, closed.consts, strict=True)}

        def value_of(atom: Any) -> Known:
            return np.asarray(atom.val) if isinstance(atom, core.Literal) else known.get(atom)

        read = [*jaxpr.outvars, *(atom for equation in jaxpr.eqns for atom in equation.invars)]
        used = {atom for atom in read if not isinstance(atom, core.Literal)}
        for equation in jaxpr.eqns:
            if used.isdisjoint(equation.outvars):  # the compiler drops it
                continue
            made, more = self._equation(equation, [value_of(atom) for atom in equation.invars])
            known |= {var: value for var, value in zip(equation.outvars, made, strict=True) if value is not None}
            costs = costs + more if more else costs
        return [value_of(atom) for atom in jaxpr.outvars], costs

    def _equation(self, equation: Any, values: list[Known]) -> tuple[list[Known], Costs | None]:
        name, params = equation.primitive.name, equation.params
        unknown: list[Known] = [None] * len(equation.outvars)
        match name:
            case "dot_general":
                return unknown, _of_product(equation)
            case "psum" | "psum_invariant" | "pmax" | "pmin" | "ppermute" | "all_gather" | "all_to_all":
                return values if name in ("pmax", "pmin") else unknown, self._exchange(equation)
            case "axis_index":
                return [np.zeros((), np.int32)], None
            case "while":
                return self._while(params, values)
            case "scan":
                return self._scan(params, values)
            case "cond":
                return self._branch(params["branches"], values)
            case "shard_map":
                body = _closed(params["jaxpr"])
                own = [_first_part(value, var) for value, var in zip(values, body.jaxpr.invars, strict=True)]
                return unknown, _Walk(dict(params["mesh"].shape)).through(body, own)[1]
            case "pallas_call":  # an upper bound: each grid step takes its most costly branches
                return unknown, self._bound(params["jaxpr"]) * math.prod(params["grid_mapping"].grid)
        inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
        if inner is not None:
            return self.through(_closed(inner), values)
        compute = _COMPUTED.get(name)
        small = all(math.prod(var.aval.shape) <= _LARGEST for var in equation.outvars)
        if compute and small and all(value is not None for value in values):
            return [compute(*values, **params)], None
        return unknown, None

    def _exchange(self, equation: Any) -> Costs:
        axes = equation.params.get("axes", equation.params.get("axis_name"))
        axes = axes if isinstance(axes, tuple) else (axes,)
        name = equation.primitive.name.removesuffix("_invariant")
        size = math.prod(self._axes[axis] for axis in axes)
        given = sum(_bytes(var.aval) for var in equation.invars)
        hops = {"ppermute": 1, "all_gather": size - 1, "all_to_all": (size - 1) / size}.get(name, 2 * (size - 1) / size)
        return Costs(0, {(name, ",".join(axes)): Exchange(1, given, int(given * hops))})

    def _branch(self, branches: Sequence[Any], values: list[Known]) -> tuple[list[Known], Costs]:
        which, inputs = values[0], values[1:]
        if which is not None:
            branch = branches[int(which)]
            unknown = self._of_unknown(branch)
            return ([None] * len(branch.jaxpr.outvars), unknown) if unknown else self.through(branch, inputs)
        costs = [self.through(branch, inputs)[1] for branch in branches]
        if any(one != costs[0] for one in costs):
            raise _UnknownError
        return [None] * len(branches[0].jaxpr.outvars), costs[0]

    def _of_unknown(self, closed: Any) -> Costs | None:
        """The costs of a jaxpr, or None if they depend on its inputs."""
        if id(closed) not in self._constant:
            try:
                self._constant[id(closed)] = self.through(closed, [None] * len(closed.jaxpr.invars))[1]
            except _UnknownError:
                self._constant[id(closed)] = None
        return self._constant[id(closed)]

    def _while(self, params: Any, values: list[Known]) -> tuple[list[Known], Costs]:
        """A loop of `jax.lax.fori_loop`, whose state begins with a counter and its bound."""
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        consts, carry = values[split[0] : split[1]], values[split[1] :]
        condition = params["cond_jaxpr"].jaxpr
        if [one.primitive.name for one in condition.eqns] != ["lt"] or len(carry) < 2:
            raise _UnknownError
        if carry[0] is None or carry[1] is None:
            raise _UnknownError
        count = max(int(carry[1]) - int(carry[0]), 0)

        def step(carry: Sequence[Known], _: int | None) -> tuple[list[Known], Costs]:
            return self.through(params["body_jaxpr"], [*consts, *carry])

        return _repeated(step, carry, count)

    def _scan(self, params: Any, values: list[Known]) -> tuple[list[Known], Costs]:
        if "num_consts" in params:  # before JAX 0.11
            constant, carried = params["num_consts"], params["num_carry"]
        else:
            constant, carried, _ = map(len, params["ft_in"].unpack())
        consts, carry, xs = values[:constant], values[constant : constant + carried], values[constant + carried :]

        def step(carry: Sequence[Known], index: int | None) -> tuple[list[Known], Costs]:
            slices = [None if index is None or x is None else x[index] for x in xs]
            made, costs = self.through(params["jaxpr"], [*consts, *carry, *slices])
            return made[: len(carry)], costs

        carry, costs = _repeated(step, carry, params["length"], reverse=params["reverse"])
        stacked = len(params["jaxpr"].jaxpr.outvars) - len(carry)
        return [*carry, *[None] * stacked], costs

    def _bound(self, jaxpr: Any) -> Costs:
        """The costs of a kernel's body, in which each conditional counts as its most costly branch."""
        costs = Costs()
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                costs += _of_product(equation)
            elif equation.primitive.name == "cond":
                branches = [self._bound(branch.jaxpr) for branch in equation.params["branches"]]
                costs += max(branches, key=lambda one: one.flops)
        return costs


def _repeated(
    step: Callable[[Sequence[Known], int | None], tuple[list[Known], Costs]],
    carry: Sequence[Known],
    count: int,
    reverse: bool = False,
) -> tuple[list[Known], Costs]:
    """The outputs and costs of a loop: one step times `count` if its costs are constant, else step by step."""
    try:
        made, costs = step([None] * len(carry), None)
    except _UnknownError:
        total = Costs()
        for index in reversed(range(count)) if reverse else range(count):
            carry, costs = step(carry, index)
            total += costs
        return list(carry), total
    return made, costs * count


def _of_product(equation: Any) -> Costs:
    ((contracted, _), _), left = equation.params["dimension_numbers"], equation.invars[0].aval
    flops = 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left.shape[axis] for axis in contracted)
    return Costs(flops, int8_flops=flops if left.dtype == np.int8 else 0)


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize


def _closed(jaxpr: Any) -> Any:
    """The jaxpr with its constants. Before JAX 0.11, a jaxpr inside another one has none."""
    return jaxpr if hasattr(jaxpr, "consts") else core.ClosedJaxpr(jaxpr, ())  # pyright: ignore[reportPrivateImportUsage]


def _small(value: Any) -> Known:
    return np.asarray(value) if getattr(value, "size", 1) <= _LARGEST else None


def _first_part(value: Known, var: Any) -> Known:
    """The first device's shard of an array."""
    return None if value is None else value[tuple(slice(size) for size in var.aval.shape)]


def _reduced(function: Callable[..., Any], x: np.ndarray, *, axes: tuple[int, ...], **_: Any) -> Any:
    return function(x, axis=axes)


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values, **_: function(*values)


def _broadcast(x: np.ndarray, *, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...], **_: Any) -> Any:
    aligned = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, np.shape(x), strict=True):
        aligned[axis] = size
    return np.broadcast_to(np.reshape(x, aligned), shape)


def _iota(*, dtype: Any, shape: tuple[int, ...], dimension: int, **_: Any) -> Any:
    along = [-1 if axis == dimension else 1 for axis in range(len(shape))]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(along), shape)


def _dynamic_slice(x: np.ndarray, *starts: Any, slice_sizes: tuple[int, ...], **_: Any) -> Any:
    first = [min(max(int(start), 0), x.shape[axis] - slice_sizes[axis]) for axis, start in enumerate(starts)]
    return x[tuple(slice(start, start + size) for start, size in zip(first, slice_sizes, strict=True))]


_COMPUTED: dict[str, Callable[..., Any]] = {
    **{
        name: _elementwise(function)
        for name, function in {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "div": lambda x, y: np.trunc(np.divide(x, y)).astype(np.result_type(x)),
            "rem": np.fmod,
            "neg": np.negative,
            "sign": np.sign,
            "max": np.maximum,
            "min": np.minimum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "not": np.invert,
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "clamp": lambda low, x, high: np.clip(x, low, high),
            "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
            "copy": np.asarray,
        }.items()
    },
    "reduce_max": functools.partial(_reduced, np.max),
    "reduce_min": functools.partial(_reduced, np.min),
    "reduce_sum": functools.partial(_reduced, np.sum),
    "reduce_and": functools.partial(_reduced, np.all),
    "reduce_or": functools.partial(_reduced, np.any),
    "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
    "broadcast_in_dim": _broadcast,
    "iota": _iota,
    "reshape": lambda x, *, new_sizes, **_: np.reshape(x, new_sizes),
    "squeeze": lambda x, *, dimensions, **_: np.squeeze(x, dimensions),
    "concatenate": lambda *xs, dimension, **_: np.concatenate(xs, axis=dimension),
    "stack": lambda *xs, axis, **_: np.stack(xs, axis=axis),
    "dynamic_slice": _dynamic_slice,
}
