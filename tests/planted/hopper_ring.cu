// O = sum over tiles of f16(Q K^T / 8) V, one block: a producer warp feeds K and V tiles through a ring of TMA stages to two
// consumer warpgroups of 64 rows, whose second product (P from registers) runs under the next tile's first one. Every
// synchronisation of a real kernel is here once; a BUG macro takes one of them away.
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE static __device__ __forceinline__
#ifndef BUG
#define BUG 0
#endif
enum Bug {
    NONE, NO_FULL_WAIT, NO_EMPTY_WAIT, NO_PROXY_FENCE, EARLY_SCORES, EARLY_P, FEW_BYTES, MANY_BYTES, EARLY_RELEASE,
    NO_WGMMA_FENCE, NO_INIT_FENCE, NO_STORE_WAIT, EXTRA_ARRIVAL, WRONG_PARITY, NO_FINAL_WAIT, NO_INIT_BARRIER,
    REGISTERS, ONE_WARP_SKIPS, BAD_SLAB
};

struct alignas(64) TensorMap { u64 words[16]; };
constexpr u32 TILE = 64 * 64 * 2;  // bytes of a 64 x 64 tile: one slab of 128-byte rows
constexpr int STAGES = 2, CONSUMERS = 256, THREADS = 384;

DEVICE void barrier_init(u32 b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(b), "r"(n) : "memory"); }
DEVICE void expect(u32 b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(b), "r"(bytes) : "memory");
}
DEVICE void arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(b) : "memory"); }
DEVICE void wait(u32 b, u32 parity) {
    u32 done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done) : "r"(b), "r"(parity) : "memory");
    } while (!done);
}
DEVICE void load_tile(u32 to, const TensorMap* map, int row, u32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(to), "l"(map), "r"(0), "r"(row), "r"(barrier) : "memory");
}
DEVICE u64 descriptor(u32 address, u32 leading) {  // 128-byte swizzle, 8 rows of 128 bytes per stride
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }
// A wait orders nothing that the compiler can see in registers: pin them to it.
DEVICE void pin(float (&d)[32]) {
    for (int i = 0; i < 32; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
}
#define D32 "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
            "%29,%30,%31}"
#define OUT8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
                "+f"(d[i + 7])
DEVICE void scores(float (&d)[32], u64 a, u64 b, u32 accumulate) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " D32
        ", %32, %33, p, 1, 1, 0, 0; }" : OUT8(0), OUT8(8), OUT8(16), OUT8(24) : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void values(float (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " D32 ", {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
        : OUT8(0), OUT8(8), OUT8(16), OUT8(24) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// Stands for the softmax: work on the scores that may run while the second product does.
DEVICE void halve(float (&s)[32]) {
    for (int i = 0; i < 32; ++i) asm volatile("mul.f32 %0, %0, 0f3F000000;" : "+f"(s[i]));
}
DEVICE void pack(u32 (&p)[4][4], const float (&s)[32]) {
    for (int i = 0; i < 16; ++i)
        asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(p[i / 4][i % 4]) : "f"(s[2 * i + 1] * 0.25f), "f"(s[2 * i] * 0.25f));
}

DEVICE void produce(const TensorMap* q, const TensorMap* k, const TensorMap* v, u32 sq, u32 sk, u32 sv, u32 full, u32 empty,
                    u32 q_full, int tiles) {
    expect(q_full, 2 * TILE);
    load_tile(sq, q, 0, q_full);
    load_tile(sq + TILE, q, 64, q_full);
    for (int i = 0; i < tiles; ++i) {
        const int s = i % STAGES;
        if (BUG != NO_EMPTY_WAIT) wait(empty + 8 * s, (i / STAGES & 1) ^ 1);
        expect(full + 8 * s, BUG == FEW_BYTES ? TILE : BUG == MANY_BYTES ? 3 * TILE : 2 * TILE);
        load_tile(sk + s * TILE, k, i * 64, full + 8 * s);
        load_tile(sv + s * TILE, v, i * 64, full + 8 * s);
    }
}

DEVICE void consume(float (&o)[32], u32 sq, u32 sk, u32 sv, u32 full, u32 empty, u32 q_full, int tiles) {
    const u32 lane = threadIdx.x & 31;
    float s[32];
    u32 p[4][4];
    wait(q_full, 0);
    if (BUG != NO_FULL_WAIT) wait(full, BUG == WRONG_PARITY ? 1 : 0);
    if (BUG != NO_WGMMA_FENCE) wgmma_fence();
    for (int k = 0; k < 4; ++k) scores(s, descriptor(sq + 32 * k, 16), descriptor(sk + 32 * k, 16), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    halve(s);
    pack(p, s);
#pragma unroll 1
    for (int i = 0; i + 1 < tiles; ++i) {
        const int now = i % STAGES, next = (i + 1) % STAGES;
        wait(full + 8 * next, (i + 1) / STAGES & 1);
        wgmma_fence();
        for (int k = 0; k < 4; ++k) scores(s, descriptor(sq + 32 * k, 16), descriptor(sk + next * TILE + 32 * k, 16), k > 0);
        wgmma_commit();
        for (int k = 0; k < 4; ++k) values(o, p[k], descriptor(sv + now * TILE + 2048 * k, 16));
        wgmma_commit();
        if (BUG == EARLY_RELEASE && lane == 0) arrive(empty + 8 * now);
        if (BUG != EARLY_SCORES) wgmma_wait<1>();
        pin(s);
        halve(s);
        if (BUG == EARLY_P) pack(p, s);
        wgmma_wait<0>();
        pin(o);
        if (BUG != EARLY_RELEASE && lane == 0) arrive(empty + 8 * now);
        if (BUG == EXTRA_ARRIVAL && lane == 1) arrive(empty + 8 * now);
        if (BUG != EARLY_P) pack(p, s);
    }
    wgmma_fence();
    if (BUG != ONE_WARP_SKIPS || threadIdx.x >= 32)
        for (int k = 0; k < 4; ++k) values(o, p[k], descriptor(sv + (tiles - 1) % STAGES * TILE + 2048 * k, 16));
    wgmma_commit();
    if (BUG != NO_FINAL_WAIT) wgmma_wait<0>();
    pin(o);
}

// Fragments to a swizzled tile of float32, two slabs of 32 columns, then one bulk store by one thread.
DEVICE void write_out(const float (&o)[32], u32 so, const TensorMap* out) {
    const u32 group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x & 31;
    for (int i = 0; i < 32; i += 2) {
        const u32 row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4);
        const u32 inside = column % 32, chunk = (inside / 4) ^ (row % 8);
        const u32 at = so + column / 32 * TILE + row * 128 + chunk * 16 + inside % 4 * 4;
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(at), "f"(o[i]), "f"(o[i + 1]) : "memory");
    }
    if (BUG != NO_PROXY_FENCE) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, 128;" :: "r"(1 + group) : "memory");
    if (threadIdx.x % 128 == 0) {
        for (int slab = 0; slab < 2; ++slab)
            asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
                :: "l"(out), "r"(32 * slab), "r"(64 * group), "r"(so + slab * TILE) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        if (BUG != NO_STORE_WAIT) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
ring(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
     const __grid_constant__ TensorMap out, int tiles) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = ((u32)__cvta_generic_to_shared(smem) + 1023) / 1024 * 1024;
    const u32 sq = base + (BUG == BAD_SLAB ? 512 : 0), sk = base + 3 * TILE, sv = sk + STAGES * TILE, so = sv + STAGES * TILE;
    const u32 full = so + 4 * TILE, empty = full + 8 * STAGES, q_full = empty + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; ++s) {
            barrier_init(full + 8 * s, 1);
            barrier_init(empty + 8 * s, CONSUMERS / 32);
        }
        barrier_init(q_full, 1);
        if (BUG != NO_INIT_FENCE) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (BUG != NO_INIT_BARRIER) __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == CONSUMERS) produce(&q, &k, &v, sq, sk, sv, full, empty, q_full, tiles);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(BUG == REGISTERS ? 248 : 240));
        float o[32];
        for (int i = 0; i < 32; ++i) o[i] = 0.0f;
        const u32 group = threadIdx.x / 128;
        consume(o, sq + group * TILE, sk, sv, full, empty, q_full, tiles);
        write_out(o, so + group * 2 * TILE, &out);
    }
}
