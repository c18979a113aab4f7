// Attention over packed sequences on tensor cores: factors rounded to bf16, sums and softmax in f32, for
// heads of up to 128 numbers, a multiple of 8.
//
// q, y, dy [rows, heads, dim]; k, v [keys, kv_heads, dim]; lse, delta [rows, heads]; bias [heads, distances].
// A block has eight warps, each with 16 rows of scores of its own (of queries, or of keys for dk and dv); the
// other side comes in tiles through shared memory, the next while one is worked on. D is dim rounded up to 64
// or 128.
//
// Fragments of mma.m16n8k16: of a thread, g = lane/4 and t = 2·(lane%4). Left: rows g and g+8 by columns t,
// t+1, t+8, t+9; result: c[0], c[1] in row g at columns t, t+1, c[2], c[3] in row g+8.

#define THREADS 256
#define ROWS 128
#define KEYS 64
#define QUERIES 32
#define LOG2E 1.4426950408889634f

// Work of a block: rows first..first+count of one side, and rows from..end of the other.
struct Tile { int first, count, from, end; };

struct Inputs {
    const u16 *k, *v;
    const int *q_pos, *kv_pos;
    const float* bias;
    i64 distances;
    int first_distance, heads, kv_heads, dim;
    float scale;
    int causal;
    u32 reach;
};

#define INPUTS \
    const u16 *k, const u16 *v, const int *q_pos, const int *kv_pos, const float *bias, i64 distances, \
        int first_distance, int heads, int kv_heads, int dim, float scale, int causal, u32 reach
#define GIVEN {k, v, q_pos, kv_pos, bias, distances, first_distance, heads, kv_heads, dim, scale, causal, reach}

// ---- instructions ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Starts copying 16 bytes to shared memory; zeros where there is nothing.
__device__ __forceinline__ void copy_16(u32 to, const void* from, bool there) {
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_4(u32 to, const void* from, bool there) {
    int bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of bf16; lane l gives the address of row l%8 of matrix l/8.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void load_turned(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// c += a·b, 16 x 8 by 16.
__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to bf16, the first in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ float power_of_two(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// ---- tiles ----

// Where 16 bytes of a row lie in a tile: shifted from row to row, so that eight rows beside each other meet
// in no bank.
template <int D>
__device__ __forceinline__ u32 place(int row, int piece) { return (u32)(row * (D / 8) + (piece ^ (row & 7))) * 16; }

// Starts copying rows first..first+COUNT of a head; zeros from `end` on and beyond dim. `from` is the head in
// row 0.
template <int D, int COUNT>
__device__ __forceinline__ void fetch(u32 to, const u16* from, i64 stride, int first, int end, int dim) {
#pragma unroll
    for (int i = threadIdx.x; i < COUNT * (D / 8); i += THREADS) {
        int row = i / (D / 8), piece = i % (D / 8);
        bool there = first + row < end && piece * 8 < dim;
        copy_16(to + place<D>(row, piece), from + (there ? (first + row) * stride + piece * 8 : 0), there);
    }
}

// Rows row..row+16 by numbers 16k..16k+16 of a tile, as a left factor.
template <int D>
__device__ __forceinline__ void load_left(u32 (&a)[4], u32 tile, int row, int k) {
    int lane = threadIdx.x % WARP;
    load_matrices(a, tile + place<D>(row + lane % 16, k * 2 + lane / 16));
}

// c[n] += a·tileᵀ for rows first..first+8N of a tile; a has all numbers of the warp's rows.
template <int D, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[N][4], const u32 (&a)[4], u32 tile, int first, int k) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        u32 b[4];
        load_matrices(b, tile + place<D>(first + n * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        multiply(c[n], a, b[0], b[1]);
        multiply(c[n + 1], a, b[2], b[3]);
    }
}

// c [16, D] += a [16, 16]·tile rows first..first+16.
template <int D>
__device__ __forceinline__ void multiply_columns(float (&c)[D / 8][4], const u32 (&a)[4], u32 tile, int first) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
        u32 b[4];
        load_turned(b, tile + place<D>(first + lane % 16, n + lane / 16));
        multiply(c[n], a, b[0], b[1]);
        multiply(c[n + 1], a, b[2], b[3]);
    }
}

// Two result tiles beside each other as a left factor.
__device__ __forceinline__ void pack_left(u32 (&a)[4], const float (&c)[4], const float (&d)[4]) {
    a[0] = pack(c[0], c[1]);
    a[1] = pack(c[2], c[3]);
    a[2] = pack(d[0], d[1]);
    a[3] = pack(d[2], d[3]);
}

// Rows first..first+16 of a head in f32 as left factors, zeros from `end` on.
template <int D>
__device__ __forceinline__ void read_left(u32 (&a)[D / 16][4], const float* x, i64 stride, int first, int end,
                                          int dim) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first + lane / 4 + i % 2 * 8, column = k * 16 + lane % 4 * 2 + i / 2 * 8;
            bool there = row < end && column < dim;
            float2 v = there ? *(const float2*)(x + row * stride + column) : make_float2(0.0f, 0.0f);
            a[k][i] = pack(v.x, v.y);
        }
}

