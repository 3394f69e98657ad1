"""Warp collectives and integer instructions: shuffles, votes, reductions, byte permutes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .form import Case, Form, blank

LANE = np.arange(32)


def _shuffled(mode: str, value: np.ndarray, b: np.ndarray, c: int) -> tuple[np.ndarray, np.ndarray]:
    """shfl.sync as the PTX pseudo-code states it: source lane, clamp and segment mask."""
    clamp, segment = c & 31, (c >> 8) & 31
    top = (LANE & segment) | (clamp & ~segment)
    bottom = LANE & segment
    b = b & 31
    if mode == "up":
        source, ok = LANE - b, LANE - b >= top
    elif mode == "down":
        source, ok = LANE + b, LANE + b <= top
    elif mode == "bfly":
        source, ok = LANE ^ b, (LANE ^ b) <= top
    else:
        source, ok = bottom | (b & ~segment), (bottom | (b & ~segment)) <= top
    return value[np.where(ok, source, LANE)], ok


def _shuffle(mode: str, c: int, per_lane: bool) -> Form:
    def make(rng: np.random.Generator) -> Case:
        value = rng.integers(0, 2**32, 32, np.uint32)
        b = rng.integers(0, 32, 32 if per_lane else 1).astype(np.uint32)
        expected, ok = _shuffled(mode, value, np.broadcast_to(b, 32).astype(int), c)
        return Case(
            [value, np.broadcast_to(b, 32).copy(), blank(32, np.uint32), blank(32, np.uint32)],
            [expected, ok.astype(np.uint32)],
        )

    return Form(
        name=f"shfl_{mode}_{c:04x}",
        group="sm_75",
        parameters="const u32* value, const u32* b, u32* out, u32* ok",
        body=f"""
    u32 y, valid;
    asm volatile("{{ .reg .pred p; shfl.sync.{mode}.b32 %0|p, %2, %3, {c:#x}, 0xffffffff; selp.u32 %1, 1, 0, p; }}"
        : "=r"(y), "=r"(valid) : "r"(value[lane]), "r"(b[lane]));
    out[lane] = y; ok[lane] = valid;""",
        make=make,
    )


def _warp_op(
    name: str,
    group: str,
    asm: str,
    expected: Callable[[np.ndarray], np.ndarray],
    draw: Callable[[np.random.Generator], np.ndarray],
) -> Form:
    """A collective of one 32-bit value per lane: `asm` maps %1 (and predicate p = value & 1) to
    %0."""

    def make(rng: np.random.Generator) -> Case:
        value = draw(rng)
        return Case([value, blank(32, np.uint32)], [expected(value)])

    return Form(
        name=name,
        group=group,
        parameters="const u32* value, u32* out",
        body=f"""
    u32 y;
    asm volatile("{{ .reg .pred p, q; .reg .b32 t; and.b32 t, %1, 1; setp.ne.u32 p, t, 0; {asm} }}"
        : "=r"(y) : "r"(value[lane]));
    out[lane] = y;""",
        make=make,
    )


def _bits(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2**32, 32, np.uint32)


def _few(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 5, 32).astype(np.uint32)


def _all(x: int | np.uint32) -> np.ndarray:
    return np.full(32, x, np.uint32)


def _mask(condition: np.ndarray) -> int:
    return int(np.sum(np.where(condition, np.uint64(1) << LANE.astype(np.uint64), np.uint64(0))))


_SELECT = "selp.u32 %0, 1, 0, q;"
VOTES = [
    _warp_op(
        "vote_ballot",
        "sm_75",
        "vote.sync.ballot.b32 %0, p, 0xffffffff;",
        lambda v: _all(_mask(v % 2 == 1)),
        _bits,
    ),
    _warp_op(
        "vote_any",
        "sm_75",
        f"vote.sync.any.pred q, p, 0xffffffff; {_SELECT}",
        lambda v: _all(int((v % 2 == 1).any())),
        _bits,
    ),
    _warp_op(
        "vote_all",
        "sm_75",
        f"vote.sync.all.pred q, p, 0xffffffff; {_SELECT}",
        lambda v: _all(int((v % 2 == 1).all())),
        lambda rng: _bits(rng) | np.uint32(1),
    ),
    _warp_op(
        "vote_uni",
        "sm_75",
        f"vote.sync.uni.pred q, p, 0xffffffff; {_SELECT}",
        lambda v: _all(int((v % 2 == v[0] % 2).all())),
        lambda rng: _bits(rng) & ~np.uint32(1),
    ),
    _warp_op(
        "match_any",
        "sm_75",
        "match.any.sync.b32 %0, %1, 0xffffffff;",
        lambda v: np.array([_mask(v == x) for x in v], np.uint32),
        _few,
    ),
    _warp_op(
        "activemask",
        "sm_75",
        "activemask.b32 %0; bar.warp.sync 0xffffffff;",
        lambda v: _all(0xFFFFFFFF),
        _bits,
    ),
    _warp_op(
        "redux_add",
        "sm_80",
        "redux.sync.add.u32 %0, %1, 0xffffffff;",
        lambda v: _all(np.uint32(int(v.astype(np.uint64).sum()) & 0xFFFFFFFF)),
        _bits,
    ),
    _warp_op(
        "redux_max",
        "sm_80",
        "redux.sync.max.u32 %0, %1, 0xffffffff;",
        lambda v: _all(v.max()),
        _bits,
    ),
    _warp_op(
        "redux_min_s32",
        "sm_80",
        "redux.sync.min.s32 %0, %1, 0xffffffff;",
        lambda v: _all(v.view(np.int32).min().view(np.uint32)),
        _bits,
    ),
    # elect.sync names the same lane to all and sets the predicate in that lane alone; which lane is
    # unspecified, so the sum of predicates is what is compared.
    _warp_op(
        "elect_sync",
        "sm_90a",
        "elect.sync t|q, 0xffffffff; selp.u32 t, 1, 0, q; redux.sync.add.u32 %0, t, 0xffffffff;",
        lambda v: _all(1),
        _bits,
    ),
]


def _integer(
    name: str, asm: str, reference: Callable[..., np.ndarray], group: str = "sm_75"
) -> Form:
    def make(rng: np.random.Generator) -> Case:
        a, b, c = (rng.integers(0, 2**32, 256, np.uint32) for _ in "abc")
        a[:4], b[:4], c[:4] = (0, 0xFFFFFFFF, 0x80000000, 1), (0, 1, 31, 0xFFFFFFFF), (0, 32, 33, 8)
        wide = (x.astype(np.uint64) for x in (a, b, c))
        expected = (reference(*wide) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        return Case([a, b, c, blank(256, np.uint32)], [expected])

    return Form(
        name=name,
        group=group,
        parameters="const u32* a, const u32* b, const u32* c, u32* out",
        body=f"""
    for (u32 i = thread; i < 256; i += 32) {{
        u32 y;
        asm volatile("{asm}" : "=r"(y) : "r"(a[i]), "r"(b[i]), "r"(c[i]));
        out[i] = y;
    }}""",
        make=make,
    )


_M32 = np.uint64(0xFFFFFFFF)


def _prmt(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    both = a | b << np.uint64(32)
    y = np.zeros_like(a)
    for i in range(4):
        selector = c >> np.uint64(4 * i)
        byte = both >> (np.uint64(8) * (selector & np.uint64(7))) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        y |= np.where(selector & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return y


def _bfe(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    start, length = b & np.uint64(31), c & np.uint64(15)
    return a >> start & ((np.uint64(1) << length) - np.uint64(1))


INTEGERS = [
    _integer("prmt", "prmt.b32 %0, %1, %2, %3;", _prmt),
    _integer("lop3_96", "lop3.b32 %0, %1, %2, %3, 0x96;", lambda a, b, c: a ^ b ^ c),
    _integer(
        "lop3_e8", "lop3.b32 %0, %1, %2, %3, 0xe8;", lambda a, b, c: (a & b) | (a & c) | (b & c)
    ),
    _integer(
        "shf_l_wrap",
        "shf.l.wrap.b32 %0, %1, %2, %3;",
        lambda a, b, c: (b << np.uint64(32) | a) << (c & np.uint64(31)) >> np.uint64(32),
    ),
    _integer(
        "shf_r_wrap",
        "shf.r.wrap.b32 %0, %1, %2, %3;",
        lambda a, b, c: (b << np.uint64(32) | a) >> (c & np.uint64(31)),
    ),
    _integer("mul_hi_u32", "mul.hi.u32 %0, %1, %2;", lambda a, b, c: a * b >> np.uint64(32)),
    _integer("mad_lo_u32", "mad.lo.u32 %0, %1, %2, %3;", lambda a, b, c: a * b + c),
    _integer("popc", "popc.b32 %0, %1;", lambda a, b, c: np.bitwise_count(a).astype(np.uint64)),
    _integer(
        "clz",
        "clz.b32 %0, %1;",
        lambda a, b, c: np.array([32 - int(x).bit_length() for x in a], np.uint64),
    ),
    _integer(
        "bfe_u32",
        "{ .reg .b32 s, n; and.b32 s, %2, 31; and.b32 n, %3, 15; bfe.u32 %0, %1, s, n; }",
        _bfe,
    ),
]

FORMS = [
    *(_shuffle(mode, c, False) for mode in ("up",) for c in (0x0000, 0x1800)),
    *(_shuffle(mode, c, False) for mode in ("down", "bfly") for c in (0x1F, 0x1C1F, 0x181F)),
    *(_shuffle("idx", c, True) for c in (0x1F, 0x1C1F)),
    *VOTES,
    *INTEGERS,
]
