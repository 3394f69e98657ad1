"""Scalar instructions of the emulator against NumPy, one form per case, over random and awkward values.

Every case is one line of inline assembly in a kernel of its own; all kernels are one module, so the
table is compiled once. Results must agree bit for bit (any NaN equals any NaN), except where a tolerance is
given: for `.approx` forms the emulator is at least as accurate as the hardware, and the tolerance is the
reference's own rounding.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.emulator import Module, Nvrtc
from tests.scalar_cases import CASES, Case
from tests.scalar_reference import BF16, N, awkward, dtype, halves

# letter of an asm constraint and C type that carries a value of a NumPy type
CARRIERS = {
    "u2": ("h", "unsigned short"), "i2": ("h", "short"), "u4": ("r", "unsigned"), "i4": ("r", "int"),
    "u8": ("l", "unsigned long long"), "i8": ("l", "long long"), "f4": ("f", "float"), "f8": ("d", "double"),
    "f2": ("h", "unsigned short"), "b2": ("h", "unsigned short"),
}  # fmt: skip


def kernel_source(index: int, case: Case) -> str:
    result, *sources = case.codes
    letter, c_result = CARRIERS[result]
    text = case.text
    if text.startswith("testp"):
        text = f"{{.reg .pred p; {text} selp.u32 %0, 1, 0, p;}}"
    parameters = "".join(f", const {CARRIERS[c][1]}* s{k}" for k, c in enumerate(sources))
    inputs = ", ".join(f'"{CARRIERS[c][0]}"(s{k}[i])' for k, c in enumerate(sources))
    # the conversion to and from "h" operands is a move of bits, which the compiler inserts
    return (
        f'extern "C" __global__ void case_{index}({c_result}* out{parameters}) {{\n'
        f"  int i = blockIdx.x * 64 + threadIdx.x;\n  {c_result} r;\n"
        f'  asm volatile("{text}" : "={letter}"(r) : {inputs});\n  out[i] = r;\n}}\n'
    )


@cache
def module() -> Module:
    return Module(
        Nvrtc().ptx("".join(kernel_source(i, c) for i, c in enumerate(CASES)), "compute_90")
    )


@pytest.mark.parametrize(
    "index", range(len(CASES)), ids=[f"{c.text}[{c.types}]".replace(" ", "_") for c in CASES]
)
def test_instruction(index: int) -> None:
    case = CASES[index]
    rng = np.random.default_rng(index)
    result, *codes = case.codes
    sources = [awkward(c, rng) for c in codes]
    if (
        case.text.startswith(("sh", "bf")) and "bfind" not in case.text
    ):  # shift amounts: mostly sensible ones
        k = len(sources) - (2 if case.text.startswith(("bfe.u", "bfi")) else 1)
        for j in range(max(k, 1), len(sources)):
            sources[j] = np.where(rng.random(N) < 0.9, rng.integers(0, 40, N), sources[j]).astype(
                sources[j].dtype
            )
    out = np.zeros(N, dtype(result))
    module().launch(f"case_{index}", N // 64, 64, 0, [out, *sources])
    with np.errstate(all="ignore"):
        expected = np.asarray(case.reference(*sources)).astype(out.dtype)
    if out.dtype.kind in "fV" or out.dtype == BF16:
        compare_floats(out, expected, sources, case.rtol)
    elif "x2" in case.text and result == "u4":
        t = BF16 if "bf16x2" in case.text else np.float16
        compare_floats(halves(out, t), halves(expected, t), sources, case.rtol)
    else:
        wrong = np.flatnonzero(out != expected)
        assert not wrong.size, [(s[wrong[0]] for s in sources), out[wrong[0]], expected[wrong[0]]]


def compare_floats(
    out: np.ndarray, expected: np.ndarray, sources: list[np.ndarray], rtol: float
) -> None:
    both_nan = (out != out) & (expected != expected)
    if rtol:
        close = np.isclose(out.astype("f8"), expected.astype("f8"), rtol=rtol, atol=1e-37)
    else:
        unsigned = f"u{out.dtype.itemsize}"
        close = out.view(unsigned) == expected.view(unsigned)
    wrong = np.argwhere(~(close | both_nan))
    assert not wrong.size, (
        [s[wrong[0][0]] for s in sources],
        out[tuple(wrong[0])],
        expected[tuple(wrong[0])],
    )
