"""Tile sizes of the kernels for float32 and float64: tables of numbers, as in `_tuning.py`.

Rows are keyed by (bytes of an element, architecture family, (HEAD_DIM, HEAD_DIM_V)). An operand of a
16 x 16 block takes 8 (TF32), 16 (three TF32 products, float64) registers instead of 4, a float64
accumulator twice those of float32, and a row of a tile two or four times the shared memory: a warp
owns 16 rows, and 32 only where the head dim leaves room. A float64 accumulator of more than 128
columns does not fit the registers: forward and backward make such results in two parts. Where even the
smallest tiles of whole rows exceed shared memory, operands come in slices of columns.

2026-11-21, chosen.
"""

from __future__ import annotations

from cuflash import _params
from cuflash._tuning import BACKWARD_ROWS, Tile, family

Key = tuple[int, str, tuple[int, int]]

FORWARD: dict[Key, Tile] = {
    (4, "sm_75", (32, 32)): Tile(64, 64, 4),
    (4, "sm_75", (64, 64)): Tile(64, 64, 4),
    (4, "sm_75", (96, 96)): Tile(64, 32, 4),
    (4, "sm_75", (128, 128)): Tile(64, 32, 4),
    (4, "sm_75", (192, 128)): Tile(32, 16, 2),
    (4, "sm_75", (192, 192)): Tile(32, 16, 2),
    (4, "sm_75", (256, 256)): Tile(32, 16, 2),
    (4, "sm_80", (32, 32)): Tile(128, 64, 4, stages=2, min_blocks=2),
    (4, "sm_80", (64, 64)): Tile(128, 32, 8, stages=2),
    (4, "sm_80", (96, 96)): Tile(128, 32, 8, stages=2),
    (4, "sm_80", (128, 128)): Tile(128, 32, 8, stages=2),
    (4, "sm_80", (192, 128)): Tile(64, 32, 4),
    (4, "sm_80", (192, 192)): Tile(64, 16, 4, stages=2),
    (4, "sm_80", (256, 256)): Tile(64, 16, 4, stages=2),
    (4, "sm_86", (32, 32)): Tile(128, 64, 4, stages=2),
    (4, "sm_86", (64, 64)): Tile(128, 32, 8, stages=2),
    (4, "sm_86", (96, 96)): Tile(128, 32, 8),
    (4, "sm_86", (128, 128)): Tile(128, 32, 8),
    (4, "sm_86", (192, 128)): Tile(64, 32, 4),
    (4, "sm_86", (192, 192)): Tile(64, 16, 4),
    (4, "sm_86", (256, 256)): Tile(64, 16, 4),
    (4, "sm_90", (32, 32)): Tile(128, 64, 4, stages=2, min_blocks=2),
    (4, "sm_90", (64, 64)): Tile(128, 32, 8, stages=2),
    (4, "sm_90", (96, 96)): Tile(128, 32, 8, stages=2),
    (4, "sm_90", (128, 128)): Tile(128, 32, 8, stages=2),
    (4, "sm_90", (192, 128)): Tile(64, 32, 4, stages=2),
    (4, "sm_90", (192, 192)): Tile(64, 16, 4, stages=2),
    (4, "sm_90", (256, 256)): Tile(64, 16, 4, stages=2),
    (8, "sm_75", (32, 32)): Tile(64, 32, 4),
    (8, "sm_75", (64, 64)): Tile(64, 32, 4),
    (8, "sm_75", (96, 96)): Tile(32, 16, 2),
    (8, "sm_75", (128, 128)): Tile(32, 16, 2),
    (8, "sm_75", (192, 128)): Tile(64, 16, 4, slice_columns=64),
    (8, "sm_75", (192, 192)): Tile(64, 16, 4, slice_columns=64),
    (8, "sm_75", (256, 256)): Tile(64, 16, 4, slice_columns=64),
    (8, "sm_80", (32, 32)): Tile(64, 32, 4, stages=2, min_blocks=2),
    (8, "sm_80", (64, 64)): Tile(64, 32, 4, stages=2),
    (8, "sm_80", (96, 96)): Tile(64, 32, 4),
    (8, "sm_80", (128, 128)): Tile(64, 32, 4),
    (8, "sm_80", (192, 128)): Tile(64, 16, 4),
    (8, "sm_80", (192, 192)): Tile(64, 16, 4),
    (8, "sm_80", (256, 256)): Tile(32, 16, 2),
    (8, "sm_86", (32, 32)): Tile(64, 32, 4, stages=2),
    (8, "sm_86", (64, 64)): Tile(64, 32, 4, stages=2),
    (8, "sm_86", (96, 96)): Tile(64, 32, 4),
    (8, "sm_86", (128, 128)): Tile(64, 16, 4),
    (8, "sm_86", (192, 128)): Tile(32, 16, 2),
    (8, "sm_86", (192, 192)): Tile(32, 16, 2),
    (8, "sm_86", (256, 256)): Tile(64, 16, 4, slice_columns=64),
    (8, "sm_90", (32, 32)): Tile(64, 32, 4, stages=2, min_blocks=2),
    (8, "sm_90", (64, 64)): Tile(128, 32, 8, stages=2),
    (8, "sm_90", (96, 96)): Tile(128, 32, 8, stages=2),
    (8, "sm_90", (128, 128)): Tile(128, 16, 8, stages=2),
    (8, "sm_90", (192, 128)): Tile(64, 16, 4, stages=2),
    (8, "sm_90", (192, 192)): Tile(64, 16, 4, stages=2),
    (8, "sm_90", (256, 256)): Tile(64, 16, 4),
}