// Writes c [16, D], row g times f0 and row g+8 times f1 (0 where the factor is), to rows first.. below `end`
// of a head.
template <int D>
__device__ __forceinline__ void write_result(const float (&c)[D / 8][4], float f0, float f1, float* y, i64 stride,
                                             int first, int end, int dim) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = first + lane / 4 + h * 8;
        float f = h ? f1 : f0;
        if (row >= end) continue;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            int column = n * 8 + lane % 4 * 2;
            float2 v = f == 0.0f ? make_float2(0.0f, 0.0f) : make_float2(c[n][2 * h] * f, c[n][2 * h + 1] * f);
            if (column < dim) *(float2*)(y + row * stride + column) = v;
        }
    }
}

// ---- what is visible ----

__device__ __forceinline__ bool visible(const Inputs& x, int qp, int kp) {
    return !x.causal || (kp <= qp && (u32)qp - (u32)kp <= x.reach);
}

#define NONE 0
#define SOME 1
#define ALL 2

// How much of keys first_key..=last_key the rows first_row..=last_row see; positions do not fall.
__device__ __forceinline__ int seen(const Inputs& x, int first_row, int last_row, int first_key, int last_key) {
    if (!x.causal) return ALL;
    int q0 = x.q_pos[first_row], q1 = x.q_pos[last_row], k0 = x.kv_pos[first_key], k1 = x.kv_pos[last_key];
    if (k0 > q1 || (k1 <= q0 && (u32)q0 - (u32)k1 > x.reach)) return NONE;
    return k1 <= q0 && (u32)q1 - (u32)k0 <= x.reach ? ALL : SOME;
}

// log2(e) times what is added to the score of a visible pair.
__device__ __forceinline__ float bias_of(const Inputs& x, int head, int qp, int kp) {
    return x.bias[head * x.distances + ((i64)kp - qp - x.first_distance)] * LOG2E;
}

// ---- forward ----

// Turns raw scores of a warp's rows with keys from..from+KEYS into weights exp(score − top), and shrinks what
// came before.
template <int D>
__device__ __forceinline__ void take_in(const Inputs& x, float (&s)[KEYS / 8][4], float (&out)[D / 8][4],
                                        float (&top)[2], float (&sum)[2], int head, int row, int last_row, int from,
                                        int end, bool masked) {
    int t = threadIdx.x % 4 * 2;
    float scale = x.scale * LOG2E;
    if (masked || x.bias) {
        int qp[2] = {x.q_pos[min(row, last_row)], x.q_pos[min(row + 8, last_row)]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int key = from + n * 8 + t + i, kp = key < end ? x.kv_pos[key] : 0;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    bool there = key < end && visible(x, qp[h], kp);
                    float add = there && x.bias ? bias_of(x, head, qp[h], kp) : 0.0f;
                    s[n][2 * h + i] = there ? s[n][2 * h + i] * scale + add : -infinity();
                }
            }
    } else {
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) s[n][i] *= scale;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float most = top[h];
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
        float base = most == -infinity() ? 0.0f : most;
        float shrink = top[h] == most ? 1.0f : power_of_two(top[h] - base);
        top[h] = most;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) total += s[n][2 * h + i] = power_of_two(s[n][2 * h + i] - base);
        sum[h] = sum[h] * shrink + total;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            out[n][2 * h] *= shrink;
            out[n][2 * h + 1] *= shrink;
        }
    }
}

