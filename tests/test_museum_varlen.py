"""Museum family H, packed sequences: each is what it is alone; others' bugs by number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cuflash
from tests import oracle, packed
from tests.case import Case, public_options
from tests.machines import Emulator, Machine, Numpy, normal, same_bits
from tests.packed import Packed

BASE = Case(heads=2, heads_kv=1, head_dim=64)
# A sequence without keys, one without rows, one of neither, and short ones before long ones.
LENS = (5, 0, 130, 1, 0, 0), (0, 7, 129, 0, 0, 3)


def call(machine: Machine, case: Packed, **changes: Any) -> list[Any]:
    """out, lse and gradients of the packed arrays, some arguments changed."""
    given = packed.arrays(case, packed.answer(case).data) | changes
    options = public_options(case.batched, packed.answer(case).data, machine) | case.options()
    options |= {n: x for n, x in changes.items() if n not in ("q", "k", "v", "dout", "dlse")}
    cu_q, cu_k = (
        options.pop("cu_q", case.cu_seqlens()[0]),
        options.pop("cu_k", case.cu_seqlens()[1]),
    )
    q, k, v, dout = (given[n] for n in ("q", "k", "v", "dout"))
    out, lse = machine.varlen(q, k, v, cu_q, cu_k, return_lse=True, **options)
    run = {"deterministic": True, "dlse": given["dlse"], **options}
    grads = machine.varlen_backward(dout, q, k, v, out, lse, cu_q, cu_k, **run)
    return [out, lse, *grads[:3]]


# ---- H1: lengths of zero


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("order", [1, -1], ids=["forth", "back"])
def test_H1_sequences_of_nothing_anywhere(backend: Machine, causal: bool, order: int) -> None:
    lens = (LENS[0][::order], LENS[1][::order])
    packed.check(backend, Packed(*lens, replace(BASE, causal=causal)), deterministic=True)


@pytest.mark.parametrize("lens", [((0,), (0,)), ((0, 0), (5, 0)), ((4, 0), (0, 0)), ((3,), (9,))])
def test_H1_nothing_at_all(backend: Machine, lens: Any) -> None:
    packed.check(backend, Packed(*lens, BASE))
    packed.check(backend, Packed(*lens, BASE, tail_q=2, tail_k=1))


def test_H1_no_sequence_at_all(backend: Machine) -> None:
    q, k = np.zeros((2, 0, 64), np.float16), np.zeros((1, 0, 64), np.float16)
    start = np.zeros(1, np.int32)
    out, lse = backend.varlen(q, k, k, start, start, return_lse=True)
    assert out.shape == (2, 0, 64) and lse.shape == (2, 0)
    grads = backend.varlen_backward(q, q, k, k, out, lse, start, start)
    assert grads.q.shape == q.shape and grads.k.shape == k.shape
    # Rows, but no sequence that they belong to.
    q = np.full((2, 3, 64), np.nan, np.float16)
    out, lse = backend.varlen(q, k, k, start, start, return_lse=True)
    assert (out == 0).all() and np.isneginf(lse).all()


@pytest.mark.parametrize(
    "options",
    [
        {"window": (20, 3)},
        {"causal": True, "q_offset": 0},
        {"alibi": "BH", "softcap": 3.0},
        {"mask": "dense", "bias": "B1qk"},
        {"mask": "keys", "bias": "1H1k", "bias_dtype": "float32"},
        {"mask": "blocks", "block": (32, 48), "causal": True},
        {"sinks": "own", "dropout": 0.3},
        {"layout": "LHD", "head_dim": 40, "causal": True},
    ],
    ids=str,
)
def test_each_sequence_is_what_it_is_alone(backend: Machine, options: dict[str, Any]) -> None:
    packed.check(backend, Packed(*LENS, replace(BASE, **options), tail_q=3), deterministic=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_option_packed_on_numpy(dtype: str) -> None:
    everything = replace(BASE, dtype=dtype, causal=True, sinks="own", dropout=0.2, softcap=3.0)
    for name, kind, bias in (
        ("table", "tiles", "qk"),
        ("branch", "blocks_partial", "BHqk"),
        ("gates", "heads", "q1"),
    ):
        case = replace(everything, score_mod=name, mask=kind, bias=bias, block=(32, 48))
        packed.check(Numpy(), Packed(*LENS, case, tail_q=1, tail_k=9, longer=4))


# ---- A11, H3, H5, H9, H11


def test_A11_H1_far_more_queries_than_keys(backend: Machine) -> None:
    """cu_q 0 76 110 256, cu_k 0 1 2 3, everything times three."""
    case = replace(BASE, causal=True, magnitude=3.0, shift=0.0)
    out, _, grads = packed.check(backend, Packed((76, 34, 146), (1, 1, 1), case))
    assert np.isfinite(out.astype(float)).all()
    assert grads is not None
    assert all(np.isfinite(x.astype(float)).all() for x in grads[:3])


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 6e4])
def test_H3_what_lies_behind_the_end_never_matters(backend: Machine, garbage: float) -> None:
    """Rows behind cu_seqlens[-1]: inputs stay, results are 0, and their contents reach nothing."""
    case = Packed(*LENS, replace(BASE, causal=True), tail_q=37, tail_k=37)
    clean = {
        n: np.where(np.isnan(x), 0, x).astype(x.dtype)
        for n, x in packed.arrays(case, packed.answer(case).data).items()
    }
    want = call(backend, case, **clean)
    dirty = {n: x.copy() for n, x in clean.items()}
    for name, x in dirty.items():
        end = sum(case.lens_k if name in "kv" else case.lens_q)
        x[:, end:] = garbage
    before = {n: x.copy() for n, x in dirty.items()}
    got = call(backend, case, **dirty)
    assert all(map(same_bits, got, want))
    assert all(same_bits(dirty[n], before[n]) for n in dirty)
    assert (got[0][:, sum(case.lens_q) :] == 0).all()


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_what_a_neighbour_holds_never_matters(backend: Machine, garbage: float) -> None:
    """Tiles run over the end of a sequence into the next one's rows and keys."""
    case = Packed((40, 70, 9), (33, 50, 70), BASE)
    data = packed.arrays(case, packed.answer(case).data)
    want = call(backend, case, **data)
    dirty = {n: x.copy() for n, x in data.items()}
    for n, x in dirty.items():
        _, _, _, at_q, at_k = list(case.sequences())[1]
        x[:, at_k if n in "kv" else at_q] = garbage
    got = call(backend, case, **dirty)
    for place, keys in ((0, False), (1, False), (2, False), (3, True), (4, True)):
        for b, _, _, at_q, at_k in case.sequences():
            at = at_k if keys else at_q
            assert b == 1 or same_bits(got[place][:, at], want[place][:, at]), (place, b)


