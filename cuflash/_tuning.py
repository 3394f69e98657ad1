"""Which tile sizes each architecture uses: tables of numbers, no rules.

Rows are keyed by (architecture family, (HEAD_DIM, HEAD_DIM_V)). A tile is a trade between registers
(a warp's accumulators), shared memory (how many blocks share a multiprocessor) and barriers.

Forward, by example of head_dim 128: 4 warps of 32 rows hold 128 floats of output and 64 of scores
per thread, so every fragment of K and V read from shared memory feeds two products; with 16 rows per
warp shared memory would be the limit. One stage is 64 KiB and lets two blocks share an A100
multiprocessor; the second stage (one barrier per tile instead of two) needs the 227 KiB of an H100.
sm_86, 89 and 120 have 100 KiB per multiprocessor: two blocks of 48 KiB. Turing carries tiles through
registers on their way to shared memory: 16 rows per warp, and 8 warps to share one copy of K and V.

Dates are those of the last change; "chosen" means from register counts and arithmetic, "measured"
names the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Tile:
    """The compile-time shape of a kernel.

    Parameters
    ----------
    block_q, block_k : int
        Query rows and keys per tile.
    warps : int
        Warps per block.
    stages : int
        Tiles of the walked operands in shared memory at a time.
    min_blocks : int
        Blocks per multiprocessor the register allocation must allow.
    q_in_registers : bool
        Keep the fragments of Q in registers instead of reading them from shared memory for every
        key tile.
    slice_columns : int
        Nothing stays in shared memory: operands come in slices of so many columns (wide_slices.cuh);
        0 for whole tiles.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int = 1
    min_blocks: int = 1
    q_in_registers: bool = False
    slice_columns: int = 0


def family(arch: str) -> str:
    """The row key of an architecture: "sm_89" -> "sm_86", which has the same 99 KiB of shared memory per block."""
    number = int(arch.removeprefix("sm_").rstrip("af"))
    if number < 80:
        return "sm_75"
    if number < 86 or number == 87:
        return "sm_80"
    if number < 90 or number >= 120:
        return "sm_86"
    return "sm_90"


# 2026-11-20, chosen.
FORWARD: dict[tuple[str, tuple[int, int]], Tile] = {
    ("sm_75", (32, 32)): Tile(64, 64, 4, q_in_registers=True),
    ("sm_75", (64, 64)): Tile(64, 64, 4, q_in_registers=True),
    ("sm_75", (96, 96)): Tile(128, 64, 8),
    ("sm_75", (128, 128)): Tile(128, 64, 8),
    ("sm_75", (192, 128)): Tile(64, 32, 4),
    ("sm_75", (192, 192)): Tile(64, 32, 4),
    ("sm_75", (256, 256)): Tile(64, 16, 4),
    ("sm_80", (32, 32)): Tile(128, 64, 4, stages=2, min_blocks=2, q_in_registers=True),
    ("sm_80", (64, 64)): Tile(128, 64, 4, stages=2, min_blocks=2, q_in_registers=True),
    ("sm_80", (96, 96)): Tile(128, 64, 4, min_blocks=2),
    ("sm_80", (128, 128)): Tile(128, 64, 4, min_blocks=2),
    ("sm_80", (192, 128)): Tile(64, 64, 4, min_blocks=2),
    ("sm_80", (192, 192)): Tile(64, 64, 4, min_blocks=2),
    ("sm_80", (256, 256)): Tile(64, 32, 4, min_blocks=2),
    ("sm_86", (32, 32)): Tile(128, 64, 4, stages=2, min_blocks=2, q_in_registers=True),
    ("sm_86", (64, 64)): Tile(128, 64, 4, stages=2, min_blocks=2, q_in_registers=True),
    ("sm_86", (96, 96)): Tile(128, 32, 4, min_blocks=2),
    ("sm_86", (128, 128)): Tile(128, 32, 4, min_blocks=2),
    ("sm_86", (192, 128)): Tile(64, 32, 4, min_blocks=2),
    ("sm_86", (192, 192)): Tile(64, 32, 4, min_blocks=2),
    ("sm_86", (256, 256)): Tile(64, 32, 4),
    ("sm_90", (32, 32)): Tile(128, 64, 4, stages=2, min_blocks=2, q_in_registers=True),
    ("sm_90", (64, 64)): Tile(128, 64, 4, stages=2, min_blocks=2, q_in_registers=True),
    ("sm_90", (96, 96)): Tile(128, 64, 4, stages=2, min_blocks=2),
    ("sm_90", (128, 128)): Tile(128, 64, 4, stages=2, min_blocks=2),
    ("sm_90", (192, 128)): Tile(64, 64, 4, stages=2, min_blocks=2),
    ("sm_90", (192, 192)): Tile(64, 64, 4, min_blocks=2),
    ("sm_90", (256, 256)): Tile(64, 64, 4, min_blocks=2),
}


