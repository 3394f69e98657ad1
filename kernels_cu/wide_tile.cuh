// Tiles of 32- and 64-bit elements: the interface of tile.cuh, which includes this, by ordinary loads
// (ldmatrix moves 16-bit elements).
#pragma once

// A [ROWS, COLUMNS] tile kept as slabs with rows of 128 bytes. Inside a slab the 16-byte chunks of a row
// are permuted by XOR with an even number made of the row's, so that every access of a warp touches
// all banks alike:
//   lane_rows        rows r and r + 1 (r even), four neighbouring chunks each: their numbers differ in
//                    bit 2
//   lane_row_pairs   rows r, r + 2, r + 4, r + 6, two neighbouring chunks each: four different numbers
//   copies           the eight chunks of a row
template <int ROWS_, int COLUMNS_, class Storage_> struct SharedTile {
    using Storage = Storage_;
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, SIZE = sizeof(Storage);
    static_assert(SIZE >= 4 && ROWS % 8 == 0 && COLUMNS * SIZE % 128 == 0,
                  "the swizzle repeats every 8 rows; slabs are 128 bytes wide");
    static constexpr int SLAB = 128 / SIZE, SLABS = COLUMNS / SLAB;
    static constexpr int PER_CHUNK = 16 / SIZE, CHUNKS = 8;
    static constexpr int ROW_BYTES = 128, SLAB_BYTES = ROWS * ROW_BYTES, BYTES = SLABS * SLAB_BYTES;
    using Pair = typename PairOf<Storage>::Type;

    DEV int swizzle(int row) { return ((row >> 1 & 3) ^ (row & 1) << 1) << 1; }

    // Byte offset of the chunk that begins at (row, column); column is a multiple of PER_CHUNK.
    DEV u32 offset(int row, int column) {
        return column / SLAB * SLAB_BYTES + row * ROW_BYTES +
               (column % SLAB / PER_CHUNK ^ swizzle(row)) * 16;
    }
    // Moves an address by (row, column), multiples of 8 and 16.
    DEV u32 moved(u32 address, int row, int column) {
        return (address ^ (column % SLAB * SIZE)) + column / SLAB * SLAB_BYTES + row * ROW_BYTES;
    }

    // ---- fragments: lane t of a row's four holds, of 16 columns, those of its chunks t (and t + 4)
    DEV u32 lane_rows(u32 smem) { return smem + offset(lane_id() / 4, lane_id() % 4 * PER_CHUNK); }
    // Of 8 rows 2 t and 2 t + 1, of 16 columns 2 (lane / 4) and the next.
    DEV u32 lane_row_pairs(u32 smem) {
        const int column = lane_id() / 4 * 2;
        return smem + offset(lane_id() % 4 * 2, column / PER_CHUNK * PER_CHUNK) +
               column % PER_CHUNK * SIZE;
    }

    // x: of the row, the four columns of this lane.
    DEV void row_slots(float (&x)[4], u32 address) {
        const float4 chunk = ld_shared_f32x4(address);
        x[0] = chunk.x, x[1] = chunk.y, x[2] = chunk.z, x[3] = chunk.w;
    }
    DEV void row_slots(double (&x)[4], u32 address) {
        const double2 left = ld_shared_f64x2(address), right = ld_shared_f64x2(address ^ 64);
        x[0] = left.x, x[1] = left.y, x[2] = right.x, x[3] = right.y;
    }

    // Writes an accumulator, times a factor per row, to rows [row, row + 16*M16). Its columns are those
    // that load_b_trans gave its products: of 16 a lane has four neighbours.
    template <int M16, int N8, class Real> DEV void put(u32 smem, int row,
                                                        const Accumulator<M16, N8, Real>& acc,
                                                        const Real (&factor)[M16][2]) {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int m = 0; m < M16; ++m)
#pragma unroll
            for (int n = 0; n < N8; n += 2)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Real scale = factor[m][half];
                    const Real x[4] = {
                        acc.x[m][n][2 * half] * scale, acc.x[m][n + 1][2 * half] * scale,
                        acc.x[m][n][2 * half + 1] * scale, acc.x[m][n + 1][2 * half + 1] * scale};
                    put_four(smem, row + m * 16 + half * 8 + g, n * 8 + 4 * t, g & 1, x);
                }
    }

  private:
    DEV void put_four(u32 smem, int row, int column, int, const float (&x)[4]) {
        st_shared_f32x4(smem + offset(row, column), make_float4(x[0], x[1], x[2], x[3]));
    }
    // Odd rows begin with the right half: otherwise half of the banks would be idle.
    DEV void put_four(u32 smem, int row, int column, int odd, const double (&x)[4]) {
        const u32 at = smem + offset(row, column);
        const double2 left = make_double2(x[0], x[1]), right = make_double2(x[2], x[3]);
        st_shared_f64x2(at ^ odd * 16, odd ? right : left);
        st_shared_f64x2(at ^ (odd ^ 1) * 16, odd ? left : right);
    }
};