# Backward: the first that fits. A warp owns 16 rows (dq, and gradients of what stands between scores and
# softmax) or 16 keys (dkdv).
BACKWARD_DQ = (
    Tile(128, 32, 8, stages=2),
    Tile(128, 32, 8),
    Tile(64, 32, 4, stages=2),
    Tile(64, 32, 4),
    Tile(64, 16, 4),
    Tile(32, 16, 2),
    Tile(64, 16, 4, slice_columns=64),
)
BACKWARD_DKDV = (
    Tile(32, 128, 8, stages=2),
    Tile(32, 128, 8),
    Tile(32, 64, 4, stages=2),
    Tile(32, 64, 4),
    Tile(16, 64, 4),
    Tile(16, 32, 2),
    Tile(16, 64, 4, slice_columns=64),
    Tile(16, 32, 2, slice_columns=64),
)
BACKWARD_PAIRS = (
    Tile(64, 32, 4),
    Tile(32, 32, 2),
    Tile(32, 16, 2),
    Tile(64, 16, 4, slice_columns=64),
)
WORK_BYTES = 32  # what a block of dkdv or dq works on: kernels_cu/wide_work.cuh
# Shared memory that one block may have: CUDA programming guide, table of technical specifications.
SHARED_BYTES = {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}


def backward_shared_bytes(
    item: int, kernel: str, tile: Tile, head_dim: int, head_dim_v: int, *, packed: bool = False
) -> int:
    """As `_tuning.backward_shared_bytes`; statistics of rows have the size of an element.

    `packed`: dkdv of packed sequences has the params of its own there.
    """
    if packed and kernel == "backward_dkdv":
        own = -(-_params.BACKWARD.itemsize // 16) * 16
        return own + backward_shared_bytes(item, kernel, tile, head_dim, head_dim_v)
    if tile.slice_columns:
        columns = part(item, head_dim)
        if kernel == "backward_dkdv":
            columns = max(columns, part(item, head_dim_v))
        return _sliced_bytes(item, kernel, tile, columns)
    row = item * (head_dim + head_dim_v)
    if kernel == "backward_dkdv":
        rows = tile.stages * tile.block_q * (row + 2 * item)
        return tile.block_k * row + rows + WORK_BYTES
    if kernel == "backward_dq":
        return tile.block_q * row + tile.stages * tile.block_k * row
    if kernel in ("backward_bias", "backward_score"):
        return (tile.block_q + tile.block_k) * row
    return 0


def _sliced_bytes(item: int, kernel: str, tile: Tile, columns: int) -> int:
    """Slices of both operands; where they were, `columns` of a whole tile, and what is staged."""
    slices = item * tile.slice_columns * (tile.block_q + tile.block_k)
    whole = item * max(tile.block_q, tile.block_k) * columns
    if kernel in ("backward_bias", "backward_score"):
        return slices
    statistics = 2 * item * tile.block_q + WORK_BYTES if kernel == "backward_dkdv" else 0
    return max(slices, whole) + statistics


def backward_tile(
    item: int, kernel: str, arch: str, head_dim: int, head_dim_v: int, *, packed: bool = False
) -> Tile:
    """The tile of one of the backward kernels."""
    if kernel in BACKWARD_ROWS:
        return BACKWARD_ROWS[kernel]
    tiles: tuple[Tile, ...]
    tiles = {"backward_dkdv": BACKWARD_DKDV, "backward_dq": BACKWARD_DQ}.get(kernel, BACKWARD_PAIRS)
    room = SHARED_BYTES[family(arch)]
    if (
        family(arch) == "sm_75"
    ):  # tiles travel through registers: nothing to gain from a second stage
        tiles = tuple(tile for tile in tiles if tile.stages == 1)
    fits = (
        tile
        for tile in tiles
        if backward_shared_bytes(item, kernel, tile, head_dim, head_dim_v, packed=packed) <= room
    )
    return next(fits)


def part(item: int, columns: int) -> int:
    """How many of an accumulator's columns are made at a time; see ForwardLayout::PART."""
    return columns // 2 if item == 8 and columns > 128 else columns


def forward_tile(item: int, arch: str, head_dim: int, head_dim_v: int) -> Tile:
    """The forward tile of compiled head dims."""
    return FORWARD[item, family(arch), (head_dim, head_dim_v)]


def forward_shared_bytes(item: int, tile: Tile, head_dim: int, head_dim_v: int) -> int:
    """As `_tuning.forward_shared_bytes`."""
    if tile.slice_columns:
        return _sliced_bytes(item, "forward", tile, part(item, head_dim_v))
    keys = tile.stages * tile.block_k * (head_dim + part(item, head_dim_v))
    return item * (tile.block_q * head_dim + keys)
