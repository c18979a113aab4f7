// What all kernels share: compiled in front of each source, without any header of the toolkit.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Sizes or strides of up to eight dimensions, slowest first.
struct Dims { i64 d[8]; };

#define WARP 32
#define FULL 0xffffffffu

// First element and stride of a loop over all elements, whatever the grid.
#define FOR_EACH(i, n) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += (i64)gridDim.x * blockDim.x)

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// bf16 are the upper 16 bits of an f32; rounded to nearest, ties to even, NaN stays NaN.
__device__ __forceinline__ u16 to_bf16(float x) {
    u32 b = __float_as_uint(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return (u16)((b >> 16) | 0x40);
    return (u16)((b + 0x7fffu + ((b >> 16) & 1)) >> 16);
}
__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }

// Four neighbouring numbers.
struct Four { float v[4]; };

#define EACH_OF_FOUR _Pragma("unroll") for (int k = 0; k < 4; k++)

__device__ __forceinline__ bool aligned(const void* p) { return ((u64)p & 15) == 0; }

// Numbers 4q.. of x, which has n; `rest` beyond them. At once where `whole` says that x is aligned.
__device__ __forceinline__ Four load_four(const float* x, i64 q, i64 n, bool whole, float rest = 0.0f) {
    i64 i = 4 * q;
    if (whole && i + 4 <= n) {
        float4 v = reinterpret_cast<const float4*>(x)[q];
        return {{v.x, v.y, v.z, v.w}};
    }
    Four four;
    EACH_OF_FOUR four.v[k] = i + k < n ? x[i + k] : rest;
    return four;
}

// Numbers 4q.. of y, which has n, become those of `four`.
__device__ __forceinline__ void store_four(float* y, i64 q, i64 n, bool whole, Four four) {
    i64 i = 4 * q;
    if (whole && i + 4 <= n) {
        reinterpret_cast<float4*>(y)[q] = make_float4(four.v[0], four.v[1], four.v[2], four.v[3]);
        return;
    }
    EACH_OF_FOUR if (i + k < n) y[i + k] = four.v[k];
}

// The same, rounded; `short_y` begins at a multiple of 8 bytes.
__device__ __forceinline__ void store_four(u16* short_y, i64 q, i64 n, bool whole, Four four) {
    i64 i = 4 * q;
    if (whole && i + 4 <= n) {
        u16 r[4];
        EACH_OF_FOUR r[k] = to_bf16(four.v[k]);
        reinterpret_cast<uint2*>(short_y)[q] = make_uint2((u32)r[0] | (u32)r[1] << 16, (u32)r[2] | (u32)r[3] << 16);
        return;
    }
    EACH_OF_FOUR if (i + k < n) short_y[i + k] = to_bf16(four.v[k]);
}

__device__ __forceinline__ float warp_sum(float v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
    for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, o));
    return v;
}

// The sum over a block of up to 1,024 threads (a multiple of 32), for every thread of it, always in the same order.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    v = warp_sum(v);
    __syncthreads();
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    return warp_sum(lane < warps ? parts[lane] : 0.0f);
}

// The largest number of a block, as `block_sum`.
__device__ __forceinline__ float block_max(float v) {
    __shared__ float parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    v = warp_max(v);
    __syncthreads();
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    return warp_max(lane < warps ? parts[lane] : -infinity());
}

// The same sums in f64.
__device__ __forceinline__ double warp_sum_f64(double v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}
__device__ __forceinline__ double block_sum_f64(double v) {
    __shared__ double parts[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    v = warp_sum_f64(v);
    __syncthreads();
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    return warp_sum_f64(lane < warps ? parts[lane] : 0.0);
}