@pytest.mark.parametrize("longer", [None, 0, 1, 1300])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_H5_a_bound_may_be_too_large(backend: Machine, longer: int | None, index: str) -> None:
    exactly = Packed(*LENS, BASE)
    want = call(backend, exactly)
    bounds: dict[str, Any] = {}
    if longer is not None:
        bounds = {"max_seqlen_q": 130 + longer, "max_seqlen_k": np.int64(129 + longer)}
    case = replace(exactly, longer=None, index=index)
    got = call(backend, case, **bounds)
    assert all(map(same_bits, got, want))


@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_H5_a_bound_that_is_too_small_is_never_silent(backend: Machine, name: str) -> None:
    """An error where the host can see lengths; on a GPU the sequence that does not fit is NaN."""
    case = Packed((5, 40, 130), (7, 60, 129), BASE)
    given = packed.arrays(case, packed.answer(case).data)
    bound = {**case.options(), name: 64}
    arrays = given["q"], given["k"], given["v"], *case.cu_seqlens()
    if backend.name != "cupy":
        with pytest.raises(
            ValueError, match=rf"{name} is 64, and cu_seqlens_. has a sequence of 1"
        ):
            backend.varlen(*arrays, **bound)
        return
    out = backend.varlen(*arrays, **bound)
    assert np.isnan(out[:, 45:].astype(float)).all()


def test_H7_cu_seqlens_of_any_strides(backend: Machine) -> None:
    """A column of a table, reversed, misplaced in memory: read as what it is."""
    case = Packed(*LENS, replace(BASE, causal=True))
    want = call(backend, case)
    cu_q, cu_k = case.cu_seqlens()
    table = np.full((len(cu_q), 3), -7, np.int32)
    table[:, 1] = cu_q
    backwards = cu_k[::-1].copy()[::-1]
    got = call(backend, case, cu_q=table[:, 1], cu_k=backwards)
    assert all(map(same_bits, got, want))


