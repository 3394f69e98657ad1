"""Is this call well formed, and what exactly is asked?

A Problem is one attention call without its arrays: extents, memory layout, options, all checked. It
is frozen and hashable, so planning is a function of it and can be cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cuflash import _array_checks, _checks, _dtypes, _option_checks, _packed_checks
from cuflash._arrangement import Arrangement
from cuflash._extras import NOTHING, Extra

if TYPE_CHECKING:
    from cuflash._arrays import Meta
    from cuflash._errors import Seen

__all__ = ["GRADIENT_BUFFERS", "Arrangement", "MaskFacts", "Operand", "Packed", "Problem"]


@dataclass(frozen=True, slots=True)
class Operand:
    """The memory layout of one array, in the order (*B, H, L, D) whatever the caller's layout was.

    Parameters
    ----------
    shape : tuple of int
        Extents. Batch axes may be 1 where the Problem's are larger (broadcast).
    strides : tuple of int
        Byte strides, same order; 0 on broadcast axes.
    aligned : bool
        True when the last axis is contiguous and every row starts on a 16-byte boundary.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool

    @classmethod
    def of(cls, meta: Meta) -> Operand:
        """From metadata in standard order."""
        strides = tuple(
            0 if n == 1 else step for n, step in zip(meta.shape, meta.strides, strict=True)
        )
        columns = meta.shape[-1] == 1 or meta.strides[-1] == meta.itemsize
        aligned = columns and meta.offset == 0 and all(step % 16 == 0 for step in strides[:-1])
        return cls(meta.shape, strides, aligned)


@dataclass(frozen=True, slots=True)
class MaskFacts:
    """What planning knows of a mask.

    Parameters
    ----------
    kind : {"dense", "blocks"}
        A boolean array or a BlockMask.
    shape : tuple of int
        Of the array, or the leading axes of the BlockMask.
    block_size : tuple of int
        (0, 0) of an array.
    """

    kind: str
    shape: tuple[int, ...]
    block_size: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Packed:
    """Sequences of several lengths one behind the other: `batch` is their number, `len_q` and
    `len_k` bound their lengths.

    Parameters
    ----------
    total_q, total_k : int
        Rows of the packed arrays.
    aligned_at_end : bool
        `q_offset` counts from each sequence's own `len_k - len_q`.
    """

    total_q: int
    total_k: int
    aligned_at_end: bool


