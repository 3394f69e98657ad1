"""Every rule a call must satisfy, one function per rule, each raising in the form of `_errors`.

Metadata only: shapes, strides, dtypes and Python values. Nothing here reads an array, launches or
allocates.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from cuflash import _dtypes
from cuflash._arrays import Meta
from cuflash._errors import Seen, kind_of, shown_dtype

LAYOUTS = ("HLD", "LHD")
PRECISIONS = ("ieee", "tf32")
GRADIENT_NAMES = ("q", "k", "v", "bias", "alibi_slopes", "sinks")
# Options whose gradient exists only when they were given.
OPTION_GRADIENTS = ("bias", "alibi_slopes", "sinks")
# 16-bit and float32 inputs keep scores in float32: a factor outside this range is 0 or inf there.
_FLOAT32_MIN, _FLOAT32_MAX = 2.0**-126, 2.0**126


class Extents(NamedTuple):
    """The shape letters of one call."""

    batch: tuple[int, ...]
    heads: int
    heads_kv: int
    len_q: int
    len_k: int
    head_dim: int
    head_dim_v: int

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Shape of a result, in the order (*B, H, L, D)."""
        rows = (*self.batch, self.heads, self.len_q)
        return rows if name in ("lse", "dlse") else (*rows, self.head_dim_v)


# ---- Python values


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


