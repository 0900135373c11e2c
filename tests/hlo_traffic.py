"""Bytes that the kernels of a compiled program read and write, counted in its optimised HLO."""

import collections
import dataclasses
import math
import re

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8
}  # fmt: skip
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "fusion-done"}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    operation: str
    bytes: int
    operands: list[str]
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> str:
        """The name of a computation among the attributes."""
        found = re.search(rf"{attribute}=%?([\w.\-]+)", self.attributes)
        assert found, f"{self.name} has no {attribute}"
        return found[1]


_Computation = dict[str, _Instruction]


def per_iteration(text: str) -> int:
    """Bytes of one iteration of the only loop of the program's entry; loops inside it count as often as they run.

    A slice counts as large as it is, not as its source, and so does an update in place. Of a conditional, the second
    computation counts.
    """
    computations, entry = _parsed(text)
    loops = [one for one in computations[entry].values() if one.operation == "while"]
    assert len(loops) == 1, f"{len(loops)} loops"
    return _of_computation(computations, loops[0].called("body"))


def _parsed(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations[begins[2]] = {}
            entry = begins[2] if begins[1] else entry
        elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$", line):
            shape, rest = _split(found[3]) if found[3].startswith("(") else found[3].split(" ", 1)
            operation, _, rest = rest.strip().partition("(")
            operands, attributes = _split("(" + rest)
            names = [operands[1:-1]] if operation == "parameter" else re.findall(r"%([\w.\-]+)", operands)
            is_root = found[1] is not None
            current[found[2]] = _Instruction(found[2], operation, _size(shape), names, attributes, is_root)
    return computations, entry


def _split(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis, cut where that closes."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    raise ValueError(f"{text!r} does not close")


def _size(shape: str) -> int:
    arrays = re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]", shape)
    return sum(_BYTES[dtype] * math.prod(int(one) for one in sizes.split(",") if one) for dtype, sizes in arrays)


def _of_computation(computations: dict[str, _Computation], name: str) -> int:
    return sum(_of_instruction(computations, computations[name], one) for one in computations[name].values())


def _of_instruction(computations: dict[str, _Computation], here: _Computation, one: _Instruction) -> int:
    if one.operation in _NO_KERNEL:
        return 0
    if one.operation == "while":
        times = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', one.attributes)
        assert times, f"{one.name} runs an unknown number of times"
        return int(times[1]) * _of_computation(computations, one.called("body"))
    if one.operation == "conditional":
        return _of_computation(computations, one.called("false_computation"))
    if one.operation == "call":
        return _of_computation(computations, one.called("to_apply"))
    operands = [here[name].bytes for name in one.operands]
    if one.operation in ("fusion", "fusion-start"):
        return _of_fusion(computations[one.called("calls")], operands)
    if one.operation in _SLICES:
        return 2 * one.bytes
    if one.operation == "dynamic-update-slice":
        return 2 * operands[1]
    return one.bytes + sum(operands)


def _of_fusion(body: _Computation, operands: list[int]) -> int:
    uses = collections.defaultdict(list)
    for one in body.values():
        if one.operation != "parameter":
            for place, name in enumerate(one.operands):
                uses[name].append((one, place))

    def read(name: str, whole: int) -> int:
        total = whole if body[name].is_root else 0
        for user, place in uses[name]:
            if user.operation in _SLICES and place == 0:
                total += user.bytes
            elif user.operation == "bitcast":
                total += read(user.name, whole)
            elif user.operation != "dynamic-update-slice" or place > 0:
                total += whole
        return min(total, whole)

    def written(one: _Instruction) -> int:
        if one.operation == "tuple":
            return sum(written(body[name]) for name in one.operands)
        if one.operation == "bitcast":
            return written(body[one.operands[0]])
        return body[one.operands[1]].bytes if one.operation == "dynamic-update-slice" else one.bytes

    parameters = {int(one.operands[0]): one.name for one in body.values() if one.operation == "parameter"}
    (root,) = (one for one in body.values() if one.is_root)
    return sum(read(parameters[place], whole) for place, whole in enumerate(operands)) + written(root)
