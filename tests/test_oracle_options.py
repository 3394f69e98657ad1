"""The yardsticks for masks, biases, sinks, dropout, score functions and packed sequences, themselves tested."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests import oracle, packed, philox
from tests.case import DTYPES, Case, answer, oracle_options
from tests.option_data import BIASES, MASKS, axes, expanded
from tests.scores import LIBRARY

BASE = Case(
    dtype="float64", batch=(2,), heads=4, heads_kv=2, len_q=5, len_k=6, head_dim=3, head_dim_v=2
)
ALONE = [
    *(replace(BASE, mask=kind, block=(2, 3)) for kind in MASKS),
    *(replace(BASE, bias=code) for code in BIASES),
    replace(BASE, sinks="own"),
    replace(BASE, dropout=0.4),
    *(replace(BASE, score_mod=name) for name in LIBRARY),
]
TOGETHER = [
    replace(
        BASE,
        causal=True,
        mask=mask,
        block=(2, 3),
        bias=bias,
        bias_inf=True,
        sinks="own",
        dropout=0.3,
        score_mod=name,
        softcap=2.0,
        alibi="H",
        scale=-0.4,
        seed=seed,
    )
    for seed, (name, mask, bias) in enumerate(
        zip(
            LIBRARY,
            ("dense", "rows", "keys", "blocks"),
            ("1H1k", "BHqk", "q1", "B1qk"),
            strict=False,
        )
    )
]


@pytest.mark.parametrize("case", ALONE + TOGETHER, ids=str)
def test_gradients_are_slopes(case: Case) -> None:
    """Every gradient against central differences of `sum(out * dout) + sum(lse * dlse)`."""
    data = case.data()
    options = oracle_options(case, data)
    arrays = {"q": data.q, "k": data.k, "v": data.v}
    arrays |= {n: options.pop(n) for n in ("bias", "alibi_slopes", "sinks") if n in options}
    twin = options.pop("score_mod", None)
    if twin is not None:
        arrays |= {f"score_{name}": x for name, x in twin.arrays().items()}

    def loss(**moved: np.ndarray) -> float:
        given = {**arrays, **moved}
        params = {n: given.pop(f"score_{n}") for n in (twin.arrays() if twin else ())}
        mod = {} if twin is None else {"score_mod": twin.having(**params)}
        out, lse = oracle.forward(**given, **options, **mod)
        finite = np.where(np.isfinite(lse), lse * data.dlse, 0)
        return float((out * data.dout).sum() + finite.sum())

    mod = {} if twin is None else {"score_mod": twin}
    given = {n: x for n, x in arrays.items() if not n.startswith("score_")}
    grads = oracle.backward(data.dout, **given, dlse=data.dlse, **options, **mod)
    assert grads.keys() == arrays.keys()
    rng = np.random.default_rng(0)
    for name, x in arrays.items():
        assert grads[name].shape == x.shape
        assert np.abs(grads[name]).max() > 1e-3, name
        for _ in range(3):
            way, step = rng.standard_normal(x.shape), 1e-5
            slope = (loss(**{name: x + step * way}) - loss(**{name: x - step * way})) / (2 * step)
            told = float((grads[name] * way).sum())
            assert slope == pytest.approx(told, rel=1e-6, abs=1e-8), name


def museum(q: Any, k: Any, v: Any, dout: Any, dlse: Any, o: dict[str, Any]) -> dict[str, Any]:
    """The formulas for whole arrays: weights P, factors Z, and `dS = P * (dP - delta)`, equal heads."""
    scale = q.shape[-1] ** -0.5
    scores = scale * np.einsum("bhid,bhjd->bhij", q, k) + o.get("bias", 0.0)
    seen = oracle.visible(q.shape[-2], k.shape[-2], causal=o.get("causal", False)) & o.get(
        "mask", True
    )
    weights = np.where(seen, np.exp(scores), 0.0)
    sink = np.exp(o["sinks"])[:, None, None] if "sinks" in o else 0.0
    total = weights.sum(-1, keepdims=True) + sink
    weights = weights / np.where(total == 0, 1, total)
    z = np.where(o.get("keep", True), 1 / (1 - o.get("dropout_p", 0.0)), 0.0)
    out = np.einsum("bhij,bhjd->bhid", weights * z, v)
    dweights = np.einsum("bhid,bhjd->bhij", dout, v) * z
    delta = (dout * out).sum(-1, keepdims=True) - dlse[..., None]
    ds = weights * (dweights - delta)
    grads = {
        "q": scale * np.einsum("bhij,bhjd->bhid", ds, k),
        "k": scale * np.einsum("bhij,bhid->bhjd", ds, q),
        "v": np.einsum("bhij,bhid->bhjd", weights * z, dout),
        "bias": ds,
        "sinks": -(sink / np.where(total == 0, 1, total) * delta).sum((0, 2, 3)),
    }
    with np.errstate(divide="ignore"):
        return {"out": out, "lse": np.log(total)[..., 0], **grads}


MIXED = itertools.product((None, "dense", "rows"), (None, "BHqk"), (None, "own"), (0.0, 0.4))


@pytest.mark.parametrize(("mask", "bias", "sinks", "dropout"), list(MIXED))
def test_against_whole_array_formulas(
    mask: str | None, bias: str | None, sinks: str | None, dropout: float
) -> None:
    case = replace(
        BASE, heads_kv=4, causal=True, mask=mask, bias=bias, sinks=sinks, dropout=dropout
    )
    data = case.data()
    given = oracle_options(case, data)
    want = museum(data.q, data.k, data.v, data.dout, data.dlse, given)
    got = oracle.exact(data.q, data.k, data.v, data.dout, dlse=data.dlse, **given)
    np.testing.assert_allclose(got.out, want["out"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.lse, want["lse"], rtol=1e-12)
    for name, grad in got.grads.items():
        np.testing.assert_allclose(grad, want[name], rtol=1e-10, atol=1e-13, err_msg=name)


def test_a_sink_is_one_more_key_with_value_zero() -> None:
    data = replace(BASE, heads_kv=4).data()
    sinks = np.array([0.3, -1.0, 2.0, 5.0])
    with_sink = oracle.exact(data.q, data.k, data.v, data.dout, dlse=data.dlse, sinks=sinks)
    # The extra key scores 0, the bias makes it the sink.
    k, v = (np.concatenate([x, 0 * x[:, :, :1]], axis=2) for x in (data.k, data.v))
    bias = np.zeros((4, 1, 7))
    bias[:, 0, 6] = sinks
    key = oracle.exact(data.q, k, v, data.dout, dlse=data.dlse, bias=bias)
    np.testing.assert_allclose(with_sink.out, key.out, rtol=1e-12)
    np.testing.assert_allclose(with_sink.lse, key.lse, rtol=1e-12)
    np.testing.assert_allclose(with_sink.grads["sinks"], key.grads["bias"][:, 0, 6], rtol=1e-12)
    np.testing.assert_allclose(with_sink.grads["k"], key.grads["k"][:, :, :6], rtol=1e-12)


def test_rows_without_keys() -> None:
    data = replace(BASE, sinks="own").data()
    mask = np.ones((5, 6), bool)
    mask[1] = False
    for sinks in (None, data.sinks):
        got = oracle.exact(
            data.q, data.k, data.v, data.dout, dlse=data.dlse, mask=mask, sinks=sinks
        )
        empty = -np.inf if sinks is None else np.broadcast_to(sinks, (2, 4))
        np.testing.assert_array_equal(got.lse[:, :, 1], np.broadcast_to(empty, (2, 4)))
        assert (got.out[:, :, 1] == 0).all() and (got.grads["q"][:, :, 1] == 0).all()
        assert all(np.isfinite(x).all() for x in got.grads.values())


def test_what_a_bias_may_hold() -> None:
    """-inf hides a pair and has gradient 0; +inf and NaN give a NaN row and touch no other."""
    data = BASE.data()
    bias = np.zeros((5, 6))
    bias[1, :4], bias[2] = -np.inf, -np.inf
    mask = np.isfinite(bias)
    hidden = oracle.exact(data.q, data.k, data.v, data.dout, dlse=data.dlse, bias=bias)
    masked = oracle.exact(data.q, data.k, data.v, data.dout, dlse=data.dlse, mask=mask)
    np.testing.assert_array_equal(hidden.out, masked.out)
    np.testing.assert_array_equal(hidden.lse, masked.lse)
    np.testing.assert_array_equal(hidden.grads["k"], masked.grads["k"])
    assert (hidden.grads["bias"][~mask] == 0).all()
    for value in (np.inf, np.nan):
        bias = np.zeros((5, 6))
        bias[3, 2] = value
        got = oracle.exact(data.q, data.k, data.v, data.dout, bias=bias)
        nan = np.isnan(got.out).all(axis=-1)
        assert nan[:, :, 3].all() and not nan[:, :, [0, 1, 2, 4]].any()


@pytest.mark.parametrize("name", LIBRARY)
def test_twins_know_their_own_derivatives(name: str) -> None:
    """By complex steps in s and in every parameter: no subtraction, so to the last digits."""
    twin = LIBRARY[name].of(2, 4, 5, 6, dtype=np.float64, seed=1)
    place = 1, 2, np.arange(5)[:, None], np.arange(6)
    s, tiny = np.random.default_rng(0).standard_normal((5, 6)), 1e-30
    slope, partials = twin.derivatives(s, *place)
    moved = twin.value(s + 1j * tiny, *place)
    np.testing.assert_allclose(np.broadcast_to(slope, s.shape), moved.imag / tiny, rtol=1e-12)
    assert {entry[0] for entry in partials} == set(twin.arrays())
    for param, x in twin.arrays().items():
        grads = np.zeros((*x.shape, *s.shape))
        for entry, at, part in partials:
            if entry == param:
                at = np.broadcast_arrays(*at, s)[:-1]
                np.add.at(grads, (*at, *np.indices(s.shape)), np.broadcast_to(part, s.shape))
        for at in np.ndindex(x.shape):
            step = x.astype(complex)
            step[at] += 1j * tiny
            moved = twin.having(**{param: step}).value(s, *place)
            np.testing.assert_allclose(grads[at], moved.imag / tiny, rtol=1e-12, atol=1e-15)


def test_philox_known_answers() -> None:
    """Vectors that the authors publish with Random123 (kat_vectors, philox4x32 10)."""
    full, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, words in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((full,) * 4, (full, full), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        got = philox.philox([np.array(c) for c in counter], key)
        assert tuple(int(word) for word in got) == words


def test_the_keep_mask_is_a_function_of_its_element() -> None:
    whole = philox.keep_mask(2**63 + 5, 0.3, 3, 4, 10, 11)
    assert whole.shape == (3, 4, 10, 11)
    np.testing.assert_array_equal(
        whole[1:, :2, :5, :3], philox.keep_mask(2**63 + 5, 0.3, 2, 2, 5, 3, first_batch=1)
    )
    assert philox.keep_mask(1, 0.0, 1, 1, 9, 9).all()
    # The least and the greatest p that are not 0 and 1.
    assert philox.keep_mask(1, 5e-324, 1, 1, 99, 99).all()
    assert not philox.keep_mask(1, 1 - 2**-53, 1, 1, 99, 99).any()


def test_bias_codes_and_blocks() -> None:
    case = Case(batch=(2, 3), heads=4, len_q=5, len_k=6)
    assert axes("BHqk", case) == (2, 3, 4, 5, 6)
    assert axes("1H1k", case) == (1, 1, 4, 1, 6)
    assert axes("Hqk", case) == (4, 5, 6) and axes("q1", case) == (5, 1)
    blocks = np.array([[True, False], [False, True], [True, True]])
    rows = ["1110", "1110", "0001", "0001", "1111"]
    assert ["".join(map(str, r)) for r in expanded(blocks, (5, 4), (2, 3)).astype(int)] == rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_honest_computation_is_near(dtype: str) -> None:
    """All options at once, right to a few roundings of the dtype; it need not share the exact one's mistakes."""
    for case in TOGETHER:
        case = replace(case, dtype=dtype, len_q=40, len_k=50, head_dim=16)
        want = answer(case)
        step = oracle.eps(case.numpy_dtype)
        assert want.honest.keys() == {"out", *want.exact.grads}
        for name, honest in want.honest.items():
            truth = want.exact.out if name == "out" else want.exact.grads[name]
            assert np.abs(honest - truth).max() < 20 * step * want.exact.gross[name].max(), name


