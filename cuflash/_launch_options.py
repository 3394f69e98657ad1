"""The option arrays of a call as kernels see them: masks with their tile maps, bias, sinks, the seed of
dropout, parameters of a score expression, cumulative lengths of packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash import _candidates, _dtypes, _mask_mirror, _params, _side_kernels
from cuflash._candidates_grouped import group_of, is_grouped
from cuflash._device import Device
from cuflash._dropout import Dropout
from cuflash._extras import Extra
from cuflash._plan_values import Launch, Plan
from cuflash._problem import Packed, Problem
from cuflash._views import View, Views, pair_view

WORD = 32  # tiles per word of a map
FAR = 2**30  # a band's bound that no sequence reaches
_SEQUENCE_WORDS, _WORK_WORDS = 4, 2  # of an entry of the tables of packed sequences: int4, int2


@dataclass(frozen=True, slots=True)
class TileMap:
    """Where one launch's tile map lies, and how large its tiles are."""

    tile_q: int
    tile_k: int
    by_keys: bool
    rows: int  # tiles along the axis a block owns
    words: int
    offset: int
    plane: int  # words of one plane
    group: int = 1  # heads whose rows a tile has

    def fill(self, values: np.ndarray, extents: Sequence[int], heads: int) -> None:
        """Write the map's part of MaskParams; `extents` of the mask's merged batch axes."""
        step = self.rows * self.words
        values["map_head"] = step if heads > 1 else 0
        step *= heads
        strides = []
        for extent in reversed(extents):
            strides.append(step if extent > 1 else 0)
            step *= extent
        values["map_batch"] = strides[::-1]
        values["map_offset"], values["map_plane"] = self.offset, self.plane
        values["map_words"] = self.words


