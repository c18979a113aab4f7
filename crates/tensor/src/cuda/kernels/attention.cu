// Attention over packed sequences in f32: y = softmax(scale·q·kᵀ + bias, over the visible keys)·v, tile by
// tile with a running maximum and sum (FlashAttention, arXiv 2205.14135), and its gradients without atomics.
//
// q, y, dy [rows, heads, dim]; k, v [keys, kv_heads, dim]; lse, delta [rows, heads]; bias [heads, distances].
// A block has 256 threads and works on 64 rows by 64 columns of scores at a time: thread (ty, tx) of 16 x 16
// holds rows 4ty..4ty+4 and columns 4tx..4tx+4. Heads wider than the block's C numbers are cut: blockIdx.y is
// the part that is written.

#define SIDE 64
#define STEP 32
#define THREADS 256

// Work of a block: rows first..first+count of one side, and rows from..end of the other.
struct Tile { int first, count, from, end; };

struct Inputs {
    const float *q, *k, *v;
    const int *q_pos, *kv_pos;
    const float* bias;
    i64 distances;
    int first_distance, heads, kv_heads, dim;
    float scale;
    int causal;
    u32 reach;
};

#define INPUTS \
    const float *q, const float *k, const float *v, const int *q_pos, const int *kv_pos, const float *bias, \
        i64 distances, int first_distance, int heads, int kv_heads, int dim, float scale, int causal, u32 reach
#define GIVEN {q, k, v, q_pos, kv_pos, bias, distances, first_distance, heads, kv_heads, dim, scale, causal, reach}

// Whether the query at position qp sees the key at kp: not later, and at most `reach` behind.
__device__ __forceinline__ bool visible(const Inputs& x, int qp, int kp) {
    return !x.causal || (kp <= qp && (u32)qp - (u32)kp <= x.reach);
}

// The score of a visible pair from its raw product.
__device__ __forceinline__ float scored(const Inputs& x, float product, int head, int qp, int kp) {
    float score = product * x.scale;
    if (x.bias) score += x.bias[head * x.distances + ((i64)kp - qp - x.first_distance)];
    return score;
}

__device__ __forceinline__ float sum16(float v) {
    for (int o = 8; o; o >>= 1) v += __shfl_xor_sync(FULL, v, o);
    return v;
}
__device__ __forceinline__ float max16(float v) {
    for (int o = 8; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL, v, o));
    return v;
}

// Rows of one head of a packed tensor.
struct Rows {
    const float* at;
    i64 stride;
    int count;
};

__device__ __forceinline__ Rows rows_of(const float* x, int heads, int head, int dim, int first, int end) {
    i64 stride = (i64)heads * dim;
    return {x + first * stride + (i64)head * dim, stride, min(end - first, SIDE)};
}

// What a block keeps in shared memory: two tiles of STEP numbers of 64 rows, turned; and a tile of weights,
// turned.
struct Shared {
    float stage[2 * STEP * SIDE];
    float weights[SIDE * SIDE];
};

// Four rows beside each other are one float4; its place changes with the number, so that neither side meets
// in a bank.
__device__ __forceinline__ int turned(int number, int group) { return number * SIDE + ((group ^ (number & 7)) << 2); }
__device__ __forceinline__ int weight_at(int column, int group) {
    return column * SIDE + ((group ^ ((column >> 2) & 7)) << 2);
}

// Numbers from..from+STEP of 64 rows to `stage`, zeros where there are none: a warp reads 8 numbers of 4 rows
// at once.
__device__ __forceinline__ void stage_turned(float* stage, const Rows& x, int from, int dim) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int group = warp * 2 + i / 4, number = (i % 4) * 8 + lane % 8, row = group * 4 + lane / 8;
        bool there = row < x.count && from + number < dim;
        stage[turned(number, group) + lane / 8] = there ? x.at[row * x.stride + from + number] : 0.0f;
    }
}

// s[i][j] = a[row i]·b[row j] over all numbers of a head.
__device__ __forceinline__ void products(float (&s)[4][4], const Rows& a, const Rows& b, int dim, Shared& shared) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float *left = shared.stage, *right = shared.stage + STEP * SIDE;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) s[i][j] = 0.0f;
    for (int from = 0; from < dim; from += STEP) {
        __syncthreads();
        stage_turned(left, a, from, dim);
        stage_turned(right, b, from, dim);
        __syncthreads();
#pragma unroll 8
        for (int d = 0; d < STEP; d++) {
            float4 l = *(const float4*)(left + turned(d, ty)), r = *(const float4*)(right + turned(d, tx));
            float rows[4] = {l.x, l.y, l.z, l.w}, columns[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[i][j] = fmaf(rows[i], columns[j], s[i][j]);
        }
    }
}