@pytest.mark.parametrize("name", ["bias", "sinks", "score_decay"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_rule_for_summed_gradients_can_say_no(name: str, dtype: str) -> None:
    """A key tile left out of the sum, a sign, a forgotten dlse: none passes."""
    case = Case(
        dtype=dtype, len_q=200, len_k=190, bias="1H1k", sinks="float32", score_mod="relative"
    )
    want, without = answer(case), answer(case, dlse=False)
    grad, gold = (answers.exact.grads[name] for answers in (without, want))

    def judge(x: np.ndarray) -> None:
        got = {name: x.astype(np.float32)}
        oracle.check_all("planted", want.exact, want.honest, case.numpy_dtype, grads=got)

    judge(gold)
    cut = case.data().dlse.copy()
    cut[..., 128:] = 0
    part = oracle.backward(
        *(getattr(want.data, n) for n in ("dout", "q", "k", "v")),
        dlse=cut,
        **oracle_options(case, want.data),
    )
    for wrong in (grad, -gold, 0 * gold, part[name]):
        with pytest.raises(AssertionError, match="exceeds"):
            judge(wrong)


def test_the_packed_oracle_is_the_batch_of_equal_lengths() -> None:
    """Sequences of equal lengths are a batch; shorter ones are what they are alone."""
    case = replace(BASE, bias="B1qk", mask="dense", sinks="own", dropout=0.3, score_mod="branch")
    whole = packed.Packed((5, 5), (6, 6), replace(case, alibi="BH"))
    want, got = answer(whole.batched), packed.answer(whole)
    np.testing.assert_array_equal(got.exact.out, whole.pack(want.exact.out))
    np.testing.assert_array_equal(got.exact.lse, whole.pack(want.exact.lse))
    for name, grad in got.exact.grads.items():
        full = want.exact.grads[name]
        full = whole.pack(full, keys=name != "q") if name in "qkv" else full
        np.testing.assert_allclose(grad, full, rtol=1e-12, atol=1e-15, err_msg=name)
    assert got.honest.keys() == want.honest.keys()
    assert got.exact.pairs == want.exact.pairs
    cut = packed.Packed((5, 0, 3), (0, 6, 4), replace(case, causal=True), tail_q=2, tail_k=3)
    got = packed.answer(cut)
    assert cut.pack(got.data.q).shape == (4, 10, 3)
    assert np.isnan(cut.pack(got.data.k, keys=True)[:, 10:]).all()
    sinks = np.broadcast_to(got.data.sinks[:, None], (4, 5))
    np.testing.assert_array_equal(got.exact.lse[:, :5], sinks)
    assert (got.exact.out[:, :5] == 0).all() and (got.exact.grads["k"][:, :6] == 0).all()
    last = oracle.exact(
        *(getattr(got.data, n)[2:, :, :3] for n in "q"),
        *(getattr(got.data, n)[2:, :, :4] for n in "kv"),
        causal=True,
        bias=got.data.bias[2:, :, :3, :4],
        mask=got.data.mask.dense[2:, :, :3, :4],
        keep=oracle_options(cut.batched, got.data)["keep"][2:, :, :3, :4],
        dropout_p=0.3,
        sinks=got.data.sinks,
        score_mod=got.data.score_mod,
        first_batch=2,
    )
    np.testing.assert_array_equal(got.exact.out[:, 5:8], last.out[0])
    assert np.isneginf(got.exact.lse[:, 8:]).all()
