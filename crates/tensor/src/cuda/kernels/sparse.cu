// A sparse matrix S [out, in]: products with it, the gradient of its entries, and its sum with a dense one.
//
// Row r of S has the entries starts[r]..starts[r + 1], at `columns`. Entries meet their tokens where these lie one
// after another: x [tokens, width] is turned over to [width, stride] first, zero behind the tokens. The sums of a token
// run in the order of the entries, however many tokens there are.

#define TOKENS 128  // tokens that a warp takes, four a lane
#define ROWS 32     // rows of S that a block takes
#define PARTS 8     // times TOKENS: the most tokens that are turned over at once

// The row of entry e: the last one that starts at it or before.
__device__ __forceinline__ i64 row_of(const u64* starts, i64 out, u64 e) {
    i64 low = 0, high = out;
    while (high - low > 1) {
        i64 middle = (low + high) / 2;
        if (starts[middle] <= e) low = middle; else high = middle;
    }
    return low;
}

// xt [width, stride] = x [tokens, width] turned over. A block (32, 8) takes 32 of each; grid (width/32, stride/32).
extern "C" __global__ void sparse_turn(const float* x, i64 tokens, i64 width, i64 stride, float* xt) {
    __shared__ float tile[32][33];
    i64 first = (i64)blockIdx.x * 32, token = (i64)blockIdx.y * 32;
    for (int t = threadIdx.y; t < 32; t += 8) {
        bool inside = token + t < tokens && first + threadIdx.x < width;
        tile[t][threadIdx.x] = inside ? x[(token + t) * width + first + threadIdx.x] : 0.0f;
    }
    __syncthreads();
    for (int c = threadIdx.y; c < 32; c += 8) {
        if (first + c < width) xt[(first + c) * stride + token + threadIdx.x] = tile[threadIdx.x][c];
    }
}

// The products of the entries from..to with four tokens a lane; x is this lane's place in row 0 of xt.
__device__ __forceinline__ float4 row_product(
    u64 from, u64 to, const u32* columns, const u32* order, const float* values, const float4* x, i64 stride) {
    int lane = threadIdx.x % WARP;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (u64 base = from; base < to; base += WARP) {
        int count = to - base < WARP ? (int)(to - base) : WARP;
        u32 column = 0;
        float value = 0.0f;
        if (lane < count) {
            column = columns[base + lane];
            value = values[order ? order[base + lane] : base + lane];
        }
#pragma unroll 4
        for (int i = 0; i < count; i++) {
            float v = __shfl_sync(FULL, value, i);
            float4 part = x[(i64)__shfl_sync(FULL, column, i) * stride];
            sum.x = fmaf(v, part.x, sum.x);
            sum.y = fmaf(v, part.y, sum.y);
            sum.z = fmaf(v, part.z, sum.z);
            sum.w = fmaf(v, part.w, sum.w);
        }
    }
    return sum;
}

// y [tokens, out] += x·Sᵀ, xt [in, stride], stride a multiple of 32; entry e has the value values[order[e]], or
// values[e] without an order. Grid (out/32, stride/128).
extern "C" __global__ void __launch_bounds__(256) sparse_product(
    const u64* starts, const u32* columns, const u32* order, const float* values, const float* xt, i64 tokens,
    i64 stride, i64 out, float* y) {
    __shared__ float tile[TOKENS][ROWS + 1];
    i64 first = (i64)blockIdx.x * ROWS, token = (i64)blockIdx.y * TOKENS;
    i64 end = first + ROWS < out ? first + ROWS : out;
    if (starts[first] == starts[end]) return;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // Lanes behind the last token read the first one's.
    const float4* x = (const float4*)(xt + token) + (token + 4 * lane < stride ? lane : 0);
    for (int r = warp; r < end - first; r += 8) {
        u64 from = starts[first + r], to = starts[first + r + 1];
        float4 sum = row_product(from, to, columns, order, values, x, stride / 4);
        tile[4 * lane][r] = sum.x;
        tile[4 * lane + 1][r] = sum.y;
        tile[4 * lane + 2][r] = sum.z;
        tile[4 * lane + 3][r] = sum.w;
    }
    __syncthreads();
    if (first + lane >= end || starts[first + lane] == starts[first + lane + 1]) return;
    for (int t = warp; t < TOKENS && token + t < tokens; t += 8) y[(token + t) * out + first + lane] += tile[t][lane];
}

