"""How cuflash says no: one form for every message, so that a reader knows where to look.

    ValueError: k has 5 heads, which does not divide the 32 heads of q.
      q  (2, 32, 1024, 128) float16   (batch, heads, len_q, head_dim)
      k  (2, 5, 2048, 128) float16    (batch, heads_kv, len_k, head_dim)
      Way out: repeat or drop heads of k and v.

A sentence with the two numbers that disagree, the arguments as seen, the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


class UnsupportedError(NotImplementedError):
    """Valid, but no kernel serves it; the message says what is missing and what is nearest."""


class CompileError(RuntimeError):
    """NVRTC refused a kernel; the message holds its log and the path of the generated source."""


# The last axes of every array in the order heads, length, dim; what stands before them are batch
# axes.
_AXES = {
    **dict.fromkeys(("q", "dq"), ("heads", "len_q", "head_dim")),
    **dict.fromkeys(("k", "dk"), ("heads_kv", "len_k", "head_dim")),
    **dict.fromkeys(("v", "dv"), ("heads_kv", "len_k", "head_dim_v")),
    **dict.fromkeys(("out", "dout"), ("heads", "len_q", "head_dim_v")),
    **dict.fromkeys(("lse", "dlse"), ("heads", "len_q")),
    "alibi_slopes": ("heads",),
    "sinks": ("heads",),
    **dict.fromkeys(("mask", "bias", "dbias"), ("heads", "len_q", "len_k")),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), ("sequences + 1",)),
}


def kind_of(value: Any) -> str:
    """ "a list", "an int": how to call something that is not an array."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def shown_dtype(dtype: Any) -> str:
    """Name of a dtype; spells out a foreign byte order, which the name alone hides."""
    name = getattr(dtype, "name", str(dtype))
    foreign = getattr(dtype, "byteorder", "=") in "<>" and not getattr(dtype, "isnative", True)
    return f"byte-swapped {name}" if foreign else name


@dataclass(frozen=True, slots=True)
class Seen:
    """The arguments of one call as the user gave them, for messages.

    Parameters
    ----------
    arrays
        Array arguments by name; None where not given.
    options
        Other arguments by name; those at their defaults are left out of messages.
    """

    arrays: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def error(self, kind: type[Exception], sentence: str, way_out: str) -> Exception:
        """The exception to raise: `sentence`, the arguments, `way_out`."""
        lines = [sentence, *self.rows(), f"  Way out: {way_out}"]
        return kind("\n".join(lines))

    def rows(self) -> Iterator[str]:
        """One line per array, then one for the options."""
        given = {name: array for name, array in self.arrays.items() if array is not None}
        width = max((len(name) for name in given), default=0)
        for name, array in given.items():
            shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", None)
            # A class such as numpy.float16 has descriptors by these names.
            if not isinstance(shape, tuple) or dtype is None:
                yield f"  {name:<{width}}  {kind_of(array)}"
            else:
                legend = self._legend(name, len(shape))
                yield f"  {name:<{width}}  {tuple(shape)} {shown_dtype(dtype)}{legend}"
        # `==` on what users pass by mistake may be an array of its own; identity and type are
        # enough here.
        told = [
            f"{name}={brief(value)}"
            for name, value in self.options.items()
            if value is not None
            and value is not False
            and not (name == "layout" and _is(value, "HLD"))
            and not (name == "dropout_p" and isinstance(value, (int, float)) and value == 0)
        ]
        if told:
            yield f"  {', '.join(told)}"

    def _legend(self, name: str, rank: int) -> str:
        axes = list(_AXES.get(name, ()))
        if not axes:
            return ""
        has_dim = axes[-1] in ("head_dim", "head_dim_v")
        if has_dim and rank >= 3 and _is(self.options.get("layout"), "LHD"):
            axes[0], axes[1] = axes[1], axes[0]
        if len(axes) - rank == 1 and len(axes) > 1:
            axes = axes[1:]  # (Lq, D) and its lse (Lq,): no head axis
        batch = rank - len(axes)
        if batch < 0:
            return ""
        names = ["batch"] if batch == 1 else [f"batch{n}" for n in range(batch)]
        return f"   ({', '.join(names + axes)})"


def brief(value: Any) -> str:
    """The first line of what `repr` says: a BlockMask draws its blocks on the others."""
    first, *rest = repr(value).splitlines() or [""]
    return f"{first} ..." if rest else first


def _is(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text
