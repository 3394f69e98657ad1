"""Which values all lanes of a warp, or all threads of a barrier, share, and at which branches they may part."""

from __future__ import annotations

from collections.abc import Callable

from tests.emulator.syntax import Number
from tests.ptx_flow import Flow, Step, registers_in

# What differs between the lanes of a warp by its nature. %tid is treated apart.
_LANE_REGISTERS = ("%laneid", "%lanemask", "%clock", "%tid.y", "%tid.z")
# One result for all threads of a barrier, or for all lanes of a warp.
_BLOCK_RESULTS = ("bar", "barrier")
_WARP_RESULTS = ("vote", "match", "redux", "activemask")
# Results that are each lane's own.
_OWN_RESULTS = ("mma", "ldmatrix", "wgmma", "movmatrix", "atom", "elect", "mbarrier")
WARP = 32


def _compares_warps(step: Step, bits: int) -> bool:
    """`setp` of a number of which the lowest `bits` tell lanes apart, with a constant between two warps."""
    operation, bound = step.instruction.modifiers[0], step.instruction.operands[-1]
    assert isinstance(bound, Number)
    edge = bound.value + (operation in ("gt", "le"))
    return operation in ("gt", "le", "lt", "ge") and edge % 2**bits == 0


class Uniformity:
    """Which results are one value in all lanes of a warp, and which branches they all take alike.

    An estimate on the safe side: what is not known to be uniform counts as divergent.

    Parameters
    ----------
    flow : Flow
    threads : int
        Of a warp (32), a warpgroup (128), or all that meet at a barrier.

    Attributes
    ----------
    divergent : set of int
        Steps whose results differ between lanes.
    branches : dict of int to set of int
        Divergent branches with the steps that depend on them.
    """

    def __init__(self, flow: Flow, threads: int = WARP) -> None:
        self.flow = flow
        self._bits = (threads - 1).bit_length()
        self.divergent: set[int] = set()
        self.branches: dict[int, set[int]] = {}
        self._unsteady: set[int] = set()  # steps that depend on divergent branches
        # Results that are the thread's number, shifted and moved by whole warps: bits that tell its lanes apart.
        self._lane_bits: dict[int, int] = {}
        for n in range(
            len(flow)
        ):  # registers of them have one writer, before their readers in the text
            bits = self._lane_bits_of(n)
            if bits:
                self._lane_bits[n] = bits
        while self._sweep(self.divergent, self._spoils) | self._find_branches():
            pass

    def _sweep(self, found: set[int], holds: Callable[[int], bool]) -> bool:
        """Adds the steps of which `holds` is true until there are no more; whether there were any."""
        before, last = len(found), -1
        while last != len(found):
            last = len(found)
            found |= {n for n in range(len(self.flow)) if n not in found and holds(n)}
        return len(found) > before

    def _find_branches(self) -> bool:
        new = [
            n
            for n in self.flow.branches()
            if n not in self.branches and any(self._own(n, x) for x in self.flow.steps[n].reads)
        ]
        for n in new:
            self.branches[n] = self.flow.region(n)
            self._unsteady |= self.branches[n]
        return bool(new)

    def _lane_bits_of(self, n: int) -> int:
        """How many of the lowest bits of a result differ between lanes, if it is made of the thread's number."""
        step = self.flow.steps[n]
        opcode, operands = step.instruction.opcode, step.instruction.operands
        bits = self._bits_read(n, step.reads[0]) if len(step.reads) == 1 and step.writes else 0
        if not bits or opcode in ("mov", "cvt"):
            return bits
        if not isinstance(operands[-1], Number):
            return 0
        value = operands[-1].value
        if opcode in ("shr", "shl"):
            return max(0, bits - value if opcode == "shr" else bits + value)
        return bits if opcode in ("add", "sub") and value % 2**bits == 0 else 0

    def _bits_read(self, n: int, name: str) -> int:
        writers = self.flow.sources[n][name]
        if name == "%tid.x":
            return self._bits
        return self._lane_bits.get(writers[0], 0) if len(writers) == 1 else 0

    def _own(self, n: int, name: str) -> bool:
        """Whether lanes may have values of their own in a register that step `n` reads."""
        writers = self.flow.sources[n][name]
        if not writers:
            return name == "%tid.x" or name.startswith(_LANE_REGISTERS)
        if any(w in self.divergent or w in self._lane_bits for w in writers):
            return True
        return len(writers) > 1 and any(w in self._unsteady for w in writers)

    def _spoils(self, n: int) -> bool:
        """Whether lanes come to have results of their own in this step."""
        step = self.flow.steps[n]
        opcode, modifiers = step.instruction.opcode, step.instruction.modifiers
        if not step.writes or n in self._lane_bits or opcode in _BLOCK_RESULTS:
            return False
        if opcode in _WARP_RESULTS and self._bits == 5:
            return False
        if opcode in _OWN_RESULTS:
            return True
        if opcode == "ld" and {"acquire", "volatile", "relaxed"} & set(modifiers):
            return True  # lanes may read at different times
        own = [name for name in step.reads if self._own(n, name)]
        return bool(own) and not self._by_warp(n, own)

    def _by_warp(self, n: int, own: list[str]) -> bool:
        """Whether a step makes something of the whole warp out of what lanes have of their own."""
        step = self.flow.steps[n]
        opcode, operands = step.instruction.opcode, step.instruction.operands
        if opcode == "shfl" and "idx" in step.instruction.modifiers and self._bits == 5:
            return not any(self._own(n, name) for name in registers_in(operands[2]))
        bits = max(self._bits_read(n, name) for name in own)
        last = operands[-1]
        if not isinstance(last, Number) or not all(self._bits_read(n, name) for name in own):
            return False
        if opcode == "setp":
            return _compares_warps(step, bits)
        if opcode == "shr":
            return last.value >= bits
        return opcode in ("and", "div") and last.value % 2**bits == 0
