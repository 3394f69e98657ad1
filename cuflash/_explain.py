"""What a call would run, and why: the Problem, the refusals, the Plan, in print, without running anything."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cuflash import _checks, _prepare
from cuflash._arrays import Meta, adopt
from cuflash._device import Device
from cuflash._errors import Seen
from cuflash._extras import split
from cuflash._order import axes_by_stride
from cuflash._problem import SCORE_PREFIX, Arrangement, Problem

_ARRAYS = ("q", "k", "v", *_prepare.OPTION_ARRAYS)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The account of one call; print it.

    Attributes
    ----------
    problem : Problem
        What is asked.
    device : str
        Who would run it.
    refusals : dict
        Candidate name -> why it cannot; an empty list means that it can. The first such one runs.
    plan : Plan or None
        Launches and workspace; None on the CPU, when nothing needs to run, or when every candidate
        refuses.
    text : str
        What is printed.
    """

    problem: Problem
    device: str
    refusals: Mapping[str, Sequence[str]]
    plan: Any
    text: str

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    backward: bool = False,
    deterministic: bool = False,
    wrt: Iterable[str] = ("q", "k", "v"),
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    mask: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    precision: str | None = None,
    seed: Any = None,
    layout: str = "HLD",
) -> Explanation:
    """How a call of `attention` (or its gradient) with these arguments would run. Nothing is computed.

    Shape letters as in `attention`. Setting the environment variable CUFLASH_EXPLAIN=1 prints the
    same for every new kind of call, to the standard error stream.

    Parameters
    ----------
    q : array (*B, H, Lq, D)
        Queries.
    k : array (*B, Hkv, Lk, D)
        Keys.
    v : array (*B, Hkv, Lk, Dv)
        Values.
    backward : bool
        Explain the gradient instead.
    deterministic, wrt
        As in `attention_backward`; without meaning in forward.
    causal, window, q_offset, mask, bias, softcap, alibi_slopes, sinks, score_mod, scale, \
dropout_p, seed, precision, layout
        As in `attention`.

    Returns
    -------
    Explanation
        Printable: the Problem, which candidates refuse it and why, the launches with tiles, grid,
        shared memory, registers (once compiled) and the path of the generated source.

    Raises
    ------
    TypeError, ValueError
        As `attention`. A call without a kernel is explained, not refused.

    Examples
    --------
    >>> import numpy as np
    >>> import cuflash
    >>> q, k = np.zeros((8, 100, 64)), np.zeros((2, 300, 64))
    >>> print(cuflash.explain(q, k, k, causal=True))
    forward · float64 · 8 heads, 2 of k and v · 100 queries · 300 keys · head_dim 64
      row i sees keys j <= i + 200
      scale 0.125
      q  (8, 100, 64) strides (51200, 512, 8) bytes
      k  (2, 300, 64) strides (153600, 512, 8) bytes
      v  (2, 300, 64) strides (153600, 512, 8) bytes
    CPU backend (NumPy)
      tiles of 64 queries x 4 heads by 300 keys, 2 heads of k and v at a time
    """
    mask, seed, extra = split(mask, seed, score_mod)
    options = {
        "causal": causal,
        "window": window,
        "q_offset": q_offset,
        "scale": scale,
        "softcap": softcap,
        "layout": layout,
        "dropout_p": dropout_p,
        "precision": precision,
        "deterministic": deterministic,
        "wrt": wrt,
    }
    names = (*_ARRAYS, *(SCORE_PREFIX + name for name in extra.score_arrays))
    objects = (q, k, v, mask, bias, alibi_slopes, sinks, seed, *extra.score_arrays.values())
    arrays, device = adopt(names, objects, 3, lambda: options)
    seen = Seen(dict(zip(names, arrays, strict=True)), {**options, **extra.told})
    backward = _checks.flag("backward", backward, seen)
    metas = {
        name: _prepare.meta_of(array, device is not None)
        for name, array in zip(names, arrays, strict=True)
        if array is not None
    }
    direction = "backward" if backward else "forward"
    if backward:
        metas = with_results(metas, layout, seen)
    problem = Problem.of(direction, metas, options, seen, extra=extra, on_device=device is not None)
    return account(problem, device)


def with_results(metas: Mapping[str, Meta], layout: str, seen: Seen) -> dict[str, Meta]:
    """Metadata that a backward call adds: dout and out dense in q's memory order, lse dense."""
    options = {
        **dict.fromkeys(("window", "q_offset", "scale", "softcap")),
        "causal": False,
        "layout": layout,
    }
    plain = {name: metas[name] for name in "qkv"}
    forward = Problem.of("forward", plain, options, seen)
    view = Arrangement(len(metas["q"].shape), layout)
    shape = (*forward.batch, forward.heads, forward.len_q, forward.head_dim_v)
    order = axes_by_stride(_Axes(view.standard_meta(metas["q"])))
    out = dense(shape, order, metas["q"].dtype)
    if view.rank == 2:
        out = out._replace(shape=out.shape[1:], strides=out.strides[1:])
    elif view.swaps:
        out = out.swapped(-3, -2)
    from cuflash import _dtypes

    rows = view.shape(shape[:-1], rows=True)
    lse = dense(rows, list(range(len(rows))), _dtypes.BY_NAME[forward.dtype].lse)
    return {**metas, "dout": out, "out": out, "lse": lse}


