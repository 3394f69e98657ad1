"""Emitters of arithmetic on integers, floats and halves.

The value rules that C does not have (NaN rules of min and max, clamped shifts, half precision, flush to
zero) are inline functions of runtime/scalar.h; what C has is emitted as C.
"""

from __future__ import annotations

from collections.abc import Callable

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .syntax import Instruction

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
    if m.flag("cc"):
        _mad_carry(e, i, m, t, use=False, keep=True)
        return
    sat = m.flag("sat")
    value, result = _integer_product(e, i, m, t)
    c = e.read(i.operands[3], result)
    if sat:
        e.write(i.operands[0], "s32", f"emu::clamp_s32((s64)({value}) + (s64){c})")
    else:
        e.write(i.operands[0], result, f"({C_TYPES[result]})({value} + {c})")


@emits("madc")
def madc(e: Emitter, i: Instruction, m: Modifiers) -> None:
    _mad_carry(e, i, m, m.type(), use=True, keep=m.flag("cc"))


def _mad_carry(e: Emitter, i: Instruction, m: Modifiers, t: str, use: bool, keep: bool) -> None:
    """The lower or upper half of a product, plus c, plus a carry, which goes on."""
    value, result = _integer_product(e, i, m, t)
    c, wide = C_TYPES[result.replace("s", "u")], "u128" if result.endswith("64") else "u64"
    addend = e.read(i.operands[3], result)
    e.line(f"{wide} sum = ({wide})({c})({value}) + ({wide})({c}){addend}{' + cc' if use else ''};")
    if keep:
        e.line(f"cc = (u8)(sum >> {result[1:]}) & 1;")
    e.write(i.operands[0], result, f"({C_TYPES[result]})sum")


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


# Functions of one float. `.approx` is the C library's, at least as accurate as the hardware's units.
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
