"""Emitters of ldmatrix and mma, which are collected into batches.

A warp's lanes are separate fibers, so meeting for every mma would cost 32 switches each. Matrix
instructions only touch registers (and ldmatrix reads shared memory), so they can wait until something
needs their results or could change their operands; the whole batch then costs one meeting.
`MatrixBatch` keeps the bookkeeping, `Emitter` asks it before every other instruction.
"""

from __future__ import annotations

import re

from .codegen import C_TYPES, Emitter, Modifiers, emits
from .syntax import Address, Instruction

# shape and operand type -> registers of A, B and C/D
_SHAPES = {
    ("m16n8k8", "f16"): (2, 1, 4),
    ("m16n8k16", "f16"): (4, 2, 4),
    ("m16n8k8", "bf16"): (2, 1, 4),
    ("m16n8k16", "bf16"): (4, 2, 4),
    ("m16n8k4", "tf32"): (2, 1, 4),
    ("m16n8k8", "tf32"): (4, 2, 4),
    ("m8n8k4", "f64"): (1, 1, 2),
    ("m16n8k4", "f64"): (2, 1, 4),
    ("m16n8k8", "f64"): (4, 2, 4),
    ("m16n8k16", "f64"): (8, 4, 4),
}


@emits("ldmatrix")
def ldmatrix(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "m8n8", "shared", "shared::cta", "b16")
    count = int(m.one_of("x1", "x2", "x4")[1])
    trans = m.flag("trans")
    d, address = e.vector(i.operands[0]), i.operands[1]
    if len(d) != count or not isinstance(address, Address):
        raise e.fail("number of registers")
    batch = e.batch
    row = {"d": [batch.output(e, x) for x in d], "offset": address.offset}
    # the base alone is a register; a variable's address is a value
    row["a"] = [batch.input(e, address.base, "b32")]
    batch.add(e, "LDMATRIX", row, count=count, trans=int(trans))


@emits("mma")
def mma(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("sync", "aligned", "row", "col", "rn")
    shape = m.match(r"m\d+n\d+k\d+")
    if len(m.left) != 4:
        raise e.fail("expected four types")
    td, ta, tb, tc = m.left
    m.left.clear()
    counts = _SHAPES.get((shape, ta))
    sums = {"f64": ("f64",), "f16": ("f32", "f16")}.get(ta, ("f32",))
    if counts is None or ta != tb or td != tc or td not in sums:
        raise e.fail("shape and types")
    d, a, b, c = (e.vector(x) for x in i.operands)
    expected = (*counts[:2], 2 if td == "f16" else counts[2])
    if (len(a), len(b), len(c)) != expected or len(d) != len(c):
        raise e.fail("number of registers")
    k = int(re.sub(r".*k", "", shape))
    if ta == "f64":
        _mma_f64(e, (d, a, b, c), 8 if shape.startswith("m8") else 16, k)
        return
    batch = e.batch
    row = {
        "a": [batch.input(e, x, "b32") for x in a],
        "b": [batch.input(e, x, "b32") for x in b],
        "c": [batch.input(e, x, "b32") for x in c],
        "d": [batch.output(e, x) for x in d],
    }
    batch.add(e, f"MMA_{ta.upper()}{'_F16' if td == 'f16' else ''}", row, k=k)


def _mma_f64(e: Emitter, operands: tuple, rows: int, k: int) -> None:
    d, a, b, c = operands
    e.site()
    for name, values in (("a", a), ("b", b), ("d", c)):
        e.line(f"{C_TYPES['f64']} {name}[] = {{{', '.join(e.read(x, 'f64') for x in values)}}};")
    e.line(f"emu::mma_f64(t, {rows}, {k}, a, b, d);")
    for n, x in enumerate(d):
        e.write(x, "f64", f"d[{n}]")
