"""Emitters of instructions that several threads execute together: barriers, warp collectives, matrix instructions."""

from __future__ import annotations

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .syntax import Instruction, Pair


# ------------------------------------------------------------------------------------------------------------- barriers
@emits("bar", "barrier")
def bar(e: Emitter, i: Instruction, m: Modifiers) -> None:
    if m.flag("warp"):
        m.flag("sync")
        e.site()
        e.line(f"emu::warp_barrier(t, {e.read(i.operands[0], 'u32')});")
        return
    m.flag("cta")
    what = m.one_of("sync", "arrive", "red")
    aligned = "true" if m.flag("aligned") or i.opcode == "bar" else "false"
    e.site()
    if what == "red":
        _barrier_reduce(e, i, m, aligned)
        return
    a = e.read(i.operands[0], "u32")
    b = e.read(i.operands[1], "u32") if len(i.operands) > 1 else "0u"
    e.line(f"emu::barrier_{what}(t, {a}, {b}, {aligned});")


def _barrier_reduce(e: Emitter, i: Instruction, m: Modifiers, aligned: str) -> None:
    op, t = m.one_of("popc", "and", "or"), m.type()
    d, a, *count, p = i.operands
    threads = e.read(count[0], "u32") if count else "0u"
    number = {"and": 0, "or": 1, "popc": 2}[op]
    value = f"emu::barrier_reduce(t, {e.read(a, 'u32')}, {threads}, {number}, {e.read(p, 'pred')}, {aligned})"
    e.write(d, t, f"({C_TYPES[t]}){value}")


# ----------------------------------------------------------------------------------------------------- warp collectives
@emits("shfl")
def shfl(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "b32")
    mode = m.one_of("up", "down", "bfly", "idx")
    d, a, b, c, mask = i.operands
    e.site()
    arguments = [e.read(a, "b32"), e.read(b, "u32"), e.read(c, "u32"), e.read(mask, "u32")]
    e.line(f"bool ok; u32 x = emu::shuffle_{mode}(t, {', '.join(arguments)}, &ok);")
    if isinstance(d, Pair):
        e.write(d.second, "pred", "ok")
        d = d.first
    e.write(d, "b32", "x")


@emits("vote")
def vote(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync")
    mode = m.one_of("all", "any", "uni", "ballot")
    t = m.type()
    d, p, mask = i.operands
    e.site()
    e.line(f"u32 x = emu::vote(t, {e.read(p, 'pred')}, {e.read(mask, 'u32')});")
    member = e.read(mask, "u32")
    value = {
        "all": f"x == {member}",
        "any": "x != 0",
        "uni": f"x == 0 || x == {member}",
        "ballot": "x",
    }[mode]
    e.write(d, t, value)


@emits("match")
def match(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync")
    mode, t = m.one_of("any", "all"), m.type()
    d, a, mask = i.operands
    e.site()
    e.line(f"u32 x = emu::match_any(t, {e.read(a, t)}, {e.read(mask, 'u32')});")
    if mode == "any":
        e.write(d, "b32", "x")
        return
    e.line(f"bool ok = x == {e.read(mask, 'u32')};")
    if isinstance(d, Pair):
        e.write(d.second, "pred", "ok")
        d = d.first
    e.write(d, "b32", "ok ? x : 0u")


@emits("redux")
def redux(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync")
    op = m.one_of("add", "min", "max", "and", "or", "xor")
    t = m.type()
    absolute, nan = m.flag("abs"), m.flag("NaN")
    d, a, mask = i.operands
    e.site()
    if t == "f32":
        flags = f"{int(op == 'max')}, {int(absolute)}, {int(nan)}"
        value = f"emu::redux_f32(t, {flags}, {e.read(a, t)}, {e.read(mask, 'u32')})"
    else:
        name = "redux_s32" if t == "s32" else "redux_u32"
        value = f"emu::{name}(t, emu::REDUX_{op.upper()}, {e.read(a, t)}, {e.read(mask, 'u32')})"
    e.write(d, t, value)


@emits("activemask")
def activemask(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("b32")
    e.write(i.operands[0], "b32", "emu::active_mask(t)")


# -------------------------------------------------------------------------------------------------- matrix instructions
@emits("stmatrix")
def stmatrix(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "m8n8", "shared", "shared::cta", "b16")
    m.one_of("x1", "x2", "x4")
    trans = m.flag("trans")
    values = e.vector(i.operands[1])
    e.site()
    e.line(f"u32 x[{len(values)}] = {{{', '.join(e.read(v, 'b32') for v in values)}}};")
    e.line(
        f"emu::stmatrix(t, {e.address(i.operands[0], 'shared')}, {len(values)}, {int(trans)}, x);"
    )


@emits("movmatrix")
def movmatrix(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "m8n8", "trans", "b16")
    e.site()
    e.write(i.operands[0], "b32", f"emu::movmatrix(t, {e.read(i.operands[1], 'b32')})")
