"""Emitters of loads, stores, atomics, fences and address conversions: every access goes through a checking call."""

from __future__ import annotations

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .syntax import SIZES, Address, Instruction, Operand

_SPACES = (
    "shared",
    "shared::cta",
    "shared::cluster",
    "global",
    "local",
    "const",
    "param",
    "param::entry",
    "param::func",
)
_CACHE = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first",
    "L1::evict_last", "L1::no_allocate", "L2::evict_normal", "L2::evict_first", "L2::evict_last", "L2::64B", "L2::128B",
    "L2::256B", "L2::cache_hint", "unified",
)  # fmt: skip
SCOPES = ("cta", "cluster", "gpu", "sys")


def _space(m: Modifiers) -> str:
    return m.one_of(*_SPACES, default="generic").split(":")[0]


def _kind(m: Modifiers, write: bool) -> str:
    """C expression of the access kind, from the memory-ordering modifiers."""
    order = m.one_of("weak", "volatile", "relaxed", "acquire", "release", "mmio", default="weak")
    if order == "mmio":
        m.flag("relaxed")
    m.flag(*SCOPES)
    kind = "emu::WRITE" if write else "emu::READ"
    if order != "weak":
        kind += " | emu::STRONG | emu::SYNC" + ("" if write else " | emu::POLL")
    if order in ("acquire", "release"):
        kind += f" | emu::{order.upper()}"
    return kind


def pointer(e: Emitter, operand: Operand, space: str, size: int, kind: str) -> str:
    """C expression of the checked host address of `size` bytes at an address operand."""
    if space == "param":
        if not isinstance(operand, Address) or e.register_type(operand.base) is None:
            return e.parameter(operand)
        space = "const"  # the address of a kernel parameter was taken
    address = e.address(operand, space)
    e.site()
    if space in ("local", "const"):
        return f"emu::{space}_access(t, {address}, {size})"
    return f"emu::{space}_access(t, {address}, {size}, {kind})"