// Column of element e of n8 block n in an accumulator whose B operands came from load_b_trans.
template <class Element> DEV int output_column(int n, int e, int lane) {
    if constexpr (sizeof(typename Element::Storage) == 2)
        return n * 8 + lane % 4 * 2 + e % 2;
    else
        return n / 2 * 16 + lane % 4 * 4 + e % 2 * 2 + n % 2;
}

// ---- operands: `set` rounds or splits the numbers as the format's products need it ---------------

// Rows [row, row + 16), columns [column, column + 16): A of a tile stored [m][k], B of one stored
// [n][k].
template <class Tile, class Operand>
DEV void load_rows_of(Operand& to, u32 lane_rows, int row, int column) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        typename Tile::Storage x[4];
        Tile::row_slots(x, Tile::moved(lane_rows, row + 8 * r, column));
#pragma unroll
        for (int n = 0; n < 4; ++n) to.set(r, n, x[n]);
    }
}
template <class Tile, class Operand>
DEV void load_a(Operand& a, u32 lane_rows, int row, int column) {
    load_rows_of<Tile>(a, lane_rows, row, column);
}
template <class Tile, class Operand>
DEV void load_b(Operand& b, u32 lane_rows, int row, int column) {
    load_rows_of<Tile>(b, lane_rows, row, column);
}
// B of a tile stored [k][n]. Slots 2 i and 2 i + 1: rows 2 t and 2 t + 1 of the i-th 8.
template <class Tile, class Operand>
DEV void load_b_trans(Operand& b, u32 lane_row_pairs, int row, int column) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const u32 even = Tile::moved(lane_row_pairs, row + n / 2 * 8, column);
        typename Tile::Pair x;
        // The number that permutes the chunks of the next row differs in bit 2.
        ld_shared(x, n % 2 ? (even ^ 64) + Tile::ROW_BYTES : even);
        b.set(0, n, x.x);
        b.set(1, n, x.y);
    }
}
// Columns 16*step .. of an accumulator as the A operand of the next product: no lane needs what
// another one has.
template <class Element, class Operand, int M16, int N8, class Real>
DEV void accumulator_to_a(Operand& a, const Accumulator<M16, N8, Real>& acc, int m, int step) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < 4; ++n) a.set(half, n, acc.x[m][2 * step + n / 2][2 * half + n % 2]);
}
template <class Element, int M16, int N8, class Storage> struct RoundedOperand {
    const Accumulator<M16, N8, typename Element::Real>& acc;

    DEV_METHOD explicit RoundedOperand(const Accumulator<M16, N8, typename Element::Real>& from)
        : acc(from) {}
    DEV_METHOD void load(typename Element::Operand& to, int m, int step) const {
        accumulator_to_a<Element>(to, acc, m, step);
    }
};

// ---- global memory ------------------------------------------------------------------------------

DEV uint4 gather_chunk(const GlobalRows<float>& gmem, int row, int column) {
    float x[4] = {0.f, 0.f, 0.f, 0.f};
    if (row < gmem.rows)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (column + e < gmem.columns) x[e] = gmem.base[row * gmem.stride + column + e];
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
}
DEV uint4 gather_chunk(const GlobalRows<double>& gmem, int row, int column) {
    double x[2] = {0.0, 0.0};
    if (row < gmem.rows)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (column + e < gmem.columns) x[e] = gmem.base[row * gmem.stride + column + e];
    return make_uint4(__double2loint(x[0]), __double2hiint(x[0]), __double2loint(x[1]),
                      __double2hiint(x[1]));
}
DEV void store_chunk(float* to, uint4 chunk, int count) {
    const u32 x[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int e = 0; e < 4; ++e)
        if (e < count) to[e] = __uint_as_float(x[e]);
}
DEV void store_chunk(double* to, uint4 chunk, int count) {
    if (count > 0) to[0] = __hiloint2double(chunk.y, chunk.x);
    if (count > 1) to[1] = __hiloint2double(chunk.w, chunk.z);
}
