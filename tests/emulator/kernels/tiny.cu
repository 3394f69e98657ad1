// One mistake each, or its correct twin (tests/test_emulator_catches.py).
typedef unsigned int u32;
extern "C" __global__ void neighbour(float* x) {  // each thread reads what its neighbour wrote
    __shared__ float s[64];
    s[threadIdx.x] = threadIdx.x;
#if defined(BARRIER)
    __syncthreads();
#elif defined(SHUFFLE)  // a shuffle meets, but does not order memory
    __shfl_xor_sync(~0u, x[threadIdx.x], 1);
#endif
    x[threadIdx.x] = s[threadIdx.x ^ 1];
}
extern "C" __global__ void bytes_apart(unsigned char* x) {  // different bytes of one word: no race
    __shared__ unsigned char s[64];
    s[threadIdx.x] = threadIdx.x;
    x[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void blocks_add(float* x) {
#ifdef ATOMIC
    atomicAdd(x, 1.f);
#else
    *x += 1.f;
#endif
}
extern "C" __global__ void last_block(float* parts, u32* counter,
                                      float* out) {  // sum by whoever comes last
    __shared__ bool last;
    parts[blockIdx.x] = blockIdx.x;
#ifndef NO_FENCE
    __threadfence();
#endif
    if (threadIdx.x == 0) last = atomicAdd(counter, 1) == gridDim.x - 1;
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float sum = 0.f;
        for (int i = 0; i < gridDim.x; ++i) sum += *(volatile float*)(parts + i);
        *out = sum;
    }
}
extern "C" __global__ void read_only(const float* x, float* y) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(x + threadIdx.x) : "memory");
    y[threadIdx.x] = v + 1;
}
extern "C" __global__ void unaligned(float* x) { *(float4*)(x + 1) = make_float4(0, 0, 0, 0); }
extern "C" __global__ void leaves_copy(const float* x) {
    __shared__ __align__(16) float s[4];
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(s)),
        "l"(x));
}
extern "C" __global__ void named(
    int* x) {  // consumers wait at barrier 1 for more threads than ever arrive
    if (threadIdx.x < 32)
        asm volatile("bar.arrive 1, 96;" ::: "memory");
    else
        asm volatile("bar.sync 1, 96;" ::: "memory");
    x[threadIdx.x] = 1;
}
extern "C" __global__ void crossed(int* x) {
    asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 32) : "memory");
    x[threadIdx.x] = 1;
}
extern "C" __global__ void half_warp_barrier(int* x) {
    if (threadIdx.x % 32 < 16)
        asm volatile("bar.sync 0;" ::: "memory");
    else
        asm volatile("bar.sync 1;" ::: "memory");
    x[threadIdx.x] = 1;
}
extern "C" __global__ void half_warp_shuffle(int* x) {
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
}
extern "C" __global__ void spin(volatile int* x) {
    while (*x == 0) {
    }
}
extern "C" __global__ void local_overrun(int* x, int n) {
    int a[8];
    for (int i = 0; i < n; ++i) a[i] = x[i];
    x[0] = a[x[1] & 7];
}
extern "C" __global__ void conflict(const float* x, float* y) {
    __shared__ volatile float s[32 * 32];
    s[threadIdx.x * 32] = x[threadIdx.x];
    y[threadIdx.x * 8] = s[threadIdx.x * 32];
}
