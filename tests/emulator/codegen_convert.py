"""Emitters of `cvt`: every conversion is "read the source exactly, round once, saturate"."""

from __future__ import annotations

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .syntax import SIZES, Instruction

_FLOATS = ("f16", "bf16", "f32", "f64")
_TO_INTEGRAL = ("rni", "rzi", "rmi", "rpi")


@emits("cvt")
def cvt(e: Emitter, i: Instruction, m: Modifiers) -> None:
    if "pack" in m.left:
        raise e.fail("cvt.pack")
    source = m.type()
    result = m.type()
    rounding = m.one_of(*_TO_INTEGRAL, "rn", "rna", "rz", "rm", "rp", default="")
    ftz, sat, relu, finite = m.flag("ftz"), m.flag("sat"), m.flag("relu"), m.flag("satfinite")
    if finite and result not in ("tf32",):
        raise e.fail("satfinite")
    d = i.operands[0]
    if result in ("f16x2", "bf16x2"):
        if source != "f32" or rounding not in ("rn", "rz"):
            raise e.fail(f"conversion to {result}")
        kind = result.removesuffix("x2")
        high, low = (_round_half(kind, rounding, e.read(x, "f32"), relu) for x in i.operands[1:3])
        e.write(d, result, f"(u32){low} | (u32){high} << 16")
        return
    if result == "tf32":
        if source != "f32" or rounding not in ("rna", "rn", "rz"):
            raise e.fail("conversion to tf32")
        value = f"emu::to_tf32_{rounding}({e.read(i.operands[1], 'f32')})"
        e.write(d, "b32", f"emu::relu_f32_bits({value})" if relu else value)
        return
    e.write(d, result, _scalar(e, i, source, result, rounding, ftz, sat, relu))


def _round_half(kind: str, rounding: str, value: str, relu: bool) -> str:
    text = f"emu::to_{kind}{'_rz' if rounding == 'rz' else ''}({value})"
    return f"emu::relu_{kind}({text})" if relu else text


def _scalar(
    e: Emitter,
    i: Instruction,
    source: str,
    result: str,
    rounding: str,
    ftz: bool,
    sat: bool,
    relu: bool,
) -> str:
    if source not in SIZES or result not in SIZES:
        raise e.fail("types")
    value = e.read(i.operands[1], source)
    if source in _FLOATS:
        if source in ("f16", "bf16"):
            value = f"emu::from_{source}({value})"
        elif ftz and source == "f32":
            value = f"emu::ftz({value})"
        if result in _FLOATS:
            return _float_to_float(value, source, result, rounding, ftz, sat, relu)
        c = C_TYPES[result]
        mode = (rounding or "rzi").upper()
        return f"emu::to_integer<{c}>({value}, emu::{mode})"
    if result in _FLOATS:
        return _integer_to_float(e, value, source, result, rounding, sat)
    return (
        f"emu::clamp_integer<{C_TYPES[result]}>({value})" if sat else f"({C_TYPES[result]}){value}"
    )


def _float_to_float(
    value: str, source: str, result: str, rounding: str, ftz: bool, sat: bool, relu: bool
) -> str:
    if rounding in _TO_INTEGRAL:
        value = f"emu::integral({value}, emu::{rounding.upper()})"
    narrowing = SIZES[result] < SIZES[source] or (source, result) in (
        ("f16", "bf16"),
        ("bf16", "f16"),
    )
    if result in ("f16", "bf16"):
        text = f"emu::to_{result}{'_rz' if rounding == 'rz' else ''}({value})"
        text = f"emu::saturate_{result}({text})" if sat else text
        return f"emu::relu_{result}({text})" if relu else text
    if result == "f32" and source == "f64" and narrowing and rounding in ("rz", "rm", "rp"):
        text = f"emu::narrow({value}, emu::{rounding.upper()})"
    else:
        text = f"({C_TYPES[result]})({value})"
    if ftz and result == "f32":
        text = f"emu::ftz({text})"
    return f"emu::saturate({text})" if sat else text


def _integer_to_float(
    e: Emitter, value: str, source: str, result: str, rounding: str, sat: bool
) -> str:
    if result in ("f16", "bf16"):
        if rounding not in ("rn", ""):
            raise e.fail(f"rounding .{rounding} from integers to {result}")
        return f"emu::to_{result}((double){value})"
    if rounding in ("rz", "rm", "rp"):
        return f"emu::integer_to_{result}({value}, emu::{rounding.upper()})"
    text = f"({C_TYPES[result]}){value}"
    return f"emu::saturate({text})" if sat else text
