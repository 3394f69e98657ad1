"""Emitters of arithmetic, logic, comparison and bit instructions: everything inside one thread without memory.

The value rules that C does not have (NaN rules of min and max, clamped shifts, half precision, flush to zero) are inline
functions of runtime/scalar.h; what C has is emitted as C.
"""

from __future__ import annotations

from collections.abc import Callable

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .ptx import Instruction, Not, Pair

_HALF = ("f16", "bf16", "f16x2", "bf16x2")
_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64", "u64": "u128", "s64": "s128"}
_WIDE_C = {
    "u32": "u32",
    "s32": "s32",
    "u64": "u64",
    "s64": "s64",
    "u128": "u128",
    "s128": "__int128",
}


def _float_result(expression: str, t: str, ftz: bool, sat: bool) -> str:
    if ftz and t == "f32":
        expression = f"emu::ftz({expression})"
    return f"emu::saturate({expression})" if sat else expression


def _sources(e: Emitter, i: Instruction, t: str, ftz: bool, first: int = 1) -> list[str]:
    values = [e.read(x, t) for x in i.operands[first:]]
    return [f"emu::ftz({x})" for x in values] if ftz and t == "f32" else values


def _by_halves(e: Emitter, i: Instruction, t: str, one: Callable[..., str]) -> None:
    """Write the result of `one(scalar operands)`; for a pair type do it for the low and the high half."""
    if not t.endswith("x2"):
        e.write(i.operands[0], t, one(*(e.read(x, t) for x in i.operands[1:])))
        return
    names = []
    for k, x in enumerate(i.operands[1:]):
        e.line(f"u32 h{k} = {e.read(x, t)};")
        names.append(f"h{k}")
    low, high = one(*(f"(u16){n}" for n in names)), one(*(f"(u16)({n} >> 16)" for n in names))
    e.write(i.operands[0], t, f"(u32)(u16)({low}) | (u32)(u16)({high}) << 16")


def _half_arithmetic(e: Emitter, i: Instruction, m: Modifiers, t: str) -> None:
    """add, sub, mul, fma of f16 and bf16: rounded once to nearest even."""
    m.flag("rn")
    ftz, sat, relu = m.flag("ftz"), m.flag("sat"), m.flag("relu")
    kind = t.removesuffix("x2")

    def one(*values: str) -> str:
        text = f"emu::{i.opcode}_{kind}({', '.join(f'emu::ftz_f16({v})' if ftz else v for v in values)})"
        text = f"emu::ftz_f16({text})" if ftz else text
        text = f"emu::saturate_{kind}({text})" if sat else text
        return f"emu::relu_{kind}({text})" if relu else text

    _by_halves(e, i, t, one)


