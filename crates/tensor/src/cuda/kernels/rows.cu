// Operations on rows: sums, lookups, softmax, norms, losses, choices, and the optimizer's step.
//
// A team of threads has a row: the x dimension of the block, 32 threads with several rows a block (y), or more with one.
// How many depends on the width alone, and a thread has the same numbers of a row wherever that lies, so that a row's
// result is the same in any company.

// The row of this thread's team.
__device__ __forceinline__ i64 team_row() { return (i64)blockIdx.x * blockDim.y + threadIdx.y; }

__device__ __forceinline__ float team_sum(float v) { return blockDim.x == WARP ? warp_sum(v) : block_sum(v); }
__device__ __forceinline__ float team_max(float v) { return blockDim.x == WARP ? warp_max(v) : block_max(v); }

// `combine` of all threads of a team, for every thread of it.
template <class T, class F>
__device__ __forceinline__ T team_fold(T v, T nothing, F combine) {
    __shared__ T parts[WARP];
    for (int o = 16; o; o >>= 1) v = combine(v, __shfl_xor_sync(FULL, v, o));
    if (blockDim.x == WARP) return v;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    __syncthreads();
    if (lane == 0) parts[warp] = v;
    __syncthreads();
    v = lane < warps ? parts[lane] : nothing;
    for (int o = 16; o; o >>= 1) v = combine(v, __shfl_xor_sync(FULL, v, o));
    return v;
}

__device__ __forceinline__ double team_sum_double(double v) {
    return team_fold(v, 0.0, [](double a, double b) { return a + b; });
}

#define TEAM __launch_bounds__(1024)

// Fours of a row of `width` that this thread has.
#define OWN_FOURS(q, width) for (i64 q = threadIdx.x; q < ((width) + 3) / 4; q += blockDim.x)

// Whether rows of `width` from x on may be read by fours at once.
__device__ __forceinline__ bool aligned_rows(const float* x, i64 width) { return width % 4 == 0 && aligned(x); }

// ---- Sums.

// y[i] = Σ x[i], x [rows, width].
extern "C" __global__ void TEAM sum_rows(const float* x, i64 rows, i64 width, float* y) {
    i64 row = team_row();
    if (row >= rows) return;
    bool whole = aligned_rows(x, width);
    x += row * width;
    float sum = 0.0f;
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole);
        sum += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
    }
    sum = team_sum(sum);
    if (threadIdx.x == 0) y[row] = sum;
}

// Which part of a sum over rows a block of x × y threads has: columns side by side, rows below one another.
struct Strip {
    i64 column, first, end, part;
};

__device__ __forceinline__ Strip strip(i64 rows, i64 rows_per_part, i64 parts, i64 tiles) {
    i64 tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
    i64 first = part % parts * rows_per_part, end = min(rows, first + rows_per_part);
    return {tile * blockDim.x + threadIdx.x, first + threadIdx.y, end, part};
}

// The sum of v over the threads below one another, for the uppermost; up to 1,024 threads, both sizes powers of two.
__device__ __forceinline__ float sum_down(float v) {
    __shared__ float sums[1024];
    int at = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();
    sums[at] = v;
    for (int half = blockDim.y / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.y < half) sums[at] += sums[at + half * blockDim.x];
    }
    return sums[at];
}

// y [outer, parts, width] from x [outer, rows, width]: sums of `rows_per_part` rows each; `tiles` blocks a part.
extern "C" __global__ void TEAM column_sums(
    const float* __restrict__ x, i64 rows, i64 width, i64 rows_per_part, i64 parts, i64 tiles, float* y) {
    Strip s = strip(rows, rows_per_part, parts, tiles);
    x += s.part / parts * rows * width + s.column;
    float sum = 0.0f;
    if (s.column < width) {
#pragma unroll 4
        for (i64 row = s.first; row < s.end; row += blockDim.y) sum += x[row * width];
    }
    sum = sum_down(sum);
    if (threadIdx.y == 0 && s.column < width) y[s.part * width + s.column] = sum;
}

