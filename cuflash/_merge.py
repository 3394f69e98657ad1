"""`merge_attention`: attention over a union of keys, from results over parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuflash import _array_checks, _arrays, _checks, _cpu, _dtypes
from cuflash._arrays import Meta
from cuflash._errors import Seen, kind_of, shown_dtype


def merge_attention(
    outs: Sequence[Any], lses: Sequence[Any], *, out: Any = None
) -> tuple[Any, Any]:
    """Attention over the union of disjoint sets of keys, from out and lse over each.

    Shape letters as in `attention`. The parts may come from anywhere: chunks of a long sequence,
    several GPUs one after the other, a cached prefix.

    Parameters
    ----------
    outs : sequence of arrays (*B, H, Lq, Dv)
        At least one; equal shapes and dtypes. Arrays in layout "LHD" must be transposed to this
        order (a view will do).
    lses : sequence of arrays (*B, H, Lq)
        As many; natural logs, float32 (float64 with float64), as `attention(..., return_lse=True)`
        returns them.
    out : array (*B, H, Lq, Dv), optional
        Where to write, which may be one of `outs`; it is returned.

    Returns
    -------
    out : array (*B, H, Lq, Dv)
        In the dtype and memory order of the first part.
    lse : array (*B, H, Lq)
        logsumexp of the parts' lse.

    Raises
    ------
    TypeError, ValueError, UnsupportedError, CompileError
        As `attention`.

    Notes
    -----
    `out = sum_i exp(lse_i - lse) * out_i`, the identity behind split keys (Flash-Decoding) and
    rings of devices, computed in float32, or float64 for float64 parts (on the CPU where it costs little too) with the
    maximum taken out. A part whose lse is -inf saw no key and has no say; when all are, out is 0
    and lse -inf. The order of the parts matters only by rounding.

    Examples
    --------
    >>> import numpy as np
    >>> from cuflash import attention, merge_attention
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 10, 16))
    >>> cuts = slice(0, 3), slice(3, 10)
    >>> parts = [attention(q, k[:, c], v[:, c], return_lse=True) for c in cuts]
    >>> out, lse = merge_attention(*zip(*parts))
    >>> bool(np.allclose(out, attention(q, k, v)))
    True
    """
    outs, lses = _parts("outs", outs), _parts("lses", lses)
    names = [*(f"outs[{n}]" for n in range(len(outs))), *(f"lses[{n}]" for n in range(len(lses)))]
    objects = [*outs, *lses, out]
    seen = Seen(dict(zip((*names, "out"), objects, strict=True)))
    if len(outs) != len(lses) or not outs:
        raise seen.error(
            ValueError,
            f"outs has {len(outs)} parts, and lses has {len(lses)}.",
            "give one lse per out, and at least one part.",
        )
    (*arrays, target), device = _arrays.adopt((*names, "out"), objects, len(names), dict)
    count = len(outs)
    _check(arrays[:count], arrays[count:], target, names, device is not None, seen)
    flat = arrays[0].ndim == 2  # (Lq, Dv): no head axis
    parts, part_lses = arrays[:count], arrays[count:]
    if flat:
        parts, part_lses = [x[None] for x in parts], [x[None] for x in part_lses]
    into = target[None] if flat and target is not None else target
    if device is None:
        merged, lse = _cpu.merge(parts, part_lses, out=into)
    else:
        from cuflash import _launch_merge

        merged, lse = _launch_merge.merge(device, parts, part_lses, into)
    if flat:
        merged, lse = merged[0], lse[0]
    return (merged if out is None else out), lse


def _parts(name: str, parts: Any) -> list[Any]:
    """The parts as a list; an array is taken apart along its first axis."""
    if isinstance(parts, (str, bytes, dict)) or not _checks.iterable(parts):
        raise TypeError(
            f"{name} is {kind_of(parts)}, not a sequence of arrays.\n"
            f"  Way out: {name}=[first, second, ...]."
        )
    return list(parts)


def _check(
    outs: Sequence[Any],
    lses: Sequence[Any],
    target: Any,
    names: Sequence[str],
    on_device: bool,
    seen: Seen,
) -> None:
    """All rules of a merge."""
    metas = {
        name: Meta(*_arrays.signature(x, on_device))
        for name, x in zip(names, (*outs, *lses), strict=True)
    }
    first = metas["outs[0]"]
    row = _dtypes.BY_NUMPY.get(first.dtype)
    if row is None:
        raise seen.error(
            TypeError,
            f"outs[0] is {shown_dtype(first.dtype)}, which is not one of {_dtypes.NAMES}.",
            "convert the parts with astype.",
        )
    if len(first.shape) < 2:
        raise seen.error(
            ValueError,
            f"outs[0] has {len(first.shape)} axes, and needs at least 2.",
            "(*B, H, Lq, Dv) parts.",
        )
    for name, meta in metas.items():
        is_lse = name.startswith("lses")
        shape, dtype = (first.shape[:-1], row.lse) if is_lse else (first.shape, row.numpy)
        _array_checks.matches(name, meta, shape, dtype, seen)
        if on_device:
            _array_checks.addressable(name, meta, seen)
    if target is None:
        return
    meta = Meta(*_arrays.signature(target, on_device))
    _array_checks.output("out", meta, first.shape, row.numpy, seen)
    if on_device:
        _array_checks.addressable("out", meta, seen)
    at = _arrays.address_of(target)
    for name, array in zip(names, (*outs, *lses), strict=True):
        # Written where it was read, element by element, is fine; anything else may be overwritten
        # before it is read.
        same = _arrays.address_of(array) == at and metas[name].strides == meta.strides
        if _arrays.share_memory(target, array) and not (same and name.startswith("outs")):
            raise seen.error(
                ValueError,
                f"out shares memory with {name}, which is not laid out the same.",
                "pass one of outs itself, or another array.",
            )