def names(value: Any, seen: Seen, way_out: str = f"a tuple out of {GRADIENT_NAMES}.") -> list[str]:
    """The entries of a wrt that holds nothing but strings."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise seen.error(TypeError, f"wrt is {kind_of(value)}, not a tuple of names.", way_out)
    found = list(value)
    for name in found:
        if not isinstance(name, str):
            raise seen.error(TypeError, f"wrt holds {kind_of(name)}, not only names.", way_out)
    return found


# ---- arrays


def dtype(arrays: Mapping[str, Meta], seen: Seen) -> str:
    """The one dtype of q, k, v (and dout, out, dq, dk, dv)."""
    first = arrays["q"].dtype
    for name in ("q", "k", "v", "dout", "out", "dq", "dk", "dv"):
        if name not in arrays:
            continue
        found = arrays[name].dtype
        if found not in _dtypes.BY_NUMPY:
            hint = (
                ", or q.view(ml_dtypes.bfloat16) if these are bfloat16 bits"
                if found == np.uint16
                else ""
            )
            raise seen.error(
                TypeError,
                f"{name} is {shown_dtype(found)}, which is not one of {_dtypes.NAMES}.",
                f"convert it with astype{hint}.",
            )
        if found != first:
            raise seen.error(
                TypeError,
                f"{name} is {shown_dtype(found)}, and q is {shown_dtype(first)}.",
                "convert one of them with astype: q, k, v, dout and out share one dtype.",
            )
    return _dtypes.BY_NUMPY[first].name


def ranks(arrays: Mapping[str, Meta], seen: Seen) -> int:
    """The rank of q, which k, v and the like share."""
    rank = len(arrays["q"].shape)
    if rank < 2:
        raise seen.error(
            ValueError,
            f"q has {rank} axes, and needs at least 2.",
            "(Lq, D), (H, Lq, D) or (*B, H, Lq, D).",
        )
    for name in ("k", "v"):
        found = len(arrays[name].shape)
        if found != rank:
            raise seen.error(
                ValueError,
                f"{name} has {found} axes, and q has {rank}.",
                "give them equal rank; an axis of extent 1 broadcasts over the batch.",
            )
    return rank


def extents(q: Meta, k: Meta, v: Meta, seen: Seen) -> Extents:
    """The shape letters, from metadata in the order (*B, H, L, D)."""
    *batch, heads, len_q, head_dim = q.shape
    *_, heads_kv, len_k, head_dim_k = k.shape
    head_dim_v = v.shape[-1]
    if head_dim_k != head_dim:
        raise seen.error(
            ValueError,
            f"k has head_dim {head_dim_k}, and q has head_dim {head_dim}.",
            "give q and k the same last axis; v may have its own.",
        )
    for name, dim in (("q", head_dim), ("v", head_dim_v)):
        if dim == 0:
            raise seen.error(
                ValueError,
                f"{name} has head_dim 0, and needs at least 1.",
                "a non-empty last axis.",
            )
    for what, axis in (("heads", -3), ("keys", -2)):
        if v.shape[axis] != k.shape[axis]:
            raise seen.error(
                ValueError,
                f"v has {v.shape[axis]} {what}, and k has {k.shape[axis]} {what}.",
                'give them equal numbers; layout="LHD" reads (L, H, D).',
            )
    if heads != heads_kv and (heads_kv == 0 or heads % heads_kv != 0):
        raise seen.error(
            ValueError,
            f"k has {heads_kv} heads, which does not divide the {heads} heads of q.",
            'heads of k and v must divide those of q; layout="LHD" reads (L, H, D).',
        )
    for name, meta in (("k", k), ("v", v)):
        for axis, extent in enumerate(batch):
            if meta.shape[axis] not in (extent, 1):
                raise seen.error(
                    ValueError,
                    f"{name} has {meta.shape[axis]} on batch axis {axis}, and q has {extent}.",
                    "equal extents, or 1 to broadcast.",
                )
    return Extents(tuple(batch), heads, heads_kv, len_q, len_k, head_dim, head_dim_v)


def matches(name: str, meta: Meta, shape: tuple[int, ...], wanted: np.dtype, seen: Seen) -> None:
    """An array of exactly this shape and dtype."""
    if meta.shape != shape:
        raise seen.error(
            ValueError,
            f"{name} has shape {meta.shape}, and {shape} is needed.",
            f"pass {name} in that shape.",
        )
    if meta.dtype != wanted:
        raise seen.error(
            TypeError,
            f"{name} is {shown_dtype(meta.dtype)}, and {wanted.name} is needed.",
            f"pass {name} in that dtype.",
        )


def output(name: str, meta: Meta, shape: tuple[int, ...], wanted: np.dtype, seen: Seen) -> None:
    """An array that can be written to: `matches`, writable, no two elements at one address."""
    matches(name, meta, shape, wanted, seen)
    if not meta.writable:
        raise seen.error(
            ValueError, f"{name} is read-only.", f"pass a writable array, or no {name}=."
        )
    if meta.overlaps_itself():
        raise seen.error(
            ValueError,
            f"{name} has strides {meta.strides} for shape {meta.shape}: elements share memory.",
            f"pass a dense array, or no {name}=.",
        )


def slopes(meta: Meta, sizes: Extents, wanted: np.dtype, rank: int, seen: Seen) -> None:
    """alibi_slopes: (H,) or (*B, H), of q's dtype or float32."""
    if meta.dtype not in (wanted, np.dtype(np.float32)):
        raise seen.error(
            TypeError,
            f"alibi_slopes is {shown_dtype(meta.dtype)}, and q is {wanted.name}.",
            f"convert it to {wanted.name} or float32.",
        )
    if rank == 2 and meta.shape == ():
        return
    if meta.shape[-1:] == (sizes.heads,):
        own = meta.shape[:-1]
        if not own or (
            len(own) == len(sizes.batch)
            and all(n in (b, 1) for n, b in zip(own, sizes.batch, strict=True))
        ):
            return
    full = (*sizes.batch, sizes.heads)
    allowed = f"{(sizes.heads,)} or {full}" if sizes.batch else f"{(sizes.heads,)}"
    raise seen.error(
        ValueError,
        f"alibi_slopes has shape {meta.shape}, and {allowed} is needed.",
        "one slope per query head, or per batch and query head.",
    )


def addressable(name: str, meta: Meta, seen: Seen) -> None:
    """Device memory is read in whole elements: an address or stride between two would fault."""
    item = meta.itemsize
    if meta.empty:
        return
    steps = [step for step, n in zip(meta.strides, meta.shape, strict=True) if n > 1]
    if meta.offset % item or any(step % item for step in steps):
        raise seen.error(
            ValueError,
            f"{name} has elements of {item} bytes at addresses that are no multiple of {item} "
            f"(strides {meta.strides}).",
            "copy it to an aligned array first.",
        )
