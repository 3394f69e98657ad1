"""One attention call as data, its exact answer, and the one way to check a result against it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import ml_dtypes
import numpy as np

from tests import option_data, oracle, scores
from tests.option_data import Masked

DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Data:
    """The arrays of a case, in the order (*B, H, L, D)."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray
    alibi_slopes: np.ndarray | None
    mask: Masked | None = None
    bias: np.ndarray | None = None
    sinks: np.ndarray | None = None
    score_mod: scores.Twin | None = None


@dataclass(frozen=True)
class Case:
    """One call, arrays included: equal cases have equal arrays.

    Parameters
    ----------
    heads_kv, head_dim_v
        None: as `heads`, `head_dim`.
    broadcast_kv
        k and v have batch axes of extent 1.
    alibi
        None, "H" (slopes of shape (heads,)) or "BH" (one per batch and head).
    mask
        None or one of `option_data.MASKS`; those with "blocks" in their name are a `BlockMask`.
    block
        Block size of a `BlockMask`.
    bias
        None or axes such as "BHqk", "1H1k", "Hqk", "qk", "q1"; B stands for all batch axes.
    bias_dtype, sinks
        "own" for q's dtype, or "float32"; sinks None for none.
    bias_inf
        A tenth of the bias is -inf.
    dropout
        dropout_p; the seed follows from `seed`.
    score_mod
        None or a name in `scores.LIBRARY`.
    magnitude
        Factor on q and k: 1 gives a soft softmax, 20 nearly one-hot rows and logits in the hundreds.
    shift
        Mean of all arrays in units of their spread: zero mean would make relative errors mean little.
    """

    dtype: str = "float16"
    batch: tuple[int, ...] = (1,)
    heads: int = 2
    heads_kv: int | None = None
    len_q: int = 128
    len_k: int = 128
    head_dim: int = 64
    head_dim_v: int | None = None
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    q_offset: int | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: str | None = None
    mask: str | None = None
    block: tuple[int, int] = (64, 64)
    bias: str | None = None
    bias_dtype: str = "own"
    bias_inf: bool = False
    sinks: str | None = None
    dropout: float = 0.0
    score_mod: str | None = None
    layout: str = "HLD"
    broadcast_kv: bool = False
    magnitude: float = 1.0
    shift: float = 0.25
    seed: int = 0

    def __str__(self) -> str:
        """Readable and complete: what differs from the defaults, after the extents."""
        kv, dim_v = self.heads_kv or self.heads, self.head_dim_v or self.head_dim
        parts = [
            self.dtype,
            "b" + "x".join(map(str, self.batch)),
            f"h{self.heads}" + (f"/{kv}" if kv != self.heads else ""),
            f"l{self.len_q}x{self.len_k}",
            f"d{self.head_dim}" + (f"/{dim_v}" if dim_v != self.head_dim else ""),
        ]
        shown = {"dtype", "batch", "heads", "heads_kv", "len_q", "len_k", "head_dim", "head_dim_v"}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in shown and value != field.default:
                text = (
                    ""
                    if value is True
                    else "_".join(map(str, value))
                    if isinstance(value, tuple)
                    else str(value)
                )
                parts.append(field.name + text)
        return "-".join(parts)

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def dropout_seed(self) -> int:
        """A seed with all its 64 bits in use."""
        return (self.seed + 1) * 0x9E3779B97F4A7C15 % 2**64

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the public functions that are no arrays; defaults are left out."""
        names = ("causal", "window", "q_offset", "scale", "softcap")
        defaults = {field.name: field.default for field in fields(self)}
        return {n: getattr(self, n) for n in names if getattr(self, n) != defaults[n]}

    def data(self) -> Data:
        """The arrays; the same ones every time."""
        rng = np.random.default_rng([self.seed, self.len_q, self.len_k, self.head_dim, self.heads])
        heads_kv = self.heads if self.heads_kv is None else self.heads_kv
        dim_v = self.head_dim if self.head_dim_v is None else self.head_dim_v
        batch_kv = (1,) * len(self.batch) if self.broadcast_kv else self.batch
        wide = np.float64 if self.dtype == "float64" else np.float32

        def normal(*shape: int, factor: float = 1.0) -> np.ndarray:
            # float32 throughout, so that a case of many dtypes has the same numbers but for rounding.
            x = rng.standard_normal(shape, dtype=np.float32) + np.float32(self.shift)
            return (x * np.float32(factor)).astype(self.numpy_dtype)

        q = normal(*self.batch, self.heads, self.len_q, self.head_dim, factor=self.magnitude)
        k = normal(*batch_kv, heads_kv, self.len_k, self.head_dim, factor=self.magnitude)
        v = normal(*batch_kv, heads_kv, self.len_k, dim_v)
        dout = normal(*self.batch, self.heads, self.len_q, dim_v)
        dlse = rng.standard_normal((*self.batch, self.heads, self.len_q)).astype(wide)
        slopes = None
        if self.alibi is not None:
            shape = (self.heads,) if self.alibi == "H" else (*self.batch, self.heads)
            slopes = (0.02 + 0.3 * rng.random(shape)).astype(np.float32)
        return Data(q, k, v, dout, dlse, slopes, **option_data.draw(self))


@dataclass(frozen=True)
class Answer:
    """What a case should give, and what the plain formula in its dtype gives."""

    data: Data
    exact: oracle.Exact
    honest: dict[str, np.ndarray]


@functools.lru_cache(maxsize=32)
def answer(case: Case, dlse: bool = True) -> Answer:
    """The oracle's word on a case. Layout does not matter to it."""
    if case.layout != "HLD":
        return answer(replace(case, layout="HLD"), dlse)
    data = case.data()
    options = oracle_options(case, data)
    arrays = data.q, data.k, data.v, data.dout
    given = data.dlse if dlse else None
    exact = oracle.exact(*arrays, dlse=given, **options)
    return Answer(data, exact, oracle.low_precision(*arrays, dlse=given, **options))


