"""Rules about the Python values of a call, one function per rule, each raising in the form of `_errors`.

Those about its arrays are in `_array_checks.py`.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from cuflash import _dtypes
from cuflash._errors import Seen, kind_of

LAYOUTS = ("HLD", "LHD")
PRECISIONS = ("ieee", "tf32")
GRADIENT_NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
# Options whose gradient exists only when they were given.
OPTION_GRADIENTS = ("bias", "alibi_slopes", "sinks")
# 16-bit and float32 inputs keep scores in float32: a factor outside this range is 0 or inf there.
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, 2.0**126


def flag(name: str, value: Any, seen: Seen) -> bool:
    """A bool; 0 and 1 are refused, since a position or a probability may have been meant."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise seen.error(
        TypeError, f"{name} is {kind_of(value)}, not a bool.", f"{name}=True or {name}=False."
    )


def integer(name: str, value: Any, seen: Seen) -> int:
    """Anything with `__index__` but a bool."""
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise seen.error(
        TypeError, f"{name} is {kind_of(value)}, not an int.", f"pass {name} as an int."
    )


def _is_real(value: Any) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return False
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.dtype.kind in "iuf" or value.dtype == _dtypes.BY_NAME["bfloat16"].numpy
    return isinstance(value, numbers.Real)


def real(name: str, value: Any, seen: Seen) -> float:
    """A finite real number: Python's, NumPy's, or a NumPy array of no axes."""
    if not _is_real(value):
        raise seen.error(
            TypeError, f"{name} is {kind_of(value)}, not a real number.", f"pass {name} as a float."
        )
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond float64
        number = math.inf if value > 0 else -math.inf
    if not math.isfinite(number):
        raise seen.error(
            ValueError, f"{name} is {number}, which is not finite.", "a finite number."
        )
    return number


def scale(value: Any, dtype: str, head_dim: int, seen: Seen) -> float:
    """The factor on q @ k.T, 1/sqrt(D) by default."""
    if value is None:
        return 1.0 / math.sqrt(head_dim)
    number = real("scale", value, seen)
    if dtype != "float64" and abs(number) > _FLOAT32_MAX:
        raise seen.error(
            ValueError,
            f"scale is {number}, and float32 scores (of {dtype} inputs) hold factors up to 2**126.",
            "a smaller scale, or float64 arrays.",
        )
    return number


def softcap(value: Any, dtype: str, seen: Seen) -> float | None:
    """The bound of softcapped logits, None for none."""
    if value is None:
        return None
    number = real("softcap", value, seen)
    if number <= 0:
        raise seen.error(
            ValueError,
            f"softcap is {number}, and must be > 0.",
            "a positive softcap, or None for none.",
        )
    if dtype != "float64" and not _FLOAT32_MIN <= number <= _FLOAT32_MAX:
        raise seen.error(
            ValueError,
            f"softcap is {number}, and float32 scores (of {dtype} inputs) hold 2**-126 to 2**126.",
            "a softcap in that range, or float64 arrays.",
        )
    return number


def band(causal: Any, window: Any, seen: Seen) -> tuple[int | None, int | None]:
    """(left, right) that causal and window together mean: row d sees d - left .. d + right."""
    causal = flag("causal", causal, seen)
    left = right = None
    if window is not None:
        left, right = _window(window, seen)
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def _window(window: Any, seen: Seen) -> tuple[int | None, int | None]:
    way_out = (
        "window=(left, right), each an int >= 0 or None; (3, 0) sees itself and 3 keys before."
    )
    try:
        if isinstance(window, (str, bytes, set, frozenset, Mapping)):
            raise TypeError
        sides = tuple(window)
    except TypeError:
        sentence = f"window is {kind_of(window)}, not a pair."
        raise seen.error(TypeError, sentence, way_out) from None
    if len(sides) != 2:
        raise seen.error(ValueError, f"window has {len(sides)} entries, and must have 2.", way_out)
    bounds = []
    for name, side in zip(("left", "right"), sides, strict=True):
        bound = None if side is None else integer(f"window {name}", side, seen)
        if bound is not None and bound < 0:
            raise seen.error(
                ValueError, f"window {name} is {bound}, and must be >= 0 or None.", way_out
            )
        bounds.append(bound)
    return bounds[0], bounds[1]


def precision(value: Any, dtype: str, seen: Seen) -> str:
    """How float32 products are formed; "ieee" when not given."""
    if value is None:
        return "ieee"
    if not isinstance(value, str):
        raise seen.error(
            TypeError, f"precision is {kind_of(value)}, not a str.", f"one of {PRECISIONS}."
        )
    if value not in PRECISIONS:
        raise seen.error(
            ValueError,
            f"precision is {value!r}, not one of {PRECISIONS}.",
            "'ieee' for float32 accuracy, 'tf32' for speed.",
        )
    if value == "tf32" and dtype != "float32":
        raise seen.error(
            ValueError,
            f"precision is 'tf32', which is for float32 inputs, and q is {dtype}.",
            "drop precision=, or convert the arrays to float32.",
        )
    return value


def layout(value: Any, seen: Seen) -> str:
    """ "HLD" or "LHD"."""
    if not isinstance(value, str):
        raise seen.error(TypeError, f"layout is {kind_of(value)}, not a str.", f"one of {LAYOUTS}.")
    if value not in LAYOUTS:
        raise seen.error(
            ValueError, f"layout is {value!r}, not one of {LAYOUTS}.", "the default is 'HLD'."
        )
    return value


def wrt(
    value: Any, given: Mapping[str, Any], seen: Seen, parameters: Mapping[str, bool] | None = None
) -> tuple[str, ...]:
    """Names to differentiate, in canonical order, each once.

    `parameters` of a score expression by name: True for arrays, which have a gradient.
    """
    parameters = parameters or {}
    arrays = tuple(name for name, is_array in parameters.items() if is_array)
    way_out = f"a tuple of names out of {GRADIENT_NAMES + arrays}."
    given_names = names(value, seen, way_out)
    for name in given_names:
        if parameters.get(name) is False:
            raise seen.error(
                ValueError,
                f"wrt names {name!r}, which is a number, and only arrays have gradients.",
                f"give the score_mod {name} as an array of no axes, or drop it from wrt.",
            )
        if name not in GRADIENT_NAMES and name not in arrays:
            raise seen.error(
                ValueError, f"wrt names {name!r}, which is no argument of this call.", way_out
            )
        if name in OPTION_GRADIENTS and given.get(name) is None:
            raise seen.error(
                ValueError,
                f"wrt names {name!r}, and {name} was not given.",
                f"pass {name}=, or drop it from wrt.",
            )
    return tuple(name for name in GRADIENT_NAMES + arrays if name in given_names)


def iterable(value: Any) -> bool:
    """Whether a loop can run over it, which a class and an array of no axes only seem to allow."""
    return (
        hasattr(value, "__iter__")
        and not isinstance(value, type)
        and getattr(value, "ndim", 1) != 0
    )


def names(value: Any, seen: Seen, way_out: str = f"a tuple out of {GRADIENT_NAMES}.") -> list[str]:
    """The entries of a wrt that holds nothing but strings."""
    if isinstance(value, str) or not iterable(value):
        raise seen.error(TypeError, f"wrt is {kind_of(value)}, not a tuple of names.", way_out)
    found = list(value)
    for name in found:
        if not isinstance(name, str):
            raise seen.error(TypeError, f"wrt holds {kind_of(name)}, not only names.", way_out)
    return found