@dataclass(frozen=True, slots=True)
class Problem:
    """One checked attention call.

    Parameters
    ----------
    direction : {"forward", "backward"}
    dtype : str
        "float16", "bfloat16", "float32" or "float64".
    batch : tuple of int
        Extents of the leading axes.
    heads, heads_kv, len_q, len_k, head_dim, head_dim_v : int
    scale : float
    q_offset : int
        Position of query row 0 on the key axis.
    left, right : int or None
        Row at position d sees keys d - left .. d + right; causal is already in `right`.
    softcap : float or None
    alibi : bool
    mask : MaskFacts or None
    bias : tuple of int or None
        Its shape.
    sinks : bool
    dropout_p : float
    precision : {"ieee", "tf32"}
        Of float32 products.
    expression : str
        Source of the score expression for kernels; "" for none.
    score_params : tuple of str
        Names of its parameter arrays.
    packed : Packed or None
    deterministic : bool
    wrt : tuple of str
        Gradients wanted, in canonical order; empty in forward.
    operands : tuple of (name, Operand)
        Layout of every array of the call that has a head dim.
    """

    direction: str
    dtype: str
    batch: tuple[int, ...]
    heads: int
    heads_kv: int
    len_q: int
    len_k: int
    head_dim: int
    head_dim_v: int
    scale: float
    q_offset: int
    left: int | None
    right: int | None
    softcap: float | None = None
    alibi: bool = False
    mask: MaskFacts | None = None
    bias: tuple[int, ...] | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    precision: str = "ieee"
    expression: str = ""
    score_params: tuple[str, ...] = ()
    packed: Packed | None = None
    deterministic: bool = False
    wrt: tuple[str, ...] = ()
    operands: tuple[tuple[str, Operand], ...] = ()

    @property
    def has_options(self) -> bool:
        """Whether kernels need more than a band, a scale, a soft cap and ALiBi."""
        return bool(
            self.mask is not None
            or self.bias is not None
            or self.sinks
            or self.dropout_p
            or self.expression
            or self.packed is not None
        )

    @classmethod
    def of(
        cls,
        direction: str,
        arrays: Mapping[str, Meta],
        options: Mapping[str, Any],
        seen: Seen,
        *,
        extra: Extra = NOTHING,
        on_device: bool = False,
    ) -> Problem:
        """Check one call completely and state what it asks.

        Parameters
        ----------
        direction : {"forward", "backward"}
        arrays : name -> Meta
            Metadata of every array given, in the caller's layout: "q", "k", "v", perhaps "mask",
            "bias", "alibi_slopes", "sinks", "seed", "out"; in backward also "dout", "lse", perhaps
            "dlse", "dq", "dk", "dv", "dbias"; parameters of a score expression as "score_mod.name";
            of packed sequences "cu_seqlens_q", "cu_seqlens_k".
        options : name -> value
            causal, window, q_offset, scale, softcap, layout, dropout_p, precision; in forward also
            return_lse, in backward deterministic, wrt; of packed sequences max_seqlen_q,
            max_seqlen_k (ints; `_varlen.py` finds those not given).
        extra : Extra
            Block mask, score expression, seed.
        seen : Seen
            The arguments as the user gave them, for messages.
        on_device : bool
            Whether kernels will read these arrays, whose elements must then lie at multiples of
            their size.

        Raises
        ------
        TypeError, ValueError
            Wrong kinds and dtypes; wrong shapes and values.
        """
        layout = _checks.layout(options["layout"], seen)
        _checks.flag("return_lse", options.get("return_lse", False), seen)
        dtype = _array_checks.dtype(arrays, seen)
        view = Arrangement(_array_checks.ranks(arrays, seen), layout)
        q, k, v = (view.standard_meta(arrays[name]) for name in ("q", "k", "v"))
        sizes = _array_checks.extents(q, k, v, seen)
        left, right = _checks.band(options["causal"], options["window"], seen)
        offset = options["q_offset"]
        if offset is not None:
            offset = _checks.integer("q_offset", offset, seen)
        row = _dtypes.BY_NAME[dtype]
        call, packed = sizes, None  # `call`: the extents that options are about
        if "cu_seqlens_q" in arrays:
            call = _packed_checks.extents(arrays, options, sizes, view.rank, seen)
            packed = Packed(sizes.len_q, sizes.len_k, offset is None)
            offset = offset or 0
        elif offset is None:
            offset = sizes.len_k - sizes.len_q
        if "alibi_slopes" in arrays:
            _array_checks.slopes(arrays["alibi_slopes"], call, row.numpy, view.rank, seen)
        problem = cls(
            direction=direction,
            dtype=dtype,
            **call._asdict(),
            scale=_checks.scale(options["scale"], dtype, sizes.head_dim, seen),
            q_offset=offset,
            left=left,
            right=right,
            softcap=_checks.softcap(options["softcap"], dtype, seen),
            precision=_checks.precision(options.get("precision"), dtype, seen),
            alibi="alibi_slopes" in arrays,
            **_option_facts(arrays, options, extra, call, view.rank, row, seen),
            packed=packed,
            deterministic=_checks.flag("deterministic", options.get("deterministic", False), seen),
            wrt=_wrt(options["wrt"], arrays, extra, seen) if direction == "backward" else (),
            operands=tuple(
                (name, Operand.of(view.standard_meta(meta)))
                for name, meta in arrays.items()
                if name in HEAD_DIM_ARRAYS
            ),
        )
        if direction == "forward":
            _check_forward(arrays, sizes, view, row, seen)
        else:
            _check_backward(arrays, sizes, view, row, problem.wrt, seen)
        if on_device:
            for name, meta in arrays.items():
                _array_checks.addressable(name, meta, seen)
        return problem