@emits("ld", "ldu")
def ld(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    space, kind = _space(m), _kind(m, write=False)
    if m.flag("nc") or i.opcode == "ldu":
        kind += " | emu::READ_ONLY"
    m.flag(*_CACHE)
    _take_vector(m)
    d, c = e.vector(i.operands[0]), C_TYPES[t]
    e.line(f"const u8* p = {pointer(e, i.operands[1], space, SIZES[t] * len(d), kind)};")
    if len(d) == 1:
        e.write(d[0], t, f"*(const {c}*)p")
        return
    # the address may live in a register that the load overwrites, but `p` is already fixed
    for k, x in enumerate(d):
        e.write(x, t, f"((const {c}*)p)[{k}]")


@emits("st")
def st(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    space, kind = _space(m), _kind(m, write=True)
    m.flag(*_CACHE)
    _take_vector(m)
    values, c = e.vector(i.operands[1]), C_TYPES[t]
    e.line(f"u8* p = {pointer(e, i.operands[0], space, SIZES[t] * len(values), kind)};")
    for k, x in enumerate(values):
        e.line(f"(({c}*)p)[{k}] = {e.read(x, t)};")


def _take_vector(m: Modifiers) -> str:
    return m.one_of("v2", "v4", "v8", default="")


def _atomic_value(e: Emitter, m_op: str, t: str, old: str, b: str, c: str) -> str:
    """C expression of what an atomic leaves in memory."""
    kind = t.removesuffix("x2")
    if t in ("f16x2", "bf16x2"):
        return f"emu::pair_{m_op}_{kind}({old}, {b})"
    if t in ("f16", "bf16") and m_op == "add":
        return f"emu::add_{kind}({old}, {b})"
    table = {
        "add": f"({C_TYPES[t]})({old} + {b})", "and": f"{old} & {b}", "or": f"{old} | {b}", "xor": f"{old} ^ {b}",
        "min": f"({b} < {old} ? {b} : {old})", "max": f"({b} > {old} ? {b} : {old})", "exch": b,
        "cas": f"({old} == {b} ? {c} : {old})", "inc": f"({old} >= {b} ? 0 : {old} + 1)",
        "dec": f"({old} == 0 || {old} > {b} ? {b} : {old} - 1)",
    }  # fmt: skip
    return table[m_op]


@emits("atom", "red")
def atomic(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    op = m.one_of("add", "and", "or", "xor", "min", "max", "exch", "cas", "inc", "dec")
    space = _space(m)
    order = m.one_of("relaxed", "acquire", "release", "acq_rel", default="relaxed")
    m.flag(*SCOPES, "noftz", *_CACHE)
    _take_vector(m)
    is_red = i.opcode == "red"
    kind = "emu::WRITE | emu::STRONG | emu::ATOMIC"
    if t[0] in "bus" and len(t) <= 4:  # sums of floats carry no signals
        kind += " | emu::SYNC" + ("" if is_red else " | emu::POLL")
    kind += " | emu::ACQUIRE" if order.startswith("acq") else ""
    kind += " | emu::RELEASE" if order in ("release", "acq_rel") else ""
    address, *values = i.operands if is_red else i.operands[1:]
    b = e.vector(values[0])
    c = C_TYPES[t]
    e.line(f"{c}* p = ({c}*){pointer(e, address, space, SIZES[t] * len(b), kind)};")
    results = [] if is_red else e.vector(i.operands[0])
    for k, x in enumerate(b):
        e.line(f"{c} o{k} = p[{k}], b{k} = {e.read(x, t)};")
        third = e.read(values[1], t) if op == "cas" else ""
        e.line(f"p[{k}] = {_atomic_value(e, op, t, f'o{k}', f'b{k}', third)};")
    for k, x in enumerate(results):
        e.write(x, t, f"o{k}")


@emits("membar")
def membar(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("cta", "gl", "sys")
    e.line("emu::fence(t);")


@emits("fence")
def fence(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.one_of("sc", "acq_rel", "acquire", "release", default="acq_rel")
    m.flag(*SCOPES)
    e.line("emu::fence(t);")


@emits("cvta")
def cvta(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    to = m.flag("to")
    space = _space(m)
    d, a = i.operands
    value = e.read(a, t) if not isinstance(a, Address) else e.address(a, space)
    if space != "shared":
        e.write(d, t, value)
    elif to:
        e.site()
        e.write(d, t, f"emu::to_shared_address(t, {value})")
    else:
        e.write(d, t, f"(emu::SHARED_WINDOW + (u32){value})")


@emits("isspacep")
def isspacep(e: Emitter, i: Instruction, m: Modifiers) -> None:
    space = _space(m)
    e.write(i.operands[0], "pred", f"emu::is_{space}(t, {e.read(i.operands[1], 'u64')})")


@emits("cp.async")
def cp_async(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """cp.async with 4, 8 or 16 bytes; the bulk forms have emitters of their own."""
    if m.flag("commit_group"):
        e.site()
        e.line("emu::cp_async_commit(t);")
        return
    if m.flag("wait_group", "wait_all"):
        e.site()
        if not i.operands:  # wait_all also covers what was not committed
            e.line("emu::cp_async_commit(t);")
        e.line(f"emu::cp_async_wait(t, {e.read(i.operands[0], 'u32') if i.operands else '0u'});")
        return
    how = m.one_of("ca", "cg")
    if not m.flag("shared", "shared::cta") or not m.flag("global"):
        raise e.fail("copies go from global to shared memory")
    hint = m.flag("L2::cache_hint")
    m.flag(*_CACHE)
    dst, src, size, *rest = i.operands
    rest = rest[:-1] if hint else rest
    n = e.read(size, "u32")
    bytes_read = n
    if rest:
        ignore = e.register_type(rest[0]) == "u8" or type(rest[0]).__name__ == "Not"
        bytes_read = f"({e.read(rest[0], 'pred')} ? 0u : {n})" if ignore else e.read(rest[0], "u32")
    e.site()
    if how == "cg":
        e.line(f'if ({n} != 16) emu::fail(emu::ASYNC_MISUSE, "cp.async.cg copies 16 bytes");')
    e.line(
        f"emu::cp_async(t, {e.address(dst, 'shared')}, {e.address(src, 'global')}, {n}, {bytes_read});"
    )
