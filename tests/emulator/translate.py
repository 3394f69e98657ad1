"""Assembles the C++ of a whole PTX module: kernels, device functions, variables, and the tables the launcher reads."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from .codegen import Emitter, Scope, Site, find_emitter, load_emitters
from .errors import Unsupported
from .ptx import parse
from .syntax import Function, Instruction, Location, PtxModule, Variable

PRELUDE = '#include "emu.h"\n#include "scalar.h"\n#include "ops.h"\n#include "hopper.h"\n'


@dataclass(frozen=True)
class Kernel:
    """What a launch must know about a kernel.

    Attributes
    ----------
    parameters : tuple of (offset, size)
        Position of each parameter in the parameter block.
    static_shared : int
        Offset of dynamic shared memory: bytes of static shared memory, rounded up to the alignment
        of the dynamic part.
    max_threads : int
        Largest block (.maxntid, else 1024).
    required_block, required_cluster : tuple of int
        .reqntid and .reqnctapercluster; empty when not given.
    """

    name: str
    parameters: tuple[tuple[int, int], ...]
    parameter_bytes: int
    static_shared: int
    max_threads: int
    required_block: tuple[int, ...]
    required_cluster: tuple[int, ...]
    instructions: int


@dataclass(frozen=True)
class Translation:
    """C++ source with what Python must remember about it."""

    source: str
    kernels: dict[str, Kernel]
    sites: list[Site]
    variables: dict[str, int]  # module variables in global and const space and their sizes


def unknown_opcodes(module: PtxModule) -> Counter[str]:
    """Opcodes of `module` that have no emitter, with their number of uses."""
    load_emitters()
    unknown: Counter[str] = Counter()
    for instruction in module.instructions():
        try:
            find_emitter(instruction)
        except Unsupported:
            unknown[instruction.full_opcode] += 1
    return unknown


def translate(text: str) -> Translation:
    """Translate PTX text to C++.

    Raises
    ------
    Unsupported
        Naming the instructions that have no emitter, or the first one with an unknown modifier or operand.
    """
    module = parse(text)
    unknown = unknown_opcodes(module)
    if unknown:
        raise Unsupported("PTX instructions without an emitter: " + ", ".join(sorted(unknown)))
    functions = {f.name: f for f in module.functions}
    globals_ = [v for v in module.variables if v.space in ("global", "const") and not v.extern]
    sites = [Site("?", Location("?", 0, 0))]
    kernels, bodies, prototypes = {}, [], []
    shared_users = _shared_of_functions(module)
    for function in module.functions:
        if function.is_declaration:
            continue
        shared, static = _place_shared(function, module, shared_users)
        scope = Scope(variables={v.name: f"g_{_c_name(v.name)}" for v in globals_} | shared)
        bodies.append(_function(function, scope, sites, functions))
        if function.is_entry:
            kernels[function.name] = _kernel(function, static)
        else:
            prototypes.append(_signature(function) + ";")
    parts = [
        PRELUDE,
        *(_global_variable(v) for v in globals_),
        *prototypes,
        *bodies,
        _site_table(sites),
    ]
    return Translation("\n".join(parts), kernels, sites, {v.name: v.size for v in globals_})


def _c_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def _shared_of_functions(module: PtxModule) -> set[str]:
    """Module-level shared variables that device functions name: every kernel must hold them."""
    names = {v.name for v in module.variables if v.space == "shared"}
    used: set[str] = set()
    for f in module.functions:
        if not f.is_entry:
            used |= names & _words(f)
    return used


def _words(function: Function) -> set[str]:
    return {
        w
        for s in function.body
        if isinstance(s, Instruction)
        for w in re.findall(r"[\w$]+", s.text)
    }


def _place_shared(
    function: Function, module: PtxModule, always: set[str]
) -> tuple[dict[str, str], int]:
    words = _words(function)
    own = [s for s in function.body if isinstance(s, Variable) and s.space == "shared"]
    outer = [
        v for v in module.variables if v.space == "shared" and (v.name in words or v.name in always)
    ]
    offset, places, dynamic_align = 0, {}, 16
    static = [v for v in (*outer, *own) if not (v.extern or v.size == 0)]
    for v in static:
        offset = -(-offset // v.align) * v.align
        places[v.name] = f"(emu::SHARED_BASE + {offset}u)"
        offset += v.size
    dynamic = [v for v in (*outer, *own) if v.extern or v.size == 0]
    dynamic_align = max([16, *(v.align for v in dynamic)])
    if static:
        offset = -(-offset // dynamic_align) * dynamic_align
    places |= {v.name: f"(emu::SHARED_BASE + {offset}u)" for v in dynamic}
    return places, offset


def _kernel(function: Function, static: int) -> Kernel:
    offset, parameters = 0, []
    for p in function.params:
        offset = -(-offset // p.align) * p.align
        parameters.append((offset, p.size))
        offset += p.size
    d = function.directives
    threads = 1
    for n in d.get("reqntid", d.get("maxntid", (1024,))):
        threads *= n
    return Kernel(
        function.name,
        tuple(parameters),
        offset,
        static,
        threads,
        d.get("reqntid", ()),
        d.get("reqnctapercluster", ()),
        sum(isinstance(s, Instruction) for s in function.body),
    )


def _signature(function: Function) -> str:
    if function.is_entry:
        return f'extern "C" void kernel_{function.name}(emu::Thread& t, u8* params)'
    names = [f", u8* q_{_c_name(v.name)}" for v in (*function.returns, *function.params)]
    return f"static void f_{function.name}(emu::Thread& t{''.join(names)})"


def _function(
    function: Function, scope: Scope, sites: list[Site], functions: dict[str, Function]
) -> str:
    emitter = Emitter(function, scope, sites, functions)
    offset = 0
    for p in (*function.returns, *function.params):
        if function.is_entry:
            offset = -(-offset // p.align) * p.align
            scope.variables[p.name] = f"(params + {offset})"
            offset += p.size
        else:
            scope.variables[p.name] = f"q_{_c_name(p.name)}"
    emitter.body()
    lines = [
        _signature(function) + " {",
        "  u8 cc = 0; (void)cc;",
        *emitter.batch.declaration(),
        *emitter.declarations,
        *emitter.lines,
        "}",
    ]
    return "\n".join(lines)


def _global_variable(v: Variable) -> str:
    size = max(v.size, 1)
    values = f" = {{{', '.join(str(b) for b in v.initial)}}}" if v.initial else ""
    return f'extern "C" {{ alignas({max(v.align, 16)}) u8 g_{_c_name(v.name)}[{size}]{values}; }}'


def _site_table(sites: list[Site]) -> str:
    rows = []
    for s in sites:
        file = s.location.file.replace("\\", "/").replace('"', "")
        rows.append(f'{{"{s.opcode}", "{file}", {s.location.line}, {s.location.outer_line}}}')
    return 'extern "C" { extern const emu::Site emu_sites[] = {\n' + ",\n".join(rows) + "}; }"