template <int D>
__device__ __forceinline__ void forward(const Inputs& x, const Tile* tiles, const float* q, float* y, float* lse) {
    extern __shared__ uint4 shared[];
    constexpr u32 SIZE = KEYS * D * 2;
    u32 memory = shared_address(shared);
    Tile t = tiles[blockIdx.x / x.heads];
    int head = blockIdx.x % x.heads, kv_head = head / (x.heads / x.kv_heads);
    int lane = threadIdx.x % WARP, end_row = t.first + t.count;
    int first = t.first + threadIdx.x / WARP * 16, row = first + lane / 4, last = min(first + 15, end_row - 1);
    i64 stride = (i64)x.heads * x.dim, kv_stride = (i64)x.kv_heads * x.dim;
    const u16 *k = x.k + (i64)kv_head * x.dim, *v = x.v + (i64)kv_head * x.dim;
    u32 a[D / 16][4];
    read_left<D>(a, q + (i64)head * x.dim, stride, first, end_row, x.dim);
    float out[D / 8][4] = {}, top[2] = {-infinity(), -infinity()}, sum[2] = {};
    // Stage i has keys at 2·i·SIZE and their values behind them.
    auto bring = [&](int from, int stage) {
        fetch<D, KEYS>(memory + 2 * stage * SIZE, k, kv_stride, from, t.end, x.dim);
        fetch<D, KEYS>(memory + (2 * stage + 1) * SIZE, v, kv_stride, from, t.end, x.dim);
    };
    if (t.from < t.end) bring(t.from, 0);
    int stage = 0;
    for (int from = t.from; from < t.end; from += KEYS, stage ^= 1) {
        await_copies();
        __syncthreads();
        if (from + KEYS < t.end) bring(from + KEYS, stage ^ 1);
        u32 keys = memory + 2 * stage * SIZE, values = keys + SIZE;
        int see = first < end_row ? seen(x, first, last, from, min(from + KEYS, t.end) - 1) : NONE;
        if (see == NONE) continue;
        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) multiply_rows<D>(s, a[i], keys, 0, i);
        take_in<D>(x, s, out, top, sum, head, row, last, from, t.end, see == SOME || from + KEYS > t.end);
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
            u32 weights[4];
            pack_left(weights, s[2 * i], s[2 * i + 1]);
            multiply_columns<D>(out, weights, values, i * 16);
        }
    }
    float share[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(FULL, sum[h], 1);
        sum[h] += __shfl_xor_sync(FULL, sum[h], 2);
        bool any = !(top[h] == -infinity() && sum[h] == 0.0f);
        share[h] = any ? 1.0f / sum[h] : 0.0f;
        if (lane % 4 == 0 && row + 8 * h < end_row) {
            lse[(i64)(row + 8 * h) * x.heads + head] = any ? top[h] / LOG2E + logf(sum[h]) : -infinity();
        }
    }
    write_result<D>(out, share[0], share[1], y + (i64)head * x.dim, stride, first, end_row, x.dim);
}

