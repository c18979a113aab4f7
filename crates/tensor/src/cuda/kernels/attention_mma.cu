// Attention over packed sequences on tensor cores: factors rounded to bf16, sums and softmax in f32, for
// heads of up to 128 numbers, a multiple of 8. Compiled behind tensor_cores.cuh.
//
// q, y, dy [rows, heads, dim]; k, v [keys, kv_heads, dim]; lse, delta [rows, heads]; bias [heads, distances].
// A block has eight warps, each with 16 rows of scores of its own (of queries, or of keys for dk and dv); the
// other side comes in tiles through shared memory, the next while one is worked on. D is dim rounded up to 64
// or 128.

#define ROWS 128
// Keys that the forward pass takes in at once; keys and queries that the backward pass does; how many of its tiles are
// on their way or in use.
#if BY_GROUPS
#define FORWARD_KEYS 128
#define QUERIES 64
#define STAGES 3
#define NARROW_BLOCKS 1
#else
#define FORWARD_KEYS 64
#define QUERIES 32
#define STAGES 2
#define NARROW_BLOCKS 2
#endif
#define KEYS 64
// Keys whose slopes are made at once.
#define PART (BY_GROUPS ? KEYS : KEYS / 2)
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

// ---- results ----

__device__ __forceinline__ float power_of_two(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
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

// The same for the query rows of the warps that work together with this one, and keys from..stop.
__device__ __forceinline__ int seen_together(const Inputs& x, const Tile& t, int from, int stop) {
    int first = t.first + threadIdx.x / WARP * 16 / TOGETHER * TOGETHER, end = t.first + t.count;
    return first < end ? seen(x, first, min(first + TOGETHER, end) - 1, from, stop - 1) : NONE;
}

// log2(e) times what is added to the score of a visible pair.
__device__ __forceinline__ float bias_of(const Inputs& x, int head, int qp, int kp) {
    return x.bias[head * x.distances + ((i64)kp - qp - x.first_distance)] * LOG2E;
}

// ---- forward ----

// Turns raw scores of a warp's rows with keys from.. into weights exp(score − top), and tells by how much what came
// before shrinks.
template <int N>
__device__ __forceinline__ void take_in(const Inputs& x, float (&s)[N][4], float (&top)[2], float (&sum)[2],
                                        float (&shrink)[2], int head, int row, int last_row, int from, int end,
                                        bool masked) {
    int t = threadIdx.x % 4 * 2;
    float scale = x.scale * LOG2E;
    if (masked || x.bias || !(scale > 0.0f)) {
        int qp[2] = {x.q_pos[min(row, last_row)], x.q_pos[min(row + 8, last_row)]};
#pragma unroll
        for (int n = 0; n < N; n++)
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
        scale = 1.0f;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float most = -infinity();
#pragma unroll
        for (int n = 0; n < N; n++) most = fmaxf(most, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
        most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
        most = fmaxf(top[h], most * scale);
        float base = most == -infinity() ? 0.0f : most;
        shrink[h] = top[h] == most ? 1.0f : power_of_two(top[h] - base);
        top[h] = most;
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) total += s[n][2 * h + i] = power_of_two(fmaf(s[n][2 * h + i], scale, -base));
        sum[h] = sum[h] * shrink[h] + total;
    }
}

// Multiplies the rows of c; mostly by 1, when nothing is to be done.
template <int N>
__device__ __forceinline__ void shrink_rows(float (&c)[N][4], const float (&shrink)[2]) {
    if (!__any_sync(FULL, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) c[n][i] *= shrink[i / 2];
}

template <int D>
__device__ __forceinline__ void forward(const Inputs& x, const Tile* tiles, const u16* q, float* y, float* lse) {
    extern __shared__ __align__(1024) uint4 shared[];
    constexpr u32 OWN = BY_GROUPS ? ROWS * D * 2 : 0, SIZE = FORWARD_KEYS * D * 2;
    // The block's queries, unless they are held in registers, two tiles of keys, two of values.
    u32 own = shared_address(shared), memory = own + OWN;
    Tile t = tiles[blockIdx.x / x.heads];
    int head = blockIdx.x % x.heads, kv_head = head / (x.heads / x.kv_heads);
    int lane = threadIdx.x % WARP, end_row = t.first + t.count;
    int within = threadIdx.x / WARP * 16, first = t.first + within, row = first + lane / 4;
    i64 stride = (i64)x.heads * x.dim, kv_stride = (i64)x.kv_heads * x.dim;
    const u16 *k = x.k + (i64)kv_head * x.dim, *v = x.v + (i64)kv_head * x.dim;
    fetch<D, ROWS>(own, q + (i64)head * x.dim, stride, t.first, end_row, x.dim);
    Left<D, ROWS> left;
    left.take(own, within);
    float out[D / 8][4] = {}, top[2] = {-infinity(), -infinity()}, sum[2] = {};
    auto bring_keys = [&](int from, int stage) {
        fetch<D, FORWARD_KEYS>(memory + stage * SIZE, k, kv_stride, from, t.end, x.dim);
    };
    auto bring_values = [&](int from, int stage) {
        fetch<D, FORWARD_KEYS>(memory + (2 + stage) * SIZE, v, kv_stride, from, t.end, x.dim);
    };
    auto is_masked = [&](int from) {
        int end = from + FORWARD_KEYS;
        return end > t.end || seen_together(x, t, from, end) != ALL;
    };
    if (t.from < t.end) {
        float s[FORWARD_KEYS / 8][4], shrink[2];
        u32 weights[FORWARD_KEYS / 16][4];
        bring_keys(t.from, 0);
        await_copies();
        __syncthreads();
        if (t.from + FORWARD_KEYS < t.end) bring_keys(t.from + FORWARD_KEYS, 1);
        bring_values(t.from, 0);
        begin_products();
        multiply_rows<D, ROWS, FORWARD_KEYS>(s, left, memory, 0);
        close_group();
        await_groups<0>();
        settled(s);
        take_in(x, s, top, sum, shrink, head, row, end_row - 1, t.from, t.end, is_masked(t.from));
        pack_left(weights, s);
        // The weights of a round go to their values while the scores of the next one are made and weighed.
        int stage = 1;
        for (int from = t.from + FORWARD_KEYS; from < t.end; from += FORWARD_KEYS, stage ^= 1) {
            bool masked = is_masked(from);
            await_copies();
            __syncthreads();
            if (from + FORWARD_KEYS < t.end) bring_keys(from + FORWARD_KEYS, stage ^ 1);
            bring_values(from, stage);
            begin_products();
            multiply_rows<D, ROWS, FORWARD_KEYS>(s, left, memory + stage * SIZE, 0);
            close_group();
            multiply_columns<D, FORWARD_KEYS>(out, weights, memory + (2 + (stage ^ 1)) * SIZE, 0);
            close_group();
            await_groups<1>();
            settled(s);
            take_in(x, s, top, sum, shrink, head, row, end_row - 1, from, t.end, masked);
            await_groups<0>();
            settled(out);
            shrink_rows(out, shrink);
            pack_left(weights, s);
        }
        await_copies();
        __syncthreads();
        begin_products();
        multiply_columns<D, FORWARD_KEYS>(out, weights, memory + (2 + (stage ^ 1)) * SIZE, 0);
        close_group();
        await_groups<0>();
        settled(out);
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
extern "C" __global__ void __launch_bounds__(THREADS, NARROW_BLOCKS)
    forward_64(INPUTS, const Tile* tiles, const u16* q, float* y, float* lse) {
    forward<64>(GIVEN, tiles, q, y, lse);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward_128(INPUTS, const Tile* tiles, const u16* q, float* y, float* lse) {
    forward<128>(GIVEN, tiles, q, y, lse);
}

// ---- backward ----

template <int D>
__device__ __forceinline__ void backward_rows(const Inputs& x, const Tile* tiles, const u16* q, const u16* dy,
                                              const float* lse, const float* delta, float* dq) {
    extern __shared__ __align__(1024) uint4 shared[];
    constexpr u32 OWN = ROWS * D * 2, SIZE = KEYS * D * 2;
    // The block's queries and their dy, unless they are held in registers, and stages of keys and values.
    u32 own = shared_address(shared), memory = own + (BY_GROUPS ? 2 * OWN : 0);
    Tile t = tiles[blockIdx.x / x.heads];
    int head = blockIdx.x % x.heads, kv_head = head / (x.heads / x.kv_heads);
    int lane = threadIdx.x % WARP, end_row = t.first + t.count;
    int within = threadIdx.x / WARP * 16, first = t.first + within, row = first + lane / 4;
    i64 stride = (i64)x.heads * x.dim, kv_stride = (i64)x.kv_heads * x.dim;
    const u16 *k = x.k + (i64)kv_head * x.dim, *v = x.v + (i64)kv_head * x.dim;
    fetch<D, ROWS>(own, q + (i64)head * x.dim, stride, t.first, end_row, x.dim);
    fetch<D, ROWS>(own + OWN, dy + (i64)head * x.dim, stride, t.first, end_row, x.dim);
    Left<D, ROWS> left, outer;
    left.take(own, within);
    outer.take(own + OWN, within);
    float own_lse[2] = {}, own_delta[2] = {};
    int qp[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        if (row + 8 * h < end_row) {
            i64 at = (i64)(row + 8 * h) * x.heads + head;
            // A row that sees nothing weighs nothing: −∞ − ∞.
            own_lse[h] = lse[at] == -infinity() ? infinity() : lse[at] * LOG2E;
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
    for (int from = t.from; from < t.end; from += KEYS) {
        await_copies();
        __syncthreads();
        u32 keys = memory + 2 * stage * SIZE, values = keys + SIZE;
        stage = (stage + 1) % STAGES;
        if (from + KEYS < t.end) bring(from + KEYS, stage);
#pragma unroll 1
        for (int part = 0; part < KEYS; part += PART) {
            int begin = from + part, stop = min(begin + PART, t.end);
            int see = begin < stop ? seen_together(x, t, begin, stop) : NONE;
            if (see == NONE) continue;
            float s[PART / 8][4], ds[PART / 8][4];
            begin_products();
            multiply_rows<D, ROWS, KEYS>(s, left, keys, part);
            close_group();
            multiply_rows<D, ROWS, KEYS>(ds, outer, values, part);
            close_group();
            // The slopes of the last round have been multiplied too now.
            await_groups<1>();
            settled(s);
            float factor = scale;
            if (see != ALL || begin + PART > t.end || x.bias) {
                factor = 1.0f;
#pragma unroll
                for (int n = 0; n < PART / 8; n++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        int h = i / 2, key = begin + n * 8 + lane % 4 * 2 + i % 2, kp = key < t.end ? x.kv_pos[key] : 0;
                        bool there = row + 8 * h < end_row && key < t.end && visible(x, qp[h], kp);
                        float add = there && x.bias ? bias_of(x, head, qp[h], kp) : 0.0f;
                        s[n][i] = there ? s[n][i] * scale + add : -infinity();
                    }
            }
#pragma unroll
            for (int n = 0; n < PART / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[n][i] = power_of_two(fmaf(s[n][i], factor, -own_lse[i / 2]));
            await_groups<0>();
            settled(ds);
#pragma unroll
            for (int n = 0; n < PART / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) ds[n][i] = s[n][i] * (ds[n][i] - own_delta[i / 2]);
            u32 slopes[PART / 16][4];
            pack_left(slopes, ds);
            begin_products();
            multiply_columns<D, KEYS>(out, slopes, keys, part);
            close_group();
        }
    }
    await_groups<0>();
    settled(out);
    write_result<D>(out, x.scale, x.scale, dq + (i64)head * x.dim, stride, first, end_row, x.dim);
}

// dq of tiles of query rows; blocks are tiles x heads.
extern "C" __global__ void __launch_bounds__(THREADS, NARROW_BLOCKS)
    backward_rows_64(INPUTS, const Tile* tiles, const u16* q, const u16* dy, const float* lse, const float* delta,
                     float* dq) {
    backward_rows<64>(GIVEN, tiles, q, dy, lse, delta, dq);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_rows_128(INPUTS, const Tile* tiles, const u16* q, const u16* dy, const float* lse, const float* delta,
                      float* dq) {
    backward_rows<128>(GIVEN, tiles, q, dy, lse, delta, dq);
}

// What comes with a tile of queries.
struct Queries {
    float lse[QUERIES], delta[QUERIES];
    int position[QUERIES];
};

// The weights of a warp's keys (rows) with the tile's queries from..end (columns); hidden ones 0 where `masked`.
__device__ __forceinline__ void weigh(const Inputs& x, float (&s)[QUERIES / 8][4], const Queries& queries,
                                      const int (&kp)[2], int head, int from, int end, int key, int end_key,
                                      bool masked) {
    float scale = x.scale * LOG2E;
    int t = threadIdx.x % 4 * 2;
    if (masked) {
#pragma unroll
        for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int h = i / 2, column = n * 8 + t + i % 2, qp = queries.position[column];
                bool there = from + column < end && key + 8 * h < end_key && visible(x, qp, kp[h]);
                float add = there && x.bias ? bias_of(x, head, qp, kp[h]) : 0.0f;
                s[n][i] = there ? s[n][i] * scale + add : -infinity();
            }
        scale = 1.0f;
    }
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float lse = queries.lse[n * 8 + t + i];
            // A row that sees nothing weighs nothing: −∞ − ∞.
            float base = lse == -infinity() ? lse : -lse * LOG2E;
            s[n][i] = power_of_two(fmaf(s[n][i], scale, base));
            s[n][i + 2] = power_of_two(fmaf(s[n][i + 2], scale, base));
        }
}

template <int D>
__device__ __forceinline__ void backward_keys(const Inputs& x, const Tile* tiles, const u16* q, const u16* dy,
                                              const float* lse, const float* delta, float* dk, float* dv) {
    extern __shared__ __align__(1024) uint4 shared[];
    constexpr u32 SIDE = ROWS * D * 2, SIZE = QUERIES * D * 2;
    // The block's keys, their values, stages of queries and their dy, and what comes with these.
    u32 keys = shared_address(shared), values = keys + SIDE, memory = values + SIDE;
    Queries* others = (Queries*)((char*)shared + 2 * SIDE + 2 * STAGES * SIZE);
    Tile t = tiles[blockIdx.x / x.kv_heads];
    int kv_head = blockIdx.x % x.kv_heads, group = x.heads / x.kv_heads;
    int lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16, end_key = t.first + t.count;
    int key = t.first + own + lane / 4;
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
    for (; steps; steps--) {
        await_copies();
        __syncthreads();
        int next = from + QUERIES < t.end ? from + QUERIES : t.from, next_head = next == t.from ? head + 1 : head;
        u32 queries = memory + 2 * stage * SIZE, outer = queries + SIZE;
        const Queries& beside = others[stage];
        stage = (stage + 1) % STAGES;
        if (steps > 1) bring(next_head, next, stage);
        int near = t.first + own / TOGETHER * TOGETHER, far = min(near + TOGETHER, end_key) - 1;
        int see = near < end_key ? seen(x, from, min(from + QUERIES, t.end) - 1, near, far) : NONE;
        if (see != NONE) {
            float s[QUERIES / 8][4], ds[QUERIES / 8][4];
            begin_products();
            multiply_tiles<D, ROWS, QUERIES>(s, keys, own, queries);
            close_group();
            multiply_tiles<D, ROWS, QUERIES>(ds, values, own, outer);
            close_group();
            // What the last round left has been multiplied too now.
            await_groups<1>();
            settled(s);
            weigh(x, s, beside, kp, head, from, t.end, key, end_key, see != ALL || from + QUERIES > t.end || x.bias);
            u32 weights[QUERIES / 16][4], slopes[QUERIES / 16][4];
            pack_left(weights, s);
            begin_products();
            multiply_columns<D, QUERIES>(value_out, weights, outer, 0);
            close_group();
            await_groups<1>();
            settled(ds);
#pragma unroll
            for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    ds[n][i] = s[n][i] * (ds[n][i] - beside.delta[n * 8 + lane % 4 * 2 + i % 2]);
            pack_left(slopes, ds);
            begin_products();
            multiply_columns<D, QUERIES>(key_out, slopes, queries, 0);
            close_group();
        }
        from = next;
        head = next_head;
    }
    await_groups<0>();
    settled(value_out);
    settled(key_out);
    if (dk) write_result<D>(key_out, x.scale, x.scale, dk + (i64)kv_head * x.dim, kv_stride, t.first + own, end_key, x.dim);
    if (dv) write_result<D>(value_out, 1.0f, 1.0f, dv + (i64)kv_head * x.dim, kv_stride, t.first + own, end_key, x.dim);
}

// dk and dv (either may be missing) of tiles of keys over the query rows from..end; blocks are tiles x
// kv_heads.
extern "C" __global__ void __launch_bounds__(THREADS, NARROW_BLOCKS)
    backward_keys_64(INPUTS, const Tile* tiles, const u16* q, const u16* dy, const float* lse, const float* delta,
                     float* dk, float* dv) {
    backward_keys<64>(GIVEN, tiles, q, dy, lse, delta, dk, dv);
}
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_keys_128(INPUTS, const Tile* tiles, const u16* q, const u16* dy, const float* lse, const float* delta,
                      float* dk, float* dv) {
    backward_keys<128>(GIVEN, tiles, q, dy, lse, delta, dk, dv);
}
