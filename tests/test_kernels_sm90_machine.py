"""What the Hopper forward kernel costs: machine instructions, registers, bank conflicts, tiles visited."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import compile_matrix as matrix
from tests import test_disassembly
from tests.cases import Case, answer
from tests.machines import Emulator

ARCH = "sm_90a"
BASE = Case(batch=(), heads=1, heads_kv=1)


# ---- machine code


@pytest.mark.parametrize(("element", "dim"), [("f16", 128), ("bf16", 64), ("f16", 256)])
def test_main_instructions(element: str, dim: int) -> None:
    found = test_disassembly.opcodes(ARCH, "forward_sm90", element, dim)
    count = lambda pattern: test_disassembly.count(found, pattern)  # noqa: E731
    spec = test_disassembly.specialization(ARCH, "forward_sm90", element, dim)
    keys = spec.constant("BLOCK_K")
    # Q K^T and P V of a tile, each at two places: before, in and after the loop.
    assert count(r"HGMMA\.64x") == 2 * (dim // 16 + keys // 16), found
    slabs = dim // 64
    assert count(r"UTMALDG\.5D") == 4 * slabs  # Q, the first K, the next K, V
    assert count(r"UTMASTG\.5D") == slabs
    assert count(r"STSM\.16\.M88\.4") == dim // 16
    assert count(r"USETMAXREG") == 2
    assert count(r"(HMMA|LDSM|LDGSTS)\b") == 0
    # Only the copying warps may keep something in memory.
    text = test_disassembly.listing(ARCH, "forward_sm90", element, dim)
    spilled = [line for line in text.splitlines() if re.search(r"\b(LDL|STL)\b", line)]
    assert not spilled or dim > 128
    assert set(spilled) <= set(reachable(text, "USETMAXREG.DEALLOC"))


@pytest.mark.parametrize(("element", "dim"), [("f16", 128), ("bf16", 64), ("f16", 256)])
def test_exponentials_fall_under_the_product_with_v(element: str, dim: int) -> None:
    """In the loop: both products issued, one awaited, all of the softmax, then the other awaited."""
    text = test_disassembly.listing(ARCH, "forward_sm90", element, dim)
    words = re.findall(r"HGMMA\.64x\d+|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2|F2FP", text)
    waits = [i for i, word in enumerate(words) if "DEPBAR" in word]
    first = next(i for i in waits if words[i].endswith("0x1"))
    second = next(i for i in waits if i > first)
    keys = test_disassembly.specialization(ARCH, "forward_sm90", element, dim).constant("BLOCK_K")
    between = words[first:second]
    # Two more for the references of a lane's two rows.
    assert between.count("MUFU.EX2") == keys // 2 + 2
    assert "F2FP" not in between


@pytest.mark.parametrize(("element", "dim"), [("f16", 128), ("bf16", 64), ("f16", 256)])
def test_registers_of_the_copying_warps(element: str, dim: int) -> None:
    """Behind the instruction that gives registers back, only those that are left occur."""
    spec = test_disassembly.specialization(ARCH, "forward_sm90", element, dim)
    text = test_disassembly.listing(ARCH, "forward_sm90", element, dim)
    reached = "\n".join(reachable(text, "USETMAXREG.DEALLOC"))
    assert "UTMALDG" in reached and "HGMMA" not in reached
    copying, multiplying = spec.constant("COPY_REGISTERS"), spec.constant("REGISTERS")
    assert max(int(n) for n in re.findall(r"\bR(\d+)\b", reached)) < copying
    groups = spec.constant("WARPS") // 4 - 1
    assert 128 * (copying + multiplying * groups) <= 65536


def reachable(text: str, start: str) -> list[str]:
    """The instructions that may run after the one that holds `start`."""
    lines = text.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.L_x_\d+:", line)}
    seen: set[int] = set()
    todo = [next(i for i, line in enumerate(lines) if start in line)]
    while todo:
        i = todo.pop()
        if i in seen or i >= len(lines):
            continue
        seen.add(i)
        code = re.sub(r"^\s*/\*\w+\*/\s*", "", lines[i])
        todo += [labels[label] for label in re.findall(r"\((\.L_x_\d+)\)", code)]
        if not re.match(r"(BRA|EXIT)\b(?! P| !P)", code):  # which go nowhere else
            todo.append(i + 1)
    return [lines[i] for i in sorted(seen)]


def test_cold_compilation_takes_at_most_a_second_and_a_half_of_cpu_time() -> None:
    """The faster of two: another process may be in the way of one."""
    spec = test_disassembly.specialization(ARCH, "forward_sm90", "f16", 128)
    times = []
    for _ in range(2):
        start = time.process_time()
        matrix.compile_one(spec, 12)
        times.append(time.process_time() - start)
    assert min(times) < 1.5, times


# ---- work and traffic


def counters(case: Case, **options: Any) -> Any:
    """Counters of one launch."""
    data = answer(case).data
    with Emulator(ARCH, seed=0) as machine:
        machine.device.count = True
        q, k, v = map(machine.device.memory.copy, (data.q, data.k, data.v))
        machine.attention(q, k, v, **options)
        name, _, found = machine.device.launches[-1]
    assert name.startswith("forward_sm90_")
    return found


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_no_bank_conflicts(dim: int) -> None:
    found = counters(replace(BASE, head_dim=dim, len_q=192, len_k=256), causal=True)
    assert found.bank_conflicts == 0, {
        at: n.bank_conflicts for at, n in found.lines.items() if n.bank_conflicts
    }
    assert found.count("stmatrix") > 0


def test_work_follows_the_visible_tiles() -> None:
    """Tiles the mask hides are never visited: matrix instructions count them."""
    case = replace(BASE, len_q=512, len_k=512, head_dim=128)
    full = counters(case).count("wgmma.mma_async")
    # 4 tiles of 128 queries, 4 of 128 keys: causal sees 1 + 2 + 3 + 4 of 16, a window of 64 keys 1 + 2 + 2 + 2.
    assert counters(case, causal=True).count("wgmma.mma_async") * 16 == full * 10
    windowed = counters(case, causal=True, window=(63, 0)).count("wgmma.mma_async")
    assert windowed * 16 == full * 7
    mask = np.zeros((512, 512), bool)
    mask[:, 128:256] = True
    assert counters(case, mask=mask).count("wgmma.mma_async") * 16 == full * 4