class OptionInputs:
    """The option arrays of one kind of call."""

    def __init__(
        self, device: Device, problem: Problem, arrays: Mapping[str, Any], extra: Extra
    ) -> None:
        self._device, self._problem = device, problem
        self._longest = _candidates.longest(problem)
        self._bias, self._sinks = arrays.get("bias"), arrays.get("sinks")
        rank = len(problem.batch) + 3
        self.found: dict[str, View] = {}
        if problem.mask is not None:
            self.found["mask"] = (
                _slots_view(extra, rank)
                if extra.blocks is not None
                else pair_view(arrays["mask"], rank)
            )
        if self._bias is not None:
            self.found["bias"] = pair_view(self._bias, rank)
        self._score_shapes = [tuple(arrays[name].shape) for name in problem.score_params]
        self._score_elements = [
            arrays[name].dtype != _dtypes.FLOAT32 for name in problem.score_params
        ]
        ends = (arrays.get("cu_seqlens_q"), arrays.get("cu_seqlens_k"))
        self._ends = [(cu.strides[0], cu.dtype.itemsize) for cu in ends if cu is not None]
        # What follows the other pointers of a call that has no such options.
        self._no_scores = [0] * (_params.MAX_SCORE_ARRAYS + _params.MAX_SCORE_SCALARS)
        self._maps: dict[Launch, TileMap] = {}
        self._map_words = 0

    @property
    def flags(self) -> int:
        """Types of side arrays, and how packed sequences are aligned."""
        flags = 0
        for array, flag in (
            (self._bias, _params.FLAG_BIAS_ELEMENT),
            (self._sinks, _params.FLAG_SINKS_ELEMENT),
        ):
            if array is not None and array.dtype != _dtypes.FLOAT32:
                flags |= flag
        packed = self._problem.packed
        if packed is not None and packed.aligned_at_end:
            flags |= _params.FLAG_ALIGN_END
        return flags

    def bind(self, struct: np.ndarray, views: Views, plan: Plan, extra: Extra) -> None:
        """Write what all launches share, lay out tile maps and work tables."""
        self._views = views
        values, problem = struct["values"], self._problem
        for name in self.found:
            strides = values["mask"]["strides"] if name == "mask" else values["bias"]
            views.fill(strides, name)
        if problem.mask is not None:
            self._bind_mask(values["mask"], plan, extra)
        if problem.dropout_p > 0:
            dropout = Dropout.of(problem.dropout_p, 0)
            values["dropout"]["threshold"] = dropout.threshold
            values["dropout"]["factor"] = values["dropout"]["factor_f64"] = dropout.factor
        score = values["score"]
        score["extents"] = 1
        for n, (shape, of_elements) in enumerate(
            zip(self._score_shapes, self._score_elements, strict=True)
        ):
            score["extents"][n, : len(shape)] = shape
            score["element_arrays"] |= int(of_elements) << n
        if problem.packed is not None:
            self._bind_packed(values["packed"], plan)

    # ---- masks

    def _bind_mask(self, values: np.ndarray, plan: Plan, extra: Extra) -> None:
        problem = self._problem
        assert problem.mask is not None
        if extra.blocks is not None:
            values["block_q"], values["block_k"] = extra.blocks.block_size
            values["bit_words"] = extra.blocks.bits.shape[-1]
        view = self._views.views["mask"]
        self._heads = view.shape[-3]
        self._extents = [
            1 if step == 0 else extent
            for step, extent in zip(
                values["strides"]["batch"], self._views.batch_extent, strict=True
            )
        ]
        group = 1
        if is_grouped(plan.launches[0].spec):
            group = group_of(problem)
            self._heads = max(1, self._heads // group)  # of the maps: groups, or all heads
        lead = math.prod(self._extents) * self._heads
        for launch in plan.launches:
            if launch.walk not in ("queries", "keys"):
                continue
            by_keys = launch.walk == "keys"
            tile_q, tile_k = (launch.spec.constant(n) for n in ("BLOCK_Q", "BLOCK_K"))
            rows, columns = -(-self._longest[0] * group // tile_q), -(-self._longest[1] // tile_k)
            rows, columns = (columns, rows) if by_keys else (rows, columns)
            words = -(-columns // WORD)
            plane = lead * rows * words
            self._maps[launch] = TileMap(
                tile_q, tile_k, by_keys, rows, words, self._map_words, plane, group
            )
            self._map_words += 2 * plane
        self._map_packers = [
            (tiles.plane, self._map_packer(tiles, values)) for tiles in self._maps.values()
        ]
        self._map_kernel = self._device.load(
            _side_kernels.mask_tiles(self._device.arch, problem.mask.kind)
        )

    def _map_packer(self, tiles: TileMap, values: np.ndarray) -> _params.Packer:
        """The params of one map's launch, ready but for its pointers; `values` as in MaskParams."""
        struct = np.zeros((), _params.MASK_TILES)
        struct["values"] = values
        tiles.fill(struct["values"], self._extents, self._heads)
        struct["batch_extent"], struct["heads"] = self._extents, self._heads
        struct["len_q"], struct["len_k"] = self._longest
        struct["tile_q"], struct["tile_k"] = tiles.tile_q, tiles.tile_k
        struct["by_keys"], struct["tile_rows"] = tiles.by_keys, tiles.rows
        struct["group"] = tiles.group
        return _params.Packer(struct, len(_params.MASK_TILES_POINTERS))

    def _make_maps(self, elements: Any, bits: Any) -> Any:
        """Tile maps of every launch, one behind the other."""
        at = self._device.pointer
        map_ = self._device.empty((max(1, self._map_words),), np.uint32)
        pointers = at(elements), 0 if bits is None else at(bits), at(map_)
        for blocks, pack in self._map_packers:
            self._map_kernel(blocks, _side_kernels.MAP_WARPS * 32, 0, pack(*pointers))
        return map_

    def _mask_pointers(self, arrays: Mapping[str, Any], extra: Extra, held: list[Any]) -> list[int]:
        at = self._device.pointer
        if extra.blocks is not None:
            slots, bits, map_ = _mask_mirror.on_device(
                self._device,
                extra.blocks,
                self._views.views["mask"].shape[:-2],
                (tuple(self._extents), self._longest, tuple(self._maps.values())),
                self._make_maps,
            )
            held += (slots, bits, map_)
            return [at(slots), 0 if bits is None else at(bits), at(map_)]
        mask = self._views.input("mask", arrays["mask"], self._device)
        map_ = self._make_maps(mask, None)
        held += (mask, map_)
        return [at(mask), 0, at(map_)]

    # ---- packed sequences

    def _bind_packed(self, values: np.ndarray, plan: Plan) -> None:
        packed, offset = self._problem.packed, 0
        assert packed is not None
        values["total_q"] = packed.total_q
        self._tables: dict[Launch, tuple[int, int, int, bool, bool]] = {}
        for launch in plan.launches:
            if not launch.walk or launch.grid == 0 or launch.spec.kernel == "backward_bias":
                continue
            by_keys = launch.walk == "keys"
            tile = launch.spec.constant("BLOCK_K" if by_keys else "BLOCK_Q")
            schedule = launch.schedule
            self._tables[launch] = (offset, schedule.tiles, tile, by_keys, schedule.longest_last)
            offset += schedule.tiles
        # `sequences`, then `work`, in one piece of memory.
        (batch,) = self._problem.batch
        self._work_at = (1 + batch) * _SEQUENCE_WORDS * 4
        self._table_words = (1 + batch) * _SEQUENCE_WORDS + offset * _WORK_WORDS
        self._packed_kernel = self._device.load(_side_kernels.packed_plan(self._device.arch))
        self._packed_packer = self._plan_packer(packed, batch)

    def _plan_packer(self, packed: Packed, batch: int) -> _params.Packer:
        """The params of the launch that finds the tiles, ready but for its pointers."""
        problem = self._problem
        struct = np.zeros((), _params.PACKED_PLAN)
        for side, (stride, itemsize) in zip("qk", self._ends, strict=True):
            struct[f"stride_{side}"] = stride // itemsize
            struct[f"wide_{side}"] = itemsize == 8
        struct["total_q"], struct["total_k"] = packed.total_q, packed.total_k
        struct["batch"], struct["max_q"], struct["max_k"] = batch, problem.len_q, problem.len_k
        struct["tables"] = len(self._tables)
        for n, (offset, capacity, tile, by_keys, longest_last) in enumerate(self._tables.values()):
            table = struct["table"][n]
            table["offset"], table["capacity"], table["tile"] = offset, capacity, tile
            table["by_keys"], table["longest_last"] = by_keys, longest_last
        return _params.Packer(struct, len(_params.PACKED_PLAN_POINTERS))

    def _packed_pointers(self, arrays: Mapping[str, Any], held: list[Any]) -> list[int]:
        """Makes `sequences` and `work` of the cumulative lengths."""
        at = self._device.pointer
        tables = self._device.empty((self._table_words,), np.int32)
        held.append(tables)
        sequences = at(tables)
        work = sequences + self._work_at
        params = self._packed_packer(
            at(arrays["cu_seqlens_q"]), at(arrays["cu_seqlens_k"]), sequences, work
        )
        self._packed_kernel(len(self._tables), _side_kernels.PACKED_WARPS * 32, 0, params)
        return [sequences, work]

    # ---- per launch, per call

    def fill_launch(self, struct: np.ndarray, launch: Launch) -> None:
        """Write what differs between the launches of a call."""
        if launch in self._maps:
            self._maps[launch].fill(struct["values"]["mask"], self._extents, self._heads)
        if self._problem.packed is not None and launch in self._tables:
            struct["values"]["packed"]["work_offset"] = self._tables[launch][0]

    def pointers(self, arrays: Mapping[str, Any], extra: Extra, held: list[Any]) -> list[int]:
        """OPTION_POINTERS of a call; launches what they need first. `held`: to keep alive."""
        device, problem = self._device, self._problem
        at = device.pointer
        found = [0, 0, 0] if problem.mask is None else self._mask_pointers(arrays, extra, held)
        bias = 0
        if problem.bias is not None:
            array = self._views.input("bias", arrays["bias"], device)
            held.append(array)
            bias = at(array)
        found.append(bias)
        sinks = arrays.get("sinks")
        found.append(0 if sinks is None else self._contiguous(sinks, held))
        seed = arrays.get("seed")
        found.append(0 if seed is None else at(seed))
        found.append(extra.seed or 0)
        found += [0, 0] if problem.packed is None else self._packed_pointers(arrays, held)
        if extra.score_mod is None:
            return found + self._no_scores
        scores = [self._contiguous(arrays[name], held) for name in problem.score_params]
        found += scores + [0] * (_params.MAX_SCORE_ARRAYS - len(scores))
        real = _dtypes.BY_NAME[problem.dtype].lse
        bits = [scalar_bits(number, real) for number in extra.score_mod.scalars.values()]
        return found + bits + [0] * (_params.MAX_SCORE_SCALARS - len(bits))

    def _contiguous(self, array: Any, held: list[Any]) -> int:
        array = self._device.xp.ascontiguousarray(array)
        held.append(array)
        return self._device.pointer(array) if array.size else 0


def _slots_view(extra: Extra, rank: int) -> View:
    """The slots of a BlockMask as an array over pairs of blocks."""
    assert extra.blocks is not None
    shape = extra.blocks.slots.shape
    shape = (1,) * (rank - len(shape)) + shape[-rank:]
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(0 if extent == 1 else step)
        step *= extent
    return View(shape, tuple(reversed(strides)), False)


def scalar_bits(number: float, real: np.dtype) -> int:
    """A scalar parameter as 8 bytes: the bits of a `real`, or of an int."""
    if isinstance(number, int):
        return number % 2**32
    with np.errstate(over="ignore"):  # what is too large for a float is infinite
        return int(real.type(number).view(f"u{real.itemsize}"))
