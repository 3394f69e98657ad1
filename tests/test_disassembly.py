"""Are the machine instructions the ones that were meant?

ptxas is free to turn any PTX into slow code that is still right. Tensor-core products must be fed
by ldmatrix, tiles must arrive by asynchronous copies of 16 bytes, results must leave by 16-byte
stores, and nothing may live in local memory.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cuflash._compile import Specialization
from tests import compile_matrix as matrix

CASES = [
    pytest.param(arch, kernel, element, dim, id=f"{arch}-{kernel}-{element}-d{dim}")
    for arch in ("sm_80", "sm_86", "sm_90a")
    for kernel in ("forward", "backward_dkdv", "backward_dq")
    for element, dim in (("f16", 128), ("bf16", 64))
]


def nvdisasm() -> Path:
    """The disassembler of the wheel nvidia-cuda-nvdisasm."""
    for folder in map(Path, sys.path):
        for path in folder.glob("nvidia/*/bin/nvdisasm"):
            return path
    raise FileNotFoundError("nvdisasm is not installed (pip install nvidia-cuda-nvdisasm)")


def specialization(
    arch: str, kernel: str, element: str, dim: int, variant: str = "linear"
) -> Specialization:
    """The fast variant: plain scores, rows on 16-byte boundaries."""
    return next(
        spec
        for spec in matrix.kernels(arch)
        if (spec.kernel, spec.element, spec.head_dim, spec.head_dim_v)
        == (kernel, element, dim, dim)
        and spec.variant == variant
    )


@functools.cache
def listing(arch: str, kernel: str, element: str, dim: int, variant: str = "linear") -> str:
    """The machine code of a kernel as text."""
    _, _, cubin = matrix.compile_one(specialization(arch, kernel, element, dim, variant), 12)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run(
            [nvdisasm(), "-c", path], check=True, capture_output=True, text=True
        ).stdout


@functools.cache
def opcodes(
    arch: str, kernel: str, element: str, dim: int, variant: str = "linear"
) -> dict[str, int]:
    """How often each machine instruction occurs, by its full name ("STG.E.128")."""
    text = listing(arch, kernel, element, dim, variant)
    found: dict[str, int] = {}
    for name in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M):
        found[name] = found.get(name, 0) + 1
    return found


def count(found: dict[str, int], pattern: str) -> int:
    """Occurrences of instructions whose name begins with a pattern."""
    return sum(number for name, number in found.items() if re.match(pattern, name))


@pytest.mark.parametrize(("arch", "kernel", "element", "dim"), CASES)
def test_main_instructions(arch: str, kernel: str, element: str, dim: int) -> None:
    found = opcodes(arch, kernel, element, dim)
    products = count(found, r"HMMA\.16816\.F32" + (r"\.BF16" if element == "bf16" else ""))
    assert products >= 32, found
    # An ldmatrix.x4 feeds at least one product; plain shared loads would be several per product.
    assert count(found, r"LDSM\.16\.M(T)?88\.4") >= 8, found
    assert count(found, r"LDGSTS\.E(\.BYPASS)?(\.LTC128B)?\.128") > 0, found
    assert count(found, r"STG\.E(\.EF)?\.128") > 0, found
    assert count(found, r"(LDL|STL)\b") == 0, found


@pytest.mark.parametrize("kernel", ["forward", "backward_dkdv", "backward_dq"])
@pytest.mark.parametrize("dim", [64, 128])
def test_main_instructions_of_turing(kernel: str, dim: int) -> None:
    found = opcodes("sm_75", kernel, "f16", dim)
    # A product is half as deep as on sm_80, and copies pass through registers, 16 bytes each.
    assert count(found, r"HMMA\.1688\.F32") >= 64, found
    assert count(found, r"LDSM\.16\.M(T)?88\.4") >= 16, found
    loads = count(found, r"LDG\.E\.128")
    assert loads >= 8, found
    assert count(found, r"STS\.128") >= loads // 2, found
    assert count(found, r"STG\.E(\.EF)?\.128") > 0, found
    assert count(found, r"(LDL|STL|LDGSTS)\b") == 0, found


def test_the_parser_reads_what_nvdisasm_writes() -> None:
    found = opcodes("sm_80", "forward", "f16", 128)
    assert found["EXIT"] >= 1
    assert count(found, "MUFU.EX2") > 0
    assert count(found, "BAR.SYNC") > 0
