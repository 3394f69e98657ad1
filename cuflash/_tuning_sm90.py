"""Tile sizes of the kernels of warpgroups (sm_90a): tables of numbers, no rules.

A block is alone on its multiprocessor: 227 KiB of shared memory, 64 Ki registers. One warpgroup copies and
gives its registers to the others, which have 64 query rows each.

Forward: a thread holds block_k / 2 floats of scores, block_k / 4 words of rounded weights and head_dim_v / 2
floats of output, and needs about 40 registers more. Shared memory holds Q, `stages` tiles of K and of V, and
the output, which goes where Q was when there is no room beside.

"chosen" means from register counts and arithmetic, "measured" names the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ALIGNMENT = 1024  # of slabs; shared memory itself is aligned to 16 bytes
SLAB = 64  # columns
SHARED_MEMORY = 227 * 1024


@dataclass(frozen=True, slots=True)
class Tile:
    """The compile-time shape of a kernel of warpgroups.

    Parameters
    ----------
    groups : int
        Warpgroups that multiply; one more copies.
    block_k : int
        Keys per tile.
    stages : int
        Tiles of K, and of V, in shared memory at a time.
    turns : bool
        Warpgroups issue their products in turns.
    copying : int
        Registers of a thread that copies, where two warpgroups multiply. It needs about 30; with 24 it keeps a
        few in memory, where they hurt nobody, and those that multiply have 8 more.
    """

    groups: int
    block_k: int
    stages: int = 2
    turns: bool = True
    copying: int = 40

    @property
    def block_q(self) -> int:
        """Query rows per tile."""
        return 64 * self.groups

    @property
    def registers(self) -> tuple[int, int]:
        """Per thread, of those that copy and those that multiply; together 64 Ki with 128 threads each."""
        if self.groups == 3:
            return 32, 160
        return self.copying, (504 - self.copying) // 2


# 2026-11-21, chosen.
FORWARD: dict[tuple[int, int], Tile] = {
    # Steps are short: copies begin three of them ahead.
    (64, 64): Tile(3, 128, stages=4),
    (96, 96): Tile(2, 128),
    (128, 128): Tile(2, 128),
    (192, 128): Tile(2, 128),
    # As many keys as shared memory holds. Products are long enough to cover a softmax without turns.
    (192, 192): Tile(2, 112, turns=False),
    (256, 256): Tile(2, 80, turns=False, copying=24),
}
# Masks, dropout, sequences and the like need more than 160 registers.
FORWARD_OPTIONS: dict[tuple[int, int], Tile] = {
    **FORWARD,
    (64, 64): Tile(2, 128, stages=4),
    (192, 192): Tile(2, 96, turns=False),
    (256, 256): Tile(2, 64, turns=False, copying=24),
}
# Biases and score expressions need registers for loads on their way: half as many keys.
FORWARD_GENERAL: dict[tuple[int, int], Tile] = {
    dims: replace(tile, block_k=min(64, tile.block_k)) for dims, tile in FORWARD_OPTIONS.items()
}


def forward_tile(
    head_dim: int, head_dim_v: int, *, options: bool = False, general: bool = False
) -> Tile:
    """The forward tile of compiled head dims.

    `options`: with anything beyond a band, a scale, a soft cap and ALiBi; `general`: with a bias or a score
    expression.
    """
    table = FORWARD_GENERAL if general else FORWARD_OPTIONS if options else FORWARD
    return table[head_dim, head_dim_v]


def slabs(columns: int) -> int:
    """Slabs of 64 columns."""
    return -(-columns // SLAB)


def forward_out_apart(tile: Tile, head_dim: int, head_dim_v: int) -> bool:
    """Whether the output has room beside Q."""
    return _forward_bytes(tile, head_dim, head_dim_v, True) <= SHARED_MEMORY


def forward_shared_bytes(tile: Tile, head_dim: int, head_dim_v: int) -> int:
    """Dynamic shared memory of forward."""
    apart = forward_out_apart(tile, head_dim, head_dim_v)
    return _forward_bytes(tile, head_dim, head_dim_v, apart)


def _forward_bytes(tile: Tile, head_dim: int, head_dim_v: int, apart: bool) -> int:
    k, v = (2 * SLAB * slabs(d) for d in (head_dim, head_dim_v))  # bytes of a row
    tiles = tile.block_q * (k + (v if apart else 0)) + tile.stages * tile.block_k * (k + v)
    # Barriers: 16 bytes per tile in shared memory, 32 per tile of V that is looked at.
    return tiles + 16 * (1 + 2 * tile.stages) + 32 * tile.stages + ALIGNMENT
