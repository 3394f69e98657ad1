"""Bulk copies: plain ones, and TMA boxes of every rank, swizzle and direction, with boxes that hang
over every edge."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from .form import Case, Form, MapOf, Output, blank
from .handshakes import BASIC, TRY

BF16 = np.dtype(ml_dtypes.bfloat16)
BITS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32, "uint8": np.uint8}
VALUES = {"float16": np.dtype(np.float16), "bfloat16": BF16, "float32": np.dtype(np.float32)}

# Every kernel has its barrier behind the data; one thread drives the copy, 32 threads move shared
# memory out or in.
OPEN = """
    const u32 barrier = shared_address(smem) + {bytes}, data = shared_address(smem); (void)data; (void)barrier;
    if (lane == 0) {{
        init_barrier(barrier, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }}
    __syncthreads();"""
EXPECT = """
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
            :: "r"(barrier), "r"({bytes}) : "memory");"""
WAIT_AND_COPY_OUT = """
    while (!try_parity(barrier, 0)) {{}}
    for (u32 i = lane; i < {bytes} / 16; i += 32) ((uint4*)out)[i] = ((const uint4*)smem)[i];"""
COPY_IN = """
    for (u32 i = lane; i < {bytes} / 16; i += 32) ((uint4*)smem)[i] = ((const uint4*)in)[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();"""
COMMIT_AND_WAIT = """
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");"""


def swizzled(rows: np.ndarray, span: int) -> np.ndarray:
    """Bytes of a box, [rows, row bytes], as they lie in shared memory.

    The pattern repeats every 8 rows of the span: 16-byte chunk c of row r goes to chunk c ^ (r % 8)
    for 128 bytes, c ^ (r / 2 % 4) for 64, c ^ (r / 4 % 2) for 32.
    """
    if not span:
        return rows
    n, width = rows.shape
    chunks = rows.reshape(n, width // 16, 16)
    r = np.arange(n)[:, None]
    flip = {128: r % 8, 64: r // 2 % 4, 32: r // 4 % 2}[span]
    out = np.empty_like(chunks)
    out[r, np.arange(width // 16)[None, :] ^ flip] = chunks
    return out.reshape(n, width)


@dataclass(frozen=True)
class Box:
    """A tensor, the box that one instruction moves, and where it stands (all innermost first)."""

    dims: tuple[int, ...]
    box: tuple[int, ...]
    at: tuple[int, ...]
    kind: str = "float16"
    swizzle: int = 0
    fill_nan: bool = False

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * np.dtype(BITS[self.kind]).itemsize

    def tensor(self, rng: np.random.Generator) -> np.ndarray:
        """Random elements, rows padded to 16 bytes so that strides are legal; [outermost, ...,
        innermost]."""
        bits = np.dtype(BITS[self.kind])
        per_row = -(-self.dims[0] * bits.itemsize // 16) * 16 // bits.itemsize
        shape = (*reversed(self.dims[1:]), per_row)
        if self.kind in VALUES:  # small integers: every sum below is exact
            return rng.integers(-8, 9, shape).astype(VALUES[self.kind])
        return rng.integers(0, np.iinfo(bits).max, shape, bits, endpoint=True)

    def argument(self, buffer: object, array: np.ndarray) -> MapOf:
        strides = tuple(int(s) for s in array.strides[-2::-1])
        return MapOf(buffer, self.kind, self.dims, strides, self.box, self.swizzle, self.fill_nan)

    def index(self) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Index arrays into the tensor (outermost first) of every box element, and which of them
        lie inside."""
        axes = [c + np.arange(n) for c, n in zip(self.at, self.box, strict=True)][::-1]
        grid = np.meshgrid(*axes, indexing="ij")
        extents = self.dims[::-1]
        inside = np.all([(g >= 0) & (g < n) for g, n in zip(grid, extents, strict=True)], axis=0)
        return tuple(np.clip(g, 0, n - 1) for g, n in zip(grid, extents, strict=True)), inside

    def row_bytes(self, elements: np.ndarray) -> np.ndarray:
        """[rows, bytes] of the box in shared memory."""
        flat = np.ascontiguousarray(elements).reshape(-1, self.box[0])
        return swizzled(flat.view(np.uint8).reshape(len(flat), -1), self.swizzle)


def _load_case(b: Box, rng: np.random.Generator) -> Case:
    tensor = b.tensor(rng)
    index, inside = b.index()
    outside = np.full((), np.nan if b.fill_nan else 0, tensor.dtype)
    box = np.where(inside, tensor[index], outside)
    return Case(
        [
            b.argument(tensor, tensor),
            tensor,
            np.array([*b.at, 0, 0, 0, 0][:5], np.int32),
            blank(box.size, box.dtype),  # typed, because the payload of a NaN does not matter
        ],
        [b.row_bytes(box).reshape(-1).view(box.dtype)],
    )


def _coordinates(rank: int, first: int) -> tuple[str, str]:
    """Asm operand list and constraint list of the coordinates."""
    text = "{" + ", ".join(f"%{first + i}" for i in range(rank)) + "}"
    return text, ", ".join(f'"r"(at[{i}])' for i in range(rank))


def _load(name: str, b: Box, hint: bool = False) -> Form:
    rank = len(b.dims)
    text, values = _coordinates(rank, 3)
    policy = ", %" + str(3 + rank) if hint else ""
    policy_value = ', "l"(0x12F0000000000000ull)' if hint else ""
    suffix = ".L2::cache_hint" if hint else ""
    return Form(
        name=name,
        group="sm_90a",
        parameters="const __grid_constant__ TensorMap map, const void* tensor, const i32* at, void* out",
        shared=b.bytes + 16,
        functions=(BASIC, TRY),
        body=OPEN.format(bytes=b.bytes)
        + """
    if (lane == 0) {"""
        + EXPECT.format(bytes=b.bytes)
        + f"""
        asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{suffix}"
            " [%0], [%1, {text}], [%2]{policy};"
            :: "r"(data), "l"(&map), "r"(barrier), {values}{policy_value} : "memory");
    }}"""
        + WAIT_AND_COPY_OUT.format(bytes=b.bytes),
        make=lambda rng: _load_case(b, rng),
    )


def _store_case(b: Box, reduce: bool, rng: np.random.Generator) -> Case:
    tensor, box = b.tensor(rng), Box(b.box, b.box, (0,) * len(b.box), b.kind).tensor(rng)
    index, inside = b.index()
    after = tensor.copy()
    where = tuple(i[inside] for i in index)
    after[where] = after[where] + box[inside] if reduce else box[inside]
    output = Output(tensor)
    return Case(
        [
            b.argument(output, tensor),
            b.row_bytes(box).reshape(-1),
            np.array([*b.at, 0, 0, 0, 0][:5], np.int32),
            output,
        ],
        [after],
    )


def _store(name: str, b: Box, reduce: bool = False) -> Form:
    rank = len(b.dims)
    text, values = _coordinates(rank, 2)
    instruction = (
        f"cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.add.tile.bulk_group"
        if reduce
        else f"cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"
    )
    return Form(
        name=name,
        group="sm_90a",
        parameters="const __grid_constant__ TensorMap map, const u8* in, const i32* at, void* tensor",
        shared=b.bytes + 16,
        body=COPY_IN.format(bytes=b.bytes)
        + f"""
    if (lane == 0) {{
        asm volatile("{instruction} [%0, {text}], [%1];"
            :: "l"(&map), "r"(shared_address(smem)), {values} : "memory");"""
        + COMMIT_AND_WAIT
        + """
    }""",
        make=lambda rng: _store_case(b, reduce, rng),
    )


BYTES = 1536


def _plain_load_case(rng: np.random.Generator) -> Case:
    data = rng.integers(0, 256, BYTES, np.uint8)
    return Case([data, blank(BYTES, np.uint8)], [data])


def _plain_store_case(kind: str, rng: np.random.Generator) -> Case:
    dtype = VALUES[kind]
    n = BYTES // dtype.itemsize
    before, data = (rng.integers(-8, 9, n).astype(dtype) for _ in "ab")
    return Case([data, Output(before)], [before + data])


PLAIN_LOAD = Form(
    name="bulk_load",
    group="sm_90a",
    parameters="const u8* in, u8* out",
    shared=BYTES + 16,
    functions=(BASIC, TRY),
    body=OPEN.format(bytes=BYTES)
    + "\n    if (lane == 0) {"
    + EXPECT.format(bytes=BYTES)
    + f"""
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            :: "r"(data), "l"(__cvta_generic_to_global(in)), "r"({BYTES}), "r"(barrier) : "memory");
    }}"""
    + WAIT_AND_COPY_OUT.format(bytes=BYTES),
    make=_plain_load_case,
)


def _plain_out(name: str, instruction: str, kind: str, reduce: bool) -> Form:
    def make(rng: np.random.Generator) -> Case:
        if reduce:
            return _plain_store_case(kind, rng)
        data = rng.integers(0, 256, BYTES, np.uint8)
        return Case([data, blank(BYTES, np.uint8)], [data])

    return Form(
        name=name,
        group="sm_90a",
        parameters="const u8* in, u8* out",
        shared=BYTES,
        body=COPY_IN.format(bytes=BYTES)
        + f"""
    if (lane == 0) {{
        asm volatile("{instruction} [%0], [%1], %2;"
            :: "l"(__cvta_generic_to_global(out)), "r"(shared_address(smem)), "r"({BYTES}) : "memory");"""
        + COMMIT_AND_WAIT
        + "\n    }",
        make=make,
    )


# Hints and fences that compute nothing: what counts is that they are accepted and change nothing.
_HINTED = Box((64, 8), (64, 8), (0, 0), swizzle=128)
HINTS = Form(
    name="tma_hints",
    group="sm_90a",
    parameters="const __grid_constant__ TensorMap map, const void* tensor, const i32* at, void* out",
    shared=_HINTED.bytes + 16,
    functions=(BASIC, TRY),
    body="""
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");"""
    + OPEN.format(bytes=_HINTED.bytes)
    + """
    if (lane == 0) {
        asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
        asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" :: "l"(&map) : "memory");
        asm volatile("fence.proxy.async.global;" ::: "memory");
        asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];"
            :: "l"(&map), "r"(0), "r"(0) : "memory");"""
    + EXPECT.format(bytes=_HINTED.bytes)
    + """
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%2, %3}], [%4];"
            :: "r"(data), "l"(&map), "r"(0), "r"(0), "r"(barrier) : "memory");
    }"""
    + WAIT_AND_COPY_OUT.format(bytes=_HINTED.bytes),
    make=lambda rng: _load_case(_HINTED, rng),
)

_REDUCE = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add"
EDGES = {  # boxes inside, over the low edge, over the high edge, wholly outside
    "inside": (8, 3),
    "low": (-16, -2),
    "high": (48, 7),
    "outside": (64, -20),
}
FORMS = [
    PLAIN_LOAD,
    _plain_out("bulk_store", "cp.async.bulk.global.shared::cta.bulk_group", "uint8", False),
    *(
        _plain_out(f"bulk_reduce_add_{kind}", f"{_REDUCE}{suffix}", kind, True)
        for kind, suffix in (
            ("float32", ".f32"),
            ("float16", ".noftz.f16"),
            ("bfloat16", ".noftz.bf16"),
        )
    ),
    _load("tma_load_1d", Box((100,), (64,), (56,), "float32")),
    *(_load(f"tma_load_2d_{name}", Box((60, 11), (32, 8), at)) for name, at in EDGES.items()),
    *(
        _load(
            f"tma_load_2d_swizzle_{span}", Box((100, 40), (span // 2, 24), (24, -5), swizzle=span)
        )
        for span in (32, 64, 128)
    ),
    _load("tma_load_2d_swizzle_128_float32", Box((40, 20), (32, 16), (8, 9), "float32", 128)),
    _load("tma_load_2d_bfloat16_hint", Box((64, 16), (64, 8), (0, 4), "bfloat16", 128), hint=True),
    _load("tma_load_3d_hint", Box((64, 9, 5), (64, 4, 3), (0, 7, 3), swizzle=128), hint=True),
    _load(
        "tma_load_4d_hint", Box((64, 6, 3, 4), (64, 4, 1, 2), (0, 1, 2, 2), swizzle=128), hint=True
    ),
    _load(
        "tma_load_5d_hint",
        Box((100, 10, 3, 2, 2), (64, 8, 1, 1, 1), (64, 4, 2, 1, 1), swizzle=128),
        hint=True,
    ),
    _load("tma_load_2d_fill_nan", Box((60, 11), (32, 8), (48, 7), fill_nan=True)),
    _load("tma_load_2d_fill_nan_float32", Box((40, 20), (32, 16), (-8, 9), "float32", 128, True)),
    HINTS,
    _load("tma_load_3d", Box((64, 9, 5), (64, 4, 3), (0, 7, 3), swizzle=128)),
    _load("tma_load_4d", Box((64, 6, 3, 4), (64, 4, 1, 2), (0, 1, 2, 2), swizzle=128)),
    # d = 192 seen as three slabs of 64: one instruction writes slab after slab
    _load(
        "tma_load_5d_slabs", Box((64, 10, 3, 2, 2), (64, 8, 3, 1, 1), (0, 4, 0, 1, 1), swizzle=128)
    ),
    _store("tma_store_1d", Box((100,), (64,), (56,), "float32")),
    *(_store(f"tma_store_2d_{name}", Box((60, 11), (32, 8), at)) for name, at in EDGES.items()),
    *(
        _store(
            f"tma_store_2d_swizzle_{span}", Box((100, 40), (span // 2, 24), (24, 20), swizzle=span)
        )
        for span in (32, 64, 128)
    ),
    _store("tma_store_3d", Box((64, 9, 5), (64, 4, 3), (0, 7, 3), swizzle=128)),
    _store("tma_store_4d", Box((64, 6, 3, 4), (64, 4, 1, 2), (0, 4, 2, 2), swizzle=128)),
    _store("tma_store_5d", Box((64, 10, 3, 2, 2), (64, 8, 3, 1, 1), (0, 4, 0, 1, 1), swizzle=128)),
    *(
        _store(f"tma_reduce_add_2d_{kind}", Box((60, 11), (16, 8), (48, 6), kind), reduce=True)
        for kind in ("float32", "float16", "bfloat16")
    ),
    _store(
        "tma_reduce_add_2d_swizzle_128", Box((64, 20), (64, 8), (0, 10), swizzle=128), reduce=True
    ),
]