// Puts the block's tile of weights in shared memory, turned; what was there must have been read.
__device__ __forceinline__ void put_weights(const float (&w)[4][4], Shared& shared) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    for (int j = 0; j < 4; j++) {
        *(float4*)(shared.weights + weight_at(tx * 4 + j, ty)) = make_float4(w[0][j], w[1][j], w[2][j], w[3][j]);
    }
}

// sums[i][4m + c] += Σ_j weights[row i][j]·b[row j][part + 64m + 4tx + c].
template <int C>
__device__ __forceinline__ void accumulate(float (&sums)[4][C / 16], const Rows& b, int part, int dim,
                                           Shared& shared) {
    constexpr int CHUNK = 2 * STEP * SIDE / C;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    for (int from = 0; from < b.count; from += CHUNK) {
        __syncthreads();
#pragma unroll
        for (int i = threadIdx.x; i < CHUNK * C; i += THREADS) {
            int row = from + i / C, column = part + i % C;
            bool there = row < b.count && column < dim;
            shared.stage[i] = there ? b.at[row * b.stride + column] : 0.0f;
        }
        __syncthreads();
#pragma unroll 8
        for (int j = 0; j < CHUNK; j++) {
            float4 w = *(const float4*)(shared.weights + weight_at(from + j, ty));
            float rows[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int m = 0; m < C / 64; m++) {
                float4 v = *(const float4*)(shared.stage + j * C + m * 64 + tx * 4);
                float columns[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int c = 0; c < 4; c++) sums[i][m * 4 + c] = fmaf(rows[i], columns[c], sums[i][m * 4 + c]);
            }
        }
    }
}

// Writes a block's sums times `factor` of each row to its part of rows of one head; 0 where the factor is,
// whatever the sum.
template <int C>
__device__ __forceinline__ void write_rows(const float (&sums)[4][C / 16], const float (&factor)[4], const Tile& t,
                                           int heads, int head, int part, int dim, float* y) {
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    for (int i = 0; i < 4; i++) {
        if (ty * 4 + i >= t.count) return;
        float* row = y + ((i64)(t.first + ty * 4 + i) * heads + head) * dim;
        for (int c = 0; c < C / 16; c++) {
            int column = part + c / 4 * 64 + tx * 4 + c % 4;
            if (column < dim) row[column] = factor[i] == 0.0f ? 0.0f : sums[i][c] * factor[i];
        }
    }
}

template <int C>
__device__ __forceinline__ void forward(const Inputs& x, const Tile* tiles, float* y, float* lse) {
    __shared__ Shared shared;
    Tile t = tiles[blockIdx.x / x.heads];
    int head = blockIdx.x % x.heads, kv_head = head / (x.heads / x.kv_heads), part = blockIdx.y * C;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    Rows rows = rows_of(x.q, x.heads, head, x.dim, t.first, t.first + t.count);
    float sums[4][C / 16] = {}, top[4], sum[4] = {}, s[4][4];
    for (int i = 0; i < 4; i++) top[i] = -infinity();
    for (int from = t.from; from < t.end; from += SIDE) {
        Rows keys = rows_of(x.k, x.kv_heads, kv_head, x.dim, from, t.end);
        Rows values = rows_of(x.v, x.kv_heads, kv_head, x.dim, from, t.end);
        products(s, rows, keys, x.dim, shared);
        for (int i = 0; i < 4; i++) {
            bool row_there = ty * 4 + i < t.count;
            int qp = row_there ? x.q_pos[t.first + ty * 4 + i] : 0;
            float most = top[i];
            for (int j = 0; j < 4; j++) {
                bool there = row_there && tx * 4 + j < keys.count;
                int kp = there ? x.kv_pos[from + tx * 4 + j] : 0;
                there = there && visible(x, qp, kp);
                s[i][j] = there ? scored(x, s[i][j], head, qp, kp) : -infinity();
                most = fmaxf(most, s[i][j]);
            }
            most = max16(most);
            // Nothing visible so far, or nothing but NaN: 0 in place of -inf lets the NaN through.
            float base = most == -infinity() ? 0.0f : most;
            float shrink = top[i] == most ? 1.0f : expf(top[i] - base);
            top[i] = most;
            sum[i] *= shrink;
            for (int j = 0; j < 4; j++) sum[i] += s[i][j] = expf(s[i][j] - base);
            for (int c = 0; c < C / 16; c++) sums[i][c] *= shrink;
        }
        put_weights(s, shared);
        accumulate<C>(sums, values, part, x.dim, shared);
    }
    float share[4];
    for (int i = 0; i < 4; i++) {
        sum[i] = sum16(sum[i]);
        bool seen = !(top[i] == -infinity() && sum[i] == 0.0f);
        share[i] = seen ? 1.0f / sum[i] : 0.0f;
        if (tx == 0 && blockIdx.y == 0 && ty * 4 + i < t.count) {
            lse[(i64)(t.first + ty * 4 + i) * x.heads + head] = seen ? top[i] + logf(sum[i]) : -infinity();
        }
    }
    write_rows<C>(sums, share, t, x.heads, head, part, x.dim, y);
}