// The same with the same bits for few tokens: x [tokens, in] as it is, a thread an element of y.
extern "C" __global__ void sparse_product_few(
    const u64* starts, const u32* columns, const u32* order, const float* values, const float* x, i64 tokens, i64 in,
    i64 out, float* y) {
    FOR_EACH(i, tokens * out) {
        const float* own = x + i / out * in;
        u64 from = starts[i % out], to = starts[i % out + 1];
        if (from == to) continue;
        float sum = 0.0f;
        for (u64 e = from; e < to; e++) sum = fmaf(values[order ? order[e] : e], own[columns[e]], sum);
        y[i] += sum;
    }
}

// dv [entries] += the entries of dyᵀ·x at the places of S; xt [in, stride], dyt [out, stride], stride at most 1,024
// and a multiple of 32. A warp takes 32 entries, one after another, and keeps the part of dy of their row.
extern "C" __global__ void __launch_bounds__(128) sparse_entries(
    const u64* starts, const u32* columns, i64 out, i64 entries, const float* xt, const float* dyt, i64 stride,
    float* dv) {
    int lane = threadIdx.x % WARP;
    u64 first = ((u64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP) * WARP;
    if (first >= (u64)entries) return;
    int count = (u64)entries - first < WARP ? (int)((u64)entries - first) : WARP;
    u32 column = lane < count ? columns[first + lane] : 0;
    u64 row_end = 0;
    float4 d[PARTS];
    float own = 0.0f;
    for (int i = 0; i < count; i++) {
        if (first + i >= row_end) {
            i64 row = row_of(starts, out, first + i);
            row_end = starts[row + 1];
            const float4* dy = (const float4*)(dyt + row * stride) + lane;
#pragma unroll
            for (int p = 0; p < PARTS; p++) {
                if (p * TOKENS + 4 * lane < stride) d[p] = dy[p * WARP];
            }
        }
        const float4* x = (const float4*)(xt + (i64)__shfl_sync(FULL, column, i) * stride) + lane;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            if (p * TOKENS + 4 * lane < stride) {
                float4 v = x[p * WARP];
                sum.x = fmaf(v.x, d[p].x, sum.x);
                sum.y = fmaf(v.y, d[p].y, sum.y);
                sum.z = fmaf(v.z, d[p].z, sum.z);
                sum.w = fmaf(v.w, d[p].w, sum.w);
            }
        }
        float total = warp_sum((sum.x + sum.y) + (sum.z + sum.w));
        if (lane == i) own = total;
    }
    if (lane < count) dv[first + lane] += own;
}

// w [out, in] += S; of several entries at one place, the thread of the first adds all in order.
extern "C" __global__ void sparse_scatter(
    const u64* starts, const u32* columns, i64 out, i64 in, i64 entries, const float* values, float* w) {
    FOR_EACH(i, entries) {
        u64 e = i;
        i64 row = row_of(starts, out, e);
        u32 column = columns[e];
        if (e > starts[row] && columns[e - 1] == column) continue;
        float sum = w[row * in + column];
        for (u64 end = starts[row + 1]; e < end && columns[e] == column; e++) sum += values[e];
        w[row * in + column] = sum;
    }
}

// dv [entries] += w [out, in] at the places of S.
extern "C" __global__ void sparse_gather(
    const u64* starts, const u32* columns, i64 out, i64 in, i64 entries, const float* w, float* dv) {
    FOR_EACH(e, entries) dv[e] += w[row_of(starts, out, e) * in + columns[e]];
}