HEAD_DIM_ARRAYS = frozenset(("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
GRADIENT_BUFFERS = {"dq": "q", "dk": "k", "dv": "v", "dbias": "bias"}
SCORE_PREFIX = "score_mod."


def _wrt(value: Any, arrays: Mapping[str, Any], extra: Extra, seen: Seen) -> tuple[str, ...]:
    score = extra.score_mod
    parameters = {} if score is None else {n: n in score.arrays for n in score.params}
    return _checks.wrt(value, arrays, seen, parameters)


def _option_facts(
    arrays: Mapping[str, Meta],
    options: Mapping[str, Any],
    extra: Extra,
    sizes: _array_checks.Extents,
    rank: int,
    row: _dtypes.Dtype,
    seen: Seen,
) -> dict[str, Any]:
    """Checks masks, bias, sinks, dropout and score expression; the Problem's fields about them."""
    pairs = _option_checks.pair_shape(sizes, rank)
    facts: dict[str, Any] = {}
    if "mask" in arrays:
        _option_checks.mask(arrays["mask"], pairs, seen)
        facts["mask"] = MaskFacts("dense", arrays["mask"].shape)
    elif extra.blocks is not None:
        _option_checks.blocks(extra.blocks, pairs, seen)
        facts["mask"] = MaskFacts("blocks", extra.blocks.slots.shape[:-2], extra.blocks.block_size)
    if "bias" in arrays:
        _option_checks.bias(arrays["bias"], pairs, row.numpy, seen)
        facts["bias"] = arrays["bias"].shape
    if "sinks" in arrays:
        _option_checks.sinks(arrays["sinks"], sizes.heads, row.numpy, rank, seen)
        facts["sinks"] = True
    has_seed = "seed" in arrays or extra.seed is not None
    if "seed" in arrays:
        _option_checks.seed(arrays["seed"], seen)
    facts["dropout_p"] = _option_checks.dropout(options.get("dropout_p", 0.0), has_seed, seen)
    if extra.score_mod is not None:
        from cuflash import _scoremod_source

        start = len(SCORE_PREFIX)
        params = {n[start:]: m for n, m in arrays.items() if n.startswith(SCORE_PREFIX)}
        _option_checks.score_arrays(params, row.numpy, _checks.GRADIENT_NAMES, seen)
        facts["expression"] = _scoremod_source.source(extra.score_mod, row.lse)
        facts["score_params"] = tuple(params)
    return facts


def _check_forward(
    arrays: Mapping[str, Meta],
    sizes: _array_checks.Extents,
    view: Arrangement,
    row: _dtypes.Dtype,
    seen: Seen,
) -> None:
    if "out" in arrays:
        _array_checks.output(
            "out", arrays["out"], view.shape(sizes.shape_of("out")), row.numpy, seen
        )


def _check_backward(
    arrays: Mapping[str, Meta],
    sizes: _array_checks.Extents,
    view: Arrangement,
    row: _dtypes.Dtype,
    wrt: tuple[str, ...],
    seen: Seen,
) -> None:
    for name in ("dout", "out"):
        _array_checks.matches(name, arrays[name], view.shape(sizes.shape_of(name)), row.numpy, seen)
    for name in ("lse", "dlse"):
        if name in arrays:
            shape = view.shape(sizes.shape_of(name), rows=True)
            _array_checks.matches(name, arrays[name], shape, row.lse, seen)
    for name, of in GRADIENT_BUFFERS.items():
        if name not in arrays:
            continue
        if of not in wrt:
            raise seen.error(
                ValueError,
                f"{name} was given, and wrt does not name {of!r}.",
                f"add {of!r} to wrt, or drop {name}=.",
            )
        _array_checks.output(name, arrays[name], arrays[of].shape, arrays[of].dtype, seen)