// y and lse of tiles of query rows over the keys from..end; blocks are tiles x heads.
extern "C" __global__ void __launch_bounds__(THREADS) forward_64(INPUTS, const Tile* tiles, float* y, float* lse) {
    forward<64>(GIVEN, tiles, y, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS) forward_128(INPUTS, const Tile* tiles, float* y, float* lse) {
    forward<128>(GIVEN, tiles, y, lse);
}

// y [n, dim] = 0, lse [n] = -inf: what rows outside all spans get.
extern "C" __global__ void clear_rows(i64 n, int dim, float* y, float* lse) {
    FOR_EACH(i, n * dim) {
        y[i] = 0.0f;
        if (i < n) lse[i] = -infinity();
    }
}

// delta [n] = Σ dy·y of each row and head, y and dy [n, dim]; a warp a row.
extern "C" __global__ void row_dots(const float* y, const float* dy, i64 n, int dim, float* delta) {
    int lane = threadIdx.x % WARP;
    i64 warps = (i64)gridDim.x * blockDim.x / WARP;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) / WARP; i < n; i += warps) {
        float sum = 0.0f;
        for (int d = lane; d < dim; d += WARP) sum = fmaf(y[i * dim + d], dy[i * dim + d], sum);
        sum = warp_sum(sum);
        if (lane == 0) delta[i] = sum;
    }
}

// The weight of a visible pair and the slope of its score: p and p·(dy·v − δ).
__device__ __forceinline__ void weigh(const Inputs& x, int head, int qp, int kp, float lse, float delta, float& s,
                                      float& ds) {
    s = expf(scored(x, s, head, qp, kp) - lse);
    ds = s * (ds - delta);
}

template <int C>
__device__ __forceinline__ void backward_rows(const Inputs& x, const Tile* tiles, const float* dy, const float* lse,
                                              const float* delta, float* dq) {
    __shared__ Shared shared;
    Tile t = tiles[blockIdx.x / x.heads];
    int head = blockIdx.x % x.heads, kv_head = head / (x.heads / x.kv_heads), part = blockIdx.y * C;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    Rows rows = rows_of(x.q, x.heads, head, x.dim, t.first, t.first + t.count);
    Rows outer = rows_of(dy, x.heads, head, x.dim, t.first, t.first + t.count);
    float sums[4][C / 16] = {}, s[4][4], ds[4][4];
    for (int from = t.from; from < t.end; from += SIDE) {
        Rows keys = rows_of(x.k, x.kv_heads, kv_head, x.dim, from, t.end);
        Rows values = rows_of(x.v, x.kv_heads, kv_head, x.dim, from, t.end);
        products(s, rows, keys, x.dim, shared);
        products(ds, outer, values, x.dim, shared);
        for (int i = 0; i < 4; i++) {
            int row = t.first + ty * 4 + i;
            bool row_there = ty * 4 + i < t.count;
            int qp = row_there ? x.q_pos[row] : 0;
            float own_lse = row_there ? lse[(i64)row * x.heads + head] : 0.0f;
            float own_delta = row_there ? delta[(i64)row * x.heads + head] : 0.0f;
            for (int j = 0; j < 4; j++) {
                bool there = row_there && tx * 4 + j < keys.count;
                int kp = there ? x.kv_pos[from + tx * 4 + j] : 0;
                if (there && visible(x, qp, kp)) weigh(x, head, qp, kp, own_lse, own_delta, s[i][j], ds[i][j]);
                else ds[i][j] = 0.0f;
            }
        }
        put_weights(ds, shared);
        accumulate<C>(sums, keys, part, x.dim, shared);
    }
    float scales[4] = {x.scale, x.scale, x.scale, x.scale};
    write_rows<C>(sums, scales, t, x.heads, head, part, x.dim, dq);
}