class _Axes:
    """Metadata in the clothes of an array."""

    def __init__(self, meta: Meta) -> None:
        self.shape, self.strides, self.ndim = meta.shape, meta.strides, len(meta.shape)


def dense(shape: tuple[int, ...], order: Sequence[int], dtype: Any) -> Meta:
    """Metadata of a dense array whose axes lie in memory in `order`."""
    strides, step = [0] * len(shape), dtype.itemsize
    for axis in reversed(order):
        strides[axis] = step
        step *= max(1, shape[axis])
    return Meta(shape, tuple(strides), dtype)


# ---- the account


def account(problem: Problem, device: Device | None) -> Explanation:
    """Explain a checked call."""
    lines = list(_describe(problem))
    if device is None:
        lines += ["CPU backend (NumPy)", *_cpu(problem)]
        return Explanation(problem, "CPU backend (NumPy)", {}, None, "\n".join(lines))
    from cuflash import _plan
    from cuflash._candidates_grouped import group_of, is_grouped
    from cuflash._side_kernels import side_kernels

    name = f"{device.name} ({device.arch})"
    reasons = _plan.refusals(problem, device.arch)
    lines.append(name)
    chosen = next((candidate for candidate, why in reasons.items() if not why), None)
    for candidate, why in reasons.items():
        verdict = "runs it" if candidate == chosen else "could run it, but comes later"
        lines += [f"  {candidate:<10} {text}" for text in why or [verdict]]
    plan = None
    if _is_empty(problem):
        lines.append("  nothing to launch: an extent is 0")
    elif chosen is not None:
        plan = _plan.plan(problem, device)
        if is_grouped(plan.launches[0].spec):
            lines.append(f"  rows of a tile: those of the {group_of(problem)} heads of a group")
        lines += [f"  first {spec.name}" for spec in side_kernels(problem, device.arch)]
        lines += _launches(plan)
        lines += _arithmetic(problem, device.arch)
    else:
        lines += _plan.describe_refusals(problem, device.arch).splitlines()[-1:]
    return Explanation(problem, name, reasons, plan, "\n".join(lines))


def _is_empty(problem: Problem) -> bool:
    return 0 in (*problem.batch, problem.heads, problem.len_q, problem.len_k)


def _describe(problem: Problem) -> Iterator[str]:
    p = problem
    dims = f"head_dim {p.head_dim}" + (
        "" if p.head_dim_v == p.head_dim else f", {p.head_dim_v} of v"
    )
    heads = f"{p.heads} heads" + ("" if p.heads_kv == p.heads else f", {p.heads_kv} of k and v")
    batch = [f"batch {' x '.join(map(str, p.batch))}"] if p.batch else []
    words = [p.direction, p.dtype, *batch, heads, f"{p.len_q} queries", f"{p.len_k} keys", dims]
    yield " · ".join(words)
    yield f"  {_band(p)}{_mask(p)}"
    options = [f"scale {p.scale:g}"]
    options += [f"softcap {p.softcap:g}"] if p.softcap is not None else []
    options += ["score_mod"] if p.expression else []
    options += [f"bias {p.bias}"] if p.bias is not None else []
    options += ["ALiBi"] if p.alibi else []
    options += ["sinks"] if p.sinks else []
    options += [f"dropout {p.dropout_p:g}"] if p.dropout_p else []
    options += [f"precision {p.precision}"] if p.dtype == "float32" else []
    if p.direction == "backward":
        options += [f"gradients of {', '.join(p.wrt) or 'nothing'}"]
        options += ["deterministic"] if p.deterministic else []
    yield "  " + ", ".join(options)
    for name, operand in p.operands:
        yield f"  {name}  {operand.shape} strides {operand.strides} bytes"


def _band(p: Problem) -> str:
    """The mask in words."""

    def at(shift: int) -> str:
        return "i" if shift == 0 else f"i {'+' if shift > 0 else '-'} {abs(shift)}"

    low = None if p.left is None else at(p.q_offset - p.left)
    high = None if p.right is None else at(p.q_offset + p.right)
    if low is None and high is None:
        return "every row sees every key"
    if low is None:
        return f"row i sees keys j <= {high}"
    if high is None:
        return f"row i sees keys j >= {low}"
    return f"row i sees keys {low} <= j <= {high}"


