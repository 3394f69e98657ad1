"""Every option of the NumPy backend alone, in pairs and all together: results, gradients, threads.

Compared with `tests.dense` in float64, with tiles so small that every case crosses many of their edges.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuflash import _cpu, _cpu_backward, _cpu_forward, _cpu_sums, _cpu_tiles
from cuflash._dropout import Dropout, dropout_mask
from cuflash._options import Options
from tests.cpu_calls import (
    EVERYTHING,
    NAMES,
    SEED,
    TINY,
    P,
    argument,
    call_of,
    check,
    cotangents,
    flat,
    options_of,
    run,
    shrink_tiles,
    with_argument,
    wrt_of,
)
from tests.dense import Dense


@pytest.fixture(params=TINY, ids=str)
def tiny_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_tiles(monkeypatch, *request.param)


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("name", NAMES)
def test_each_option(name: str) -> None:
    check(*call_of((name,)))


COVERING = [
    pair for pair in itertools.combinations(NAMES, 2) if len({n.split("_")[0] for n in pair}) == 2
    and set(pair) not in ({"causal", "window"}, {"mask", "blocks"}, {"mask", "blocks_shared"},
                          {"mask_keys", "blocks"}, {"mask_keys", "blocks_shared"})
]  # fmt: skip


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("names", COVERING, ids="-".join)
def test_pairs_of_options(names: tuple[str, ...]) -> None:
    check(*call_of(names, seed=1))


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("mask", ["mask", "blocks", "blocks_shared"])
@pytest.mark.parametrize("bias", ["bias", "bias_shared", "bias_keys"])
def test_all_options_together(mask: str, bias: str) -> None:
    names = [{"mask": mask, "bias_shared": bias}.get(name, name) for name in EVERYTHING]
    check(*call_of(tuple(names), seed=2))


@pytest.mark.parametrize(
    "names",
    [("bias", "causal"), ("bias_shared", "mask"), ("bias_keys", "sinks"), ("score_mod", "window"),
     ("dropout", "blocks"), ("sinks", "dropout"), ("alibi", "mask"), EVERYTHING],
    ids="-".join,
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(names: tuple[str, ...]) -> None:
    """Along random directions in every argument: the formula's forward against the backend's backward."""
    dense, options = call_of(names, seed=3)
    dout, dlse = cotangents(dense)
    grads = run(dense, options)[2]
    rng = np.random.default_rng(4)

    def loss(call: Dense) -> float:
        out, lse = call.forward()
        seen = np.isfinite(lse)
        return float((out * dout).sum() + (lse[seen] * dlse[seen]).sum())

    for name, grad in grads.items():
        x = argument(dense, name)
        for _ in range(3):
            step = rng.standard_normal(x.shape)
            ahead, behind = (loss(with_argument(dense, name, x + h * step)) for h in (1e-5, -1e-5))
            want = (ahead - behind) / 2e-5
            assert abs((grad * step).sum() - want) < 1e-6 * max(abs(want), 1.0), name


@pytest.mark.parametrize("part_elements", [0, 1 << 16])
@pytest.mark.parametrize("bias", ["bias", "bias_shared", "bias_keys"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_same_bits_on_any_number_of_threads(
    bias: str, dtype: str, part_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpu_tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(_cpu_tiles, "TILE_KEYS", 16)
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", part_elements)
    monkeypatch.setattr("cuflash._cpu_scores.PART_ELEMENTS", part_elements)
    names = tuple(bias if name == "bias_shared" else name for name in EVERYTHING)
    dense, _ = call_of(names, seed=6)
    inputs = {n: getattr(dense, n).astype(dtype) for n in ("q", "k", "v", "bias", "sinks")}
    dense = dense.having(**inputs)
    results = []
    for threads in (1, 2, 5):
        for module in (_cpu_forward, _cpu_backward):
            monkeypatch.setattr(
                module, "threads_for", lambda items, pairs, n=threads: min(items, n)
            )
        out, lse, grads = run(dense, options_of(dense))
        results.append([x.tobytes() for x in (out, lse, *grads.values())])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("option", "items"),
    [
        ("bias", [1, 1, 1, 1]),
        ("bias_shared", [2, 2]),
        ("bias_keys", [1, 1, 1, 1]),
        ("score_mod", [4]),
    ],
)
def test_units_that_share_a_sum_are_one_threads(
    option: str, items: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(B, Hkv) = (2, 2) units: with a large bias over the batch, one thread has both of a head."""
    monkeypatch.setattr(_cpu_tiles, "TILE_ELEMENTS", 1)
    monkeypatch.setattr(_cpu_sums, "PART_ELEMENTS", 0)
    monkeypatch.setattr("cuflash._cpu_scores.PART_ELEMENTS", 0)
    seen: list[int] = []

    def counting(work: Any, worker: Any, threads: int) -> None:
        do = worker(lambda: False)
        for item in work:
            seen.append(len(item))
            do(item)

    monkeypatch.setattr(_cpu_backward, "run", counting)
    dense, options = call_of((option,))
    run(dense, options)
    assert seen == items


def test_only_what_is_asked_for() -> None:
    dense, options = call_of(EVERYTHING, seed=7)
    full = run(dense, options)[2]
    for name in full:
        part = run(dense, options, [name])[2]
        assert set(part) == {name}
        np.testing.assert_array_equal(part[name], full[name])
    assert run(dense, options, [])[2] == {}


def test_arguments_are_not_changed() -> None:
    dense, options = call_of(EVERYTHING, seed=8)
    given = [dense.q, dense.k, dense.v, dense.bias, dense.mask, dense.sinks, dense.alibi_slopes]
    given += dense.score_mod.params.values()
    before = [x.tobytes() for x in given]
    for x in given:
        x.flags.writeable = False
    run(dense, options)
    assert [x.tobytes() for x in given] == before


def test_several_batch_axes_count_as_one() -> None:
    """(2, 1, H, ...) and (1, 2, H, ...) give what (2, H, ...) gives, for every option."""
    dense, options = call_of(EVERYTHING, seed=9)
    want_out, want_lse, want = run(dense, options)
    dout, dlse = cotangents(dense)
    for lead in ((2, 1), (1, 2)):

        def apart(x: np.ndarray, lead: tuple[int, int] = lead) -> np.ndarray:
            return x.reshape(*lead, *x.shape[1:])

        slopes = apart(options.alibi_slopes)
        own = replace(options, mask=apart(options.mask), alibi_slopes=slopes)
        q, k, v = map(apart, (dense.q, dense.k, dense.v))
        out, lse = _cpu.forward(q, k, v, own)
        given = apart(dout), q, k, v, out, lse
        grads = flat(_cpu.backward(*given, own, dlse=apart(dlse), wrt=wrt_of(own)))
        np.testing.assert_array_equal(out, apart(want_out))
        np.testing.assert_array_equal(lse, apart(want_lse))
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad.reshape(want[name].shape), want[name])


def test_batch_numbers_are_flat_indices() -> None:
    """Batch (2, 3): dropout draws element (1, 0) as number 3, whatever units hold it."""
    keep = dropout_mask(SEED, P, (2, 3, 2, 5, 7))
    q, k = np.zeros((2, 3, 2, 5, 4)), np.zeros((2, 3, 2, 7, 4))
    v = np.broadcast_to(np.eye(7), (2, 3, 2, 7, 7))
    options = Options(0.3, 0, dropout=Dropout.of(P, SEED))
    for elements in (1, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_cpu_tiles, "TILE_ELEMENTS", elements)
            out, _ = _cpu.forward(q, k, v, options)
        np.testing.assert_array_equal(out != 0, keep)