// dq of tiles of query rows; blocks are tiles x heads.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_rows_64(INPUTS, const Tile* tiles, const float* dy, const float* lse, const float* delta, float* dq) {
    backward_rows<64>(GIVEN, tiles, dy, lse, delta, dq);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_rows_128(INPUTS, const Tile* tiles, const float* dy, const float* lse, const float* delta, float* dq) {
    backward_rows<128>(GIVEN, tiles, dy, lse, delta, dq);
}

// Keys are the rows here and queries the columns; the heads of a group follow one another.
template <int C>
__device__ __forceinline__ void backward_keys(const Inputs& x, const Tile* tiles, const float* dy, const float* lse,
                                              const float* delta, float* dk, float* dv) {
    __shared__ Shared shared;
    Tile t = tiles[blockIdx.x / x.kv_heads];
    int kv_head = blockIdx.x % x.kv_heads, group = x.heads / x.kv_heads, part = blockIdx.y * C;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    Rows keys = rows_of(x.k, x.kv_heads, kv_head, x.dim, t.first, t.first + t.count);
    Rows values = rows_of(x.v, x.kv_heads, kv_head, x.dim, t.first, t.first + t.count);
    float key_sums[4][C / 16] = {}, value_sums[4][C / 16] = {}, s[4][4], ds[4][4];
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int from = t.from; from < t.end; from += SIDE) {
            Rows rows = rows_of(x.q, x.heads, head, x.dim, from, t.end);
            Rows outer = rows_of(dy, x.heads, head, x.dim, from, t.end);
            products(s, keys, rows, x.dim, shared);
            products(ds, values, outer, x.dim, shared);
            for (int j = 0; j < 4; j++) {
                int row = from + tx * 4 + j;
                bool row_there = row < t.end;
                int qp = row_there ? x.q_pos[row] : 0;
                float own_lse = row_there ? lse[(i64)row * x.heads + head] : 0.0f;
                float own_delta = row_there ? delta[(i64)row * x.heads + head] : 0.0f;
                for (int i = 0; i < 4; i++) {
                    bool there = row_there && ty * 4 + i < t.count;
                    int kp = there ? x.kv_pos[t.first + ty * 4 + i] : 0;
                    if (there && visible(x, qp, kp)) weigh(x, head, qp, kp, own_lse, own_delta, s[i][j], ds[i][j]);
                    else s[i][j] = ds[i][j] = 0.0f;
                }
            }
            if (dv) {
                put_weights(s, shared);
                accumulate<C>(value_sums, outer, part, x.dim, shared);
                __syncthreads();
            }
            if (dk) {
                put_weights(ds, shared);
                accumulate<C>(key_sums, rows, part, x.dim, shared);
            }
        }
    }
    float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f}, scales[4] = {x.scale, x.scale, x.scale, x.scale};
    if (dk) write_rows<C>(key_sums, scales, t, x.kv_heads, kv_head, part, x.dim, dk);
    if (dv) write_rows<C>(value_sums, ones, t, x.kv_heads, kv_head, part, x.dim, dv);
}

