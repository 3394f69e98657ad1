// Whose keys a block of dK and dV has, where they and the rows that see them lie, and how both get to shared
// memory.
#pragma once

#include "backward_dkdv_layout.cuh"

namespace backward {

// A tile of rows of one of a group's query heads.
struct RowPlace {
    int head, tile;
};

template <class C> struct KeyRows {
    using Element = typename C::Element;
    using Storage = typename Element::Storage;
    using Real = typename Element::Real;
    static constexpr bool SLICED = SLICE<C> > 0;
    using Layout = Chosen<SLICED, KeyLayoutOfSlices<C>, KeyLayout<C>>;
    using TileQ = typename Layout::TileQ;
    using TileDout = typename Layout::TileDout;
    using TileK = typename Layout::TileK;
    using TileV = typename Layout::TileV;
    static constexpr int THREADS = C::WARPS * 32, M16 = C::BLOCK_K / (16 * C::WARPS);
    static_assert(M16 * 16 * C::WARPS == C::BLOCK_K, "a warp owns whole strips of 16 keys");

    const BackwardParams& p;
    const Layout layout;
    int first_key;
    // Offsets of the group's first head in Q, dO and the statistics; not kept where the Work that they come
    // from is in shared memory.
    i64 q_at, dout_at, rows_at;

    DEV_METHOD KeyRows(const BackwardParams& params, u32 smem) : p(params), layout(smem) {
        const Work work = key_work();
        const int head = work.head * p.shape.group;
        first_key = work.tile * C::BLOCK_K;
        q_at = head_offset(work, p.q_strides, head);
        dout_at = head_offset(work, p.dout_strides, head);
        rows_at = statistics_row<C>(p, work, head);
    }

    DEV_METHOD Work key_work() const { return read_work<C>(layout.work(), p, p.shape.heads_kv); }
    DEV_METHOD static Range rows_of_tile(int tile) {
        return {tile * C::BLOCK_Q, (tile + 1) * C::BLOCK_Q};
    }
    DEV_METHOD Range keys() const { return {first_key, first_key + C::BLOCK_K}; }
    // First key of this warp inside the tile.
    DEV_METHOD static int warp_key() { return fresh_thread_id() / 32 * (16 * M16); }

    // ---- global memory ----

    // Q and dO of one query head of the group.
    DEV_METHOD GlobalRows<Storage> q_gmem(int head) const {
        return rows_of(p.q, start(q_at, p.q_strides) + head * p.q_strides.head, p.q_strides.row,
                       p.shape.head_dim, FLAG_Q_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> dout_gmem(int head) const {
        return rows_of(p.dout, start(dout_at, p.dout_strides) + head * p.dout_strides.head,
                       p.dout_strides.row, p.shape.head_dim_v, FLAG_DOUT_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> k_gmem() const {
        return keys_of(key_work(), p.k, p.k_strides, p.shape.head_dim, FLAG_K_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> v_gmem() const {
        return keys_of(key_work(), p.v, p.v_strides, p.shape.head_dim_v, FLAG_V_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> dk_gmem(const Work& work) const {
        return keys_of(work, p.dk, p.dk_strides, p.shape.head_dim, FLAG_DK_VECTOR);
    }
    DEV_METHOD GlobalRows<Storage> dv_gmem(const Work& work) const {
        return keys_of(work, p.dv, p.dv_strides, p.shape.head_dim_v, FLAG_DV_VECTOR);
    }
    // Row `row` of the group's query head `head` in the workspace.
    DEV_METHOD float* accum(int head, int row) const {
        return p.dq_accum + (rows_at + (i64)head * p.shape.len_q + row) * C::HEAD_DIM;
    }

    // ---- to shared memory ----

    // K, and V where dS is formed.
    DEV_METHOD void load_keys(bool with_v) {
        if constexpr (!SLICED) {
            load_tile<TileK>(k_gmem(), layout.k, first_key);
            if (!with_v) return;
            load_tile<TileV>(v_gmem(), layout.v, first_key);
        }
    }

    // Starts the copies of a tile of rows and of their statistics.
    DEV_METHOD void load_rows(RowPlace place, int stage) {
        const int row = place.tile * C::BLOCK_Q;
        if constexpr (!SLICED) {
            load_tile<TileQ>(q_gmem(place.head), layout.q(stage), row);
            load_tile<TileDout>(dout_gmem(place.head), layout.dout(stage), row);
        }
        const i64 at = statistics_start() + place.head * statistics_stride<C>(p) + row;
#pragma unroll
        for (int first = 0; first < 2 * C::BLOCK_Q; first += THREADS) {
            const int i = first + fresh_thread_id(), r = i % C::BLOCK_Q;
            if (2 * C::BLOCK_Q % THREADS != 0 && i >= 2 * C::BLOCK_Q) break;
            const Real* from = (const Real*)(i < C::BLOCK_Q ? p.lse_log2 : p.delta) + at + r;
            // Rows past the end get 0: cut tiles leave them out.
            const bool exists = row + r < p.shape.len_q;
            const u32 to = layout.lse_log2(stage) + Layout::REAL_BYTES * i;
            if constexpr (!HAS_ASYNC_COPY)
                st_shared(to, exists ? *from : Real(0));
            else if constexpr (sizeof(Real) == 8)
                cp_async_8(to, from, exists ? 8 : 0);
            else
                cp_async_4(to, from, exists ? 4 : 0);
        }
        cp_async_commit();
    }

  private:
    DEV_METHOD GlobalRows<Storage> rows_of(const void* array, i64 at, i64 stride, int columns,
                                           int flag) const {
        return {(Storage*)array + at, stride, p.shape.len_q, columns,
                (p.shape.flags & flag) && columns % TileQ::PER_CHUNK == 0};
    }
    DEV_METHOD GlobalRows<Storage> keys_of(const Work& work, const void* array,
                                           const Strides& strides, int columns, int flag) const {
        return head_rows<Storage>(array, strides, work, work.head, p.shape.len_k, columns,
                                  p.shape.flags & flag);
    }
    // Of the group's first query head: what is kept, or made anew.
    DEV_METHOD i64 start(i64 kept, const Strides& strides) const {
        if constexpr (!WORK_IN_SHARED<C>) return kept;
        const Work work = key_work();
        return head_offset(work, strides, work.head * p.shape.group);
    }
    DEV_METHOD i64 statistics_start() const {
        if constexpr (!WORK_IN_SHARED<C>) return rows_at;
        const Work work = key_work();
        return statistics_row<C>(p, work, work.head * p.shape.group);
    }
    template <class Tile>
    DEV_METHOD void load_tile(const GlobalRows<Storage>& gmem, u32 smem, int row) {
        TileLoader<Tile, THREADS, C::VECTOR_ONLY> loader(gmem);
        load(loader, smem, row);
    }
};

}  // namespace backward
