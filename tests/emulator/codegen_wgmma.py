"""Emitters of wgmma and of what goes with warpgroups: setmaxnreg, elect (runtime/wgmma.cpp)."""

from __future__ import annotations

import re

from .codegen import Emitter, Modifiers, emits
from .syntax import Instruction, Name, Number, Operand, Pair, Vector


def begin(e: Emitter) -> None:
    """Set the site, and let the kernel begin by creating the block's state: stores before its first
    use count, too."""
    begin = "  emu::hopper_begin(t);"
    if begin not in e.declarations:
        e.declarations.append(begin)
    e.site()


@emits("wgmma")
def wgmma(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """wgmma.{fence, commit_group, wait_group, mma_async}."""
    begin(e)
    what = m.one_of("fence", "commit_group", "wait_group", "mma_async")
    m.flag("sync", "aligned")
    if what == "fence":
        e.line("emu::wgmma_fence(t);")
    elif what == "commit_group":
        e.line("emu::wgmma_commit(t);")
    elif what == "wait_group":
        e.line(f"emu::wgmma_wait(t, {e.read(i.operands[0], 'u32')});")
    else:
        _mma_async(e, i, m)


WGMMA_TYPES = {
    ("f32", "f16", "f16"): "WG_F16",
    ("f16", "f16", "f16"): "WG_F16",
    ("f32", "bf16", "bf16"): "WG_BF16",
    ("f32", "tf32", "tf32"): "WG_TF32",
}


def _mma_async(e: Emitter, i: Instruction, m: Modifiers) -> None:
    shape = re.fullmatch(r"m64n(\d+)k(\d+)", m.match(r"m64n\d+k\d+"))
    assert shape is not None
    n = int(shape[1])
    types = tuple(m.left)
    if types not in WGMMA_TYPES:
        raise e.fail(f"types {'.'.join(types)} are not known")
    m.left.clear()
    half_d, tf32 = types[0] == "f16", types[1] == "tf32"
    if n % 8 or not 8 <= n <= 256 or int(shape[2]) != (8 if tf32 else 16):
        raise e.fail("no such shape")
    d, a, b, scale_d, *immediates = i.operands
    registers = e.vector(d)
    if len(registers) != (n // 4 if half_d else n // 2):
        raise e.fail(f"{len(registers)} accumulator registers for n = {n}")
    flags = [_immediate(e, x) for x in immediates]
    from_registers = isinstance(a, Vector)
    transposes = 0 if tf32 else (1 if from_registers else 2)
    if len(flags) != 2 + transposes:
        raise e.fail(f"{len(flags)} immediates after scale-d")
    trans_a = flags[2] if transposes == 2 else 0
    trans_b = flags[-1] if transposes else 0
    e.line("emu::Wgmma w;")
    for r, register in enumerate(registers):
        e.line(f"w.d[{r}] = &{_register(e, register)};")
    if from_registers:
        for r, register in enumerate(e.vector(a)):
            e.line(f"w.ar[{r}] = (u32*)&{_register(e, register)};")
    fields = {
        "n": f"{n}u",
        "type": f"emu::{WGMMA_TYPES[types]}",
        "half_d": str(half_d).lower(),
        "a_registers": str(from_registers).lower(),
        "accumulate": e.read(scale_d, "pred"),
        "negate_a": "true" if flags[0] == -1 else "false",
        "negate_b": "true" if flags[1] == -1 else "false",
        "transpose_a": "true" if trans_a else "false",
        "transpose_b": "true" if trans_b else "false",
        "a": "0" if from_registers else e.read(a, "b64"),
        "b": e.read(b, "b64"),
    }
    for name, value in fields.items():
        e.line(f"w.{name} = {value};")
    e.line("emu::wgmma_issue(t, w);")


def _register(e: Emitter, operand: Operand) -> str:
    """C variable of a register: wgmma keeps its address."""
    found = e._register(operand.text) if isinstance(operand, Name) else None
    if found is None:
        raise e.fail(f"{operand} must be a register")
    return found[0]


def _immediate(e: Emitter, operand: Operand) -> int:
    if not isinstance(operand, Number) or operand.value not in (-1, 0, 1):
        raise e.fail(f"{operand} must be an immediate -1, 0 or 1")
    return operand.value


@emits("setmaxnreg")
def setmaxnreg(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """setmaxnreg.{inc, dec}.sync.aligned.u32."""
    begin(e)
    m.flag("sync", "aligned", "u32")
    increase = "true" if m.one_of("inc", "dec") == "inc" else "false"
    e.line(f"emu::setmaxnreg(t, {e.read(i.operands[0], 'u32')}, {increase});")


@emits("elect")
def elect(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """elect.sync d|p, mask."""
    begin(e)
    m.flag("sync")
    pair = i.operands[0]
    if not isinstance(pair, Pair):
        raise e.fail("expected a register and a predicate")
    e.line(f"u32 leader = emu::elect(t, {e.read(i.operands[1], 'u32')});")
    e.write(pair.first, "u32", "leader")
    e.write(pair.second, "pred", "leader == t.lane")