def oracle_options(case: Case, data: Data) -> dict[str, Any]:
    """All options of a case as the oracle takes them."""
    options = case.options()
    for name in ("alibi_slopes", "bias", "sinks", "score_mod"):
        if getattr(data, name) is not None:
            options[name] = getattr(data, name)
    if data.mask is not None:
        options["mask"] = data.mask.dense
    if case.dropout:
        options["keep"] = option_data.kept(case)
        options["dropout_p"] = case.dropout
    return options


def public_options(case: Case, data: Data, machine: Any) -> dict[str, Any]:
    """All options of a case as a user gives them, but for the layout."""
    import cuflash

    options = case.options()
    for name in ("alibi_slopes", "bias", "sinks"):
        if getattr(data, name) is not None:
            options[name] = getattr(data, name)
    if data.mask is not None:
        options["mask"] = data.mask.public((case.len_q, case.len_k), case.block)
    if case.dropout:
        options |= {"dropout_p": case.dropout, "seed": case.dropout_seed}
    if data.score_mod is not None:
        twin = data.score_mod
        put = {name: machine.put(x) for name, x in twin.params.items()}
        options["score_mod"] = cuflash.ScoreMod(twin.code, put)
    return options


def names_of_gradients(data: Data) -> tuple[str, ...]:
    """Everything that a call with this data can be differentiated in, as `wrt` names it."""
    optional = ("bias", "alibi_slopes", "sinks")
    params = () if data.score_mod is None else tuple(data.score_mod.arrays())
    return ("q", "k", "v", *(n for n in optional if getattr(data, n) is not None), *params)


def gradients_by_name(grads: Any, data: Data, wrt: tuple[str, ...]) -> dict[str, Any]:
    """`Gradients` under the oracle's names; each has its argument's dtype."""
    result = {}
    for name in wrt:
        if data.score_mod is not None and name in data.score_mod.arrays():
            of, grad = data.score_mod.params[name], grads.score_params[name]
            result[f"score_{name}"] = grad
        else:
            of = getattr(data, name)
            grad = result[name] = getattr(grads, name)
        assert grad.dtype == of.dtype, f"d{name} is {grad.dtype}, {name} is {of.dtype}"
    return result


def arranged(x: np.ndarray, layout: str) -> np.ndarray:
    """(*B, H, L, n) as a contiguous array in `layout`."""
    return np.ascontiguousarray(np.swapaxes(x, -2, -3)) if layout == "LHD" else x


def standard(x: Any, layout: str) -> Any:
    """An array in `layout` as a view (*B, H, L, n)."""
    return x if x is None or layout == "HLD" else np.swapaxes(x, -2, -3)


def check(
    machine: Any,
    case: Case,
    *,
    gradients: bool = True,
    dlse: bool = True,
    deterministic: bool = False,
) -> None:
    """Run a case through the public API on a `tests.machines.Machine` and compare all it returns by rule T."""
    want = answer(case, dlse)
    data, options = want.data, public_options(case, want.data, machine)
    if case.layout != "HLD":
        options["layout"] = case.layout
    q, k, v, dout = (arranged(x, case.layout) for x in (data.q, data.k, data.v, data.dout))
    out, lse = machine.attention(q, k, v, **options, return_lse=True)
    grads = {}
    if gradients:
        wrt = names_of_gradients(data)
        got = machine.backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dlse=data.dlse if dlse else None,
            wrt=wrt,
            deterministic=deterministic,
            **options,
        )
        grads = gradients_by_name(got, data, wrt)
        grads |= {n: standard(grads[n], case.layout) for n in ("q", "k", "v")}
    oracle.check_all(
        f"{getattr(machine, 'name', machine)}: {case!r}",
        want.exact,
        want.honest,
        case.numpy_dtype,
        out=standard(out, case.layout),
        lse=lse,
        grads=grads,
    )
