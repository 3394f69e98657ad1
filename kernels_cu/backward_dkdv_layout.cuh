// Where backward_dkdv keeps what in shared memory.
#pragma once

#include "backward_accumulate.cuh"
#include "wide_work.cuh"

namespace backward {

// Shared memory of a kernel that takes slices: operands, later what is staged, then the statistics.
template <class C> struct KeyLayoutOfSlices {
    using Storage = typename C::Element::Storage;
    static constexpr int REAL_BYTES = sizeof(typename C::Element::Real);
    static constexpr int PART =
        larger_of(part_columns<C>(C::HEAD_DIM), part_columns<C>(C::HEAD_DIM_V));
    static_assert(C::STAGES == 1, "slices are used at once");
    using Operands = Slices<C, C::BLOCK_K, C::BLOCK_Q>;
    // Names that the other layout has.
    using TileK = typename Operands::TileA;
    using TileV = TileK;
    using TileQ = typename Operands::TileB;
    using TileDout = TileQ;
    static constexpr int ROWS = larger_of(C::BLOCK_Q, C::BLOCK_K);
    static constexpr int STATISTICS =
        larger_of(Operands::BYTES, ROWS * PART * (int)sizeof(Storage));
    static constexpr int WORK = STATISTICS + C::BLOCK_Q * 2 * REAL_BYTES;
    static constexpr int PARAMS = WORK + WORK_BYTES<C>,
                         BYTES = PARAMS + PARAMS_BYTES<C, BackwardParams>;
    static_assert(BYTES == C::SHARED_BYTES,
                  "_tuning_wide.backward_shared_bytes disagrees with the layout");

    u32 operands, k, v, ds;  // k and v: where gradients are staged
    DEV_METHOD explicit KeyLayoutOfSlices(u32 base) : operands(base), k(base), v(base), ds(base) {}
    DEV_METHOD u32 lse_log2(int) const { return operands + STATISTICS; }
    DEV_METHOD u32 work() const { return operands + WORK; }
    static constexpr int DELTA = C::BLOCK_Q * REAL_BYTES;
};

// Shared memory: the key tiles stay, query tiles and their statistics come in STAGES buffers.
template <class C> struct KeyLayout {
    using Storage = typename C::Element::Storage;
    static constexpr int REAL_BYTES = sizeof(typename C::Element::Real);
    using TileK = SharedTile<C::BLOCK_K, C::HEAD_DIM, Storage>;
    using TileV = SharedTile<C::BLOCK_K, C::HEAD_DIM_V, Storage>;
    using TileQ = SharedTile<C::BLOCK_Q, C::HEAD_DIM, Storage>;
    using TileDout = SharedTile<C::BLOCK_Q, C::HEAD_DIM_V, Storage>;
    static constexpr int STATISTICS_BYTES =
        C::BLOCK_Q * 2 * REAL_BYTES;  // lse_log2 [BLOCK_Q], delta [BLOCK_Q]
    static constexpr int STAGE_BYTES = TileQ::BYTES + TileDout::BYTES + STATISTICS_BYTES;
    static constexpr int DS = TileK::BYTES + TileV::BYTES + C::STAGES * STAGE_BYTES;
    static constexpr int WORK = DS + (C::ACCUMULATE_DQ ? QueryAccumulator<C>::TileDs::BYTES : 0);
    static constexpr int PARAMS = WORK + WORK_BYTES<C>,
                         BYTES = PARAMS + PARAMS_BYTES<C, BackwardParams>;
    static_assert(BYTES == C::SHARED_BYTES,
                  "_tuning.backward_dkdv_shared_bytes disagrees with the layout");
    static_assert(STATISTICS_BYTES % 128 == 0, "tiles begin at multiples of 128");

    u32 k, v, stages, ds;
    DEV_METHOD explicit KeyLayout(u32 base)
        : k(base),
          v(base + TileK::BYTES),
          stages(base + TileK::BYTES + TileV::BYTES),
          ds(base + DS) {}
    DEV_METHOD u32 q(int stage) const { return stages + stage * STAGE_BYTES; }
    DEV_METHOD u32 dout(int stage) const { return q(stage) + TileQ::BYTES; }
    DEV_METHOD u32 lse_log2(int stage) const { return dout(stage) + TileDout::BYTES; }
    DEV_METHOD u32 work() const { return k + WORK; }
    static constexpr int DELTA = C::BLOCK_Q * REAL_BYTES;  // delta lies this far behind lse_log2
};

}  // namespace backward
