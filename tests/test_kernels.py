"""The shipped kernels' PTX against float64: every head dim, group, mask edge, score, in two schedules.

Each case runs forward and backward twice, with its threads in two orders: once with dQ in a pass of its own
(`deterministic=True`) and once with dQ gathered by reductions. A race, an uninitialised read or an access out of bounds
fails by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.cases import Case, answer, check, covering
from tests.machines import Emulator, Numpy, same_bits

# The head dims of the contract, each with another group, mask and pair of lengths. Tiles are 64 or 128 rows and 32 or
# 64 keys, so 63, 64, 65, 127, 129 sit on their edges.
BASE = Case(batch=(), heads=1, heads_kv=1)
HEAD_DIMS = {
    1: replace(BASE, heads=3, len_q=65, len_k=130, causal=True),
    5: replace(BASE, heads=7, len_q=33, len_k=129, window=(63, 0)),
    32: replace(BASE, heads=8, len_q=64, len_k=64),
    40: replace(BASE, len_q=129, len_k=65, causal=True),
    64: replace(BASE, heads=3, len_q=150, len_k=200, causal=True),
    80: replace(BASE, len_q=127, len_k=190, window=(64, 65)),
    96: replace(BASE, heads=7, len_q=20, len_k=128, causal=True),
    111: replace(BASE, len_q=140, len_k=77, window=(65, 1)),
    128: replace(BASE, heads=3, len_q=129, len_k=193, causal=True),
    160: replace(BASE, len_q=70, len_k=131, window=(0, 64)),
    192: replace(BASE, heads=8, len_q=9, len_k=66),
    256: replace(BASE, len_q=65, len_k=97, causal=True),
}
HEAD_DIMS = {d: replace(case, head_dim=d) for d, case in HEAD_DIMS.items()}
VALUE_DIMS = [
    replace(BASE, head_dim=64, head_dim_v=128, heads=3, len_q=65, len_k=70, causal=True),
    replace(BASE, head_dim=128, head_dim_v=64, len_q=130, len_k=65),
    replace(BASE, head_dim=192, head_dim_v=128, len_q=66, len_k=130, causal=True),
    replace(BASE, head_dim=64, head_dim_v=1, len_q=33, len_k=65),
    replace(BASE, head_dim=8, head_dim_v=256, len_q=20, len_k=65, causal=True),
]
# The general variant of every compiled head dim, by a softcap or ALiBi.
SHAPED = [
    replace(HEAD_DIMS[64], softcap=3.0),
    replace(HEAD_DIMS[96], softcap=20.0, alibi="H", scale=-0.3),
    replace(HEAD_DIMS[192], alibi="H", causal=True),
    replace(HEAD_DIMS[256], alibi="H", window=(40, 3), scale=0.0),
    replace(VALUE_DIMS[2], softcap=5.0),
]
SIGNS = [
    replace(HEAD_DIMS[64], scale=-0.125),
    replace(HEAD_DIMS[64], q_offset=-30, window=(50, 20), causal=False),
]
FLOAT16 = [*HEAD_DIMS.values(), *VALUE_DIMS, *SHAPED, *SIGNS]
BFLOAT16 = [replace(c, dtype="bfloat16") for c in [*HEAD_DIMS.values(), VALUE_DIMS[2], SHAPED[0]]]
PLACES = {
    "sm_80": FLOAT16 + BFLOAT16,
    "sm_75": [HEAD_DIMS[d] for d in (5, 40, 64, 96, 111, 128, 160, 256)],
    # Their tiles differ from those of sm_80. sm_90a has a family of its own; sm_90 runs this one.
    "sm_86": [HEAD_DIMS[d] for d in (96, 128, 256)],
    "sm_90": [HEAD_DIMS[d] for d in (64, 128, 256)],
}


def on_every_place() -> list[Any]:
    return [
        pytest.param(arch, case, id=f"{arch}-{case}")
        for arch, suite in PLACES.items()
        for case in suite
    ]


@pytest.mark.parametrize(("arch", "case"), on_every_place())
def test_forward_and_gradients_pass_rule_t_in_two_schedules(arch: str, case: Case) -> None:
    for seed, deterministic in ((0, True), (1, False)):
        with Emulator(arch, seed=seed) as machine:
            check(machine, case, deterministic=deterministic, dlse=seed == 0)


COVERING = covering(
    dtype=("float16", "bfloat16"),
    lengths=[(1, 1), (1, 130), (64, 64), (65, 33), (33, 129), (17, 5), (66, 131)],
    dims=[(64, 64), (5, 5), (32, 32), (30, 8)],
    heads=[(2, 2), (6, 2), (7, 1)],
    batch=[(2,), (), (1, 2)],
)


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_pairs_of_options_pass_rule_t(case: Case) -> None:
    """Every pair of values of any two options, on the emulator."""
    with Emulator("sm_80", seed=case.seed) as machine:
        check(machine, case, deterministic=case.seed % 2 == 0, dlse=case.seed % 3 == 0)


@pytest.mark.parametrize("case", [HEAD_DIMS[64], SHAPED[0], HEAD_DIMS[111]], ids=str)
def test_deterministic_gradients_do_not_depend_on_the_order_of_threads(case: Case) -> None:
    """Forward always, gradients with deterministic=True: the same bits in every schedule."""
    data, options = answer(case).data, case.options()
    runs = []
    for seed in (0, 5, 11):
        with Emulator("sm_80", seed=seed) as machine:
            out, lse = machine.attention(data.q, data.k, data.v, **options, return_lse=True)
            arrays = (data.dout, data.q, data.k, data.v, out, lse)
            grads = machine.backward(*arrays, dlse=data.dlse, deterministic=True, **options)
            runs.append((out, lse, grads.q, grads.k, grads.v))
    for other in runs[1:]:
        assert all(same_bits(a, b) for a, b in zip(runs[0], other, strict=True))


SQUARE = replace(BASE, len_q=256, len_k=256)
COUNTED = [("sm_80", replace(SQUARE, head_dim=d)) for d in (32, 64, 96, 128, 192, 256)] + [
    (arch, replace(SQUARE, head_dim=d)) for d in (64, 128) for arch in ("sm_75", "sm_90")
]


def counts(arch: str, case: Case) -> dict[str, Any]:
    """Counters of every kernel of a forward and both backwards, by kernel."""
    data = answer(case).data
    with Emulator(arch, seed=0) as machine:
        machine.device.count = True
        # As CuPy allocates: NumPy's 16-byte alignment alone would split rows over one more sector.
        q, k, v, dout = map(machine.device.memory.copy, (data.q, data.k, data.v, data.dout))
        out, lse = machine.attention(q, k, v, return_lse=True)
        for deterministic in (True, False):
            machine.backward(dout, q, k, v, out, lse, deterministic=deterministic)
        return {
            name.replace(f"f16_d{case.head_dim}_", ""): c for name, _, c in machine.device.launches
        }


@pytest.mark.parametrize(("arch", "case"), COUNTED, ids=str)
def test_main_loops_have_no_bank_conflicts_and_coalesced_copies(arch: str, case: Case) -> None:
    """Counted exactly: shared memory in the fewest wavefronts, global rows in whole 32-byte sectors."""
    once = counts(arch, case)
    assert {name.removesuffix("_linear") for name in once} == {
        *("forward", "backward_prepare", "backward_dq", "backward_convert"),
        *("backward_dkdv", "backward_dkdv_accumulate"),
    }
    # Twice as long a walk: what does not grow belongs to the beginning or the end of a block.
    longer = {
        "forward_linear": counts(arch, replace(case, len_k=512)),
        "backward_dkdv_linear": counts(arch, replace(case, len_q=512)),
    }
    for name, counters in once.items():
        conflicts = {at: n.bank_conflicts for at, n in counters.lines.items() if n.bank_conflicts}
        # Slabs of 32 columns (head dim 96) meet in the same banks when a finished tile is stored.
        assert not conflicts or case.head_dim == 96, f"{name}: {conflicts}"
        if name in longer:
            grown = longer[name][name]
            assert grown.count("mma") == 2 * counters.count("mma")
            assert grown.bank_conflicts == counters.bank_conflicts, f"{name}: {conflicts}"
        # Copies of rows, 16 bytes a thread: bytes asked for and bytes moved agree.
        wide = [
            line
            for line in counters.lines.values()
            if line.global_bytes
            and any(op.startswith("cp.async.c") or ".v4" in op for op in line.instructions)
        ]
        assert wide, name
        if name == "backward_convert_linear":
            continue  # a lane reads 32 bytes in two halves, the second from the first-level cache
        for line in wide:
            assert line.sectors * 32 == line.global_bytes, (name, dict(line.instructions))


def test_work_follows_the_visible_tiles() -> None:
    """Tiles the mask hides are never visited: matrix instructions count them."""
    data = answer(replace(BASE, len_q=512, len_k=512)).data

    def products(**options: Any) -> int:
        with Emulator("sm_80", seed=0) as machine:
            machine.device.count = True
            machine.attention(data.q, data.k, data.v, **options)
            return machine.device.launches[-1][2].count("mma")

    full = products()
    # 4 query tiles of 128 rows, 8 key tiles of 64: causal sees 2 + 4 + 6 + 8 of 32, a window of 64 keys 2 + 3 + 3 + 3.
    assert products(causal=True) * 32 == full * 20
    assert products(causal=True, window=(63, 0)) * 32 == full * 11


@pytest.mark.parametrize(("dtype", "element"), [("float16", "f16"), ("bfloat16", "bf16")])
def test_kernels_are_named_after_what_they_compute(dtype: str, element: str) -> None:
    data = answer(replace(BASE, dtype=dtype, len_q=16, len_k=16)).data
    with Emulator("sm_80") as machine:
        out = machine.attention(data.q, data.k, data.v)
        (name, *_), *_ = machine.device.launches
    assert out.dtype == np.dtype(data.q.dtype)
    assert name == f"forward_{element}_d64_linear"


def test_two_huge_maxima_that_round_to_one_product() -> None:
    """Beside museum C3: key 100 beats key 10 by 16 in log2 units, at raw scores near 2^31.

    In log2 units both scores round to one number: the newer maximum must be recognised before.
    """
    q, k = np.zeros((1, 1, 64), np.float16), np.zeros((1, 128, 64), np.float16)
    v = np.random.default_rng(0).standard_normal((1, 128, 64)).astype(np.float16)
    q[0, 0, :2] = 30000, 1
    k[0, [10, 100], 0] = 65504
    k[0, 100, 1] = 128
    with Emulator("sm_80") as machine:
        out = machine.attention(q, k, v)
    assert same_bits(out[0, 0], v[0, 100])


def test_copies_for_many_batch_axes_are_aligned_whatever_the_array_was() -> None:
    """Five batch axes that cannot be merged make the host copy; a q at an odd address is copied too."""
    batch, rng = (2, 2, 2, 2, 2), np.random.default_rng(0)
    memory = rng.standard_normal(32 * 24 + 1).astype(np.float16)
    start = 1 if memory.ctypes.data % 16 == 0 else 0
    q = memory[start : start + 32 * 24].reshape(*batch, 1, 3, 8)
    assert q.ctypes.data % 16 != 0 and q.flags.c_contiguous
    k = rng.standard_normal((1, 5, *batch, 8)).astype(np.float16).transpose(6, 5, 4, 3, 2, 0, 1, 7)
    v = rng.standard_normal((*batch, 1, 5, 8)).astype(np.float16)
    with Emulator("sm_80") as machine:
        out, grads = machine.vjp(q, k, v, dout=q)
        plain, plain_grads = machine.vjp(q.copy(), np.ascontiguousarray(k), v, dout=q.copy())
    assert np.array_equal(out, plain)
    assert np.allclose(grads.k.astype("f4"), plain_grads.k.astype("f4"), atol=1e-3)


@pytest.mark.parametrize("factor", [1e2, 1e3, 1e4])
def test_a_row_with_one_key_gives_dv_its_dout_at_huge_logits(factor: float) -> None:
    """float32 lse near 2^20 has steps of 1/8: rounded twice, the weight of the only key must still be 1."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 64, 32)) for _ in "qkvd")
    arrays = [(factor * x).astype(np.float16) for x in (q, k)]
    arrays += [x.astype(np.float16) for x in (v, dout)]
    for deterministic in (True, False):
        with Emulator("sm_80") as machine:
            _, grads = machine.vjp(*arrays, window=(0, 0), deterministic=deterministic)
        assert same_bits(grads.v, arrays[3])


@pytest.mark.parametrize("slopes", [(2,), (2, 1, 2, 2, 1, 2), (2, 2, 2, 2, 2, 2)], ids=str)
def test_slope_gradients_with_many_unmergeable_batch_axes(slopes: tuple[int, ...]) -> None:
    """Beyond four axes the host copies to full size; gradients still have the slopes' shape."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 2, 2, 2, 2, 2, 3, 16)).astype(np.float16)
    k, v = rng.standard_normal((2, 2, 1, 2, 1, 2, 2, 4, 16)).astype(np.float16)
    options = {"alibi_slopes": rng.random(slopes).astype(np.float32), "wrt": ("alibi_slopes", "k")}
    with Emulator("sm_80") as machine:
        _, grads = machine.vjp(q, k, v, q, **options)
    _, exact = Numpy().vjp(q, k, v, q, **options)
    assert grads.alibi_slopes.shape == slopes and grads.k.shape == k.shape
    assert np.allclose(grads.alibi_slopes, exact.alibi_slopes, atol=2e-2)
    assert np.allclose(grads.k.astype("f4"), exact.k.astype("f4"), atol=2e-2)