// dk and dv (either may be missing) of tiles of keys over the query rows from..end; blocks are tiles x
// kv_heads.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_keys_64(INPUTS, const Tile* tiles, const float* dy, const float* lse, const float* delta, float* dk,
                     float* dv) {
    backward_keys<64>(GIVEN, tiles, dy, lse, delta, dk, dv);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_keys_128(INPUTS, const Tile* tiles, const float* dy, const float* lse, const float* delta, float* dk,
                      float* dv) {
    backward_keys<128>(GIVEN, tiles, dy, lse, delta, dk, dv);
}

// ---- the bias ----

#define TABLE 512

// Finds the columns of a tile by their key's position: a table of the first of each position, and the next of
// the same.
struct Columns {
    int position[SIDE];
    short next[SIDE];
    short first[TABLE];
    int least, most;
};

// Fills `c` with the positions of `count` keys.
__device__ __forceinline__ void find_columns(Columns& c, const int* positions, int count) {
    __syncthreads();
    if (threadIdx.x < count) c.position[threadIdx.x] = positions[threadIdx.x];
    for (int i = threadIdx.x; i < TABLE; i += THREADS) c.first[i] = -1;
    __syncthreads();
    if (threadIdx.x == 0) {
        c.least = c.most = c.position[0];
        for (int j = 1; j < count; j++) {
            c.least = min(c.least, c.position[j]);
            c.most = max(c.most, c.position[j]);
        }
        // From the last on, so that chains go upwards. Where keys lie far apart there is no table.
        bool table = (i64)c.most - c.least < TABLE;
        for (int j = count - 1; table && j >= 0; j--) {
            int place = c.position[j] - c.least;
            c.next[j] = c.first[place];
            c.first[place] = (short)j;
        }
    }
    __syncthreads();
}

// Adds the slopes in shared memory (turned, `rows` by `count`) to `sums` [distances]; a thread sums its
// distances alone.
__device__ __forceinline__ void add_distances(const Inputs& x, const Columns& c, const int* q_pos, int rows,
                                              int count, const float* slopes, float* sums) {
    int least = q_pos[0], most = q_pos[0];
    for (int i = 1; i < rows; i++) {
        least = min(least, q_pos[i]);
        most = max(most, q_pos[i]);
    }
    // Hidden pairs may lie outside the bias; their slope is 0.
    i64 start = max((i64)c.least - most - x.first_distance, (i64)0);
    i64 end = min((i64)c.most - least - x.first_distance + 1, x.distances);
    bool table = (i64)c.most - c.least < TABLE;
    for (i64 at = start + threadIdx.x; at < end; at += THREADS) {
        float sum = 0.0f;
        for (int i = 0; i < rows; i++) {
            i64 wanted = at + x.first_distance + q_pos[i] - c.least;
            if (wanted < 0 || wanted > (i64)c.most - c.least) continue;
            if (table) {
                for (int j = c.first[wanted]; j >= 0; j = c.next[j]) sum += slopes[weight_at(j, i / 4) + i % 4];
            } else {
                for (int j = 0; j < count; j++) {
                    if ((i64)c.position[j] - c.least == wanted) sum += slopes[weight_at(j, i / 4) + i % 4];
                }
            }
        }
        sums[at] += sum;
    }
}

// parts [gridDim.x, heads, distances]: sums of p·(dy·v − δ) at each distance, over every gridDim.x-th tile of
// query rows from blockIdx.x on; blockIdx.y is the head.
extern "C" __global__ void __launch_bounds__(THREADS)
    backward_bias(INPUTS, const Tile* tiles, int count, const float* dy, const float* lse, const float* delta,
                  float* parts) {
    __shared__ Shared shared;
    __shared__ Columns columns;
    __shared__ int positions[SIDE];
    Inputs x = GIVEN;
    int head = blockIdx.y, kv_head = head / (heads / kv_heads);
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    float* sums = parts + ((i64)blockIdx.x * heads + head) * distances;
    for (i64 i = threadIdx.x; i < distances; i += THREADS) sums[i] = 0.0f;
    float s[4][4], ds[4][4];
    for (int at = blockIdx.x; at < count; at += gridDim.x) {
        Tile t = tiles[at];
        Rows rows = rows_of(q, heads, head, dim, t.first, t.first + t.count);
        Rows outer = rows_of(dy, heads, head, dim, t.first, t.first + t.count);
        __syncthreads();
        if (threadIdx.x < t.count) positions[threadIdx.x] = q_pos[t.first + threadIdx.x];
        for (int from = t.from; from < t.end; from += SIDE) {
            Rows keys = rows_of(k, kv_heads, kv_head, dim, from, t.end);
            Rows values = rows_of(v, kv_heads, kv_head, dim, from, t.end);
            products(s, rows, keys, dim, shared);
            products(ds, outer, values, dim, shared);
            for (int i = 0; i < 4; i++) {
                int row = t.first + ty * 4 + i;
                for (int j = 0; j < 4; j++) {
                    bool there = ty * 4 + i < t.count && tx * 4 + j < keys.count;
                    int qp = there ? q_pos[row] : 0, kp = there ? kv_pos[from + tx * 4 + j] : 0;
                    i64 own = (i64)row * heads + head;
                    if (there && visible(x, qp, kp)) weigh(x, head, qp, kp, lse[own], delta[own], s[i][j], ds[i][j]);
                    else ds[i][j] = 0.0f;
                }
            }
            put_weights(ds, shared);
            find_columns(columns, kv_pos + from, keys.count);
            add_distances(x, columns, positions, t.count, keys.count, shared.weights, sums);
        }
    }
}

// y [n] = Σ of parts [count, n], in order.
extern "C" __global__ void sum_parts(const float* parts, i64 n, int count, float* y) {
    FOR_EACH(i, n) {
        float sum = 0.0f;
        for (int p = 0; p < count; p++) sum += parts[p * n + i];
        y[i] = sum;
    }
}

// ---- few query rows on many keys ----

#define PART 128
#define CELLS 8
#define WARPS 4

// Sums eight numbers over a warp; lane l gets the sum of v[l/4].
__device__ __forceinline__ float sum_of_eight(float (&v)[CELLS], int lane) {
#pragma unroll
    for (int half = 4; half; half >>= 1) {
        bool upper = lane & (half * 4);
#pragma unroll
        for (int c = 0; c < half; c++) {
            float send = upper ? v[c] : v[c + half], keep = upper ? v[c + half] : v[c];
            v[c] = keep + __shfl_xor_sync(FULL, send, half * 4);
        }
    }
    float sum = v[0];
    sum += __shfl_xor_sync(FULL, sum, 2);
    return sum + __shfl_xor_sync(FULL, sum, 1);
}

// A few rows of one key head's query heads ("cells") against at most PART keys; V numbers of a head lie in a
// lane.
template <int V>
__device__ __forceinline__ void decode_part(const Inputs& x, const Tile* tiles, int most_rows, float2* states,
                                            float* sums) {
    __shared__ float scores[CELLS][PART];
    __shared__ float partial[WARPS][CELLS][V * WARP];
    int part = blockIdx.x / x.kv_heads, kv_head = blockIdx.x % x.kv_heads, group = x.heads / x.kv_heads;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Tile t = tiles[part];
    int count = t.end - t.from, cells = t.count * group;
    i64 stride = (i64)x.kv_heads * x.dim, start = t.from * stride + (i64)kv_head * x.dim;
    for (int first = 0; first < cells; first += CELLS) {
        int n = min(cells - first, CELLS);
        // Row and head of a cell, counted over the rows and heads of this part.
        auto cell = [&](int c) {
            int row = (first + c) / group, head = kv_head * group + (first + c) % group;
            return (i64)row * x.heads + head;
        };
        float query[CELLS][V];
#pragma unroll
        for (int c = 0; c < CELLS; c++)
#pragma unroll
            for (int i = 0; i < V; i++) {
                bool there = c < n && i * WARP + lane < x.dim;
                query[c][i] = there ? x.q[((i64)t.first * x.heads + cell(c)) * x.dim + i * WARP + lane] : 0.0f;
            }
        __syncthreads();
#pragma unroll 2
        for (int j = warp; j < PART; j += WARPS) {
            float key[V], dots[CELLS];
#pragma unroll
            for (int i = 0; i < V; i++) {
                bool there = j < count && i * WARP + lane < x.dim;
                key[i] = there ? x.k[start + j * stride + i * WARP + lane] : 0.0f;
            }
#pragma unroll
            for (int c = 0; c < CELLS; c++) {
                dots[c] = 0.0f;
                if (c < n)
#pragma unroll
                    for (int i = 0; i < V; i++) dots[c] = fmaf(query[c][i], key[i], dots[c]);
            }
            float dot = sum_of_eight(dots, lane);
            int c = lane / 4;
            if (lane % 4 == 0 && c < n) {
                int row = (first + c) / group, head = kv_head * group + (first + c) % group;
                int qp = x.q_pos[t.first + row], kp = j < count ? x.kv_pos[t.from + j] : 0;
                bool seen = j < count && visible(x, qp, kp);
                scores[c][j] = seen ? scored(x, dot, head, qp, kp) : -infinity();
            }
        }
        __syncthreads();
        for (int c = warp; c < n; c += WARPS) {
            float top = -infinity(), sum = 0.0f;
            for (int j = lane; j < PART; j += WARP) top = fmaxf(top, scores[c][j]);
            top = warp_max(top);
            float base = top == -infinity() ? 0.0f : top;
            for (int j = lane; j < PART; j += WARP) sum += scores[c][j] = expf(scores[c][j] - base);
            sum = warp_sum(sum);
            if (lane == 0) states[(i64)part * most_rows * x.heads + cell(c)] = make_float2(top, sum);
        }
        __syncthreads();
        float own[CELLS][V] = {};
#pragma unroll 4
        for (int j = warp; j < count; j += WARPS) {
            float value[V];
#pragma unroll
            for (int i = 0; i < V; i++) {
                value[i] = i * WARP + lane < x.dim ? x.v[start + j * stride + i * WARP + lane] : 0.0f;
            }
#pragma unroll
            for (int c = 0; c < CELLS; c++) {
                if (c < n) {
                    float weight = scores[c][j];
#pragma unroll
                    for (int i = 0; i < V; i++) own[c][i] = fmaf(weight, value[i], own[c][i]);
                }
            }
        }
#pragma unroll
        for (int c = 0; c < CELLS; c++)
#pragma unroll
            for (int i = 0; i < V; i++) partial[warp][c][i * WARP + lane] = own[c][i];
        __syncthreads();
        for (int c = 0; c < n; c++) {
            float* to = sums + ((i64)part * most_rows * x.heads + cell(c)) * x.dim;
            for (int d = threadIdx.x; d < x.dim; d += WARPS * WARP) {
                to[d] = ((partial[0][c][d] + partial[1][c][d]) + partial[2][c][d]) + partial[3][c][d];
            }
        }
    }
}

// states (top, sum) [parts, most_rows, heads] and weighted sums of values [parts, most_rows, heads, dim] of
// query rows first..first+count over at most PART keys from..end; blocks are parts x kv_heads.
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    decode_32(INPUTS, const Tile* tiles, int most_rows, float2* states, float* sums) {
    decode_part<1>(GIVEN, tiles, most_rows, states, sums);
}
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    decode_64(INPUTS, const Tile* tiles, int most_rows, float2* states, float* sums) {
    decode_part<2>(GIVEN, tiles, most_rows, states, sums);
}
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    decode_128(INPUTS, const Tile* tiles, int most_rows, float2* states, float* sums) {
    decode_part<4>(GIVEN, tiles, most_rows, states, sums);
}
extern "C" __global__ void __launch_bounds__(WARPS * WARP)
    decode_256(INPUTS, const Tile* tiles, int most_rows, float2* states, float* sums) {
    decode_part<8>(GIVEN, tiles, most_rows, states, sums);
}

// y and lse of rows first..first+count from their parts from..end, in order; blockIdx.x is the span,
// blockIdx.y the row and head, a warp each.
extern "C" __global__ void unite_parts(const Tile* tiles, int most_rows, int heads, int dim, const float2* states,
                                       const float* sums, float* y, float* lse) {
    int lane = threadIdx.x % WARP;
    Tile t = tiles[blockIdx.x];
    int cell = blockIdx.y * (blockDim.x / WARP) + threadIdx.x / WARP, cells = most_rows * heads;
    if (cell >= t.count * heads) return;
    float top = -infinity(), sum = 0.0f;
    for (int p = t.from; p < t.end; p++) top = fmaxf(top, states[(i64)p * cells + cell].x);
    float base = top == -infinity() ? 0.0f : top;
    // A part of NaN alone has no top; its NaN must reach the result all the same.
    auto share = [&](float2 state) { return isnan(state.y) ? 1.0f : expf(state.x - base); };
    for (int p = t.from; p < t.end; p++) {
        float2 state = states[(i64)p * cells + cell];
        sum += share(state) * state.y;
    }
    bool seen = !(top == -infinity() && sum == 0.0f);
    i64 at = (i64)t.first * heads + cell;
    if (lane == 0) lse[at] = seen ? top + logf(sum) : -infinity();
    for (int d = lane; d < dim; d += WARP) {
        float total = 0.0f;
        for (int p = t.from; p < t.end; p++) {
            i64 own = (i64)p * cells + cell;
            total += share(states[own]) * sums[own * dim + d];
        }
        y[at * dim + d] = seen ? total * (1.0f / sum) : 0.0f;
    }
}
