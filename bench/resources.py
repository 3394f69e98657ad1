"""What a kernel takes of a multiprocessor: registers, spills, shared memory, and how many blocks fit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cuflash import _compile, _nvrtc
from cuflash._compile import Specialization

REGISTERS = 65536  # of a multiprocessor, and handed out to a warp in units of 256
UNIT = 256
# CUDA programming guide, "Technical Specifications per Compute Capability": bytes of shared memory, warps and
# blocks of a multiprocessor.
LIMITS = {
    75: (64 << 10, 32, 16),
    80: (164 << 10, 64, 32),
    86: (100 << 10, 48, 16),
    89: (100 << 10, 48, 24),
    90: (228 << 10, 64, 32),
    120: (100 << 10, 48, 24),
}
RESERVED = 1024  # bytes of shared memory that the system keeps for every block, from 8.0 on


@dataclass(frozen=True, slots=True)
class Usage:
    """What one kernel takes.

    Parameters
    ----------
    registers : int
        Per thread.
    spilled : int
        Bytes stored to and loaded from local memory in the code.
    shared : int
        Dynamic shared memory of a block, in bytes.
    warps : int
        Of a block.
    blocks : int
        That fit on one multiprocessor at a time.
    """

    registers: int
    spilled: int
    shared: int
    warps: int
    blocks: int


def usage(spec: Specialization) -> Usage:
    """Compile a kernel and read what ptxas says of it.

    Raises
    ------
    RuntimeError
        It does not compile; the first error of the log.
    """
    nvrtc = _nvrtc.binding()
    program = nvrtc.createProgram(_compile.source(spec), f"{spec.name}.cu", (), ())
    options = (*_compile.OPTIONS, f"-I{_compile.ROOT}", f"-arch={spec.arch}", "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
        log = nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        lines = [line for line in log.splitlines() if "error" in line]
        raise RuntimeError((lines or [str(error)])[0].split("error: ")[-1]) from None
    finally:
        nvrtc.destroyProgram(program)
    return read(log, spec)


def read(log: str, spec: Specialization) -> Usage:
    """The figures in a log of `ptxas -v`."""
    text = log.split(f"Compiling entry function '{spec.name}'", 1)[-1]
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    used = re.search(r"Used (\d+) registers", text)
    if spills is None or used is None:
        raise RuntimeError(f"no figures of {spec.name} in the log of ptxas:\n{log}")
    registers, spilled = int(used[1]), int(spills[1]) + int(spills[2])
    shared, warps = spec.constant("SHARED_BYTES"), spec.constant("WARPS")
    blocks = blocks_per_multiprocessor(spec.arch, registers, shared, warps)
    return Usage(registers, spilled, shared, warps, blocks)


def blocks_per_multiprocessor(arch: str, registers: int, shared: int, warps: int) -> int:
    """How many blocks run on one multiprocessor at a time.

    Examples
    --------
    >>> blocks_per_multiprocessor("sm_80", 128, 64 << 10, 4)
    2
    """
    memory, most_warps, most_blocks = limits(arch)
    reserved = 0 if arch == "sm_75" else RESERVED
    per_warp = -(-registers * 32 // UNIT) * UNIT
    by_registers = REGISTERS // per_warp // warps
    return min(memory // (shared + reserved), most_warps // warps, most_blocks, by_registers)


def limits(arch: str) -> tuple[int, int, int]:
    """Of an architecture, or of the nearest older one that is known."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    return LIMITS[max(known for known in LIMITS if known <= number)]
