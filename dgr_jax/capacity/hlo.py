"""What a compiled program does, read from its text: FLOPs, bytes, collectives, by the loop.

XLA's own cost analysis counts the body of a loop once. Here the text of the optimised program is
read, and a body counts as often as it runs: the trip count that XLA found (`known_trip_count`), or
the one that the caller gives where the loop ends by its data, as beam search does. Of a conditional
the dearest branch counts.

    cost(compiled.as_text(), unknown_trips=8)

The rules are those of XLA's HloCostAnalysis: a dot is 2 * result * contracted; a convolution (what
TPUs make of dots) counts the positions where the kernel meets the input, not padding. Bytes are the
operands and results of every fusion in main memory; where a fusion only slices or gathers from an
operand, or updates a slice of it, the slice counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from dgr_jax.capacity.hlo_text import Computation, Instruction, computations

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "optimization-barrier", "domain",
}  # fmt: skip
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class Collective:
    """What one collective sends: kind, shapes of its results, devices in a group, bytes a device
    puts on the network in one run of a bandwidth-optimal algorithm, and runs."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    group: int
    sent: float
    runs: float = 1.0


@dataclass(frozen=True)
class Cost:
    """What one device does: floating point operations of matrix products, bytes of main memory read
    and written, and collectives. unknown: loops whose trip count was not in the program."""

    flops: float = 0.0
    bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
            self.unknown + other.unknown,
        )

    def times(self, runs: float) -> Cost:
        """The cost of so many runs."""
        many = tuple(dataclasses.replace(c, runs=c.runs * runs) for c in self.collectives)
        return Cost(self.flops * runs, self.bytes * runs, many, self.unknown)

    def sent(self) -> dict[str, float]:
        """Bytes that a device sends, by kind of collective, the most first."""
        total: dict[str, float] = {}
        for collective in self.collectives:
            total[collective.kind] = (
                total.get(collective.kind, 0.0) + collective.sent * collective.runs
            )
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def cost(text: str, *, unknown_trips: int = 1) -> Cost:
    """The cost of one run of a program on one device.

    unknown_trips: runs of the body of a loop that ends by its data.
    """
    return _Reader(*computations(text), unknown_trips).of(None)