def _mask(p: Problem) -> str:
    """A mask beside the band, in words."""
    if p.mask is None:
        return ""
    if p.mask.kind == "dense":
        return f", and what a mask of shape {p.mask.shape} shows"
    rows, keys = p.mask.block_size
    return f", and what a BlockMask {p.mask.shape} of {rows} x {keys} blocks shows"


def _cpu(problem: Problem) -> Iterator[str]:
    from cuflash._cpu_tiles import Shape, Tiling

    if _is_empty(problem):
        yield "  nothing to compute: an extent is 0"
        return
    group = problem.heads // problem.heads_kv
    shape = Shape(
        problem.batch,
        problem.heads_kv,
        group,
        problem.len_q,
        problem.len_k,
        problem.head_dim,
        problem.head_dim_v,
    )
    block = problem.mask.block_size[0] if problem.mask is not None else 0
    tiling = Tiling.of(shape, block or None)
    heads = min(tiling.heads, problem.heads_kv)
    stacked = f" x {group} heads" if group > 1 else ""
    yield (
        f"  tiles of {tiling.rows} queries{stacked} by {tiling.keys} keys, "
        f"{heads} heads of k and v at a time"
    )


def _arithmetic(problem: Problem, arch: str) -> list[str]:
    """How products of float32 and float64 are made, and where that is slow."""
    from cuflash._candidates import element_of

    if problem.dtype not in ("float32", "float64"):
        return []
    if arch == "sm_75":  # also where precision="tf32" was asked for
        return [
            f"  products by FMA of {problem.dtype}",
            f"  slow: {arch} has no matrix instructions for {problem.dtype}, only multiply-adds",
        ]
    how = {
        "f32": "3xTF32: three TF32 products of factors split in two, sums in float32",
        "f32tf32": "TF32: one product of factors rounded to 10 bits, sums in float32",
        "f64": "DMMA: matrix instructions of float64",
    }
    lines = [f"  products by {how[element_of(problem, arch)]}"]
    if problem.dtype == "float64" and not arch.startswith(("sm_80", "sm_90")):
        lines.append(f"  slow: {arch} computes float64 at 1/64 of its float32 rate")
    return lines


def _launches(plan: Any) -> Iterator[str]:
    total = 0
    for launch in plan.launches:
        spec = launch.spec
        yield f"  launch {spec.name}"
        words = [f"grid {launch.grid}", f"block {launch.block}"]
        words.append(f"shared memory {launch.shared_memory} bytes")
        if launch.schedule.splits > 1:
            words.append(f"keys in {launch.schedule.splits} parts")
        registers, path = _binary(spec)
        words.append("not compiled yet" if registers is None else f"{registers} registers")
        yield "    " + ", ".join(words)
        yield "    " + ", ".join(f"{name} {value}" for name, value in spec.constants)
        yield f"    source {path}"
    for scratch in plan.scratch:
        size = struct.calcsize({"float32": "f", "float64": "d", "uint32": "I"}[scratch.dtype])
        for extent in scratch.shape:
            size *= extent
        total += size
        yield f"  workspace {scratch.name} {scratch.shape} {scratch.dtype}"
    if total:
        yield f"  workspace in all {total} bytes"


def _binary(spec: Any) -> tuple[int | None, Any]:
    """Registers of a kernel if its cubin is in the cache, and the path of its source."""
    from cuflash import _cache, _compile

    try:
        path = _compile.source_path(spec)
    except ImportError:
        return None, "in memory (no NVRTC here)"
    name, _, digest = path.stem.rpartition("-")
    cubin = _cache.read(name, digest)
    return (None if cubin is None else registers_of(cubin)), path


# In the section ".nv.info", an entry with this attribute holds (symbol, registers per thread).
_REGISTER_COUNT = 0x2F
_SIZED_VALUE = 4  # the only entry format with a payload of a stated size; others are 4 bytes in all


def registers_of(cubin: bytes) -> int | None:
    """Registers per thread of the one kernel in a cubin; None when its notes cannot be read."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    (strings,) = struct.unpack_from("<Q", cubin, table + names * size + 24)
    for section in range(table, table + count * size, size):
        start = strings + struct.unpack_from("<I", cubin, section)[0]
        if cubin[start : cubin.index(b"\0", start)] != b".nv.info":
            continue
        at, length = struct.unpack_from("<QQ", cubin, section + 24)
        end = at + length
        while at + 4 <= end:
            form, attribute, payload = struct.unpack_from("<BBH", cubin, at)
            if attribute == _REGISTER_COUNT and form == _SIZED_VALUE:
                return struct.unpack_from("<I", cubin, at + 8)[0]
            at += 4 + (payload if form == _SIZED_VALUE else 0)
    return None