// partial[block] = its part of Σ x², n numbers.
extern "C" __global__ void TEAM sum_of_squares(const float* x, i64 n, double* partial) {
    bool whole = aligned(x);
    double sum = 0.0;
    FOR_EACH(q, (n + 3) / 4) {
        Four v = load_four(x, q, n, whole);
        EACH_OF_FOUR sum += (double)v.v[k] * v.v[k];
    }
    sum = team_sum_double(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// y[0] += Σ partial, by one block.
extern "C" __global__ void TEAM add_total(const double* partial, i64 n, float* y) {
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum += partial[i];
    sum = team_sum_double(sum);
    if (threadIdx.x == 0) y[0] += (float)sum;
}

// ---- Lookups.

// y[i] = x[index[i]], n rows of `width`.
extern "C" __global__ void gather_rows(const float* x, const i64* index, i64 width, i64 n, float* y) {
    if (aligned_rows(x, width) && aligned(y)) {
        i64 fours = width / 4;
        FOR_EACH(i, n * fours)
            ((float4*)y)[i] = ((const float4*)x)[index[i / fours] * fours + i % fours];
    } else {
        FOR_EACH(i, n * width) y[i] = x[index[i / width] * width + i % width];
    }
}

// y[target[i]] += x[j] for the rows j = source[start[i]..start[i + 1]], in this order; x and y of rows of `width`.
extern "C" __global__ void scatter_add_rows(
    const float* __restrict__ x, const i64* __restrict__ target, const i64* __restrict__ start,
    const i64* __restrict__ source, i64 width, i64 targets, float* y) {
    FOR_EACH(i, targets * width) {
        i64 t = i / width, column = i % width, end = start[t + 1], at = target[t] * width + column;
        float sum = y[at];
#pragma unroll 8
        for (i64 j = start[t]; j < end; j++) sum += x[source[j] * width + column];
        y[at] = sum;
    }
}

// ---- Softmax.

// y = softmax of rows x [rows, width].
extern "C" __global__ void TEAM softmax(const float* x, i64 rows, i64 width, float* y) {
    i64 row = team_row();
    if (row >= rows) return;
    bool whole = aligned_rows(x, width) && aligned(y);
    x += row * width;
    y += row * width;
    float top = -infinity(), sum = 0.0f;
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole, -infinity());
        top = fmaxf(top, fmaxf(fmaxf(v.v[0], v.v[1]), fmaxf(v.v[2], v.v[3])));
    }
    top = team_max(top);
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole);
        EACH_OF_FOUR if (4 * q + k < width) sum += expf(v.v[k] - top);
    }
    float inverse = 1.0f / team_sum(sum);
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole);
        EACH_OF_FOUR v.v[k] = expf(v.v[k] - top) * inverse;
        store_four(y, q, width, whole, v);
    }
}

// dx = y·(dy − Σ y·dy) for rows [rows, width].
extern "C" __global__ void TEAM softmax_backward(const float* y, const float* dy, i64 rows, i64 width, float* dx) {
    i64 row = team_row();
    if (row >= rows) return;
    bool whole = aligned_rows(y, width) && aligned(dy) && aligned(dx);
    y += row * width;
    dy += row * width;
    dx += row * width;
    float dot = 0.0f;
    OWN_FOURS(q, width) {
        Four v = load_four(y, q, width, whole), d = load_four(dy, q, width, whole);
        EACH_OF_FOUR dot = fmaf(v.v[k], d.v[k], dot);
    }
    dot = team_sum(dot);
    OWN_FOURS(q, width) {
        Four v = load_four(y, q, width, whole), d = load_four(dy, q, width, whole);
        EACH_OF_FOUR v.v[k] *= d.v[k] - dot;
        store_four(dx, q, width, whole, v);
    }
}

// ---- Norms.

// y = (x − mean)·rstd·gain + bias of rows x [rows, width]; keeps mean and rstd [rows]. RMS norm has neither mean nor bias.
extern "C" __global__ void TEAM norm_rows(
    const float* x, const float* gain, const float* bias, float eps, i64 rows, i64 width, float* y, float* mean,
    float* rstd) {
    i64 row = team_row();
    if (row >= rows) return;
    bool whole = aligned_rows(x, width) && aligned(gain) && aligned(bias) && aligned(y);
    x += row * width;
    y += row * width;
    float middle = 0.0f, spread = 0.0f;
    if (mean) {
        OWN_FOURS(q, width) {
            Four v = load_four(x, q, width, whole);
            middle += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
        }
        middle = team_sum(middle) / (float)width;
    }
    OWN_FOURS(q, width) {
        // Beyond the row stands the mean, which adds nothing.
        Four v = load_four(x, q, width, whole, middle);
        EACH_OF_FOUR spread = fmaf(v.v[k] - middle, v.v[k] - middle, spread);
    }
    float scale = 1.0f / sqrtf(team_sum(spread) / (float)width + eps);
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole), g = load_four(gain, q, width, whole), b = {};
        if (bias) b = load_four(bias, q, width, whole);
        EACH_OF_FOUR v.v[k] = fmaf((v.v[k] - middle) * scale, g.v[k], b.v[k]);
        store_four(y, q, width, whole, v);
    }
    if (threadIdx.x == 0) {
        if (mean) mean[row] = middle;
        rstd[row] = scale;
    }
}

