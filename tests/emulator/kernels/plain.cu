// What plain CUDA C makes the compiler emit: calls, tables, local arrays, atomics, warp functions.
typedef unsigned int u32;
typedef unsigned long long u64;
__device__ __noinline__ int collatz(int n) {
    int k = 0;
    while (n != 1) {
        n = n & 1 ? 3 * n + 1 : n / 2;
        ++k;
    }
    return k;
}
__constant__ int table[4] = {10, 20, 30, 40};
__device__ int total = 5;
extern "C" __global__ void calls(int* out) {
    out[threadIdx.x] = collatz(threadIdx.x + 1) + table[threadIdx.x & 3];
}
extern "C" __global__ void switches(int* out, int k) {
    int r;
    switch (threadIdx.x + k) {
        case 0:
            r = 5;
            break;
        case 1:
            r = out[9];
            break;
        case 2:
            r = 77;
            break;
        case 3:
            r = out[8] * 3;
            break;
        case 4:
            r = 1 + out[7];
            break;
        case 5:
            r = -1;
            break;
        case 6:
            r = out[6] / 3;
            break;
        default:
            r = 1000;
    }
    out[threadIdx.x] = r;
}
extern "C" __global__ void locals(int* out, int shift) {
    int a[16];
    for (int i = 0; i < 16; ++i) a[i] = i * i;
    for (int i = 0; i < 16; ++i) a[(i * 5 + shift) & 15] += a[i];
    out[threadIdx.x] = a[(threadIdx.x + shift) & 15];
}
extern "C" __global__ void atomics(u32* u, float* f, u64* w, int* s) {
    int i = threadIdx.x;
    atomicAdd(u, i);
    atomicMax(u + 1, i * 7 % 32);
    atomicXor(u + 2, 1u << i);
    atomicInc(u + 3, 9);
    atomicCAS(u + 4, 0, i + 1);
    atomicAdd(f, 0.5f);
    atomicAdd(w, 1ull << 33);
    atomicMin(s, -i);
    atomicExch(u + 5, 3);
    atomicSub(u + 6, 2);
    atomicAdd(&total, 1);
    __syncthreads();
    if (i == 0) u[7] = total;
}
extern "C" __global__ void warps(int* out) {
    int i = threadIdx.x, lane = i & 31;
    out[i] = __shfl_up_sync(~0u, i, 3) + 1000 * __shfl_down_sync(~0u, i, 5, 16);
    out[64 + i] = __shfl_sync(~0u, i, 7, 8) + 1000 * __shfl_xor_sync(~0u, i, 9);
    out[128 + i] = __ballot_sync(~0u, lane % 3 == 0) ^ (__any_sync(~0u, lane == 40) ? 1 : 0) ^
                   (__all_sync(~0u, lane < 32) ? 2 : 0);
    out[192 + i] = __match_any_sync(~0u, lane % 5);
    out[256 + i] = __reduce_add_sync(~0u, i) + __reduce_max_sync(~0u, i) * 10000;
    if (lane < 8) out[320 + i] = __shfl_xor_sync(0xff, i, 2);
    out[384 + i] = __syncthreads_count(i & 1) + 100 * __syncthreads_or(i == 63) +
                   1000 * __syncthreads_and(i < 63);
}
extern "C" __global__ void bytes(const signed char* a, short* b, unsigned char* c) {
    int i = threadIdx.x;
    b[i] = a[i] * 3;
    c[i] = (unsigned char)(a[i] >> 1);
}
extern "C" __global__ void wide(const float4* a, double2* b) {
    float4 v = a[threadIdx.x];
    b[threadIdx.x] = make_double2(v.x + v.y, v.z * v.w);
}
extern "C" __global__ void static_and_dynamic(int* out) {
    __shared__ int s[40];
    extern __shared__ int d[];
    s[threadIdx.x] = threadIdx.x;
    d[threadIdx.x] = 100 + threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = s[31 - threadIdx.x] + d[31 - threadIdx.x];
}
extern "C" __global__ void block_ids(int* out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * 12 + thread] = block * 1000 + thread;
}
extern "C" __global__ void matrix_moves(u32* out) {
    u32 v = threadIdx.x, r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v | v << 16));
    out[threadIdx.x] = r;
}
extern "C" __global__ void asserts(int n) {
    if (n > 3) asm volatile("trap;");
}
