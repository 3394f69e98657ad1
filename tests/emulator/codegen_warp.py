"""Emitters of instructions that several threads execute together: barriers, warp collectives, matrix instructions."""

from __future__ import annotations

import re

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .ptx import Instruction, Pair


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
    value = {"all": f"x == {member}", "any": "x != 0", "uni": f"x == 0 || x == {member}", "ballot": "x"}[mode]
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
        value = f"emu::redux_f32(t, {int(op == 'max')}, {int(absolute)}, {int(nan)}, {e.read(a, t)}, {e.read(mask, 'u32')})"
    else:
        value = f"emu::redux_{'s32' if t == 's32' else 'u32'}(t, emu::REDUX_{op.upper()}, {e.read(a, t)}, {e.read(mask, 'u32')})"
    e.write(d, t, value)


@emits("activemask")
def activemask(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("b32")
    e.write(i.operands[0], "b32", "emu::active_mask(t)")


# -------------------------------------------------------------------------------------------------- matrix instructions
@emits("ldmatrix")
def ldmatrix(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "m8n8", "shared", "shared::cta", "b16")
    m.one_of("x1", "x2", "x4")
    trans = m.flag("trans")
    d = e.vector(i.operands[0])
    e.site()
    e.line(f"u32 x[{len(d)}]; emu::ldmatrix(t, {e.address(i.operands[1], 'shared')}, {len(d)}, {int(trans)}, x);")
    for k, r in enumerate(d):
        e.write(r, "b32", f"x[{k}]")


@emits("stmatrix")
def stmatrix(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "m8n8", "shared", "shared::cta", "b16")
    m.one_of("x1", "x2", "x4")
    trans = m.flag("trans")
    values = e.vector(i.operands[1])
    e.site()
    e.line(f"u32 x[{len(values)}] = {{{', '.join(e.read(v, 'b32') for v in values)}}};")
    e.line(f"emu::stmatrix(t, {e.address(i.operands[0], 'shared')}, {len(values)}, {int(trans)}, x);")


@emits("movmatrix")
def movmatrix(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "m8n8", "trans", "b16")
    e.site()
    e.write(i.operands[0], "b32", f"emu::movmatrix(t, {e.read(i.operands[1], 'b32')})")


# shape and operand type -> registers of A, B and C/D
_MMA = {
    ("m16n8k8", "f16"): (2, 1, 4), ("m16n8k16", "f16"): (4, 2, 4), ("m16n8k8", "bf16"): (2, 1, 4),
    ("m16n8k16", "bf16"): (4, 2, 4), ("m16n8k4", "tf32"): (2, 1, 4), ("m16n8k8", "tf32"): (4, 2, 4),
    ("m8n8k4", "f64"): (1, 1, 2), ("m16n8k4", "f64"): (2, 1, 4), ("m16n8k8", "f64"): (4, 2, 4),
    ("m16n8k16", "f64"): (8, 4, 4),
}  # fmt: skip


@emits("mma")
def mma(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "row", "col", "rn")
    shape = m.match(r"m\d+n\d+k\d+")
    if len(m.left) != 4:
        raise e.fail("expected four types")
    td, ta, tb, tc = m.left
    m.left.clear()
    counts = _MMA.get((shape, ta))
    half_sums = td == "f16"
    if counts is None or ta != tb or td != tc or td != ("f64" if ta == "f64" else "f16" if half_sums else "f32"):
        raise e.fail("shape and types")
    if half_sums and ta != "f16":
        raise e.fail("half-precision sums of other operands")
    d, a, b, c = (e.vector(x) for x in i.operands)
    expected = (*counts[:2], 2 if half_sums else counts[2])
    if (len(a), len(b), len(c)) != expected or len(d) != len(c):
        raise e.fail("number of registers")
    operand = "f64" if ta == "f64" else "b32"
    sums = "b32" if half_sums else td
    k = int(re.sub(r".*k", "", shape))
    rows = 8 if shape.startswith("m8") else 16
    e.site()
    e.line(f"{C_TYPES[operand]} a[] = {{{', '.join(e.read(x, operand) for x in a)}}};")
    e.line(f"{C_TYPES[operand]} b[] = {{{', '.join(e.read(x, operand) for x in b)}}};")
    e.line(f"{C_TYPES[sums]} d[] = {{{', '.join(e.read(x, sums) for x in c)}}};")
    if ta == "f64":
        e.line(f"emu::mma_f64(t, {rows}, {k}, a, b, d);")
    else:
        e.line(f"emu::mma_{ta}{'_f16' if half_sums else ''}(t, {k}, a, b, d);")
    for n, x in enumerate(d):
        e.write(x, sums, f"d[{n}]")



