// Attention forward with mma.sync: one block per (head, tile of query rows), a walk over the key
// tiles those rows see.
#pragma once

#include "forward_output.cuh"
#include "forward_products.cuh"
#include "score_map.cuh"

// One tile of rows of one head, output columns from first_column on.
template <class C> DEV void forward_tile(const ForwardParams& p, int first_column) {
    using L = ForwardLayout<C>;
    using Real = typename L::Real;
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 smem = shared_address(shared_memory);

    // Which rows, which keys
    const ForwardWork work = forward_work<C>(p);
    const int first_row = work.tile * C::BLOCK_Q;
    const auto rows = [&] {
        const int first = opaque(first_row);
        return Range{first, first + C::BLOCK_Q};
    };
    const typename C::Mask mask(p, work, work.head);
    const typename C::Score score = make_score<C>(p, work, work.head);
    const Range tiles = own_key_tiles<C>(p, work, mask, rows());

    // Start the copies, prepare Q
    QueryLoader<C> q_loader(query_rows<C>(p, work));
    KeyValuePipeline<C> pipeline(p, work, first_column, smem, tiles.end);
    q_loader.fetch(smem + L::Q, first_row);
    cp_async_commit();
    pipeline.start(tiles.begin);
    q_loader.template land<1>(smem + L::Q);
    __syncthreads();
    if (C::Score::FOLDED && score.negative()) {
        // The maximum is taken of raw products, which must therefore grow with the logits.
        negate<typename L::QTile, L::THREADS>(smem + L::Q);
        __syncthreads();
    }
    const Queries<C> q(smem + L::Q);

    // S = Q K^T, P = softmax(S), O = P V, one tile of keys at a time
    Accumulator<L::M16, C::BLOCK_K / 8, Real> s;
    Accumulator<L::M16, L::PART / 8, Real> o;
    OnlineSoftmax<L::M16, Real> softmax(score.folded_factor());
    bool repaired = false;
    o.zero();
    for (int tile = tiles.begin, next; tile < tiles.end; tile = next) {
        next = mask.next_tile(tile + 1, tiles.end);
        const Range tile_keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
        const u32 k_smem = pipeline.k(tile, next);
        query_key_product<C>(s, q, k_smem);
        const ScoreMap<L::M16, C::BLOCK_K / 8, Real> map{s, first_row, tile_keys.begin};
        if constexpr (!C::Score::FOLDED) score.apply(map);
        if (mask.cuts(rows(), tile_keys, tile)) mask.hide(map, rows(), tile_keys);
        softmax.update(s, o);  // s becomes P
        if constexpr (C::DROPOUT) {
            const ForwardWork here = forward_work<C>(p);  // anew, as always
            drop_weights(Keep<C>(p, here, here.head), s,
                         here.tile * C::BLOCK_Q + warp_id() * L::WARP_Q, tile_keys.begin);
        }
        const RoundedOperand<typename C::Element, L::M16, C::BLOCK_K / 8> probabilities(s);
        const u32 v_smem = pipeline.v(next);
        if (mask.isolates(rows(), tile_keys, tile))
            repaired |=
                remove_non_finite<typename C::Element, typename L::VTile, L::THREADS>(v_smem);
        add_probability_value_product<C>(o, probabilities, v_smem);
    }
    write_output<C>(p, first_column, smem + L::Q, o, softmax, repaired);
}

