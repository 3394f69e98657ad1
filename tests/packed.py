"""Packed sequences: a batch of which each entry keeps its first rows and keys, laid end to end.

The batch entries of an ordinary `Case` are the sequences, cut to their lengths; every option is the
case's, and an entry cut that way and called alone is what its part of the packed result must be.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests import oracle
from tests.case import (
    Case,
    Data,
    arranged,
    gradients_by_name,
    names_of_gradients,
    oracle_options,
    public_options,
    standard,
)

PLAIN = Case()


@dataclass(frozen=True)
class Packed:
    """One packed call.

    Parameters
    ----------
    lens_q, lens_k
        Rows and keys of every sequence.
    case
        Everything else; its batch and lengths are ignored.
    tail_q, tail_k
        Rows behind the last sequence, full of NaN.
    longer
        max_seqlen_* exceed the longest sequence by this much; None leaves them to be found.
    index
        dtype of cu_seqlens.
    """

    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    case: Case = PLAIN
    tail_q: int = 0
    tail_k: int = 0
    longer: int | None = 0
    index: str = "int32"

    def __str__(self) -> str:
        parts = [f"{self.lens_q} x {self.lens_k}".replace(" ", ""), str(self.batched)]
        parts += [f"{n}{getattr(self, n)}" for n in ("tail_q", "tail_k", "longer", "index")]
        return "-".join(parts)

    @property
    def batched(self) -> Case:
        """The case of which every sequence is a part."""
        extra = self.longer or 0
        lens = {"len_q": max(self.lens_q) + extra, "len_k": max(self.lens_k) + extra}
        return replace(self.case, batch=(len(self.lens_q),), **lens)

    def cu_seqlens(self) -> tuple[np.ndarray, np.ndarray]:
        """Where sequences begin and end."""
        return tuple(
            np.concatenate([[0], np.cumsum(lens)]).astype(self.index)
            for lens in (self.lens_q, self.lens_k)
        )

    def sequences(self) -> Iterator[tuple[int, int, int, slice, slice]]:
        """(number, rows, keys, where its rows are packed, where its keys are) of every sequence."""
        starts = zip(*(cu[:-1].tolist() for cu in self.cu_seqlens()), strict=True)
        for b, (at_q, at_k) in enumerate(starts):
            n, m = self.lens_q[b], self.lens_k[b]
            yield b, n, m, slice(at_q, at_q + n), slice(at_k, at_k + m)

    def pack(self, x: np.ndarray, *, keys: bool = False) -> np.ndarray:
        """(batch, H, L, ...) to (H, total, ...), NaN behind the end."""
        total = sum(self.lens_k if keys else self.lens_q) + (self.tail_k if keys else self.tail_q)
        result = np.full((x.shape[1], total, *x.shape[3:]), np.nan, x.dtype)
        for b, n, m, at_q, at_k in self.sequences():
            result[:, at_k if keys else at_q] = x[b, :, : m if keys else n]
        return result

    def options(self) -> dict[str, Any]:
        """max_seqlen_*, where given."""
        case = self.batched
        if self.longer is None:
            return {}
        return {"max_seqlen_q": case.len_q, "max_seqlen_k": case.len_k}


@dataclass(frozen=True)
class PackedAnswer:
    """The data of the batch, the exact result, and the plain formula's, both packed."""

    data: Data
    exact: oracle.Exact
    honest: dict[str, np.ndarray]


def _cut(x: Any, b: int, n: int, m: int) -> Any:
    """The part of an array that broadcasts to (batch, H, Lq, Lk) that sequence `b` meets."""
    lead = (slice(b, b + 1),) if x.ndim == 4 and x.shape[0] > 1 else (slice(None),) * (x.ndim == 4)
    middle = (slice(None),) * (x.ndim - 2 - len(lead))
    rows, keys = (
        slice(k) if e > 1 else slice(None) for k, e in zip((n, m), x.shape[-2:], strict=True)
    )
    return (*lead, *middle, rows, keys)