// dx = rstd·(g − mean(g) − x̂·mean(g·x̂)), g = dy·gain, x̂ = (x − mean)·rstd, for rows [rows, width]; RMS norm, without
// means, has no mean(g).
extern "C" __global__ void TEAM norm_rows_backward(
    const float* x, const float* gain, const float* mean, const float* rstd, const float* dy, i64 rows, i64 width,
    float* dx) {
    i64 row = team_row();
    if (row >= rows) return;
    bool whole = aligned_rows(x, width) && aligned(gain) && aligned(dy) && aligned(dx);
    x += row * width;
    dy += row * width;
    dx += row * width;
    float middle = mean ? mean[row] : 0.0f, scale = rstd[row], along = 0.0f, level = 0.0f;
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole), d = load_four(dy, q, width, whole);
        Four g = load_four(gain, q, width, whole);
        EACH_OF_FOUR {
            float slope = d.v[k] * g.v[k];
            along = fmaf(slope, (v.v[k] - middle) * scale, along);
            level += slope;
        }
    }
    along = team_sum(along) / (float)width;
    level = mean ? team_sum(level) / (float)width : 0.0f;
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole), d = load_four(dy, q, width, whole);
        Four g = load_four(gain, q, width, whole);
        EACH_OF_FOUR {
            float unit = (v.v[k] - middle) * scale;
            d.v[k] = scale * fmaf(unit, -along, d.v[k] * g.v[k] - level);
        }
        store_four(dx, q, width, whole, d);
    }
}

// Sums of dy·x̂ and of dy over parts of the rows, [parts, width] each, where wanted; x and dy [rows, width].
extern "C" __global__ void TEAM norm_sums(
    const float* __restrict__ x, const float* __restrict__ mean, const float* __restrict__ rstd,
    const float* __restrict__ dy, i64 rows, i64 width, i64 rows_per_part, i64 parts, i64 tiles, float* dgain,
    float* dbias) {
    Strip s = strip(rows, rows_per_part, parts, tiles);
    float gain = 0.0f, bias = 0.0f;
    if (s.column < width) {
#pragma unroll 4
        for (i64 row = s.first; row < s.end; row += blockDim.y) {
            float d = dy[row * width + s.column];
            if (dgain) {
                float v = x[row * width + s.column];
                gain = fmaf(d, (v - (mean ? mean[row] : 0.0f)) * rstd[row], gain);
            }
            bias += d;
        }
    }
    gain = sum_down(gain);
    bias = sum_down(bias);
    if (threadIdx.y == 0 && s.column < width) {
        if (dgain) dgain[s.part * width + s.column] = gain;
        if (dbias) dbias[s.part * width + s.column] = bias;
    }
}

// ---- Rotary embedding.

// y = x [tokens, heads, dim] with numbers i and i + half of each head turned by the angle of row positions[token] of
// cos and sin [positions, half], `sign` 1 or −1; n = tokens·heads·(dim − half): a pair or one of the rest each.
extern "C" __global__ void rope(
    const float* __restrict__ x, const float* __restrict__ cos, const float* __restrict__ sin,
    const int* __restrict__ positions, float sign, i64 heads, i64 dim, i64 half, i64 n, float* __restrict__ y) {
    i64 each = dim - half;
    FOR_EACH(i, n) {
        i64 head = i / each, j = i % each, at = head * dim + j;
        if (j >= half) {
            y[at + half] = x[at + half];
            continue;
        }
        i64 angle = positions[head / heads] * half + j;
        float c = cos[angle], s = sign * sin[angle], a = x[at], b = x[at + half];
        y[at] = a * c - b * s;
        y[at + half] = b * c + a * s;
    }
}

// ---- Cross-entropy.

#define IGNORED (-100)