// y and lse of tiles of query rows over the keys from..end; blocks are tiles x heads.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    forward_64(INPUTS, const Tile* tiles, const float* q, float* y, float* lse) {
    forward<64>(GIVEN, tiles, q, y, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward_128(INPUTS, const Tile* tiles, const float* q, float* y, float* lse) {
    forward<128>(GIVEN, tiles, q, y, lse);
}

// ---- backward ----

template <int D>
__device__ __forceinline__ void backward_rows(const Inputs& x, const Tile* tiles, const float* q, const float* dy,
                                              const float* lse, const float* delta, float* dq) {
    extern __shared__ uint4 shared[];
    constexpr u32 SIZE = KEYS * D * 2;
    constexpr int HALF = KEYS / 2;
    u32 memory = shared_address(shared);
    Tile t = tiles[blockIdx.x / x.heads];
    int head = blockIdx.x % x.heads, kv_head = head / (x.heads / x.kv_heads);
    int lane = threadIdx.x % WARP, end_row = t.first + t.count;
    int first = t.first + threadIdx.x / WARP * 16, row = first + lane / 4, last = min(first + 15, end_row - 1);
    i64 stride = (i64)x.heads * x.dim, kv_stride = (i64)x.kv_heads * x.dim;
    const u16 *k = x.k + (i64)kv_head * x.dim, *v = x.v + (i64)kv_head * x.dim;
    u32 a[D / 16][4], outer[D / 16][4];
    read_left<D>(a, q + (i64)head * x.dim, stride, first, end_row, x.dim);
    read_left<D>(outer, dy + (i64)head * x.dim, stride, first, end_row, x.dim);
    float own_lse[2] = {}, own_delta[2] = {};
    int qp[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (row + 8 * h < end_row) {
            i64 at = (i64)(row + 8 * h) * x.heads + head;
            own_lse[h] = lse[at] * LOG2E;
            own_delta[h] = delta[at];
            qp[h] = x.q_pos[row + 8 * h];
        }
    }
    float out[D / 8][4] = {}, scale = x.scale * LOG2E;
    auto bring = [&](int from, int stage) {
        fetch<D, KEYS>(memory + 2 * stage * SIZE, k, kv_stride, from, t.end, x.dim);
        fetch<D, KEYS>(memory + (2 * stage + 1) * SIZE, v, kv_stride, from, t.end, x.dim);
    };
    if (t.from < t.end) bring(t.from, 0);
    int stage = 0;
    for (int from = t.from; from < t.end; from += KEYS, stage ^= 1) {
        await_copies();
        __syncthreads();
        if (from + KEYS < t.end) bring(from + KEYS, stage ^ 1);
        u32 keys = memory + 2 * stage * SIZE, values = keys + SIZE;
#pragma unroll 1
        for (int half = 0; half < KEYS; half += HALF) {
            int begin = from + half, stop = min(begin + HALF, t.end);
            int see = first < end_row && begin < stop ? seen(x, first, last, begin, stop - 1) : NONE;
            if (see == NONE) continue;
            float s[HALF / 8][4] = {}, ds[HALF / 8][4] = {};
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                multiply_rows<D>(s, a[i], keys, half, i);
                multiply_rows<D>(ds, outer[i], values, half, i);
            }
            bool plain = see == ALL && begin + HALF <= t.end && !x.bias;
#pragma unroll
            for (int n = 0; n < HALF / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int h = i / 2, key = begin + n * 8 + lane % 4 * 2 + i % 2;
                    float score = s[n][i] * scale;
                    bool there = true;
                    if (!plain) {
                        int kp = key < t.end ? x.kv_pos[key] : 0;
                        there = row + 8 * h < end_row && key < t.end && visible(x, qp[h], kp);
                        if (there && x.bias) score += bias_of(x, head, qp[h], kp);
                    }
                    float weight = power_of_two(score - own_lse[h]);
                    ds[n][i] = there ? weight * (ds[n][i] - own_delta[h]) : 0.0f;
                }
#pragma unroll
            for (int i = 0; i < HALF / 16; i++) {
                u32 slopes[4];
                pack_left(slopes, ds[2 * i], ds[2 * i + 1]);
                multiply_columns<D>(out, slopes, keys, half + i * 16);
            }
        }
    }
    write_result<D>(out, x.scale, x.scale, dq + (i64)head * x.dim, stride, first, end_row, x.dim);
}

// dq of tiles of query rows; blocks are tiles x heads.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    backward_rows_64(INPUTS, const Tile* tiles, const float* q, const float* dy, const float* lse, const float* delta,
                     float* dq) {
    backward_rows<64>(GIVEN, tiles, q, dy, lse, delta, dq);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_rows_128(INPUTS, const Tile* tiles, const float* q, const float* dy, const float* lse, const float* delta,
                      float* dq) {
    backward_rows<128>(GIVEN, tiles, q, dy, lse, delta, dq);
}

// What comes with a tile of queries.
struct Queries {
    float lse[QUERIES], delta[QUERIES];
    int position[QUERIES];
};

// The weights and slopes of a warp's keys (rows) with the tile's queries from..end (columns), hidden ones 0.
__device__ __forceinline__ void weigh(const Inputs& x, float (&s)[QUERIES / 8][4], float (&ds)[QUERIES / 8][4],
                                      const Queries& queries, const int (&kp)[2], int head, int from, int end, int key,
                                      int end_key, bool plain) {
    float scale = x.scale * LOG2E;
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int h = i / 2, column = n * 8 + threadIdx.x % 4 * 2 + i % 2;
            float score = s[n][i] * scale;
            bool there = true;
            if (!plain) {
                int qp = queries.position[column];
                there = from + column < end && key + 8 * h < end_key && visible(x, qp, kp[h]);
                if (there && x.bias) score += bias_of(x, head, qp, kp[h]);
            }
            float weight = power_of_two(score - queries.lse[column] * LOG2E);
            s[n][i] = there ? weight : 0.0f;
            ds[n][i] = there ? weight * (ds[n][i] - queries.delta[column]) : 0.0f;
        }
}

