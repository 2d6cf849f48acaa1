"""The text of a compiled program, parsed: its computations and their instructions."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][\w-]*)\(")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\([^\n]*)?.*\{$")
_NAME = re.compile(r"%([\w.-]+)")


@dataclass(frozen=True)
class Array:
    """An array type: element bytes, shape, and whether it lies in main memory (not on the chip)."""

    element: float
    shape: tuple[int, ...]
    main: bool = True

    @property
    def nbytes(self) -> float:
        return self.element * math.prod(self.shape) if self.main else 0.0


@dataclass(frozen=True)
class Instruction:
    """One line of a program: name = type opcode(operands), attributes."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool = False

    @property
    def nbytes(self) -> float:
        return sum(array.nbytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that `calls`, `to_apply`, branches ... name."""
        named = re.findall(
            r"(?:calls|branch_computations|true_computation|false_computation|to_apply)="
            r"(\{[^}]*\}|%?[\w.-]+)",
            self.attributes,
        )
        return tuple(
            name.lstrip("%") for part in named for name in re.split(r"[{}, ]+", part) if name
        )


@dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, in their order."""
        numbered = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(numbered, key=lambda i: int(i.operands[0]))

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


def arrays_of(text: str) -> tuple[Array, ...]:
    """The arrays of a type such as (f32[2,3]{1,0:T(8,128)S(1)}, s32[])."""
    return tuple(
        Array(
            _BYTES.get(kind, 1),
            tuple(int(size) for size in dims.split(",") if size),
            re.search(r"S\([1-9]", layout) is None,
        )
        for kind, dims, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """Place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "({") - (text[place] in ")}")
        if not depth:
            return place + 1
    raise ValueError(f"program text: brackets are not closed in {text[:200]!r}")


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.strip().partition(" = ")
    if not equals:
        return None
    root = name.startswith("ROOT ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    stop = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : stop - 1]
    literal = (inside,) if opcode[1] in ("parameter", "constant") else ()
    operands = literal or tuple(_NAME.findall(inside))
    return Instruction(
        name.removeprefix("ROOT ").lstrip("%"),
        arrays_of(rest[:end]),
        opcode[1],
        operands,
        rest[stop:],
        root,
    )


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """All computations of a program's text by name, and the name of the entry."""
    by_name: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" ") and line.endswith("{") and not line.startswith("HloModule"):
            header = _HEADER.match(line)
            if header:
                current = by_name[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("program text: got no ENTRY computation, expected an optimised HLO module")
    return by_name, entry