// loss = lse − x[label], lse = log Σ exp x, of rows x [rows, width]; both 0 where the label is −100. Reads x once.
extern "C" __global__ void TEAM cross_entropy(
    const float* x, const i64* labels, i64 rows, i64 width, float* loss, float* lse) {
    i64 row = team_row();
    if (row >= rows) return;
    i64 label = labels[row];
    if (label == IGNORED) {
        if (threadIdx.x == 0) loss[row] = lse[row] = 0.0f;
        return;
    }
    bool whole = aligned_rows(x, width);
    x += row * width;
    // The sum is of exp(x − base), base being the largest so far: 0 while that is −∞, so that −∞ adds 0 and NaN stays.
    float top = -infinity(), base = 0.0f, sum = 0.0f;
    OWN_FOURS(q, width) {
        Four v = load_four(x, q, width, whole, -infinity());
        float largest = fmaxf(fmaxf(v.v[0], v.v[1]), fmaxf(v.v[2], v.v[3]));
        if (largest > top) {
            sum *= expf(top - largest);
            top = base = largest;
        }
        EACH_OF_FOUR sum += expf(v.v[k] - base);
    }
    float highest = team_max(top);
    // A thread that saw nothing but −∞ gives 0, a row of nothing else NaN.
    double total = team_sum_double((double)sum * expf(top - highest));
    if (threadIdx.x == 0) {
        double rest = log(total);
        lse[row] = (float)((double)highest + rest);
        loss[row] = (float)((double)highest - (double)x[label] + rest);
    }
}

// dx = dloss·(exp(x − lse) − onehot(label)) of rows x [rows, width]; 0 where the label is −100.
template <typename T>
__device__ __forceinline__ void logits_gradient(
    const float* x, const i64* labels, const float* lse, const float* dloss, i64 rows, i64 width, T* dx) {
    i64 row = team_row();
    if (row >= rows) return;
    bool whole = aligned_rows(x, width) && aligned(dx);
    x += row * width;
    dx += row * width;
    i64 label = labels[row];
    float scale = dloss[row], log_sum = lse[row];
    OWN_FOURS(q, width) {
        Four v = {};
        if (label != IGNORED) {
            v = load_four(x, q, width, whole);
            EACH_OF_FOUR v.v[k] = scale * expf(v.v[k] - log_sum) - (4 * q + k == label ? scale : 0.0f);
        }
        store_four(dx, q, width, whole, v);
    }
}
extern "C" __global__ void TEAM cross_entropy_backward(
    const float* x, const i64* labels, const float* lse, const float* dloss, i64 rows, i64 width, float* dx) {
    logits_gradient(x, labels, lse, dloss, rows, width, dx);
}
extern "C" __global__ void TEAM cross_entropy_backward_bf16(
    const float* x, const i64* labels, const float* lse, const float* dloss, i64 rows, i64 width, u16* dx) {
    logits_gradient(x, labels, lse, dloss, rows, width, dx);
}

// ---- The largest of each row, in the total order of IEEE 754 and of equal ones the earliest.