def test_H9_thousands_of_tiny_sequences() -> None:
    """20000 sequences of 0 to 3 rows, in one call; each is its own."""
    rng = np.random.default_rng(9)
    lens = rng.integers(0, 4, (2, 20000))
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in lens)
    q = normal(rng, 2, int(cu_q[-1]), 8, dtype="float32")
    k, v = (normal(rng, 1, int(cu_k[-1]), 8, dtype="float32") for _ in range(2))
    run = {"max_seqlen_q": 3, "max_seqlen_k": 3, "causal": True}
    out, lse = cuflash.attention_varlen(q, k, v, cu_q, cu_k, return_lse=True, **run)
    grads = cuflash.attention_varlen_backward(q, q, k, v, out, lse, cu_q, cu_k, **run)
    for b in (0, 1, 77, 10000, 19998, 19999):
        at_q, at_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        args = q[:, at_q], k[:, at_k], v[:, at_k]
        want = oracle.exact(*args, q[:, at_q], causal=True)
        np.testing.assert_allclose(out[:, at_q], want.out, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[:, at_q], want.lse, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(grads.q[:, at_q], want.grads["q"], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(grads.k[:, at_k], want.grads["k"], rtol=1e-4, atol=1e-5)


def test_H9_many_tiny_sequences_in_the_emulator() -> None:
    rng = np.random.default_rng(10)
    lens = tuple(tuple(n.tolist()) for n in rng.integers(0, 4, (2, 60)))
    with Emulator() as machine:
        packed.check(machine, Packed(*lens, replace(BASE, causal=True)))


def test_H11_repeated_ends_are_empty_sequences(backend: Machine) -> None:
    """cu_seqlens of a longer batch, filled up with its end: as if they were not there."""
    case = Packed(*LENS, BASE, longer=None)
    want = call(backend, case)
    filled = [np.concatenate([cu, np.repeat(cu[-1:], 5)]) for cu in case.cu_seqlens()]
    got = call(backend, case, cu_q=filled[0], cu_k=filled[1])
    assert all(map(same_bits, got, want))


# ---- the rest of the contract


def test_G9_packed_gradients_are_reproducible() -> None:
    """In any order of threads, with tiles skipped by causal and by length."""
    case = Packed(*LENS, replace(BASE, causal=True, sinks="own", dropout=0.2))
    runs = []
    for seed in (0, 5, 11):
        with Emulator(seed=seed) as machine:
            out, lse, grads = packed.check(machine, case, deterministic=True)
            assert grads is not None
            runs.append([out, lse, *grads[:3], grads.sinks])
    for other in runs[1:]:
        assert all(map(same_bits, runs[0], other))


def test_packed_equals_alone_without_packing(backend: Machine) -> None:
    """The public functions against each other: no oracle between."""
    case = Packed((70, 33), (129, 40), replace(BASE, causal=True), longer=None)
    data = packed.answer(case).data
    together = call(backend, case)
    for b, n, m, at_q, at_k in case.sequences():
        q, dout = data.q[b, :, :n], data.dout[b, :, :n]
        k, v = data.k[b, :, :m], data.v[b, :, :m]
        out, lse = backend.attention(q, k, v, causal=True, return_lse=True)
        run = {"dlse": data.dlse[b, :, :n], "causal": True, "deterministic": True}
        grads = backend.backward(dout, q, k, v, out, lse, **run)
        for got, want, at in zip(
            together, (out, lse, *grads[:3]), (at_q, at_q, at_q, at_k, at_k), strict=True
        ):
            got, want = got[:, at].astype(float), want.astype(float)
            assert np.allclose(got, want, rtol=2e-3, atol=2e-3)


def test_vjp_of_packed_sequences(backend: Machine) -> None:
    case = Packed(*LENS, replace(BASE, causal=True, sinks="own", dropout=0.2), tail_q=2)
    data = packed.answer(case).data
    given = packed.arrays(case, data)
    q, k, v, dout = (backend.put(given[n]) for n in ("q", "k", "v", "dout"))
    cu = [backend.put(x) for x in case.cu_seqlens()]
    run = {"causal": True, "sinks": backend.put(data.sinks), **case.options()}
    run |= {"dropout_p": 0.2, "seed": case.batched.dropout_seed}
    out, pullback = cuflash.attention_varlen_vjp(
        q, k, v, *cu, wrt=("q", "k", "v", "sinks"), deterministic=True, **run
    )
    grads = pullback(dout, backend.put(given["dlse"]))
    want = call(backend, case)
    assert same_bits(backend.get(out), want[0])
    assert all(same_bits(backend.get(a), b) for a, b in zip(grads[:3], want[2:], strict=True))
    assert np.allclose(
        backend.get(grads.sinks).astype(float),
        packed.answer(case).exact.grads["sinks"],
        rtol=5e-3,
        atol=5e-3,
    )


def test_out_is_written_and_nothing_beside_it(host_backend: Machine) -> None:
    """out= inside a larger buffer; every row written, the tail with zeros, no byte around it."""
    case = Packed(*LENS, replace(BASE, causal=True), tail_q=5)
    given = packed.arrays(case, packed.answer(case).data)
    want = call(host_backend, case)[0]
    guard = 4096
    memory = np.full(2 * guard + want.nbytes, 0x7F, np.uint8)
    out = memory[guard : guard + want.nbytes].view(want.dtype).reshape(want.shape)
    run = {"causal": True, "out": out, **case.options()}
    q, k, v = (given[n] for n in "qkv")
    assert cuflash.attention_varlen(q, k, v, *case.cu_seqlens(), **run) is out
    assert same_bits(out, want)
    assert (memory[:guard] == 0x7F).all() and (memory[guard + want.nbytes :] == 0x7F).all()


def test_rows_are_walked_once_however_they_are_packed() -> None:
    """Work follows the sum of the lengths, not the batch times the longest: matrix instructions count it."""
    rng = np.random.default_rng(0)

    def products(lens: list[int]) -> int:
        q, k, v = (normal(rng, 1, sum(lens), 64) for _ in range(3))
        cu = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        bound = {"max_seqlen_q": 256, "max_seqlen_k": 256}
        with Emulator(seed=0) as machine:
            machine.device.count = True
            out, lse = machine.varlen(q, k, v, cu, cu, return_lse=True, **bound)
            machine.varlen_backward(q, q, k, v, out, lse, cu, cu, **bound)
            return sum(counters.count("mma") for _, _, counters in machine.device.launches)

    one = products([256])
    # Sequences of 128 have a quarter of the pairs of one of 256.
    assert products([256, 0, 128, 0, 128]) * 2 == one * 3