// The same with operands in slices, of which nothing stays in shared memory.
template <class C> DEV void forward_tile_by_slices(const ForwardParams& p, int first_column) {
    using L = ForwardLayout<C>;
    using Real = typename L::Real;
    using Element = typename C::Element;
    using Operands = Slices<C, C::BLOCK_Q, C::BLOCK_K>;
    static_assert(C::SHARED_BYTES == larger_of(Operands::BYTES, L::OutTile::BYTES) &&
                      L::VTile::BYTES <= C::SHARED_BYTES,
                  "forward_shared_bytes in _tuning_wide.py computes the same");
    static_assert(!GROUPED<C>, "a tile of slices has the rows of one head");
    extern __shared__ __align__(128) u8 shared_memory[];
    const u32 smem = shared_address(shared_memory);
    const Shape& shape = p.shape;
    const ForwardWork work = forward_work<C>(p);
    const int first_row = work.tile * C::BLOCK_Q;
    const Range rows{first_row, first_row + C::BLOCK_Q};
    const typename C::Mask mask(p, work, work.head);
    const typename C::Score score = make_score<C>(p, work, work.head);
    const auto q_gmem = query_rows<C>(p, work);
    const auto k_gmem =
        head_rows<typename L::Storage>(p.k, p.k_strides, work, work.head / shape.group, shape.len_k,
                                       shape.head_dim, shape.flags & FLAG_K_VECTOR);

    Accumulator<L::M16, C::BLOCK_K / 8, Real> s;
    Accumulator<L::M16, L::PART / 8, Real> o;
    OnlineSoftmax<L::M16, Real> softmax(score.folded_factor());
    bool repaired = false;
    o.zero();
    const Range tiles = own_key_tiles<C>(p, work, mask, rows);
    for (int tile = tiles.begin; tile < tiles.end; tile = mask.next_tile(tile + 1, tiles.end)) {
        const Range keys{tile * C::BLOCK_K, tile * C::BLOCK_K + C::BLOCK_K};
        Operands::product(s, q_gmem, first_row, k_gmem, keys.begin, warp_id() * L::WARP_Q, smem);
        // The maximum is taken of raw products, which must grow with the logits.
        if (C::Score::FOLDED && score.negative()) s.negate();
        const ScoreMap<L::M16, C::BLOCK_K / 8, Real> map{s, first_row, keys.begin};
        if constexpr (!C::Score::FOLDED) score.apply(map);
        if (mask.cuts(rows, keys, tile)) mask.hide(map, rows, keys);
        softmax.update(s, o);  // s becomes P
        if constexpr (C::DROPOUT)
            drop_weights(dropout::Keep(p, work, work.head), s, first_row + warp_id() * L::WARP_Q,
                         keys.begin);
        const RoundedOperand<Element, L::M16, C::BLOCK_K / 8> probabilities(s);
        Operands::template load<typename L::VTile>(value_rows<C>(p, work, first_column), keys.begin,
                                                   smem);
        if (mask.isolates(rows, keys, tile))
            repaired |= remove_non_finite<Element, typename L::VTile, L::THREADS>(smem);
        add_probability_value_product<C>(o, probabilities, smem);
    }
    __syncthreads();  // the output is staged where V was
    write_output<C>(p, first_column, smem, o, softmax, repaired);
}

// All columns of a tile's output, in as many walks as the accumulator needs.
template <class C> DEV void forward_columns(const ForwardParams& p) {
    constexpr int PART = ForwardLayout<C>::PART;
    if constexpr (SLICE<C> > 0) {
#pragma unroll 1
        for (int column = 0; column < p.shape.head_dim_v; column += PART) {
            if (column > 0) __syncthreads();  // operands go where the output was staged
            forward_tile_by_slices<C>(p, column);
        }
    } else {
        forward_tile<C>(p, 0);
        if constexpr (PART < C::HEAD_DIM_V)
            if (PART < p.shape.head_dim_v) {
                __syncthreads();  // Q goes where the output was staged
                forward_tile<C>(p, PART);
            }
    }
}

template <class C> DEV void forward(const ForwardParams& p) {
    if constexpr (C::PACKED) {
        if (packed::is_bad(p.options)) return write_nan<C>(p);
        const Work work = decode<C>(p, p.shape.heads);
        if (work.batch < 0) return;
        ForwardParams own = p;
        packed::enter<C>(own, work);
        forward_columns<C>(own);
    } else {
        forward_columns<C>(p);
    }
}