# Biases and score expressions need registers for loads on their way: half as many keys at a time.
# 2026-11-21, chosen.
_HALF_KEYS = Tile(128, 32, 4, stages=2, min_blocks=2)
FORWARD_GENERAL: dict[tuple[str, tuple[int, int]], Tile] = {
    **FORWARD,
    ("sm_80", (32, 32)): _HALF_KEYS,
    ("sm_80", (64, 64)): _HALF_KEYS,
    ("sm_80", (96, 96)): _HALF_KEYS,
    ("sm_80", (128, 128)): _HALF_KEYS,
    ("sm_86", (32, 32)): _HALF_KEYS,
    ("sm_86", (64, 64)): _HALF_KEYS,
    ("sm_90", (32, 32)): _HALF_KEYS,
    ("sm_90", (64, 64)): _HALF_KEYS,
    ("sm_90", (96, 96)): _HALF_KEYS,
    ("sm_90", (128, 128)): _HALF_KEYS,
}
# A packed sequence's lengths and band take registers, too: half as many rows.
FORWARD_GENERAL_PACKED: dict[tuple[str, tuple[int, int]], Tile] = {
    **FORWARD_GENERAL,
    ("sm_80", (128, 128)): Tile(64, 64, 4, stages=2, min_blocks=2),
    ("sm_86", (128, 128)): Tile(64, 64, 4, min_blocks=2),
    ("sm_90", (128, 128)): Tile(64, 64, 4, stages=2, min_blocks=2),
}


def forward_tile(
    arch: str, head_dim: int, head_dim_v: int, *, general: bool = False, packed: bool = False
) -> Tile:
    """The forward tile of compiled head dims on an architecture; `general`: with a bias or a score expression."""
    table = FORWARD
    if general:
        table = FORWARD_GENERAL_PACKED if packed else FORWARD_GENERAL
    return table[family(arch), (head_dim, head_dim_v)]


# One warp with all rows there are: it reads no key twice, and many small blocks keep copies under way.
# Turing's copies pass through registers, of which one warp has too few.
# 2026-11-21, chosen.
FORWARD_FEW_ROWS: dict[tuple[str, tuple[int, int]], Tile] = {
    **{key: tile for key, tile in FORWARD.items() if key[0] == "sm_75"},
    ("sm_75", (96, 96)): Tile(64, 32, 4),
    ("sm_75", (128, 128)): Tile(64, 32, 4),
    **{
        (family, dims): Tile(
            16, 32 if dims[0] >= 192 else 64, 1, stages=2, q_in_registers=dims[0] <= 128
        )
        for family, dims in FORWARD
        if family != "sm_75"
    },
}


# Warps of such tiles, of 16 rows each. Rows beyond the largest begin another tile: a warp with 32 of them, as in the
# tiles of many queries, would have too few registers to find out what each of its rows is.
ROW_WARPS = (1, 2, 4)


def forward_few_rows_tile(arch: str, head_dim: int, head_dim_v: int, rows: int = 16) -> Tile:
    """The forward tile for so few rows of compiled head dims on an architecture."""
    tile = FORWARD_FEW_ROWS[family(arch), (head_dim, head_dim_v)]
    if rows <= tile.block_q or tile.warps > 1:
        return tile
    warps = next((n for n in ROW_WARPS if rows <= 16 * n), ROW_WARPS[-1])
    return replace(tile, block_q=16 * warps, warps=warps)


def forward_shared_bytes(tile: Tile, head_dim: int, head_dim_v: int) -> int:
    """Dynamic shared memory of forward: one tile of Q (later the output), `stages` tiles of K and V."""
    return 2 * (tile.block_q * head_dim + tile.stages * tile.block_k * (head_dim + head_dim_v))