@emits("add", "sub")
def add_sub(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    sign = "+" if i.opcode == "add" else "-"
    if t in _HALF:
        _half_arithmetic(e, i, m, t)
    elif t in ("f32", "f64", "f32x2"):
        _float_binary(e, i, m, t, sign)
    elif m.flag("cc"):
        _carry(e, i, t, sign, use=False, keep=True)
    else:
        a, b = (e.read(x, t) for x in i.operands[1:])
        if m.flag("sat"):
            e.write(i.operands[0], t, f"emu::clamp_s32((s64){a} {sign} (s64){b})")
        else:
            e.write(i.operands[0], t, f"({C_TYPES[t]})({a} {sign} {b})")


@emits("addc", "subc")
def addc_subc(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    _carry(e, i, t, "+" if i.opcode == "addc" else "-", use=True, keep=m.flag("cc"))


def _carry(e: Emitter, i: Instruction, t: str, sign: str, use: bool, keep: bool) -> None:
    c, wide = C_TYPES[t.replace("s", "u")], "u128" if t.endswith("64") else "u64"
    a, b = (f"({wide})({c}){e.read(x, t)}" for x in i.operands[1:])
    e.line(f"{wide} sum = {a} {sign} {b}" + (f" {sign} cc;" if use else ";"))
    if keep:
        e.line(f"cc = (u8)(sum >> {t[1:]}) & 1;")
    e.write(i.operands[0], t, f"({C_TYPES[t]})sum")


def _rounding(m: Modifiers) -> str:
    return m.one_of("rn", "rz", "rm", "rp", default="rn")


def _float_binary(e: Emitter, i: Instruction, m: Modifiers, t: str, sign: str) -> None:
    rounding, ftz, sat = _rounding(m), m.flag("ftz"), m.flag("sat")
    if t == "f32x2":
        _f32x2(e, i, lambda a, b: f"{a} {sign} {b}", rounding, ftz)
        return
    a, b = _sources(e, i, t, ftz)
    value = (
        f"{a} {sign} {b}"
        if rounding == "rn"
        else f"emu::rounded('{sign}', {a}, {b}, emu::{rounding.upper()})"
    )
    e.write(i.operands[0], t, _float_result(value, t, ftz, sat))


def _f32x2(e: Emitter, i: Instruction, one: Callable[..., str], rounding: str, ftz: bool) -> None:
    if rounding != "rn":
        raise e.fail(f"rounding .{rounding} of f32x2")
    for k, x in enumerate(i.operands[1:]):
        e.line(f"u64 p{k} = {e.read(x, 'b64')};")
    halves = []
    for shift in (0, 32):
        values = [
            f"__builtin_bit_cast(float, (u32)(p{k} >> {shift}))" for k in range(len(i.operands) - 1)
        ]
        value = one(*(f"emu::ftz({v})" if ftz else v for v in values))
        halves.append(
            f"(u64)__builtin_bit_cast(u32, (float)({_float_result(value, 'f32', ftz, False)}))"
        )
    e.write(i.operands[0], "b64", f"{halves[0]} | {halves[1]} << 32")


@emits("mul", "mul24")
def mul(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    if t in _HALF:
        _half_arithmetic(e, i, m, t)
    elif t in ("f32", "f64", "f32x2"):
        _float_binary(e, i, m, t, "*")
    else:
        value, wide_type = _integer_product(e, i, m, t)
        e.write(i.operands[0], wide_type, value)


def _integer_product(e: Emitter, i: Instruction, m: Modifiers, t: str) -> tuple[str, str]:
    part = m.one_of("lo", "hi", "wide")
    c, wide = C_TYPES[t], _WIDE_C[_WIDE[t]]
    a, b = (e.read(x, t) for x in i.operands[1:3])
    if i.opcode.endswith("24"):
        a, b = (f"emu::low24({x})" for x in (a, b))
        shift = 16
    else:
        shift = int(t[1:])
    if part == "wide":
        return f"({wide})({wide}){a} * ({wide}){b}", _WIDE[t]
    if part == "hi":
        return f"({c})((({wide}){a} * ({wide}){b}) >> {shift})", t
    unsigned = c.replace("s", "u") if t[1:] != "16" else "u32"
    return f"({c})(({unsigned}){a} * ({unsigned}){b})", t


@emits("mad", "mad24")
def mad(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    if t in ("f32", "f64"):
        fma_float(e, i, m, t)
        return
    keep_carry = m.flag("cc")
    if keep_carry:
        raise e.fail("carry out of mad")
    sat = m.flag("sat")
    value, result = _integer_product(e, i, m, t)
    c = e.read(i.operands[3], result)
    if sat:
        e.write(i.operands[0], "s32", f"emu::clamp_s32((s64)({value}) + (s64){c})")
    else:
        e.write(i.operands[0], result, f"({C_TYPES[result]})({value} + {c})")


@emits("fma")
def fma(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    if t in _HALF:
        _half_arithmetic(e, i, m, t)
    else:
        fma_float(e, i, m, t)


def fma_float(e: Emitter, i: Instruction, m: Modifiers, t: str) -> None:
    """fma and mad of f32, f64, f32x2."""
    rounding, ftz, sat = _rounding(m), m.flag("ftz"), m.flag("sat")
    if t == "f32x2":
        _f32x2(e, i, lambda a, b, c: f"__builtin_fmaf({a}, {b}, {c})", rounding, ftz)
        return
    a, b, c = _sources(e, i, t, ftz)
    if rounding == "rn":
        value = f"__builtin_fma{'f' if t == 'f32' else ''}({a}, {b}, {c})"
    else:
        value = f"emu::rounded_fma({a}, {b}, {c}, emu::{rounding.upper()})"
    e.write(i.operands[0], t, _float_result(value, t, ftz, sat))


@emits("div", "rem")
def div_rem(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    if t not in ("f32", "f64"):
        name = "divide" if i.opcode == "div" else "remainder"
        a, b = (e.read(x, t) for x in i.operands[1:])
        e.write(i.operands[0], t, f"emu::{name}<{C_TYPES[t]}>({a}, {b})")
        return
    how, ftz = m.one_of("approx", "full", "rn", "rz", "rm", "rp"), m.flag("ftz")
    a, b = _sources(e, i, t, ftz)
    exact = how in ("approx", "full", "rn")
    value = f"{a} / {b}" if exact else f"emu::rounded('/', {a}, {b}, emu::{how.upper()})"
    e.write(i.operands[0], t, _float_result(value, t, ftz, False))


@emits("min", "max")
def min_max(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    ftz, nan, xorsign = m.flag("ftz"), m.flag("NaN"), m.flag("xorsign")
    if xorsign and not m.flag("abs"):
        raise e.fail("xorsign without abs")
    if t in _HALF:
        kind = t.removesuffix("x2")
        name = f"emu::{i.opcode}_half<emu::{kind.upper()}, {int(nan)}, {int(xorsign)}>"
        flush = (lambda v: f"emu::ftz_f16({v})") if ftz else (lambda v: v)
        _by_halves(e, i, t, lambda *v: f"{name}({', '.join(flush(x) for x in v)})")
    elif t in ("f32", "f64"):
        values = _sources(e, i, t, ftz)
        value = values[0]
        for other in values[1:]:
            value = (
                f"emu::{i.opcode}_float<{C_TYPES[t]}, {int(nan)}, {int(xorsign)}>({value}, {other})"
            )
        e.write(i.operands[0], t, value)
    else:
        relu = m.flag("relu")
        c = C_TYPES[t]
        e.line(f"{c} x = {e.read(i.operands[1], t)}, y = {e.read(i.operands[2], t)};")
        value = f"(x {'<' if i.opcode == 'min' else '>'} y ? x : y)"
        e.write(i.operands[0], t, f"emu::positive({value})" if relu else value)


@emits("neg", "abs")
def neg_abs(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    ftz = m.flag("ftz")
    if t in _HALF:
        text = "({0} ^ 0x8000u)" if i.opcode == "neg" else "({0} & 0x7fffu)"
        _by_halves(e, i, t, lambda v: text.format(f"emu::ftz_f16({v})" if ftz else v))
        return
    (a,) = _sources(e, i, t, ftz)
    if t in ("f32", "f64"):
        suffix = "f" if t == "f32" else ""
        e.write(i.operands[0], t, f"-{a}" if i.opcode == "neg" else f"__builtin_fabs{suffix}({a})")
    else:
        c = C_TYPES[t]
        e.write(
            i.operands[0], t, f"({c})-{a}" if i.opcode == "neg" else f"({c})({a} < 0 ? -{a} : {a})"
        )


@emits("copysign")
def copysign(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    a, b = (e.read(x, t) for x in i.operands[1:])
    e.write(i.operands[0], t, f"__builtin_copysign{'f' if t == 'f32' else ''}({b}, {a})")


@emits("testp")
def testp(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    what = m.one_of("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    e.write(i.operands[0], "pred", f"emu::testp_{what}({e.read(i.operands[1], t)})")


# Functions of one float. `.approx` is computed with the C library, which is at least as accurate as the hardware's units.
_UNARY = {
    "rcp": "{one} / {a}", "sqrt": "emu::math_sqrt({a})", "rsqrt": "{one} / emu::math_sqrt({a})",
    "sin": "__builtin_sinf({a})", "cos": "__builtin_cosf({a})", "lg2": "__builtin_log2f({a})",
    "ex2": "__builtin_exp2f({a})", "tanh": "__builtin_tanhf({a})",
}  # fmt: skip


@emits("rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "ex2", "tanh")
def unary_float(e: Emitter, i: Instruction, m: Modifiers) -> None:
    t = m.type()
    how, ftz = m.one_of("approx", "rn", "rz", "rm", "rp"), m.flag("ftz")
    if i.opcode in ("ex2", "tanh"):
        e.count()
    template = _UNARY[i.opcode]
    if t in _HALF:
        kind = t.removesuffix("x2")
        flush = (lambda v: f"emu::ftz_f16({v})") if ftz and kind == "f16" else (lambda v: v)

        def one(v: str) -> str:
            value = template.format(a=f"emu::from_{kind}({flush(v)})", one="1.f")
            return flush(f"emu::to_{kind}({value})")

        _by_halves(e, i, t, one)
        return
    (a,) = _sources(e, i, t, ftz)
    if how in ("rz", "rm", "rp"):
        value = f"emu::rounded_{i.opcode}({a}, emu::{how.upper()})"
    else:
        value = template.format(a=a, one="1.f" if t == "f32" else "1.")
    e.write(i.operands[0], t, _float_result(value, t, ftz, False))


# ------------------------------------------------------------------------------------------------------- logic and bits
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


# ----------------------------------------------------------------------------------------------- compare, select and move
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
