"""The values that planning hands to launching: what runs, how large, in which order."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash._compile import Specialization


@dataclass(frozen=True, slots=True)
class Schedule:
    """How block ids map to (tile, head); see kernels_cu/schedule.cuh."""

    tiles: int
    heads_per_section: int
    longest_last: bool
    splits: int = 1  # parts of the keys; `tiles` counts each tile of rows so many times


@dataclass(frozen=True, slots=True)
class PairWork:
    """How a walk over pairs shares out its sums; see kernels_cu/backward_pairs.cuh."""

    splits: int
    tiles_q: int
    tiles_k: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch.

    Parameters
    ----------
    walk : {"", "rows", "queries", "keys"}
        What its tiles are: rows alone, or queries or keys with the pairs they see (which needs a
        mask's tile map). "" for a launch without tiles.
    pairs : PairWork or None
        Of gradients of a bias or of score parameters.
    """

    spec: Specialization
    grid: int
    block: int
    shared_memory: int
    schedule: Schedule
    walk: str = ""
    pairs: PairWork | None = None


@dataclass(frozen=True, slots=True)
class Scratch:
    """Workspace a Plan needs between its launches."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What `_launch` runs, in order."""

    candidate: str
    launches: tuple[Launch, ...]
    scratch: tuple[Scratch, ...] = ()