class _Reader:
    def __init__(
        self, computations: dict[str, Computation], entry: str, unknown_trips: int
    ) -> None:
        self.computations, self.entry, self.unknown_trips = computations, entry, unknown_trips
        self._known: dict[tuple[str, bool], Cost] = {}

    def of(self, name: str | None, *, fused: bool = False) -> Cost:
        """Cost of a computation; inside of a fusion no bytes are counted."""
        name = self.entry if name is None else name
        if (name, fused) not in self._known:
            computation = self.computations[name]
            total = Cost()
            for instruction in computation.instructions.values():
                total += self._cost_of(instruction, computation, fused)
            self._known[name, fused] = total
        return self._known[name, fused]

    def _cost_of(self, instruction: Instruction, inside: Computation, fused: bool) -> Cost:
        if instruction.opcode == "while":
            return self._loop(instruction, fused)
        if instruction.opcode == "conditional":
            branches = [
                self.of(name, fused=fused)
                for name in instruction.called
                if name in self.computations
            ]
            return max(branches, key=lambda c: c.flops / 200 + c.bytes, default=Cost())
        moved = 0.0 if fused or instruction.opcode in _FREE else self._bytes(instruction, inside)
        if instruction.opcode == "dot":
            return Cost(_dot_flops(instruction, inside), moved)
        if instruction.opcode == "convolution":
            return Cost(_convolution_flops(instruction, inside), moved)
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            return Cost(0.0, moved, (_collective(kind, instruction, inside),))
        if instruction.opcode in ("fusion", "call", "async-start", "custom-call"):
            within = fused or instruction.opcode == "fusion"
            parts = (
                self.of(name, fused=within)
                for name in instruction.called
                if name in self.computations
            )
            return sum(parts, Cost(0.0, moved))
        return Cost(0.0, moved)

    def _loop(self, instruction: Instruction, fused: bool) -> Cost:
        body = self.of(_required(r"body=%?([\w.-]+)", instruction.attributes)[1], fused=fused)
        trips = self._trips(instruction)
        if trips is not None:
            return body.times(trips)
        return body.times(self.unknown_trips) + Cost(unknown=1)

    def _trips(self, instruction: Instruction) -> int | None:
        """Runs of a loop's body: as XLA noted, or of a loop that counts from 0 to a constant."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.attributes):
            return int(noted[1])
        name = _required(r"condition=%?([\w.-]+)", instruction.attributes)[1]
        condition = self.computations[name]
        names = [name, *condition.root.called]
        inside = [
            i
            for n in names
            if n in self.computations
            for i in self.computations[n].instructions.values()
        ]
        compared = [i for i in inside if i.opcode == "compare" and "direction=LT" in i.attributes]
        constants = [i for i in inside if i.opcode == "constant" and i.arrays[0].shape == ()]
        simple = condition.root.opcode == "compare" or len(names) > 1
        others = {i.opcode for i in inside} & {"and", "or", "not", "reduce"}
        if simple and not others and len(compared) == len(constants) == 1:
            return int(constants[0].operands[0])
        return None

    def _bytes(self, instruction: Instruction, inside: Computation) -> float:
        """Main memory that a top-level instruction reads and writes."""
        if instruction.opcode.endswith(("-done", "-update")):
            return 0.0
        get = inside.instructions.get
        read = [get(name) for name in instruction.operands]
        if instruction.opcode in _SLICES:
            return 2 * instruction.nbytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * (read[1].nbytes if len(read) > 1 and read[1] else 0.0)
        if instruction.opcode.endswith("-start"):
            return 2 * sum(o.nbytes for o in read if o)
        if (
            instruction.opcode == "fusion"
            and instruction.called
            and instruction.called[0] in self.computations
        ):
            return self._fusion_bytes(instruction, read, self.computations[instruction.called[0]])
        return instruction.nbytes + sum(o.nbytes for o in read if o)

    def _fusion_bytes(
        self, instruction: Instruction, read: list[Instruction | None], body: Computation
    ) -> float:
        total, updated = 0.0, 0.0
        for operand, parameter in zip(read, body.parameters, strict=False):
            if operand is None or not operand.nbytes:
                continue
            users = list(_through_bitcasts(body, parameter.name))
            if users and all(u.opcode in _SLICES and u.operands[0] == via for via, u in users):
                total += min(operand.nbytes, sum(_size(user) for _, user in users))
            elif users and all(
                u.opcode == "dynamic-update-slice" and u.operands[0] == via for via, u in users
            ):
                updates = (body.instructions[u.operands[1]] for _, u in users)
                total += sum(map(_size, updates))
                updated += operand.nbytes
            else:
                total += operand.nbytes
        return total + max(0.0, instruction.nbytes - updated)


def _size(instruction: Instruction) -> float:
    return sum(array.element * math.prod(array.shape) for array in instruction.arrays)


def _through_bitcasts(body: Computation, name: str) -> Iterator[tuple[str, Instruction]]:
    """(operand, user) of every use of a value, bitcasts looked through."""
    for user in body.users.get(name, ()):
        if user.opcode == "bitcast":
            yield from _through_bitcasts(body, user.name)
        else:
            yield name, user


def _numbers(pattern: str, text: str) -> list[int]:
    match = re.search(pattern, text)
    return [int(i) for i in match[1].split(",") if i] if match else []


def _required(pattern: str, attributes: str) -> re.Match[str]:
    """What XLA always writes. Raises ValueError where it is not there."""
    if (match := re.search(pattern, attributes)) is None:
        raise ValueError(f"instruction of XLA: got {attributes!r}, expected {pattern!r} in it")
    return match


def _shape(inside: Computation, name: str) -> tuple[int, ...]:
    return inside.instructions[name].arrays[0].shape


def _dot_flops(instruction: Instruction, inside: Computation) -> float:
    left = _shape(inside, instruction.operands[0])
    contracted = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    return 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(instruction: Instruction, inside: Computation) -> float:
    labels = _required(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left, right = (_shape(inside, name) for name in instruction.operands[:2])
    result = instruction.arrays[0].shape
    sizes = dict(zip(labels[1], left, strict=True))
    kernel = dict(zip(labels[2], right, strict=True))
    out = dict(zip(labels[3], result, strict=True))
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(part.split("=") for part in window[1].split()) if window else {}
    groups = _numbers(r"feature_group_count=(\d+)", instruction.attributes) or [1]
    batch_groups = _numbers(r"batch_group_count=(\d+)", instruction.attributes) or [1]
    meetings = 1
    for place, label in enumerate(sorted(k for k in out if k.isdigit())):
        setting = lambda name, usual, place=place: (
            window[name].split("x")[place] if name in window else usual
        )
        meetings *= _meetings(
            sizes[label], kernel[label], out[label],
            stride=int(setting("stride", 1)),
            low=int(str(setting("pad", "0_0")).split("_")[0]),
            input_dilation=int(setting("lhs_dilate", 1)),
            kernel_dilation=int(setting("rhs_dilate", 1)),
        )  # fmt: skip
    features = kernel["i"] * out["f"] if groups[0] > 1 else sizes["f"] * out["f"]
    return 2.0 * features * sizes["b"] / batch_groups[0] * meetings


@functools.lru_cache(maxsize=4096)
def _meetings(
    size: int,
    kernel: int,
    out: int,
    *,
    stride: int,
    low: int,
    input_dilation: int,
    kernel_dilation: int,
) -> int:
    """Pairs of an output and a kernel place whose input place is neither padding nor a hole."""
    if kernel == 1 and stride == 1 and low == 0 and input_dilation == 1:
        return min(out, size)
    spread = (size - 1) * input_dilation + 1
    count = 0
    for k in range(kernel):
        first = k * kernel_dilation - low
        for o in range(out):
            place = first + o * stride
            count += 0 <= place < spread and place % input_dilation == 0
    return count


def group_size(attributes: str) -> int:
    """Devices that take part in one collective together, in any of XLA's notations; 0: all."""
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", attributes):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{('.*?)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    return 0


_SENT: Mapping[str, Callable[[int], float]] = {  # bytes sent by a device for a byte of its operand
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def _collective(kind: str, instruction: Instruction, inside: Computation) -> Collective:
    group = group_size(instruction.attributes) or 1
    operands = [inside.instructions.get(name) for name in instruction.operands]
    given = sum(_size(o) for o in operands if o)
    if kind == "all-reduce" and inside.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # a fusion of TPUs: each device keeps its part
    shapes = tuple(array.shape for array in instruction.arrays)
    return Collective(kind, shapes, group, given * _SENT[kind](max(group, 1)))