// Numbers as keys of that order: no two of a row are equal, and none is 0 or the largest u64.
__device__ __forceinline__ u64 key_of(float v, i64 column) {
    u32 bits = __float_as_uint(v);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return (u64)bits << 32 | (0xfffffffeu - (u32)column);
}
__device__ __forceinline__ float value_of(u64 key) {
    u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ i64 column_of(u64 key) { return 0xfffffffeu - (u32)key; }

// y, columns [rows, count]: the `count` largest of rows x [rows, width], found one after another.
extern "C" __global__ void TEAM few_largest(
    const float* x, i64 rows, i64 width, i64 count, float* y, i64* columns) {
    i64 row = team_row();
    if (row >= rows) return;
    x += row * width;
    u64 last = ~0ull;
    for (i64 j = 0; j < count; j++) {
        u64 best = 0;
        for (i64 column = threadIdx.x; column < width; column += blockDim.x) {
            u64 key = key_of(x[column], column);
            if (key < last && key > best) best = key;
        }
        best = team_fold(best, (u64)0, [](u64 a, u64 b) { return a > b ? a : b; });
        if (threadIdx.x == 0) {
            y[row * count + j] = value_of(best);
            columns[row * count + j] = column_of(best);
        }
        last = best;
    }
}

// keys [rows, size] of x [rows, width], 0 beyond the width; n = rows·size.
extern "C" __global__ void make_keys(const float* x, i64 width, i64 size, i64 n, u64* keys) {
    FOR_EACH(i, n) {
        i64 row = i / size, column = i % size;
        keys[i] = column < width ? key_of(x[row * width + column], column) : 0;
    }
}

__device__ __forceinline__ void exchange(u64* a, u64* b, bool descending) {
    u64 first = *a, second = *b;
    if (first < second == descending) *a = second, *b = first;
}

// One step of a bitonic sort of rows of `size` keys into descending order, all powers of two: numbers `apart` from each
// other in runs of `run`; n keys.
extern "C" __global__ void sort_step(u64* keys, i64 size, i64 run, i64 apart, i64 n) {
    FOR_EACH(pair, n / 2) {
        i64 low = pair & (apart - 1), i = (pair - low) * 2 + low;
        exchange(keys + i, keys + i + apart, (i & (size - 1) & run) == 0);
    }
}

#define SORTED_TOGETHER 2048

// The steps of runs `first` to `last` within 2,048 neighbouring keys of n, a block of 1,024 threads.
extern "C" __global__ void TEAM sort_together(u64* keys, i64 size, i64 first, i64 last, i64 n) {
    __shared__ u64 own[SORTED_TOGETHER];
    i64 base = (i64)blockIdx.x * SORTED_TOGETHER;
    for (int i = threadIdx.x; i < SORTED_TOGETHER; i += 1024) own[i] = base + i < n ? keys[base + i] : 0;
    for (i64 run = first; run <= last; run *= 2) {
        for (int apart = (int)min(run, (i64)SORTED_TOGETHER) / 2; apart; apart /= 2) {
            __syncthreads();
            int low = threadIdx.x & (apart - 1), i = (threadIdx.x - low) * 2 + low;
            exchange(own + i, own + i + apart, ((base + i) & (size - 1) & run) == 0);
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SORTED_TOGETHER; i += 1024) {
        if (base + i < n) keys[base + i] = own[i];
    }
}

// y, columns [rows, count] of sorted keys [rows, size]; n = rows·count.
extern "C" __global__ void take_sorted(const u64* keys, i64 size, i64 count, i64 n, float* y, i64* columns) {
    FOR_EACH(i, n) {
        u64 key = keys[i / count * size + i % count];
        y[i] = value_of(key);
        columns[i] = column_of(key);
    }
}

// ---- The optimizer's step.

__device__ __forceinline__ bool finite(float v) { return (__float_as_uint(v) & 0x7f800000u) != 0x7f800000u; }

// norm = √squares, scale = min(1, max_norm/(norm + 1e-6)), or 1 where `max_norm` is 0; NaN where the norm is not finite.
extern "C" __global__ void clip_scale(const float* squares, float max_norm, float* norm, float* scale) {
    float n = sqrtf(squares[0]);
    norm[0] = n;
    float factor = max_norm > 0.0f ? fminf(max_norm / (n + 1e-6f), 1.0f) : 1.0f;
    scale[0] = finite(n) ? factor : __int_as_float(0x7fc00000);
}

// AdamW's step of n parameters with gradient grad·scale[0]; nothing where the scale is not finite. Scalars as in
// cpu/adamw.rs.
extern "C" __global__ void adamw(
    const float* scale, const float* grad, float* param, float* m, float* v, float keep, float beta1,
    float one_minus_beta1, float beta2, float one_minus_beta2, float root_correction2, float eps, float step_size,
    i64 n) {
    float grad_scale = scale[0];
    if (!finite(grad_scale)) return;
    bool whole = aligned(grad) && aligned(param) && aligned(m) && aligned(v);
    FOR_EACH(q, (n + 3) / 4) {
        Four g4 = load_four(grad, q, n, whole), p4 = load_four(param, q, n, whole);
        Four m4 = load_four(m, q, n, whole), v4 = load_four(v, q, n, whole);
        EACH_OF_FOUR {
            float g = g4.v[k] * grad_scale, old = m4.v[k];
            // PyTorch's lerp takes the end that lies nearer.
            m4.v[k] = one_minus_beta1 < 0.5f ? old + one_minus_beta1 * (g - old) : g - (g - old) * beta1;
            v4.v[k] = v4.v[k] * beta2 + one_minus_beta2 * g * g;
            float denominator = sqrtf(v4.v[k]) / root_correction2 + eps;
            p4.v[k] = p4.v[k] * keep - step_size * m4.v[k] / denominator;
        }
        store_four(param, q, n, whole, p4);
        store_four(m, q, n, whole, m4);
        store_four(v, q, n, whole, v4);
    }
}
