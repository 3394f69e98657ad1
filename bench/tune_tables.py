"""What can be tuned: the tables of tile sizes, and the tiles worth trying for each kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from cuflash import _plan, _tuning, _tuning_sm90
from cuflash._tuning import Tile, family

Dims = tuple[int, int]
THREAD_REGISTERS = 255
# What a kernel needs beside accumulators: addresses, statistics of rows, fragments on their way.
OTHER_REGISTERS = 40


@dataclass(frozen=True)
class Tunable:
    """One table.

    Parameters
    ----------
    kernel : str
        Whose tile it holds: the kernel's name in a Specialization.
    where : str
        File and name of the table.
    table : dict
        Itself.
    key : callable
        (architecture, head dims) -> its key.
    tiles : callable
        (architecture, head dims) -> tiles to try.
    direction : {"forward", "backward"}
    deterministic : bool
        Of the call that runs the kernel.
    portable : bool
        Whether the kernel is of the portable family.
    """

    kernel: str
    where: str
    table: MutableMapping[Any, Any]
    key: Callable[[str, Dims], Any]
    tiles: Callable[[str, Dims], Iterator[Any]]
    direction: str
    deterministic: bool = False
    portable: bool = True

    def current(self, arch: str, dims: Dims) -> Any:
        """The tile in use; None where the table has none."""
        return self.table.get(self.key(arch, dims))

    @contextlib.contextmanager
    def using(self, arch: str, dims: Dims, tile: Any) -> Iterator[None]:
        """Plans made inside of this block use a tile."""
        key = self.key(arch, dims)
        before = self.table[key]
        self.table[key] = tile
        _plan._plan.cache_clear()
        try:
            yield
        finally:
            self.table[key] = before
            _plan._plan.cache_clear()

    def row(self, arch: str, dims: Dims, tile: Any) -> str:
        """The line of the table."""
        key = self.key(arch, dims)
        shown = repr(key).replace("'", '"')
        return f"{shown}: {shown_tile(tile)},"


def shown_tile(tile: Any) -> str:
    """A tile as the tables write it.

    Examples
    --------
    >>> shown_tile(Tile(128, 64, 4, stages=2))
    'Tile(128, 64, 4, stages=2)'
    """
    parts = []
    for field in dataclasses.fields(tile):
        value = getattr(tile, field.name)
        if field.default is dataclasses.MISSING:
            parts.append(repr(value))
        elif value != field.default:
            parts.append(f"{field.name}={value!r}")
    return f"{type(tile).__name__}({', '.join(parts)})"


def fits(warps: int, min_blocks: int, registers: int) -> bool:
    """Whether threads may have so many registers when `min_blocks` blocks share a multiprocessor."""
    most = min(THREAD_REGISTERS, 65536 // (min_blocks * warps * 32) // 8 * 8)
    return registers + OTHER_REGISTERS <= most


def stages_of(arch: str) -> tuple[int, ...]:
    """Turing's tiles travel through registers: nothing to gain from a second stage."""
    return (1,) if family(arch) == "sm_75" else (1, 2)


def warps_tried(dims: Dims) -> tuple[int, ...]:
    """Two warps a block only where shared memory holds no more rows."""
    return (2, 4, 8) if max(dims) > 128 else (4, 8)


