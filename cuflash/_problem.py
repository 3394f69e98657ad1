"""Is this call well formed, and what exactly is asked?

A Problem is one attention call without its arrays: extents, memory layout, options, all checked. It
is frozen and hashable, so planning is a function of it and can be cached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cuflash import _checks, _dtypes

if TYPE_CHECKING:
    from cuflash._arrays import Meta
    from cuflash._errors import Seen


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
    deterministic: bool = False
    wrt: tuple[str, ...] = ()
    operands: tuple[tuple[str, Operand], ...] = ()

    @classmethod
    def of(
        cls,
        direction: str,
        arrays: Mapping[str, Meta],
        options: Mapping[str, Any],
        seen: Seen,
        *,
        on_device: bool = False,
    ) -> Problem:
        """Check one call completely and state what it asks.

        Parameters
        ----------
        direction : {"forward", "backward"}
        arrays : name -> Meta
            Metadata of every array given, in the caller's layout: "q", "k", "v", perhaps
            "alibi_slopes" and "out"; in backward also "dout", "lse", perhaps "dlse", "dq", "dk",
            "dv".
        options : name -> value
            causal, window, q_offset, scale, softcap, layout; in forward also return_lse, in
            backward deterministic, wrt.
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
        dtype = _checks.dtype(arrays, seen)
        view = Arrangement(_checks.ranks(arrays, seen), layout)
        q, k, v = (view.standard_meta(arrays[name]) for name in ("q", "k", "v"))
        sizes = _checks.extents(q, k, v, seen)
        left, right = _checks.band(options["causal"], options["window"], seen)
        offset = options["q_offset"]
        offset = (
            sizes.len_k - sizes.len_q
            if offset is None
            else _checks.integer("q_offset", offset, seen)
        )
        row = _dtypes.BY_NAME[dtype]
        if "alibi_slopes" in arrays:
            _checks.slopes(arrays["alibi_slopes"], sizes, row.numpy, view.rank, seen)
        problem = cls(
            direction=direction,
            dtype=dtype,
            **sizes._asdict(),
            scale=_checks.scale(options["scale"], dtype, sizes.head_dim, seen),
            q_offset=offset,
            left=left,
            right=right,
            softcap=_checks.softcap(options["softcap"], dtype, seen),
            alibi="alibi_slopes" in arrays,
            deterministic=_checks.flag("deterministic", options.get("deterministic", False), seen),
            wrt=_checks.wrt(options["wrt"], arrays, seen) if direction == "backward" else (),
            operands=tuple(
                (name, Operand.of(view.standard_meta(meta)))
                for name, meta in arrays.items()
                if name not in ROW_ARRAYS
            ),
        )
        if direction == "forward":
            _check_forward(arrays, sizes, view, row, seen)
        else:
            _check_backward(arrays, sizes, view, row, problem.wrt, seen)
        if on_device:
            for name, meta in arrays.items():
                _checks.addressable(name, meta, seen)
        return problem


# Arrays without a head dim.
ROW_ARRAYS = frozenset(("lse", "dlse", "alibi_slopes"))
GRADIENT_BUFFERS = {"dq": "q", "dk": "k", "dv": "v"}


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a caller's axes map to the order (*B, H, L, D), which everything below the checks uses.

    Parameters
    ----------
    rank : int
        Axes of q; with 2 there is no head axis.
    layout : {"HLD", "LHD"}
    """

    rank: int
    layout: str

    @property
    def swaps(self) -> bool:
        """Whether heads and rows change places."""
        return self.rank > 2 and self.layout == "LHD"

    @property
    def plain(self) -> bool:
        """Whether the caller's order is the standard one."""
        return self.rank > 2 and not self.swaps

    def standard_meta(self, meta: Meta) -> Meta:
        """Metadata of an array with a head dim, as `standard` would give it."""
        if self.rank == 2:
            return meta.expanded()
        return meta.swapped(-3, -2) if self.swaps else meta

    def standard(self, array: Any) -> Any:
        """View of an array with a head dim as (*B, H, L, D)."""
        if array is None or self.plain:
            return array
        return array[None] if self.rank == 2 else array.swapaxes(-3, -2)

    def restore(self, array: Any) -> Any:
        """View of a standard array in the caller's order."""
        if array is None or self.plain:
            return array
        return array[0] if self.rank == 2 else array.swapaxes(-3, -2)

    def standard_rows(self, array: Any) -> Any:
        """View of lse or dlse as (*B, H, Lq)."""
        return array[None] if array is not None and self.rank == 2 else array

    def restore_rows(self, array: Any) -> Any:
        """View of a standard lse in the caller's shape."""
        return array[0] if self.rank == 2 else array

    def shape(self, standard: tuple[int, ...], rows: bool = False) -> tuple[int, ...]:
        """The caller's shape of a standard one; `rows` for lse and dlse."""
        if self.rank == 2:
            return standard[1:]
        if rows or not self.swaps:
            return standard
        *batch, heads, length, dim = standard
        return (*batch, length, heads, dim)


def _check_forward(
    arrays: Mapping[str, Meta],
    sizes: _checks.Extents,
    view: Arrangement,
    row: _dtypes.Dtype,
    seen: Seen,
) -> None:
    if "out" in arrays:
        _checks.output("out", arrays["out"], view.shape(sizes.shape_of("out")), row.numpy, seen)


def _check_backward(
    arrays: Mapping[str, Meta],
    sizes: _checks.Extents,
    view: Arrangement,
    row: _dtypes.Dtype,
    wrt: tuple[str, ...],
    seen: Seen,
) -> None:
    for name in ("dout", "out"):
        _checks.matches(name, arrays[name], view.shape(sizes.shape_of(name)), row.numpy, seen)
    for name in ("lse", "dlse"):
        if name in arrays:
            shape = view.shape(sizes.shape_of(name), rows=True)
            _checks.matches(name, arrays[name], shape, row.lse, seen)
    for name, of in GRADIENT_BUFFERS.items():
        if name not in arrays:
            continue
        if of not in wrt:
            raise seen.error(
                ValueError,
                f"{name} was given, and wrt does not name {of!r}.",
                f"add {of!r} to wrt, or drop {name}=.",
            )
        _checks.output(name, arrays[name], arrays[of].shape, row.numpy, seen)
