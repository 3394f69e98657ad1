"""Control and data flow of PTX: what may run after what, and where a register's value comes from.

The emulator sees the paths that a launch takes. This reads all of them, for laws that hold on every path
(`ptx_law.py`). Registers and labels of nested scopes get names of their own first.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.emulator.syntax import (
    Address,
    BranchTargets,
    CloseScope,
    Function,
    Group,
    Instruction,
    Label,
    Name,
    Not,
    Number,
    OpenScope,
    Operand,
    Pair,
    Registers,
    Vector,
)

# What ends a thread or never returns.
_ENDS = {"ret", "exit", "trap"}
# Without a result: every operand is read.
_NO_RESULT = {"st", "red", "bar", "barrier", "fence", "membar", "bra", "brx", "ret", "exit", "trap"}
_NO_RESULT |= {
    "setmaxnreg",
    "stmatrix",
    "prefetch",
    "nanosleep",
    "cp",
    "griddepcontrol",
    "applypriority",
}


@dataclass(slots=True)
class Step:
    """One instruction with the registers it reads and writes, and where control goes next."""

    instruction: Instruction
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    next: list[int] = field(default_factory=list)

    @property
    def opcode(self) -> str:
        return self.instruction.full_opcode

    def __str__(self) -> str:
        at = self.instruction.location
        return f"{self.instruction.text!r} ({at.file.rpartition('/')[2]}:{at.line})"


class _Scopes:
    """Names that a scope declares are its own."""

    def __init__(self) -> None:
        self._stack: list[dict[str, str]] = [{}]
        self._count = 0

    def open(self) -> None:
        self._count += 1
        self._stack.append({})

    def close(self) -> None:
        self._stack.pop()

    def declare(self, names: list[str]) -> None:
        if len(self._stack) > 1:
            self._stack[-1].update((n, f"{n}@{self._count}") for n in names)

    def of(self, name: str) -> str:
        for scope in reversed(self._stack):
            if name in scope:
                return scope[name]
        return name


def registers_in(operand: Operand) -> list[str]:
    """Registers that an operand mentions, in order."""
    if isinstance(operand, Name):
        return [operand.text]
    if isinstance(operand, Not):
        return [operand.operand.text]
    if isinstance(operand, Pair):
        return registers_in(operand.first) + registers_in(operand.second)
    if isinstance(operand, (Vector, Group)):
        return [n for x in operand.elements for n in registers_in(x)]
    if isinstance(operand, Address):
        return registers_in(operand.base) + [n for x in operand.extra for n in registers_in(x)]
    assert isinstance(operand, Number)
    return []


def has_result(instruction: Instruction) -> bool:
    """Whether the first operand is written."""
    opcode, modifiers = instruction.opcode, instruction.modifiers
    if opcode in ("bar", "barrier"):
        return "red" in modifiers
    if opcode == "mbarrier":
        return modifiers[0] in ("try_wait", "test_wait") or modifiers[0].startswith("arrive")
    if opcode == "wgmma":
        return "mma_async" in modifiers
    return opcode not in _NO_RESULT


class Flow:
    """The steps of a kernel as a graph.

    Parameters
    ----------
    function : Function
        From `tests.emulator.ptx.parse`.

    Attributes
    ----------
    steps : list of Step
        In the order of the text; a step's `next` are indices, `len(steps)` is the end.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.steps: list[Step] = []
        labels: dict[str, int] = {}
        tables: dict[str, list[str]] = {}
        targets: list[list[str]] = []
        scopes = _Scopes()
        declared = self._labels_of_scopes(function)
        for place, statement in enumerate(function.body):
            if isinstance(statement, OpenScope):
                scopes.open()
                scopes.declare(declared[place])
            elif isinstance(statement, CloseScope):
                scopes.close()
            elif isinstance(statement, Registers):
                scopes.declare(statement.names)
            elif isinstance(statement, Label):
                labels[scopes.of(statement.name)] = len(self.steps)
            elif isinstance(statement, BranchTargets):
                tables[statement.name] = statement.labels
            elif isinstance(statement, Instruction):
                self.steps.append(_step(statement, scopes))
                targets.append(
                    [scopes.of(n) for n in registers_in(statement.operands[-1])]
                    if statement.opcode in ("bra", "brx")
                    else []
                )
        for n, (step, names) in enumerate(zip(self.steps, targets, strict=True)):
            step.next = self._next(n, step, names, labels, tables)

    @functools.cached_property
    def writers(self) -> dict[str, list[int]]:
        """The steps that write each register."""
        found: dict[str, list[int]] = defaultdict(list)
        for n, step in enumerate(self.steps):
            for name in step.writes:
                found[name].append(n)
        return found

    @functools.cached_property
    def sources(self) -> list[dict[str, list[int]]]:
        """For each step and register that it reads, the steps that may have written what it finds there."""
        mentions: dict[str, list[int]] = defaultdict(list)
        found: list[dict[str, list[int]]] = [{} for _ in self.steps]
        for n, step in enumerate(self.steps):
            for name in {*step.reads, *step.writes}:
                mentions[name].append(n)
            for name in step.reads:
                found[n][name] = []
        for name, places in self.writers.items():
            if len(places) == 1 or name.startswith("%f"):
                # Accumulators are written hundreds of times, and take no part in control.
                for n in mentions[name]:
                    if name in found[n]:
                        found[n][name] = places
                continue
            for writer in places:
                for n in self._readers(name, writer, mentions[name]):
                    found[n][name].append(writer)
        return found

    def _readers(self, name: str, writer: int, mentions: list[int]) -> Iterator[int]:
        """Steps that may read what `writer` wrote."""
        todo, seen = list(self.steps[writer].next), set()
        while todo:
            n = todo.pop()
            # To the next step that mentions the register, or to the end of the straight line.
            if n >= len(self) or n in seen:
                continue
            seen.add(n)
            place = bisect_left(mentions, n)
            mention = mentions[place] if place < len(mentions) else len(self)
            last = self._line_ends[bisect_left(self._line_ends, n)]
            if mention > last:
                todo += self.steps[last].next
                continue
            step = self.steps[mention]
            if name in step.reads:
                yield mention
            if name not in step.writes or step.instruction.guard is not None:
                todo += step.next

    @functools.cached_property
    def _line_ends(self) -> list[int]:
        """Last steps of straight lines, which nothing leaves or enters in between."""
        entered = {m for n, step in enumerate(self.steps) for m in step.next if m != n + 1}
        return [
            n
            for n, step in enumerate(self.steps)
            if step.next != [n + 1] or n + 1 in entered or n + 1 == len(self)
        ]

    @staticmethod
    def _labels_of_scopes(function: Function) -> dict[int, list[str]]:
        """Labels by the place of the scope that holds them: a branch may come before its label."""
        found: dict[int, list[str]] = {}
        stack: list[int] = []
        for place, statement in enumerate(function.body):
            if isinstance(statement, OpenScope):
                stack.append(place)
                found[place] = []
            elif isinstance(statement, CloseScope):
                stack.pop()
            elif isinstance(statement, Label) and stack:
                found[stack[-1]].append(statement.name)
        return found

    def _next(
        self,
        n: int,
        step: Step,
        names: list[str],
        labels: dict[str, int],
        tables: dict[str, list[str]],
    ) -> list[int]:
        end, opcode = len(self.steps), step.instruction.opcode
        if opcode == "bra":
            found = [labels[names[0]]]
        elif opcode == "brx":
            found = [labels[name] for name in tables[names[0]]]
        elif opcode in _ENDS:
            found = [end]
        else:
            return [n + 1]
        return [*found, n + 1] if step.instruction.guard is not None else found

    def __len__(self) -> int:
        return len(self.steps)

    @functools.cached_property
    def before(self) -> list[list[int]]:
        """Steps that may run right before each, the end included."""
        found: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for n, step in enumerate(self.steps):
            for m in step.next:
                found[m].append(n)
        return found

    @functools.cached_property
    def reachable(self) -> set[int]:
        """Steps that control can come to."""
        seen, todo = {0}, [0]
        while todo:
            n = todo.pop()
            for m in self.steps[n].next if n < len(self) else ():
                if m not in seen:
                    seen.add(m)
                    todo.append(m)
        return seen

    @functools.cached_property
    def joins(self) -> list[int]:
        """For each step, the first one that every path from it to the end passes (its immediate postdominator)."""
        end = len(self)
        order: list[int] = []  # reverse graph, children first
        seen, stack = {end}, [(end, iter(self.before[end]))]
        while stack:
            n, rest = stack[-1]
            for m in rest:
                if m not in seen:
                    seen.add(m)
                    stack.append((m, iter(self.before[m])))
                    break
            else:
                order.append(n)
                stack.pop()
        number = {n: i for i, n in enumerate(order)}
        join = {end: end}
        changed = True
        while changed:
            changed = False
            for n in reversed(order[:-1]):
                known = [m for m in self.steps[n].next if m in join]
                new = known[0]
                for m in known[1:]:
                    while new != m:
                        if number[new] < number[m]:
                            new = join[new]
                        else:
                            m = join[m]
                if join.get(n) != new:
                    join[n] = new
                    changed = True
        # What never ends has no join: the end stands for it.
        return [join.get(n, end) for n in range(end + 1)]

    def region(self, n: int) -> set[int]:
        """Steps that run or not, or more or less often, depending on the branch at `n`."""
        join = self.joins[n]
        todo = [m for m in self.steps[n].next if m != join]
        seen = set(todo)
        while todo:
            m = todo.pop()
            if m >= len(self):
                continue
            for k in self.steps[m].next:
                if k != join and k not in seen:
                    seen.add(k)
                    todo.append(k)
        return seen

    def branches(self) -> Iterator[int]:
        """Steps with more than one successor."""
        return (n for n, step in enumerate(self.steps) if len(set(step.next)) > 1)


def _step(instruction: Instruction, scopes: _Scopes) -> Step:
    operands = instruction.operands
    if instruction.opcode == "bra":
        operands = ()
    writes: list[str] = []
    reads: list[str] = []
    if operands and has_result(instruction):
        writes = registers_in(operands[0])
        operands = operands[1:]
        if instruction.opcode == "wgmma":  # accumulates
            reads += writes
    for operand in operands:
        reads += registers_in(operand)
    if instruction.guard is not None:
        reads += registers_in(instruction.guard)
        reads += writes  # may keep what it held
    return Step(
        instruction,
        tuple(scopes.of(n) for n in reads),
        tuple(scopes.of(n) for n in writes if n != "_"),
    )


def constant(flow: Flow, n: int, operand: object) -> int | None:
    """The value of an operand of step `n` where it is the same on every path, and known here."""
    if isinstance(operand, Number):
        return operand.value
    if isinstance(operand, Name) and operand.text in flow.sources[n]:
        writers = flow.sources[n][operand.text]
        if len(writers) == 1 and flow.steps[writers[0]].instruction.opcode == "mov":
            return constant(flow, writers[0], flow.steps[writers[0]].instruction.operands[-1])
    return None