@functools.lru_cache(maxsize=16)
def answer(packed: Packed, dlse: bool = True) -> PackedAnswer:
    """Each sequence by the oracle on its own, put together."""
    case = packed.batched
    data = case.data()
    options = oracle_options(case, data)
    totals = {"q": sum(packed.lens_q) + packed.tail_q, "k": sum(packed.lens_k) + packed.tail_k}
    shapes = {
        "q": (case.heads, totals["q"], data.q.shape[-1]),
        "k": (data.k.shape[1], totals["k"], data.k.shape[-1]),
        "v": (data.v.shape[1], totals["k"], data.v.shape[-1]),
        "out": (case.heads, totals["q"], data.v.shape[-1]),
    }
    wrt = names_of_gradients(data)
    shapes |= {n: getattr(data, n).shape for n in wrt if n not in shapes and hasattr(data, n)}
    if data.score_mod is not None:
        shapes |= {f"score_{n}": x.shape for n, x in data.score_mod.arrays().items()}
    tables = {
        part: {name: np.zeros(shape) for name, shape in shapes.items()}
        for part in ("grads", "gross", "inherited", "honest")
    }
    lse = np.full((case.heads, totals["q"]), -np.inf)
    for b, n, m, at_q, at_k in packed.sequences():
        q, dout, lse_grad = (
            data.q[b : b + 1, :, :n],
            data.dout[b : b + 1, :, :n],
            data.dlse[b : b + 1, :, :n],
        )
        k, v = data.k[b : b + 1, :, :m], data.v[b : b + 1, :, :m]
        own = {**options, "first_batch": b}
        where: dict[str, Any] = dict.fromkeys(shapes, ...)
        where |= {
            "q": np.s_[:, at_q],
            "out": np.s_[:, at_q],
            "k": np.s_[:, at_k],
            "v": np.s_[:, at_k],
        }
        for name in ("mask", "bias", "keep"):
            if name in own:
                own[name] = own[name][_cut(own[name], b, n, m)]
        if "bias" in own:
            where["bias"] = _cut(options["bias"], b, n, m)
        if "alibi_slopes" in own and own["alibi_slopes"].ndim == 2:
            own["alibi_slopes"] = own["alibi_slopes"][b : b + 1]
            where["alibi_slopes"] = np.s_[b : b + 1]
        given = lse_grad if dlse else None
        exact = oracle.exact(q, k, v, dout, dlse=given, **own)
        honest = oracle.low_precision(q, k, v, dout, dlse=given, **own)
        parts = {"grads": exact.grads, "gross": exact.gross, "inherited": exact.inherited}
        parts["grads"]["out"] = exact.out
        for part, values in {**parts, "honest": honest}.items():
            for name, value in values.items():
                single = value[0] if name in ("q", "k", "v", "out") else value
                tables[part][name][where[name]] += single
        lse[:, at_q] = exact.lse[0]
    out = tables["grads"].pop("out")
    pairs = case.heads * sum(n * m for n, m in zip(packed.lens_q, packed.lens_k, strict=True))
    parts = (tables[part] for part in ("grads", "gross", "inherited"))
    exact = oracle.Exact(out, lse, *parts, pairs, dropped=bool(case.dropout))
    return PackedAnswer(data, exact, tables["honest"])


def arrays(packed: Packed, data: Data) -> dict[str, np.ndarray]:
    """q, k, v, dout and dlse, packed, (H, total, ...)."""
    keys = {"k", "v"}
    names = ("q", "k", "v", "dout", "dlse")
    return {n: packed.pack(getattr(data, n), keys=n in keys) for n in names}


def check(
    machine: Any,
    packed: Packed,
    *,
    gradients: bool = True,
    dlse: bool = True,
    deterministic: bool = False,
) -> tuple[Any, Any, Any]:
    """Run a packed case through the public API, compare all it returns by rule T, and return that."""
    want, case = answer(packed, dlse), packed.batched
    layout = case.layout
    given = arrays(packed, want.data)
    q, k, v, dout = (arranged(given[n], layout) for n in ("q", "k", "v", "dout"))
    options = public_options(case, want.data, machine) | packed.options()
    if layout != "HLD":
        options["layout"] = layout
    cu = packed.cu_seqlens()
    out, lse = machine.varlen(q, k, v, *cu, **options, return_lse=True)
    grads, got = {}, None
    if gradients:
        wrt = names_of_gradients(want.data)
        run = {"dlse": given["dlse"] if dlse else None, "wrt": wrt, "deterministic": deterministic}
        got = machine.varlen_backward(dout, q, k, v, out, lse, *cu, **run, **options)
        grads = gradients_by_name(got, want.data, wrt)
        grads |= {n: standard(grads[n], layout) for n in ("q", "k", "v")}
    text = f"{machine.name}: {packed!r}"
    out = standard(out, layout)
    oracle.check_all(text, want.exact, want.honest, case.numpy_dtype, out=out, lse=lse, grads=grads)
    end_q, end_k = sum(packed.lens_q), sum(packed.lens_k)
    assert (out[:, end_q:] == 0).all() and np.isneginf(lse[:, end_q:]).all(), text
    for name, end in (("q", end_q), ("k", end_k), ("v", end_k)):
        assert name not in grads or (grads[name][:, end:] == 0).all(), (name, text)
    return out, lse, got
