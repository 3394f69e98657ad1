"""Where every matrix element of a tensor instruction lives, as index arrays (the PTX tables, in one
place).

Each function returns (rows, columns) shaped [lanes, elements]: `matrix[rows, columns]` is what the
lanes hold, in register order. With g = lane // 4 and t = lane % 4 as in the PTX manual.
"""

from __future__ import annotations

import numpy as np

Index = tuple[np.ndarray, np.ndarray]


def _lanes(count: int) -> tuple[np.ndarray, np.ndarray]:
    lane = np.arange(32)[:, None]
    element = np.arange(count)[None, :]
    return lane, element


def a_16bit(k: int) -> Index:
    """A of m16n8k8 / m16n8k16 with 16-bit elements, two per register."""
    lane, e = _lanes(k // 2)
    return lane // 4 + 8 * (e // 2 % 2), lane % 4 * 2 + e % 2 + 8 * (e // 4)


def b_16bit(k: int) -> Index:
    """B of m16n8k8 / m16n8k16 with 16-bit elements."""
    lane, e = _lanes(k // 4)
    return lane % 4 * 2 + e % 2 + 8 * (e // 2), lane // 4 + 0 * e


def a_wide(k: int) -> Index:
    """A of m16n8k4..k16 with 32- or 64-bit elements (tf32, f64)."""
    lane, e = _lanes(k // 2)
    return lane // 4 + 8 * (e % 2), lane % 4 + 4 * (e // 2)


def b_wide(k: int) -> Index:
    """B of m16n8k4..k16 with 32- or 64-bit elements."""
    lane, e = _lanes(k // 4)
    return lane % 4 + 4 * e, lane // 4 + 0 * e


def c_m16n8() -> Index:
    """C and D of every m16n8 shape."""
    lane, e = _lanes(4)
    return lane // 4 + 8 * (e // 2), lane % 4 * 2 + e % 2


def a_m8k4() -> Index:
    """A of m8n8k4.f64."""
    lane, e = _lanes(1)
    return lane // 4 + 0 * e, lane % 4 + 0 * e


def c_m8n8() -> Index:
    """C and D of m8n8k4.f64."""
    lane, e = _lanes(2)
    return lane // 4 + 0 * e, lane % 4 * 2 + e


def matrix_8x8() -> Index:
    """One 8x8 matrix of 16-bit elements as ldmatrix, stmatrix and movmatrix spread it."""
    lane, e = _lanes(2)
    return lane // 4 + 0 * e, lane % 4 * 2 + e


def wgmma_d(n: int) -> Index:
    """Accumulator of m64nN: [128 threads, N / 2]."""
    thread = np.arange(128)[:, None]
    i = np.arange(n // 2)[None, :]
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2


def wgmma_a_16bit() -> Index:
    """Register A of m64k16: [128 threads, 8 elements]."""
    thread = np.arange(128)[:, None]
    e = np.arange(8)[None, :]
    warp, lane = thread // 32, thread % 32
    register = e // 2
    return (
        16 * warp + lane // 4 + 8 * (register % 2),
        2 * (lane % 4) + 8 * (register // 2) + e % 2,
    )


def wgmma_a_tf32() -> Index:
    """Register A of m64k8.tf32: [128 threads, 4 elements]."""
    thread = np.arange(128)[:, None]
    e = np.arange(4)[None, :]
    warp, lane = thread // 32, thread % 32
    return 16 * warp + lane // 4 + 8 * (e % 2), lane % 4 + 4 * (e // 2)
