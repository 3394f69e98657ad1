"""Whole kernels of plain CUDA C in the emulator: what the compiler emits without any inline assembly of ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.emulator import Module, Nvrtc, Unsupported
from tests.emulator.translate import translate

SOURCE = (Path(__file__).parent / "emulator" / "kernels" / "plain.cu").read_text()


@cache
def plain(arch: str) -> Module:
    return Module(Nvrtc().ptx(SOURCE, arch))


@pytest.mark.parametrize("arch", ["compute_80", "compute_90", "compute_120"])
def test_plain_cuda(arch: str) -> None:
    m = plain(arch)
    out = np.zeros(32, np.int32)
    m.launch("calls", 1, 32, 0, [out])
    steps = {1: 0}
    expected = []
    for n in range(1, 33):
        k, x = 0, n
        while x != 1:
            x, k = (3 * x + 1 if x & 1 else x // 2), k + 1
        steps[n] = k
        expected.append(k + [10, 20, 30, 40][(n - 1) & 3])
    np.testing.assert_array_equal(out, expected)
    out = np.arange(10, dtype=np.int32)
    m.launch("switches", 1, 1, 0, [out, np.int32(3)])
    assert out[0] == 24
    out = np.zeros(16, np.int32)
    m.launch("locals", 1, 16, 0, [out, np.int32(3)])
    a = [i * i for i in range(16)]
    for i in range(16):
        a[(i * 5 + 3) & 15] += a[i]
    np.testing.assert_array_equal(out, [a[(i + 3) & 15] for i in range(16)])
    x, y = np.arange(-20, 12, dtype=np.int8), np.zeros(32, np.int16)
    z = np.zeros(32, np.uint8)
    m.launch("bytes", 1, 32, 0, [x, y, z])
    np.testing.assert_array_equal(y, x.astype(np.int16) * 3)
    np.testing.assert_array_equal(z, (x >> 1).view(np.uint8))
    f, d = (
        m.memory.copy(np.arange(16, dtype=np.float32).reshape(4, 4)),
        m.memory.empty((4, 2), np.float64),
    )
    m.launch("wide", 1, 4, 0, [f, d])
    np.testing.assert_array_equal(d, np.stack([f[:, 0] + f[:, 1], f[:, 2] * f[:, 3]], 1))
    out = np.zeros(32, np.int32)
    m.launch("static_and_dynamic", 1, 32, 128, [out], seed=1)
    np.testing.assert_array_equal(out, 100 + 2 * (31 - np.arange(32)))
    out = np.zeros(24 * 12, np.int32)
    m.launch("block_ids", (2, 3, 4), (3, 2, 2), 0, [out])
    np.testing.assert_array_equal(
        out.reshape(24, 12), 1000 * np.arange(24)[:, None] + np.arange(12)
    )


def test_atomics() -> None:
    u, f, w, s = (
        np.zeros(8, np.uint32),
        np.zeros(1, np.float32),
        np.zeros(1, np.uint64),
        np.zeros(1, np.int32),
    )
    plain("compute_80").launch("atomics", 1, 32, 0, [u, f, w, s], seed=3)
    assert u[:4].tolist() == [496, 31, 0xFFFFFFFF, 32 % 10] and u[4] in range(1, 33)
    assert (u[5], u[6], f[0], w[0], s[0]) == (3, 2**32 - 64, 16, 32 << 33, -31)
    assert u[7] % 32 == 5


def test_warp_collectives() -> None:
    out = np.zeros(448, np.int32)
    plain("compute_80").launch("warps", 1, 64, 0, [out], seed=2)
    i, lane = np.arange(64), np.arange(64) % 32
    np.testing.assert_array_equal(
        out[:64], np.where(lane < 3, i, i - 3) + 1000 * np.where(lane % 16 + 5 < 16, i + 5, i)
    )
    np.testing.assert_array_equal(out[64:128], (i & ~7) + 7 + 1000 * (i ^ 9))
    ballot = sum(1 << k for k in range(0, 32, 3)) ^ 2
    np.testing.assert_array_equal(out[128:192].view(np.uint32), ballot)
    np.testing.assert_array_equal(
        out[192:256].view(np.uint32),
        [sum(1 << k for k in range(32) if k % 5 == x % 5) for x in lane],
    )
    sums = np.where(i < 32, 496, 496 + 1024) + np.where(i < 32, 31, 63) * 10000
    np.testing.assert_array_equal(out[256:320], sums)
    np.testing.assert_array_equal(out[320:384], np.where(lane < 8, i ^ 2, 0))
    np.testing.assert_array_equal(out[384:448], 32 + 100)


def test_movmatrix_transposes() -> None:
    out = np.zeros(32, np.uint32)
    plain("compute_80").launch("matrix_moves", 1, 32, 0, [out])
    matrix = np.repeat(np.arange(32, dtype=np.uint16), 2).reshape(8, 8)
    np.testing.assert_array_equal(out.view(np.uint16).reshape(8, 8), matrix.T)


def test_unknown_instructions_and_modifiers_are_named() -> None:
    text = Nvrtc().ptx(SOURCE, "compute_80")
    with pytest.raises(Unsupported, match=r"wmma\.load"):
        translate(text.replace("bar.sync", "wmma.load.bar", 1))
    with pytest.raises(Unsupported, match=r"modifier \.sideways"):
        translate(text.replace("add.s32", "add.sideways.s32", 1))