def forward(arch: str, dims: Dims) -> Iterator[Tile]:
    """Portable forward: a warp owns 16 or 32 rows of queries."""
    keys_tried = (16, 32, 64) if max(dims) > 128 else (32, 64, 128)
    for warps, strips, keys, stages, kept in itertools.product(
        (4, 8), (1, 2), keys_tried, stages_of(arch), (False, True)
    ):
        # Per thread and 16 rows: output and scores in float32, fragments of Q in pairs.
        need = strips * (dims[1] // 2 + keys // 2 + (dims[0] // 4 if kept else 0))
        blocks = next((n for n in (2, 1) if fits(warps, n, need)), None)
        if blocks is not None:
            yield Tile(16 * strips * warps, keys, warps, stages, blocks, kept)


def by_keys(arch: str, dims: Dims) -> Iterator[Tile]:
    """Portable dK and dV: a warp owns 16 or 32 keys."""
    for warps, strips, queries, stages in itertools.product(
        warps_tried(dims), (1, 2), (16, 32, 64, 128), stages_of(arch)
    ):
        # Both gradients; scores and their gradients are formed a part at a time.
        if fits(warps, 1, strips * (sum(dims) // 2 + 16)):
            yield Tile(queries, 16 * strips * warps, warps, stages)


def by_queries(arch: str, dims: Dims) -> Iterator[Tile]:
    """Portable dQ: a warp owns 16 or 32 rows."""
    for warps, strips, keys, stages in itertools.product(
        warps_tried(dims), (1, 2), (16, 32, 64, 128), stages_of(arch)
    ):
        if fits(warps, 1, strips * (dims[0] // 2 + 16)):
            yield Tile(16 * strips * warps, keys, warps, stages)


def hopper_forward(arch: str, dims: Dims) -> Iterator[_tuning_sm90.Tile]:
    """Hopper's forward: two or three warpgroups of 64 rows, and one that copies."""
    for groups, keys, stages, turns in itertools.product(
        (2, 3), (64, 80, 96, 128, 160, 176), (1, 2, 3), (True, False)
    ):
        tile = _tuning_sm90.Tile(groups, keys, stages, turns)
        # Scores, weights rounded to pairs, output.
        need = keys // 2 + keys // 4 + dims[1] // 2 + OTHER_REGISTERS
        room = _tuning_sm90.forward_shared_bytes(tile, *dims) <= _tuning_sm90.SHARED_MEMORY
        if room and need <= tile.registers[1]:
            yield tile


def hopper_by_keys(arch: str, dims: Dims) -> Iterator[Tile]:
    """Hopper's dK and dV: two or three warpgroups of 64 keys, and one that feeds them. Above 128 columns two share
    64 keys.
    """
    if max(dims) > 128:
        yield from (Tile(64, 64, 12, stages) for stages in (1, 2))
        return
    for groups, queries, stages in itertools.product((1, 2, 3), (32, 64, 128), (1, 2, 3)):
        if sum(dims) // 2 + queries <= 240:
            yield Tile(queries, 64 * groups, 4 * groups + 4, stages)


def portable_key(arch: str, dims: Dims) -> Any:
    """Of the tables in `_tuning.py`."""
    return family(arch), dims


def hopper_key(arch: str, dims: Dims) -> Any:
    """Of the tables for sm_90a alone."""
    return dims


def tunables() -> Iterator[Tunable]:
    """Every table that can be tuned."""
    from cuflash._candidates_backward_sm90 import TILES

    keys, both = _tuning.BACKWARD_DKDV, _tuning.BACKWARD_DKDV_ACCUMULATE
    file = "_tuning.py"

    def portable(kernel: str, name: str, table: Any, tiles: Any, **options: bool) -> Tunable:
        direction = kernel.split("_")[0]
        return Tunable(kernel, f"{file}: {name}", table, portable_key, tiles, direction, **options)

    yield portable("forward", "FORWARD", _tuning.FORWARD, forward)
    yield portable("backward_dkdv", "BACKWARD_DKDV_ACCUMULATE", both, by_keys)
    yield portable("backward_dkdv", "BACKWARD_DKDV", keys, by_keys, deterministic=True)
    yield portable(
        "backward_dq", "BACKWARD_DQ", _tuning.BACKWARD_DQ, by_queries, deterministic=True
    )
    yield Tunable(
        kernel="forward_sm90",
        where="_tuning_sm90.py: FORWARD",
        table=_tuning_sm90.FORWARD,
        key=hopper_key,
        tiles=hopper_forward,
        direction="forward",
        portable=False,
    )
    yield Tunable(
        kernel="backward_sm90",
        where="_candidates_backward_sm90.py: TILES",
        table=TILES,
        key=hopper_key,
        tiles=hopper_by_keys,
        direction="backward",
        portable=False,
    )


def name_of(tunable: Tunable) -> str:
    """As on the command line."""
    alone = tunable.kernel == "backward_dkdv" and tunable.deterministic
    return tunable.kernel + ("_deterministic" if alone else "")


TUNABLES: dict[str, Tunable] = {name_of(tunable): tunable for tunable in tunables()}