template <int D>
__device__ __forceinline__ void backward_keys(const Inputs& x, const Tile* tiles, const u16* q, const u16* dy,
                                              const float* lse, const float* delta, float* dk, float* dv) {
    extern __shared__ uint4 shared[];
    constexpr u32 SIDE = ROWS * D * 2, SIZE = QUERIES * D * 2;
    // The block's keys, their values, two stages of queries and their dy, and what comes with these.
    u32 keys = shared_address(shared), values = keys + SIDE, memory = values + SIDE;
    Queries* others = (Queries*)((char*)shared + 2 * SIDE + 4 * SIZE);
    Tile t = tiles[blockIdx.x / x.kv_heads];
    int kv_head = blockIdx.x % x.kv_heads, group = x.heads / x.kv_heads;
    int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16, end_key = t.first + t.count;
    int first = t.first + own, key = first + lane / 4, last = min(first + 15, end_key - 1);
    i64 stride = (i64)x.heads * x.dim, kv_stride = (i64)x.kv_heads * x.dim;
    int kp[2] = {key < end_key ? x.kv_pos[key] : 0, key + 8 < end_key ? x.kv_pos[key + 8] : 0};
    float key_out[D / 8][4] = {}, value_out[D / 8][4] = {};
    auto bring = [&](int head, int from, int stage) {
        fetch<D, QUERIES>(memory + 2 * stage * SIZE, q + (i64)head * x.dim, stride, from, t.end, x.dim);
        fetch<D, QUERIES>(memory + (2 * stage + 1) * SIZE, dy + (i64)head * x.dim, stride, from, t.end, x.dim);
        int column = threadIdx.x % QUERIES, what = threadIdx.x / QUERIES;
        bool there = from + column < t.end;
        i64 row = there ? from + column : 0;
        if (what == 0) copy_4(shared_address(&others[stage].lse[column]), lse + row * x.heads + head, there);
        if (what == 1) copy_4(shared_address(&others[stage].delta[column]), delta + row * x.heads + head, there);
        if (what == 2) copy_4(shared_address(&others[stage].position[column]), x.q_pos + row, there);
    };
    int head = kv_head * group, from = t.from, stage = 0;
    int steps = t.from < t.end ? (t.end - t.from + QUERIES - 1) / QUERIES * group : 0;
    if (steps) {
        fetch<D, ROWS>(keys, x.k + (i64)kv_head * x.dim, kv_stride, t.first, end_key, x.dim);
        fetch<D, ROWS>(values, x.v + (i64)kv_head * x.dim, kv_stride, t.first, end_key, x.dim);
        bring(head, from, 0);
    }
    for (; steps; steps--, stage ^= 1) {
        await_copies();
        __syncthreads();
        int next = from + QUERIES < t.end ? from + QUERIES : t.from, next_head = next == t.from ? head + 1 : head;
        if (steps > 1) bring(next_head, next, stage ^ 1);
        u32 queries = memory + 2 * stage * SIZE, outer = queries + SIZE;
        int see = first < end_key ? seen(x, from, min(from + QUERIES, t.end) - 1, first, last) : NONE;
        if (see != NONE) {
            float s[QUERIES / 8][4] = {}, ds[QUERIES / 8][4] = {};
#pragma unroll
            for (int i = 0; i < D / 16; i++) {
                u32 a[4];
                load_left<D>(a, keys, own, i);
                multiply_rows<D>(s, a, queries, 0, i);
                load_left<D>(a, values, own, i);
                multiply_rows<D>(ds, a, outer, 0, i);
            }
            bool plain = see == ALL && from + QUERIES <= t.end && !x.bias;
            weigh(x, s, ds, others[stage], kp, head, from, t.end, key, end_key, plain);
#pragma unroll
            for (int i = 0; i < QUERIES / 16; i++) {
                u32 a[4];
                pack_left(a, s[2 * i], s[2 * i + 1]);
                multiply_columns<D>(value_out, a, outer, i * 16);
                pack_left(a, ds[2 * i], ds[2 * i + 1]);
                multiply_columns<D>(key_out, a, queries, i * 16);
            }
        }
        from = next;
        head = next_head;
    }
    if (dk) write_result<D>(key_out, x.scale, x.scale, dk + (i64)kv_head * x.dim, kv_stride, first, end_key, x.dim);
    if (dv) write_result<D>(value_out, 1.0f, 1.0f, dv + (i64)kv_head * x.dim, kv_stride, first, end_key, x.dim);
}

// dk and dv (either may be missing) of tiles of keys over the query rows from..end; blocks are tiles x
// kv_heads.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    backward_keys_64(INPUTS, const Tile* tiles, const u16* q, const u16* dy, const float* lse, const float* delta,
                     float* dk, float* dv) {
    backward_keys<64>(GIVEN, tiles, q, dy, lse, delta, dk, dv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_keys_128(INPUTS, const Tile* tiles, const u16* q, const u16* dy, const float* lse, const float* delta,
                      float* dk, float* dv) {
    backward_keys<128>(GIVEN, tiles, q, dy, lse, delta, dk, dv);
}