# Backward. dkdv: a warp owns 16 or 32 keys and both gradients of them; queries stream past.
# dq: a warp owns 16 or 32 rows.
# 2026-11-20, chosen.
BACKWARD_DKDV: dict[tuple[str, tuple[int, int]], Tile] = {
    ("sm_75", (32, 32)): Tile(64, 128, 4),
    ("sm_75", (64, 64)): Tile(64, 128, 8),
    ("sm_75", (96, 96)): Tile(32, 64, 4),
    ("sm_75", (128, 128)): Tile(16, 64, 4),
    ("sm_75", (192, 128)): Tile(32, 64, 4),
    ("sm_75", (192, 192)): Tile(16, 64, 4),
    ("sm_75", (256, 256)): Tile(16, 32, 2),
    ("sm_80", (32, 32)): Tile(64, 128, 4, stages=2),
    ("sm_80", (64, 64)): Tile(64, 128, 4, stages=2),
    ("sm_80", (96, 96)): Tile(64, 128, 8, stages=2),
    ("sm_80", (128, 128)): Tile(64, 128, 8, stages=2),
    ("sm_80", (192, 128)): Tile(32, 128, 8, stages=2),
    ("sm_80", (192, 192)): Tile(32, 128, 8, stages=2),
    ("sm_80", (256, 256)): Tile(32, 128, 8),
    ("sm_86", (32, 32)): Tile(64, 128, 4, stages=2),
    ("sm_86", (64, 64)): Tile(32, 128, 4, stages=2),
    ("sm_86", (96, 96)): Tile(32, 128, 8, stages=2),
    ("sm_86", (128, 128)): Tile(32, 128, 8, stages=2),
    ("sm_86", (192, 128)): Tile(32, 64, 4, stages=2),
    ("sm_86", (192, 192)): Tile(32, 64, 4),
    ("sm_86", (256, 256)): Tile(32, 64, 4),
    ("sm_90", (32, 32)): Tile(64, 128, 4, stages=2),
    ("sm_90", (64, 64)): Tile(64, 128, 4, stages=2),
    ("sm_90", (96, 96)): Tile(64, 128, 8, stages=2),
    ("sm_90", (128, 128)): Tile(64, 128, 8, stages=2),
    ("sm_90", (192, 128)): Tile(64, 128, 8, stages=2),
    ("sm_90", (192, 192)): Tile(32, 128, 8, stages=2),
    ("sm_90", (256, 256)): Tile(32, 128, 8, stages=2),
}
# The same with a tile of dS in shared memory, for dQ on the way.
BACKWARD_DKDV_ACCUMULATE: dict[tuple[str, tuple[int, int]], Tile] = {
    **BACKWARD_DKDV,
    ("sm_75", (64, 64)): Tile(32, 128, 8),
    ("sm_75", (192, 128)): Tile(32, 32, 2),
    ("sm_75", (192, 192)): Tile(32, 32, 2),
    ("sm_80", (256, 256)): Tile(32, 64, 4, stages=2),
    ("sm_86", (128, 128)): Tile(32, 128, 8),
    ("sm_86", (256, 256)): Tile(16, 64, 4),
}
# Variants of a general score, and of any other than the linear one with an option: more warps or smaller tiles, so that
# each thread has registers for masks, biases and places. 2026-11-21, chosen.
BACKWARD_DKDV_OPTIONS: dict[tuple[str, tuple[int, int]], Tile] = {
    **BACKWARD_DKDV,
    ("sm_75", (128, 128)): Tile(16, 64, 4),
    ("sm_80", (64, 64)): Tile(64, 128, 8, stages=2),
    ("sm_86", (64, 64)): Tile(32, 128, 8, stages=2),
    ("sm_90", (64, 64)): Tile(64, 128, 8, stages=2),
}
BACKWARD_DQ: dict[tuple[str, tuple[int, int]], Tile] = {
    ("sm_75", (32, 32)): Tile(128, 64, 4),
    ("sm_75", (64, 64)): Tile(128, 64, 8),
    ("sm_75", (96, 96)): Tile(64, 32, 4),
    ("sm_75", (128, 128)): Tile(64, 32, 4),
    ("sm_75", (192, 128)): Tile(64, 32, 4),
    ("sm_75", (192, 192)): Tile(64, 16, 4),
    ("sm_75", (256, 256)): Tile(32, 32, 2),
    ("sm_80", (32, 32)): Tile(128, 64, 4, stages=2),
    ("sm_80", (64, 64)): Tile(128, 64, 4, stages=2),
    ("sm_80", (96, 96)): Tile(128, 64, 8, stages=2),
    ("sm_80", (128, 128)): Tile(128, 64, 8, stages=2),
    ("sm_80", (192, 128)): Tile(128, 32, 8, stages=2),
    ("sm_80", (192, 192)): Tile(128, 32, 8, stages=2),
    ("sm_80", (256, 256)): Tile(128, 32, 8),
    ("sm_86", (32, 32)): Tile(128, 64, 4, stages=2),
    ("sm_86", (64, 64)): Tile(128, 32, 4, stages=2),
    ("sm_86", (96, 96)): Tile(128, 32, 8, stages=2),
    ("sm_86", (128, 128)): Tile(128, 32, 8, stages=2),
    ("sm_86", (192, 128)): Tile(64, 32, 4, stages=2),
    ("sm_86", (192, 192)): Tile(64, 32, 4),
    ("sm_86", (256, 256)): Tile(64, 32, 4),
    ("sm_90", (32, 32)): Tile(128, 64, 4, stages=2),
    ("sm_90", (64, 64)): Tile(128, 64, 4, stages=2),
    ("sm_90", (96, 96)): Tile(128, 64, 8, stages=2),
    ("sm_90", (128, 128)): Tile(128, 64, 8, stages=2),
    ("sm_90", (192, 128)): Tile(128, 64, 8, stages=2),
    ("sm_90", (192, 192)): Tile(128, 32, 8, stages=2),
    ("sm_90", (256, 256)): Tile(128, 32, 8, stages=2),
}
# Gradients of what stands between scores and softmax: 16 rows per warp; are both head dims together at most 256?
BACKWARD_PAIRS: dict[tuple[str, bool], Tile] = {
    ("sm_75", True): Tile(64, 16, 4),
    ("sm_75", False): Tile(32, 32, 2),
    ("sm_80", True): Tile(64, 64, 4),
    ("sm_80", False): Tile(64, 32, 4),
    ("sm_86", True): Tile(64, 64, 4),
    ("sm_86", False): Tile(32, 32, 2),
    ("sm_90", True): Tile(64, 64, 4),
    ("sm_90", False): Tile(64, 32, 4),
}
# Kernels that only pass over rows; one for all architectures and head dims.
BACKWARD_ROWS: dict[str, Tile] = {
    "backward_prepare": Tile(32, 32, 4),
    "backward_convert": Tile(32, 32, 4),
    "backward_slopes": Tile(32, 32, 1),
    "backward_sinks": Tile(32, 32, 4),
}


