"""When is a result right? When its error is a small multiple of that of the honest computation.

No tolerance here is guessed: what is allowed follows from the error of the plain formula in the
same dtype (`oracle.low_precision`), from the rounding of the result's dtype, and from how much the
terms of a sum cancel (`oracle.Exact.gross`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.oracle import Exact

FORWARD, GRADIENT = 2.0, 3.0  # multiples of the honest error


def _describe(name: str, case: Any, at: Any, got: Any, gold: Any, lp: Any, text: str) -> str:
    at = tuple(int(a) for a in at)
    return (
        f"{name}: {text}\n  worst at {at}: got {float(got[at])!r}, exact {float(gold[at])!r}, "
        f"same-precision formula {float(lp[at])!r}\n  case: {case}"
    )


def floor_of(gold: np.ndarray, dtype: Any) -> float:
    """What rounding alone may cost where the honest error is 0: two roundings at gold + 0.3."""
    dtype = np.dtype(dtype)
    finite = gold[np.isfinite(gold)]
    if finite.size == 0:
        return 0.0
    with np.errstate(all="ignore"):
        near = finite.astype(dtype)
        moved = near + dtype.type(0.3) - dtype.type(0.3)
        step = np.nanmax(np.abs(moved.astype(np.float64) - near.astype(np.float64)), initial=0.0)
    tiny = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 1e-6}.get(dtype, 1e-5)
    half_step = eps(dtype) / 2 * float(np.abs(finite).max())
    return 2 * max(float(step) if np.isfinite(step) else 0.0, half_step) + tiny


def eps(dtype: Any) -> float:
    """Distance from 1 to the next number of `dtype`, which may be bfloat16."""
    one = np.ones((), dtype=dtype)
    return float(np.nextafter(one, one + one).astype(np.float64) - 1)


def check(
    got: Any,
    gold: np.ndarray,
    lp: np.ndarray,
    mult: float,
    dtype: Any,
    *,
    name: str = "out",
    case: Any = None,
    lse: np.ndarray | None = None,
    gross: np.ndarray | None = None,
    spare: np.ndarray | None = None,
    tile: int = 128,
) -> None:
    """Rule T: finiteness first, then error against `mult` times that of the honest computation.

    Applied to the whole array, and again to every (batch, head) slice and every `tile` rows of it,
    so that one large error cannot excuse a small wrong region. Where exact values are finite `got`
    must be, and where they are NaN or inf `got` must be NaN or inf (which of the two depends on
    where a product overflows first).

    Parameters
    ----------
    got
        Result under test, (*B, H, L, n), or any shape without a row axis for slope gradients.
    gold, lp
        float64 result, and the same-precision result, of the same shape.
    mult
        `FORWARD` or `GRADIENT`.
    dtype
        Expected dtype of `got`, whose rounding sets the floor.
    lse, gross
        Exact lse and the entry of `Exact.gross` for this result. Scores, lse and their products
        with dout are float32 numbers by contract (float64 for float64), so every term of a sum may
        be off by a step of float32 at 1 and at the size of lse (near 100 that is 8e-6), however
        lucky the honest computation is and however much the terms cancel.
    spare
        What each element may be off beyond that, of `gold`'s shape; see `summed`.
    """
    got = np.asarray(got)
    assert got.shape == gold.shape, (
        f"{name}: shape {got.shape} instead of {gold.shape}\n  case: {case}"
    )
    assert got.dtype == np.dtype(dtype), (
        f"{name}: dtype {got.dtype} instead of {dtype}\n  case: {case}"
    )
    if got.size == 0:
        return
    got = got.astype(np.float64)
    with np.errstate(all="ignore"):
        # Values too large for the dtype become inf, rightly; just below its largest number either is right.
        overflow = np.isfinite(gold) & ~np.isfinite((gold * 1.01).astype(dtype).astype(np.float64))
    finite = np.isfinite(gold) & ~overflow
    wrong = (np.isfinite(got) != finite) & ~overflow
    if wrong.any():
        at = np.argwhere(wrong)[0]
        text = f"{int(wrong.sum())} of {wrong.size} values finite where they should not be, or the reverse"
        raise AssertionError(_describe(name, case, at, got, gold, lp, text))
    with np.errstate(all="ignore"):
        error = np.where(finite, np.abs(got - gold), 0.0)
        honest = np.where(finite & np.isfinite(lp), np.abs(lp - gold), 0.0)
    floor = floor_of(gold, dtype)
    if lse is not None:
        terms = np.abs(gold[finite]) if gross is None else gross
        floor += score_step(lse, dtype) * float(terms.max(initial=0.0))
    spare = np.zeros(gold.shape) if spare is None else spare
    typical = float(honest.mean())

    def bounded(cut: Any, what: str, least: float) -> None:
        worst, allowed = error[cut].max(), mult * max(float(honest[cut].max()), least) + floor
        allowed += float(spare[cut].max())
        if worst > allowed:
            masked = np.zeros_like(error)
            masked[cut] = error[cut]
            at = np.unravel_index(masked.argmax(), masked.shape)
            text = f"error {worst:.3e} exceeds {allowed:.3e} in {what} (floor {floor:.1e})"
            raise AssertionError(_describe(name, case, at, got, gold, lp, text))

    bounded(..., "the whole array", 0.0)
    mean, mean_allowed = float(error.mean()), 1.5 * typical + floor / 4 + float(spare.mean())
    # Means of a handful of numbers compare luck, not computations.
    if got.size >= 256 and mean > mean_allowed:
        at = np.unravel_index(error.argmax(), error.shape)
        text = f"mean error {mean:.3e} exceeds {mean_allowed:.3e}"
        raise AssertionError(_describe(name, case, at, got, gold, lp, text))
    if got.ndim < 3:
        return
    for index in np.ndindex(got.shape[:-2]):
        # A small slice may be lucky in the honest computation, hence at least its typical error.
        bounded(index, f"(batch, head) {index}", typical)
        for row in range(0, got.shape[-2], tile):
            cut = (*index, slice(row, row + tile))
            bounded(cut, f"rows {row}:{row + tile} of (batch, head) {index}", typical)


def check_lse(got: Any, gold: np.ndarray, dtype: Any, *, case: Any = None) -> None:
    """lse to 1e-5 absolute and relative (1e-12 in float64); -inf and NaN exactly where they are."""
    got = np.asarray(got)
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    assert got.shape == gold.shape, (
        f"lse: shape {got.shape} instead of {gold.shape}\n  case: {case}"
    )
    assert got.dtype == wide, f"lse: dtype {got.dtype} instead of {np.dtype(wide)}\n  case: {case}"
    got = got.astype(np.float64)
    for what, test in (("-inf", np.isneginf), ("NaN", np.isnan), ("+inf", np.isposinf)):
        wrong = test(got) != test(gold)
        if wrong.any():
            at = np.argwhere(wrong)[0]
            text = f"{what} in {int(wrong.sum())} wrong places"
            raise AssertionError(_describe("lse", case, at, got, gold, gold, text))
    tolerance = 1e-12 if wide is np.float64 else 1e-5
    with np.errstate(invalid="ignore"):
        excess = np.where(
            np.isfinite(gold), np.abs(got - gold) - tolerance * (1 + np.abs(gold)), -1.0
        )
    if excess.size and excess.max() > 0:
        at = np.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            _describe("lse", case, at, got, gold, gold, f"off by more than {tolerance}")
        )


def score_step(lse: np.ndarray, dtype: Any) -> float:
    """What a weight exp(s - lse) may be off, relatively: a float32 step at 1 and at max(lse)."""
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    size = np.abs(lse[np.isfinite(lse)]).max(initial=1.0)
    return float(np.finfo(wide).eps + np.spacing(wide(size)))


def summed(truth: Exact, name: str, dtype: Any) -> np.ndarray:
    """What a gradient may be off whose elements are sums of score gradients, elementwise.

    With p the weight of a pair and delta = sum(dout * out) of its row, a score gradient is
    p * (dp - delta). Three errors are nobody's fault:

    * p carries a float32 step at 1 and at the size of lse, `score_step`, in every term alike:
      that times `Exact.gross`, the sum of p * (|dp| + |delta|).
    * delta inherits the rounding of `out`; see `rounded_out`.
    * Adding n numbers in float32 rounds n times, each time by half a step of a partial sum of at
      most `gross`: as a random walk, sqrt(n) times half a step.
    """
    gross = truth.gross[name]
    wide = np.finfo(np.float64 if np.dtype(dtype) == np.float64 else np.float32).eps
    terms = max(1.0, truth.pairs / max(1, gross.size))
    step = score_step(truth.lse, dtype) + math.sqrt(terms) * float(wide) / 2
    single = terms == 1 and not truth.dropped
    return gross * step + (0.0 if single else rounded_out(truth, name, dtype))


def rounded_out(truth: Exact, name: str, dtype: Any) -> np.ndarray:
    """What a gradient inherits from `out`, which backward is given rounded to `dtype`, half a step off.

    delta of a row is off by the same for all of its pairs. The honest computation, which finds
    delta from the weights, shows an error of that size too, but for two cases. In a sum of many
    terms its errors may have cancelled by luck, while rows whose out is nearly the same (weights
    spread over many keys) are rounded alike. And with dropout a lone weight is not 1: out is then
    no copy of a value and is rounded, while dp - delta of the honest computation is exactly 0.
    """
    return truth.inherited[name] * eps(dtype) / 2


def check_all(
    case: Any,
    truth: Exact,
    lp: dict[str, np.ndarray],
    q_dtype: Any,
    *,
    out: Any = None,
    lse: Any = None,
    grads: dict[str, Any] | None = None,
) -> None:
    """`check` and `check_lse` for whatever is given; `grads` by name, None ones skipped."""
    if lse is not None:
        check_lse(lse, truth.lse, q_dtype, case=case)
    if out is not None:
        gross = truth.gross["out"]
        check(out, truth.out, lp["out"], FORWARD, q_dtype, case=case, lse=truth.lse, gross=gross)
    for name, grad in (grads or {}).items():
        if grad is None:
            continue
        gross, dtype, spare = truth.gross[name], q_dtype, None
        if truth.dropped and name in ("q", "k"):
            spare = rounded_out(truth, name, q_dtype)
        if name not in ("q", "k", "v", "alibi_slopes"):
            spare, own = summed(truth, name, q_dtype), np.asarray(grad).dtype
            want = truth.grads[name]
            check(grad, want, lp[name], GRADIENT, own, name=f"d{name}", case=case, spare=spare)
            continue
        if name == "alibi_slopes":
            # A few numbers, each a sum over all pairs, and the honest error is luck: each term may
            # carry a rounding of the inputs' dtype, and all of them may pull one way. Slopes may be
            # float32 beside 16-bit inputs.
            gross, dtype = (
                gross * (1 + eps(q_dtype) / score_step(truth.lse, q_dtype)),
                np.asarray(grad).dtype,
            )
        check(
            grad,
            truth.grads[name],
            lp[name],
            GRADIENT,
            dtype,
            name=f"d{name}",
            case=case,
            lse=truth.lse,
            gross=gross,
            spare=spare,
        )
