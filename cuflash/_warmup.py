"""Compile ahead, so that no call of a server or of the first training step waits for NVRTC.

A kernel depends on head dims, dtype, options and GPU, never on lengths; warming one shape therefore
warms all lengths, batch sizes and head counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash import _cache, _checks, _compile, _dtypes, _explain
from cuflash._arrays import Meta
from cuflash._device import Limits, device_override
from cuflash._errors import Seen, brief, kind_of
from cuflash._extras import split
from cuflash._problem import SCORE_PREFIX, Problem
from cuflash._system import cupy_or_reason

Shape = tuple[int, ...]

# Without the device its figures are unknown. They decide the order of blocks, not the kernels.
_ANY_LIMITS = Limits(sm_count=1, shared_memory=48 * 1024, l2_bytes=1 << 20)


@dataclass(frozen=True, slots=True)
class Warmed:
    """What `warmup` did; prints as a sentence.

    Attributes
    ----------
    arch : str or None
        Architecture compiled for; None when there was none to compile for.
    kernels : tuple of (str, float)
        Names of the kernels now ready, and the seconds each one took (milliseconds when it was in
        the cache).
    note : str
        Where they are kept, or why nothing was compiled.
    """

    arch: str | None
    kernels: tuple[tuple[str, float], ...]
    note: str

    def __str__(self) -> str:
        if self.arch is None:
            return self.note
        seconds = sum(seconds for _, seconds in self.kernels)
        count = f"{len(self.kernels)} kernel{'s' * (len(self.kernels) != 1)}"
        return f"{count} for {self.arch} ready in {seconds:.2f} s; {self.note}"


def warmup(
    shapes: Iterable[tuple[Shape, Shape, Shape]],
    *,
    dtype: Any = "float16",
    backward: bool = True,
    deterministic: bool = False,
    wrt: Iterable[str] = ("q", "k", "v"),
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    q_offset: int | None = None,
    mask: str | None = None,
    bias: bool = False,
    softcap: float | None = None,
    alibi_slopes: bool = False,
    sinks: bool = False,
    score_mod: Any = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    precision: str | None = None,
    layout: str = "HLD",
    arch: str | None = None,
    progress: bool = True,
) -> Warmed:
    """Compile the kernels of these calls now and keep them in the cache directory.

    Parameters
    ----------
    shapes : iterable of (q_shape, k_shape, v_shape)
        As the arrays will have them, C-ordered. Lengths, batch and head counts make no difference
        to which kernels are built.
    dtype : dtype, name, or sequence of them
        Of the arrays.
    backward : bool
        Also the kernels of the gradient.
    deterministic, wrt
        As in `attention_backward`.
    causal, window, q_offset, softcap, score_mod, scale, dropout_p, precision, layout
        As in `attention`. causal, window and q_offset need no kernels of their own.
    mask : {None, "dense", "blocks"}
        Whether calls will pass a bool array or a BlockMask.
    bias, alibi_slopes, sinks : bool
        Whether calls will pass these; their gradients are then warmed too.
    arch : str, optional
        Architecture such as "sm_80" or "sm_90a", to fill a cache for another machine; needs CuPy
        for its NVRTC, and no GPU. Default: that of the current GPU, whose kernels are also loaded.
    progress : bool
        Show a progress bar on standard error.

    Returns
    -------
    Warmed
        Names of the kernels and the time each took. On a machine without a GPU, and without
        `arch`, nothing is compiled (NumPy arrays need no kernels) and its `note` says so.

    Raises
    ------
    TypeError, ValueError
        Shapes or options that `attention` would refuse.
    UnsupportedError, CompileError
        As `attention`.

    See Also
    --------
    explain : Which kernels one call runs.

    Examples
    --------
    >>> import cuflash
    >>> q, kv = (1, 32, 4096, 128), (1, 8, 4096, 128)
    >>> print(cuflash.warmup([(q, kv, kv)], dtype="bfloat16", arch="sm_90a"))  # doctest: +SKIP
    4 kernels for sm_90a ready in 2.10 s; kept in /home/me/.cache/cuflash
    """
    options: dict[str, Any] = {
        "causal": causal,
        "window": window,
        "q_offset": q_offset,
        "scale": scale,
        "softcap": softcap,
        "layout": layout,
        "dropout_p": dropout_p,
        "precision": precision,
        "deterministic": deterministic,
    }
    told = {"shapes": shapes, "dtype": dtype, "wrt": wrt, "mask": mask, "arch": arch}
    given = {"bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    seen = Seen({}, {**options, **told, **given})
    side = [name for name, passed in given.items() if _checks.flag(name, passed, seen)]
    options["wrt"] = tuple(dict.fromkeys([*_checks.names(wrt, seen), *side]))
    backward = _checks.flag("backward", backward, seen)
    layout = _checks.layout(layout, seen)
    _check_words(mask, arch, seen)
    triples, kinds = _triples(shapes, seen), _dtypes_of(dtype, seen)
    problems = [
        problem
        for triple in triples
        for kind in kinds
        for problem in _problems(triple, kind, side, mask, score_mod, backward, options)
    ]
    device = None
    if arch is None:
        device = _current_device()
        if device is None:
            note = f"nothing to compile: {cupy_or_reason()[1]}; NumPy arrays need no kernels"
            return Warmed(None, (), note)
        arch = device.arch
    from tqdm import tqdm

    specs = _specializations(problems, arch, device.limits if device else _ANY_LIMITS)
    build = device.load if device else _compile.build
    kernels = []
    with tqdm(specs, unit="kernel", leave=False, disable=not progress) as bar:
        for spec in bar:
            bar.set_description(spec.name)
            start = time.perf_counter()
            build(spec)
            kernels.append((spec.name, time.perf_counter() - start))
    return Warmed(arch, tuple(kernels), f"kept in {_cache.directory()}")


def _check_words(mask: Any, arch: Any, seen: Seen) -> None:
    if mask is not None and not (isinstance(mask, str) and mask in ("dense", "blocks")):
        raise seen.error(
            ValueError,
            f"mask is {brief(mask)}, not one of None, 'dense', 'blocks'.",
            "'dense' for bool arrays, 'blocks' for BlockMasks.",
        )
    if not (arch is None or isinstance(arch, str)):
        raise seen.error(TypeError, f"arch is {kind_of(arch)}, not a str.", 'such as "sm_90a".')


def _triples(shapes: Any, seen: Seen) -> list[tuple[Shape, Shape, Shape]]:
    """Shapes of q, k and v of each call."""
    way_out = "[(q_shape, k_shape, v_shape), ...], each a tuple of ints of at least 2 axes."
    if not _checks.iterable(shapes):
        raise seen.error(TypeError, f"shapes is {kind_of(shapes)}, not a list.", way_out)
    found: list[Any] = []
    for triple in shapes:
        if not hasattr(triple, "__len__") or not all(hasattr(x, "__len__") for x in triple):
            raise seen.error(TypeError, f"shapes holds {brief(triple)}, not three shapes.", way_out)
        if len(triple) != 3:
            raise seen.error(
                ValueError, f"shapes holds {len(triple)} shapes for a call of 3 arrays.", way_out
            )
        found.append(tuple(tuple(_checks.integer("shapes", n, seen) for n in x) for x in triple))
        for shape in found[-1]:
            if len(shape) < 2 or min(shape) < 0:
                raise seen.error(ValueError, f"shapes holds {shape}.", way_out)
    return found


def _dtypes_of(dtype: Any, seen: Seen) -> list[np.dtype]:
    """One dtype or several, names of ml_dtypes included (importing it registers "bfloat16")."""
    several = isinstance(dtype, Sequence) and not isinstance(dtype, str)
    found = []
    for one in dtype if several else [dtype]:
        try:
            found.append(np.dtype(one))
        except TypeError:
            raise seen.error(
                TypeError, f"dtype is {one!r}, which is none.", f"one of {_dtypes.NAMES}."
            ) from None
    return found


def _problems(
    shapes: tuple[Shape, Shape, Shape],
    dtype: np.dtype,
    side: Sequence[str],
    mask: str | None,
    score_mod: Any,
    backward: bool,
    options: dict[str, Any],
) -> list[Problem]:
    """The checked calls on C-ordered arrays of these shapes, with side arrays of these names."""
    metas = {
        name: _explain.dense(tuple(shape), range(len(shape)), dtype)
        for name, shape in zip("qkv", shapes, strict=True)
    }
    long = options["layout"] == "LHD"
    q, k = metas["q"].shape, metas["k"].shape
    heads = () if len(q) < 3 else (q[-2 if long else -3],)
    row_axis = -3 if long and len(q) >= 3 else -2
    for name in side:
        shape = () if name == "bias" else heads
        metas[name] = Meta(shape, (4,) * len(shape), np.dtype(np.float32))
    if mask == "dense":
        metas["mask"] = Meta((), (), np.dtype(np.bool_))
    blocks = None
    if mask == "blocks":
        from cuflash._blockmask import BlockMask

        blocks = BlockMask.from_blocks(np.ones((1, 1), bool), shape=(q[row_axis], k[row_axis]))
    _, _, extra = split(blocks, 0, score_mod)
    for name, array in extra.score_arrays.items():
        metas[SCORE_PREFIX + name] = Meta(tuple(array.shape), tuple(array.strides), array.dtype)
    seen = Seen(metas, options)
    problems = [Problem.of("forward", metas, options, seen, extra=extra, on_device=True)]
    if backward:
        metas = _explain.with_results(metas, options["layout"], seen)
        problems.append(Problem.of("backward", metas, options, seen, extra=extra, on_device=True))
    return problems


def _specializations(
    problems: Iterable[Problem], arch: str, limits: Limits
) -> list[_compile.Specialization]:
    """Every kernel of the calls' plans, once."""
    from cuflash import _plan
    from cuflash._side_kernels import side_kernels

    found: dict[_compile.Specialization, None] = {}
    for problem in problems:
        found |= dict.fromkeys(side_kernels(problem, arch))
        for launch in _plan._plan(problem, arch, limits).launches:
            found[launch.spec] = None
    return list(found)


def _current_device() -> Any:
    """The device new CuPy arrays would be on (or the one tests chose); None without a GPU."""
    chosen = device_override()
    if chosen is not None:
        return chosen
    cupy, _ = cupy_or_reason()
    if cupy is None:
        return None
    from cuflash import _cupy_device

    return _cupy_device.device(cupy.cuda.runtime.getDevice())
