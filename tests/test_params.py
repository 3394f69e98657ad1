"""The structs that Python packs are the structs that kernels read."""

from __future__ import annotations

import numpy as np
import pytest

from cuflash import _compile, _params


def members(dtype: np.dtype, prefix: str = "", base: int = 0):
    """Every leaf of a struct: (C designator, byte offset)."""
    for name, (kind, offset, *_) in dtype.fields.items():
        if kind.subdtype is None and kind.fields:
            yield from members(kind, f"{prefix}{name}.", base + offset)
        elif kind.subdtype and kind.base.fields:
            yield from members(kind.base, f"{prefix}{name}[0].", base + offset)
        else:
            yield f"{prefix}{name}", base + offset


def compiles(text: str) -> bool:
    try:
        _compile.compile_cubin(text, "params", "sm_80", None)
    except _compile.CompileError:
        return False
    return True


@pytest.mark.parametrize("struct", sorted(_params.STRUCTS))
def test_offsets_equal_the_cuda_side(struct: str) -> None:
    dtype = _params.STRUCTS[struct]
    checks = [f"sizeof({struct}) == {dtype.itemsize}"]
    checks += [
        # NVRTC has no offsetof without host headers; this is its front end's own spelling.
        f"__INTADDR__(&(({struct}*)0)->{name}) == {offset}"
        for name, offset in members(dtype)
    ]
    asserts = "\n".join(f'static_assert({check}, "{check}");' for check in checks)
    _compile.compile_cubin(f'#include "params.cuh"\n{asserts}\n', struct, "sm_80", None)
    assert len(checks) > 4
    # The check itself can fail: one offset off by one is refused.
    assert not compiles(f'#include "params.cuh"\nstatic_assert(sizeof({struct}) == 1, "");\n')


def test_flags_and_limits_equal_the_cuda_side() -> None:
    constants = [n for n in dir(_params) if n.startswith("FLAG_")]
    constants += [n for n in dir(_params) if n.startswith(("MAX_", "REDUCED_"))]
    constants += ["MERGE_MAX_PARTS"]
    asserts = "\n".join(f'static_assert({n} == {getattr(_params, n)}, "{n}");' for n in constants)
    _compile.compile_cubin(f'#include "params.cuh"\n{asserts}\n', "flags", "sm_80", None)


def pointers_of(dtype: np.dtype, base: int = 0) -> list[int]:
    """Offsets of the 8-byte members before the first that is none, arrays and structs of them spread."""
    found: list[int] = []
    for kind, offset, *_ in sorted(dtype.fields.values(), key=lambda field: field[1]):
        if kind.fields:
            inner = pointers_of(kind, base + offset)
            found += inner
            if len(inner) * 8 != kind.itemsize:
                return found
        elif kind.base == np.uint64:
            found += [base + offset + 8 * n for n in range(kind.itemsize // 8)]
        else:
            return found
    return found


def test_pointers_lead_the_structs_that_are_packed_once() -> None:
    for dtype, pointers in (
        (_params.FORWARD, _params.FORWARD_POINTERS),
        (_params.BACKWARD, _params.BACKWARD_POINTERS),
        (_params.MASK_TILES, _params.MASK_TILES_POINTERS),
        (_params.PACKED_PLAN, _params.PACKED_PLAN_POINTERS),
    ):
        assert pointers_of(dtype) == [8 * i for i in range(len(pointers))]


def test_packer_puts_pointers_in_front() -> None:
    struct = np.zeros((), _params.FORWARD)
    struct["shape"]["scale"] = 0.125
    struct["options"]["seed"] = 7
    data = _params.Packer(struct, 6)(1, 2, 3, 4, 5, 2**63)
    back = np.frombuffer(data, _params.FORWARD)[0]
    assert [int(back[name]) for name in _params.FORWARD_POINTERS[:6]] == [1, 2, 3, 4, 5, 2**63]
    assert back["options"]["seed"] == 7
    assert back["shape"]["scale"] == np.float32(0.125)


def test_a_struct_fits_kernel_parameter_space() -> None:
    # 4 KB is the limit of every architecture that cuflash compiles for.
    assert all(dtype.itemsize <= 4096 for dtype in _params.STRUCTS.values())
