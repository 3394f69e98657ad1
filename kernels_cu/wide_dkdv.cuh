// dK and dV for elements of 32 and 64 bits whose two accumulators together do not fit the registers: one after
// the other, the scores formed again for each, and of float64 a part of the columns at a time. What a walk
// makes is decided at run time, so that there is one piece of code for all of them: two would take the
// compiler twice as long and run no faster.
#pragma once

#include "backward_dkdv_walk.cuh"
#include "wide_products.cuh"

namespace backward {

template <class C> struct GradientPart : KeyWalk<C, GradientPart<C>> {
    using Walk = KeyWalk<C, GradientPart<C>>;
    using Rows = KeyRows<C>;
    using Rows::M16, Rows::SLICED, Rows::THREADS;
    using Rows::p, Rows::layout, Rows::first_key;
    using Rows::warp_key, Rows::q_gmem, Rows::dout_gmem, Rows::k_gmem, Rows::v_gmem;
    using typename Rows::Element, typename Rows::Storage, typename Rows::Real;
    using typename Rows::TileQ, typename Rows::TileDout, typename Rows::TileK, typename Rows::TileV;
    using typename Walk::Place, typename Walk::KeptScore;
    // Columns of a gradient made at a time, and tiles seen from the first of them.
    static constexpr int PART =
        larger_of(part_columns<C>(C::HEAD_DIM), part_columns<C>(C::HEAD_DIM_V));
    using PartOfRows = SharedTile<C::BLOCK_Q, PART, Storage>;
    using PartOfKeys = SharedTile<C::BLOCK_K, PART, Storage>;
    // dK and dV of different widths: the columns that a part lacks are left out of its product.
    static constexpr bool UNEVEN = C::HEAD_DIM != C::HEAD_DIM_V;
    static constexpr int CHUNK = SLICED ? C::BLOCK_Q : chunk_columns<C, M16, PART, C::BLOCK_Q>();

    static_assert(PART <= C::HEAD_DIM, "a part is staged where K was");

    const bool of_keys;  // dK, else dV
    const int first_column;
    Accumulator<M16, PART / 8, Real> gradient;

    DEV_METHOD GradientPart(const BackwardParams& params, u32 smem, bool keys, int column)
        : Walk(params, smem), of_keys(keys), first_column(column) {
        gradient.zero();
    }

    // ---- what KeyWalk asks for ----

    static constexpr bool FORMS_DS = true;  // not used for dV, but a branch costs as much
    DEV_METHOD bool reads_v() const { return of_keys; }
    DEV_METHOD void begin() {}
    DEV_METHOD void end(Range) {}

    // gradient += P^T dO or dS^T Q over one tile of rows.
    DEV_METHOD bool add_tile(const KeptScore& score, Place place, int stage, bool cut,
                             bool isolate) {
        bool repaired = false;
#pragma unroll 1
        for (int column = 0; column < C::BLOCK_Q; column += CHUNK) {
            Accumulator<M16, CHUNK / 8, Real> s, ds;
            form_scores(s, ds, place, column, stage);
            Walk::score_gradients(score, s, ds, place, column, stage);
            if (cut) Walk::hide(s, ds, place, column);
            if (of_keys) s = ds;
            const u32 rows_smem = operand(place, column, stage);
            if (isolate) {
                // Scores come from Q and dO as they are, so every warp must have its own before the
                // repair.
                __syncthreads();
                repaired |= clean(rows_smem);
            }
            wide::multiply_part<Element, PartOfRows, UNEVEN>(gradient, s, rows_smem,
                                                             columns_left());
        }
        return repaired;
    }

    DEV_METHOD void finish() {
        const Work work = Rows::key_work();
        const Real dv_factor = C::DROPOUT ? dropout::factor_of<Real>(p) : Real(1);
        const Real factor = of_keys ? scale_of<Real>(p.shape) : dv_factor;
        const auto to = of_keys ? Rows::dk_gmem(work) : Rows::dv_gmem(work);
        store_gradient<C, PartOfKeys>(
            from_column(to, first_column), layout.k, warp_key(), first_key, gradient, factor, [&] {
                Walk::template add_back<PartOfKeys>(layout.k, factor,
                                                    [&](int head) { return part_gmem(head); });
            });
    }

  private:
    // Of Q or dO of a query head, the columns from first_column on.
    DEV_METHOD GlobalRows<Storage> part_gmem(int head) const {
        return from_column(of_keys ? q_gmem(head) : dout_gmem(head), first_column);
    }
    // Of the gradient's columns, as compiled, those from first_column on.
    DEV_METHOD int columns_left() const {
        return (of_keys ? C::HEAD_DIM : C::HEAD_DIM_V) - first_column;
    }

    DEV_METHOD void form_scores(Accumulator<M16, CHUNK / 8, Real>& s,
                                Accumulator<M16, CHUNK / 8, Real>& ds, Place place, int column,
                                int stage) {
        if constexpr (SLICED) {
            using Operands = typename Rows::Layout::Operands;
            const int first_row = place.tile * C::BLOCK_Q;
            Operands::product(s, k_gmem(), first_key, q_gmem(place.head), first_row, warp_key(),
                              layout.operands);
            ds.zero();
            if (of_keys)
                Operands::product(ds, v_gmem(), first_key, dout_gmem(place.head), first_row,
                                  warp_key(), layout.operands);
        } else {
            s.zero();
            ds.zero();
            multiply_transposed<Element, TileK, TileQ>(s, row_address<TileK>(layout.k, warp_key()),
                                                       row_address<TileQ>(layout.q(stage), column));
            if (!of_keys) return;
            multiply_transposed<Element, TileV, TileDout>(
                ds, row_address<TileV>(layout.v, warp_key()),
                row_address<TileDout>(layout.dout(stage), column));
        }
    }

    // Takes NaN and inf out of the rows that the gradient is a sum of. True if there were any.
    DEV_METHOD bool clean(u32 rows_smem) const {
        if constexpr (SLICED || !UNEVEN) {
            return remove_non_finite<Element, PartOfRows, THREADS, CHUNK>(rows_smem);
        } else {
            using Columns = SharedTile<C::BLOCK_Q, 64, Storage>;
            bool found = false;
#pragma unroll 1
            for (int column = 0; column < min(PART, columns_left()); column += 64)
                found |= remove_own_non_finite<Element, Columns, THREADS, CHUNK>(
                    rows_smem + column / TileQ::SLAB * TileQ::SLAB_BYTES);
            return __syncthreads_or(found);
        }
    }

    // Where the rows that the gradient is a sum of lie, from `column` of the scores on, their part only.
    DEV_METHOD u32 operand(Place place, int column, int stage) const {
        if constexpr (SLICED) {
            using Operands = typename Rows::Layout::Operands;
            Operands::template load<PartOfRows>(part_gmem(place.head), place.tile * C::BLOCK_Q,
                                                layout.operands);
            return layout.operands;
        } else {
            // A part begins at a slab, and slabs of a tile lie one behind the other.
            const u32 part = first_column / TileQ::SLAB * TileQ::SLAB_BYTES;
            return row_address<TileQ>(of_keys ? layout.q(stage) : layout.dout(stage), column) +
                   part;
        }
    }
};

// Both gradients of a key tile.
template <class C> DEV void each_gradient(const BackwardParams& p, u32 smem) {
    using Part = GradientPart<C>;
    bool of_keys = p.dv == nullptr;
    int column = 0;
#pragma unroll 1
    while (!of_keys || (p.dk != nullptr && column < p.shape.head_dim)) {
        Part part(p, smem, of_keys, column);
        part.walk();
        part.finish();
        __syncthreads();  // keys go where the part was staged
        column += Part::PART;
        if (!of_keys && column >= p.shape.head_dim_v) of_keys = true, column = 0;
    }
}

}  // namespace backward
