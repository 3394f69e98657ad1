"""Emitters of comparisons, selections and moves."""

from __future__ import annotations

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .syntax import Instruction, Not, Pair

_HALF = ("f16", "bf16", "f16x2", "bf16x2")
_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}
_COMPARISONS = (*_COMPARE, *_UNORDERED, "num", "nan")


def _comparison(how: str, a: str, b: str, is_float: bool) -> str:
    if how == "num":
        return f"({a} == {a} && {b} == {b})"
    if how == "nan":
        return f"({a} != {a} || {b} != {b})"
    if how in _UNORDERED:
        # equ: true when equal or unordered = not (ordered and different)
        if how in ("equ", "neu"):
            ordered = f"({a} == {a} && {b} == {b})"
            return f"(!{ordered} || {a} == {b})" if how == "equ" else f"({a} != {b})"
        return f"(!({a} {_UNORDERED[how]} {b}))"
    if how == "ne" and is_float:  # ordered and different
        return f"({a} < {b} || {a} > {b})"
    return f"({a} {_COMPARE[how]} {b})"


def _compare(e: Emitter, i: Instruction, m: Modifiers, t: str) -> tuple[list[str], str | None, str]:
    """Comparison of the sources, one expression per half; the combining operator and its predicate."""
    ftz = m.flag("ftz")
    how = m.one_of(*_COMPARISONS)
    combine = m.one_of("and", "or", "xor", default="") or None
    a, b = (e.read(x, t) for x in i.operands[1:3])
    predicate = e.read(i.operands[3], "pred") if combine else ""
    is_float = t in ("f32", "f64", *_HALF)
    if t in _HALF:
        kind = t.removesuffix("x2")
        e.line(f"u32 ha = {a}, hb = {b};")
        flush = (lambda v: f"emu::ftz_f16({v})") if ftz and kind == "f16" else (lambda v: v)
        shifts = (0, 16) if t.endswith("x2") else (0,)
        pairs = []
        for shift in shifts:
            for name in "ab":
                e.line(
                    f"float {name}{shift} = emu::from_{kind}({flush(f'(u16)(h{name} >> {shift})')});"
                )
            pairs.append((f"a{shift}", f"b{shift}"))
    else:
        pairs = [(f"emu::ftz({a})", f"emu::ftz({b})") if ftz and t == "f32" else (a, b)]
    return [_comparison(how, x, y, is_float) for x, y in pairs], combine, predicate


def _combine(value: str, combine: str | None, predicate: str) -> str:
    if not combine:
        return value
    return f"(u8)({value} {({'and': '&', 'or': '|', 'xor': '^'})[combine]} (bool){predicate})"


@emits("setp")
def setp(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    values, combine, predicate = _compare(e, i, m, t)
    d = i.operands[0]
    if not isinstance(d, Pair):
        e.write(d, "pred", _combine(values[0], combine, predicate))
        return
    e.line(f"bool c0 = {values[0]}, c1 = {values[1] if len(values) == 2 else '!c0'};")
    if combine:
        e.line(f"bool q = {predicate};")
        predicate = "q"
    e.write(d.first, "pred", _combine("c0", combine, predicate))
    e.write(d.second, "pred", _combine("c1", combine, predicate))


@emits("set")
def set_(e: Emitter, i: Instruction, m: Modifiers) -> None:
    source = m.type()
    result = m.type()
    values, combine, predicate = _compare(e, i, m, source)
    values = [_combine(v, combine, predicate) for v in values]
    if result in ("f16x2", "bf16x2"):
        one = "0x3c00u" if result == "f16x2" else "0x3f80u"
        e.write(
            i.operands[0], "b32", f"({values[0]} ? {one} : 0u) | ({values[1]} ? {one} << 16 : 0u)"
        )
    elif len(values) == 2:
        e.write(
            i.operands[0], "b32", f"({values[0]} ? 0xffffu : 0u) | ({values[1]} ? 0xffff0000u : 0u)"
        )
    else:
        true = {"f32": "1.f", "f16": "0x3c00", "bf16": "0x3f80"}.get(
            result, f"({C_TYPES[result]})-1"
        )
        e.write(i.operands[0], result, f"{values[0]} ? {true} : ({C_TYPES[result]})0")


@emits("selp")
def selp(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    a, b, p = e.read(i.operands[1], t), e.read(i.operands[2], t), e.read(i.operands[3], "pred")
    e.write(i.operands[0], t, f"{p} ? {a} : {b}")


@emits("slct")
def slct(e: Emitter, i: Instruction, m: Modifiers) -> None:
    by = m.type()
    t = m.type()
    ftz = m.flag("ftz")
    a, b, c = e.read(i.operands[1], t), e.read(i.operands[2], t), e.read(i.operands[3], by)
    c = f"emu::ftz({c})" if ftz else c
    e.write(i.operands[0], t, f"{c} >= 0 ? {a} : {b}")


@emits("mov")
def mov(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    d, a = i.operands
    parts, sources = e.vector(d), e.vector(a)
    bits = {"pred": 1}.get(t) or int(t.lstrip("busf"))
    if len(parts) > 1:
        e.line(f"{C_TYPES[t]} x = {e.read(a, t)};")
        width = bits // len(parts)
        for k, part in enumerate(parts):
            e.write(part, f"b{width}", f"({C_TYPES[f'b{width}']})(x >> {k * width})")
    elif len(sources) > 1:
        width = bits // len(sources)
        c = C_TYPES[t]
        e.write(
            d,
            t,
            " | ".join(
                f"({c}){e.read(s, f'b{width}')} << {k * width}" for k, s in enumerate(sources)
            ),
        )
    elif isinstance(a, Not):
        raise e.fail("negated source")
    else:
        # keep the register's own type: no conversion when both sides are, say, float
        kind = e.register_type(d)
        same = {"float": "f32", "double": "f64"}.get(kind or "", t)
        e.write(
            d,
            same if same in ("f32", "f64") else t,
            e.read(a, same if same in ("f32", "f64") else t),
        )
