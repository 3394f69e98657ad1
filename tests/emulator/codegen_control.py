"""Emitters of control flow: branches, calls, returns, traps, and no-ops that only matter to hardware."""

from __future__ import annotations

from .codegen import Emitter, Modifiers, emits
from .syntax import Group, Instruction, Name


@emits("bra")
def bra(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("uni")
    e.jump(e.label(i.operands[0]))


@emits("brx")
def brx(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("idx", "uni")
    labels = e.branch_targets(i.operands[1])
    e.site()
    cases = " ".join(f"case {k}: goto {label};" for k, label in enumerate(labels))
    outside = 'default: emu::fail(emu::TRAP, "brx.idx: index outside its table");'
    e.line(f"switch ({e.read(i.operands[0], 'u32')}) {{ {cases} {outside} }}")


@emits("ret")
def ret(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("uni")
    e.line("return;")


@emits("exit")
def exit_(e: Emitter, i: Instruction, m: Modifiers) -> None:
    e.line("return;" if e.function.is_entry else "emu::exit_thread(t);")


@emits("trap", "brkpt")
def trap(e: Emitter, i: Instruction, m: Modifiers) -> None:
    e.site()
    e.line('emu::fail(emu::TRAP, "the kernel executed trap");')


@emits("nanosleep")
def nanosleep(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.type()
    e.site()
    e.line("emu::yield(t);")


@emits("pmevent")
def pmevent(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("mask")


@emits("prefetch", "prefetchu", "applypriority", "discard")
def hint(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """Cache hints have no effect on values."""
    m.left.clear()


@emits("createpolicy")
def createpolicy(e: Emitter, i: Instruction, m: Modifiers) -> None:
    """An opaque cache policy: only ever passed on to instructions that ignore it."""
    m.left.clear()
    e.write(i.operands[0], "b64", "0ull")


@emits("call")
def call(e: Emitter, i: Instruction, m: Modifiers) -> None:
    m.flag("uni")
    groups = [x for x in i.operands if isinstance(x, Group)]
    names = [x for x in i.operands if isinstance(x, Name)]
    if len(names) != 1:
        raise e.fail("indirect call")
    name = names[0].text
    returns = groups[0].elements if isinstance(i.operands[0], Group) else ()
    arguments = groups[-1].elements if isinstance(i.operands[-1], Group) else ()
    e.site()
    pointers = [e.parameter(x) for x in (*returns, *arguments)]
    if name == "__assertfail":
        e.line(f"emu::assert_failed({', '.join(pointers[:3])});")
    elif name == "vprintf":
        e.line(f"emu::device_printf({', '.join(pointers)});")
    elif name in e.functions and not e.functions[name].is_declaration:
        e.line(f"f_{name}({', '.join(['t', *pointers])});")
    else:
        raise e.fail(f"call of the external function {name}")
