"""Emitters of logic, shifts and bit fields."""

from __future__ import annotations

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .syntax import Instruction, Pair


@emits("and", "or", "xor")
def logic(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    sign = {"and": "&", "or": "|", "xor": "^"}[i.opcode]
    a, b = (e.read(x, t) for x in i.operands[1:])
    e.write(i.operands[0], t, f"({C_TYPES[t]})({a} {sign} {b})")


@emits("not", "cnot")
def bit_not(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    logical = t == "pred" or i.opcode == "cnot"
    e.write(i.operands[0], t, f"({C_TYPES[t]}){'!' if logical else '~'}{e.read(i.operands[1], t)}")


@emits("lop3")
def lop3(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("b32")
    combine = m.one_of("or", "and", default="")
    a, b, c = (e.read(x, "b32") for x in i.operands[1:4])
    e.line(f"u32 x = emu::lop3({a}, {b}, {c}, {e.read(i.operands[4], 'u32')});")
    d = i.operands[0]
    if combine:
        if not isinstance(d, Pair):
            raise e.fail("a combined lop3 needs d|p")
        q = e.read(i.operands[5], "pred")
        e.write(d.second, "pred", f"(x != 0) {'|' if combine == 'or' else '&'} {q}")
        d = d.first
    e.write(d, "b32", "x")


@emits("shl", "shr")
def shift(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    name = "shift_left" if i.opcode == "shl" else "shift_right"
    a, n = e.read(i.operands[1], t), e.read(i.operands[2], "u32")
    e.write(i.operands[0], t, f"emu::{name}<{C_TYPES[t]}>({a}, {n})")


@emits("shf")
def funnel_shift(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("b32")
    side, mode = m.one_of("l", "r"), m.one_of("clamp", "wrap")
    a, b, n = (e.read(x, "u32") for x in i.operands[1:])
    n = f"({n} & 31u)" if mode == "wrap" else f"emu::at_most_32({n})"
    pair = f"((u64){b} << 32 | {a})"
    value = f"(u32)(({pair} << {n}) >> 32)" if side == "l" else f"(u32)({pair} >> {n})"
    e.write(i.operands[0], "b32", value)


@emits("bfe")
def bfe(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    a, pos, length = (
        e.read(i.operands[1], t),
        e.read(i.operands[2], "u32"),
        e.read(i.operands[3], "u32"),
    )
    e.write(i.operands[0], t, f"emu::bit_field_extract<{C_TYPES[t]}>({a}, {pos}, {length})")


@emits("bfi")
def bfi(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    a, b = e.read(i.operands[1], t), e.read(i.operands[2], t)
    pos, length = e.read(i.operands[3], "u32"), e.read(i.operands[4], "u32")
    e.write(i.operands[0], t, f"emu::bit_field_insert<{C_TYPES[t]}>({a}, {b}, {pos}, {length})")


@emits("prmt")
def prmt(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("b32")
    mode = m.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16", default="index")
    a, b, c = (e.read(x, "u32") for x in i.operands[1:])
    e.write(i.operands[0], "b32", f"emu::permute_{mode}({a}, {b}, {c})")


@emits("popc", "clz")
def popc_clz(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    e.write(i.operands[0], "u32", f"emu::{i.opcode}{t[1:]}({e.read(i.operands[1], t)})")


@emits("brev")
def brev(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    e.write(i.operands[0], t, f"emu::brev{t[1:]}({e.read(i.operands[1], t)})")


@emits("bfind")
def bfind(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    amount = m.flag("shiftamt")
    e.write(
        i.operands[0],
        "u32",
        f"emu::find_leading<{C_TYPES[t]}>({e.read(i.operands[1], t)}, {int(amount)})",
    )


@emits("bmsk")
def bmsk(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("b32")
    mode = m.one_of("clamp", "wrap")
    a, b = (e.read(x, "u32") for x in i.operands[1:])
    e.write(i.operands[0], "b32", f"emu::bit_mask_{mode}({a}, {b})")


@emits("sad")
def sad(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    a, b, c = (e.read(x, t) for x in i.operands[1:])
    e.write(i.operands[0], t, f"({C_TYPES[t]})({c} + ({a} < {b} ? {b} - {a} : {a} - {b}))")
