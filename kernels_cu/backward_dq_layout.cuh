// Where backward_dq keeps what in shared memory.
#pragma once

#include "backward_tile.cuh"

namespace backward {

// Shared memory: the query tiles stay, key tiles come in STAGES buffers.
template <class C> struct QueryLayout {
    using Storage = typename C::Element::Storage;
    using TileQ = SharedTile<C::BLOCK_Q, C::HEAD_DIM, Storage>;
    using TileDout = SharedTile<C::BLOCK_Q, C::HEAD_DIM_V, Storage>;
    using TileK = SharedTile<C::BLOCK_K, C::HEAD_DIM, Storage>;
    using TileV = SharedTile<C::BLOCK_K, C::HEAD_DIM_V, Storage>;
    static constexpr int STAGE_BYTES = TileK::BYTES + TileV::BYTES;
    static constexpr int BYTES = TileQ::BYTES + TileDout::BYTES + C::STAGES * STAGE_BYTES;
    static_assert(BYTES == C::SHARED_BYTES,
                  "_tuning.backward_dq_shared_bytes disagrees with the layout");

    u32 q, dout, stages;
    DEV_METHOD explicit QueryLayout(u32 base)
        : q(base), dout(base + TileQ::BYTES), stages(base + TileQ::BYTES + TileDout::BYTES) {}
    DEV_METHOD u32 k(int stage) const { return stages + stage * STAGE_BYTES; }
    DEV_METHOD u32 v(int stage) const { return k(stage) + TileK::BYTES; }
};

// Shared memory of a kernel that takes slices: operands, later what is staged.
template <class C> struct QueryLayoutOfSlices {
    using Storage = typename C::Element::Storage;
    static constexpr int PART = part_columns<C>(C::HEAD_DIM);
    using Operands = Slices<C, C::BLOCK_Q, C::BLOCK_K>;
    // Names that the other layout has.
    using TileQ = typename Operands::TileA;
    using TileDout = TileQ;
    using TileK = typename Operands::TileB;
    using TileV = TileK;
    static constexpr int ROWS = larger_of(C::BLOCK_Q, C::BLOCK_K);
    static constexpr int BYTES = larger_of(Operands::BYTES, ROWS * PART * (int)sizeof(Storage));
    static_assert(BYTES == C::SHARED_BYTES && C::STAGES == 1,
                  "_tuning_wide.backward_shared_bytes disagrees with the layout");

    u32 operands, q, stages;  // q: where the gradient is staged
    DEV_METHOD explicit QueryLayoutOfSlices(u32 base) : operands(base), q(base), stages(base) {}
    DEV_METHOD u32 k(int) const { return operands; }
    DEV_METHOD u32 v(int) const { return operands; }
};

}  // namespace backward
