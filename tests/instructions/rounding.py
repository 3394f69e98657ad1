"""Rounding as the instructions round, where NumPy itself rounds otherwise, twice, or not at all."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def truncate(x: np.ndarray, bits: int, rounding: str) -> np.ndarray:
    """Round the float32 significand to `bits` fewer bits: to nearest, ties away ("rna") or ties to
    even ("rn")."""
    u = x.view(np.uint32).astype(np.uint64)
    half = np.uint64(1 << (bits - 1))
    odd = (u >> np.uint64(bits)) & np.uint64(1)
    bump = half if rounding == "rna" else half - np.uint64(1) + odd
    rounded = (u + bump) & ~np.uint64((1 << bits) - 1)
    special = ~np.isfinite(x)
    return np.where(special, u, rounded).astype(np.uint32).view(np.float32)


def narrow(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round once to `dtype`. ml_dtypes rounds float64 to bfloat16 through float32, which would
    round twice."""
    if dtype != BF16 or x.dtype != F64:
        return x.astype(dtype)
    near = x.astype(F32)
    beyond = np.abs(near.astype(F64)) > np.abs(x)
    toward_zero = np.where(beyond, np.nextafter(near, F32.type(0)), near)
    inexact = np.isfinite(x) & (toward_zero.astype(F64) != x)
    odd = toward_zero.view(np.uint32) | inexact.astype(np.uint32)  # sticky bit: never a false tie
    return odd.view(F32).astype(BF16)


def flush(x: np.ndarray) -> np.ndarray:
    """.ftz: subnormal float32 inputs count as zero of the same sign."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """One rounding: rational arithmetic where the values are finite."""
    out = (a.astype(F64) * b + c).astype(F32)  # right for infinities and NaN
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(b) & np.isfinite(c)):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        out[i] = round_fraction(exact) if exact else out[i]
    return out


def round_fraction(x: Fraction) -> np.float32:
    """The float32 nearest to a rational number, ties to even."""
    near = np.float32(
        float(x)
    )  # float(Fraction) is correctly rounded to float64, so at most one step off
    if not np.isfinite(near):
        return near
    steps = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
    steps = [s for s in steps if np.isfinite(s)]
    return min(steps, key=lambda s: (abs(Fraction(float(s)) - x), int(s.view(np.uint32)) & 1))
