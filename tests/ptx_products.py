"""Laws of asynchronous products: their registers are left alone until they are waited for, and fenced before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.emulator.syntax import Number, Vector
from tests.ptx_flow import Flow, Step, registers_in


@dataclass(frozen=True)
class _Pending:
    """Products under way: registers of D and of A as bits, of each group not waited for, the oldest first.

    The last group is the one not yet committed.
    """

    groups: tuple[tuple[int, int], ...] = ((0, 0),)

    def with_product(self, d: int, a: int) -> _Pending:
        *old, (d_open, a_open) = self.groups
        return _Pending((*old, (d_open | d, a_open | a)))

    def committed(self) -> _Pending:
        return _Pending((*self.groups, (0, 0)))

    def waited(self, newest: int) -> _Pending:
        return _Pending((*self.groups[:-1][len(self.groups) - 1 - newest :], self.groups[-1]))

    @property
    def d(self) -> int:
        return _union(d for d, _ in self.groups)

    @property
    def a(self) -> int:
        return _union(a for _, a in self.groups)


def _union(masks: Iterator[int]) -> int:
    found = 0
    for mask in masks:
        found |= mask
    return found


class _Products:
    """The registers of a kernel's wgmma as bits, and what each step does with them."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow
        self.bits: dict[str, int] = {}
        self.d: dict[int, int] = {}
        self.a: dict[int, int] = {}
        for n, step in enumerate(flow.steps):
            if step.opcode.startswith("wgmma.mma_async"):
                d, a = step.instruction.operands[:2]
                self.d[n] = self._mask(registers_in(d), new=True)
                self.a[n] = self._mask(registers_in(a), new=True) if isinstance(a, Vector) else 0
        self.reads = [self._mask(step.reads) for step in flow.steps]
        self.writes = [self._mask(step.writes) for step in flow.steps]

    def _mask(self, names: list[str] | tuple[str, ...], new: bool = False) -> int:
        mask = 0
        for name in names:
            if new or name in self.bits:
                mask |= 1 << self.bits.setdefault(name, len(self.bits))
        return mask


def registers_of_products(flow: Flow) -> Iterator[str]:
    """Accesses to registers of wgmma while it is under way, and products that no fence comes before."""
    products = _Products(flow)
    if products.d:
        yield from _touched(flow, products)
        yield from _unfenced(flow, products)


def _touched(flow: Flow, products: _Products) -> Iterator[str]:
    states: list[set[_Pending]] = [set() for _ in range(len(flow) + 1)]
    todo = [(0, _Pending())]
    reported = set()
    while todo:
        n, state = todo.pop()
        if state in states[n]:
            continue
        states[n].add(state)
        if n == len(flow):
            if state.d:
                yield "ends while products are under way"
            continue
        step = flow.steps[n]
        for text in _wrong(n, step, state, products):
            if n not in reported:
                reported.add(n)
                yield f"{step} {text}"
        after = _after(n, step, state, products)
        todo += [(m, after) for m in step.next]


def _wrong(n: int, step: Step, state: _Pending, products: _Products) -> Iterator[str]:
    d, a = state.d, state.a
    if n in products.d:
        others = [x for x in products.d.values() if x & products.d[n] and x != products.d[n]]
        if any(x & d for x in others):
            yield "accumulates in part of what another product under way has"
        if products.d[n] & a or products.a[n] & d:
            yield "takes registers that a product under way has in another part"
        return
    if products.reads[n] & d:
        yield "reads a result that is under way"
    if products.writes[n] & (d | a):
        yield "overwrites registers of a product under way"
    if step.opcode.startswith("wgmma.wait_group") and state.groups[-1] != (0, 0):
        yield "waits before the products are committed"


def _after(n: int, step: Step, state: _Pending, products: _Products) -> _Pending:
    if n in products.d:
        return state.with_product(products.d[n], products.a[n])
    if step.opcode.startswith("wgmma.commit_group"):
        return state.committed()
    if step.opcode.startswith("wgmma.wait_group"):
        (newest,) = step.instruction.operands
        assert isinstance(newest, Number)
        return state.waited(newest.value)
    return state


def _unfenced(flow: Flow, products: _Products) -> Iterator[str]:
    everything = (1 << len(products.bits)) - 1
    touched = [-1] * (len(flow) + 1)  # since the last fence, before each step
    todo = [(0, everything)]
    while todo:
        n, now = todo.pop()
        known = touched[n]
        if known >= 0 and known | now == known:
            continue
        touched[n] = now = now if known < 0 else now | known
        if n == len(flow):
            continue
        if flow.steps[n].opcode.startswith("wgmma.fence"):
            now = 0
        elif n not in products.d:
            now |= products.reads[n] | products.writes[n]
        todo += [(m, now) for m in flow.steps[n].next]
    for n, d in products.d.items():
        if touched[n] > 0 and touched[n] & (d | products.a[n]):
            yield f"{flow.steps[n]} has no fence behind what touched its registers"