def accumulates(arch: str, head_dim: int, head_dim_v: int, linear: bool) -> bool:
    """Whether the dK/dV kernel can gather dQ on the way: on Turing the general variant has too few registers for it."""
    return family(arch) != "sm_75" or linear or head_dim + head_dim_v < 256


def backward_tile(
    kernel: str, arch: str, head_dim: int, head_dim_v: int, *, options: bool = False
) -> Tile:
    """The tile of one of the backward kernels.

    `options`: of a general score, or of soft cap or ALiBi with an option.
    """
    if kernel in BACKWARD_ROWS:
        return BACKWARD_ROWS[kernel]
    if kernel in ("backward_bias", "backward_score"):
        return BACKWARD_PAIRS[family(arch), head_dim + head_dim_v <= 256]
    if kernel == "backward_dkdv" and options:
        return BACKWARD_DKDV_OPTIONS[family(arch), (head_dim, head_dim_v)]
    table = {
        "backward_dkdv": BACKWARD_DKDV,
        "backward_dkdv_accumulate": BACKWARD_DKDV_ACCUMULATE,
        "backward_dq": BACKWARD_DQ,
    }[kernel]
    return table[family(arch), (head_dim, head_dim_v)]


def backward_shared_bytes(kernel: str, tile: Tile, head_dim: int, head_dim_v: int) -> int:
    """Dynamic shared memory of one of the backward kernels.

    dkdv keeps tiles of K and V, and `stages` tiles of Q and dO with two floats per row; where it gathers dQ also a tile
    of dS. dq keeps tiles of Q and dO, and `stages` tiles of K and V.
    """
    row = 2 * (head_dim + head_dim_v)
    if kernel in ("backward_dkdv", "backward_dkdv_accumulate"):
        scores = 2 * tile.block_k * max(32, tile.block_q) if kernel.endswith("accumulate") else 0
        return tile.block_k * row + tile.stages * tile.block_q * (row + 8) + scores
    if kernel in ("backward_bias", "backward_score"):
        return (tile.block_q + tile.block_k) * row
    if kernel == "backward_dq":
        return tile.block_q * row + tile.stages * tile.block_k * row
    return 0
