// Functions of single elements, four neighbours a thread, and copies that reorder.

// y = value, n numbers.
extern "C" __global__ void fill(float value, float* y, i64 n) {
    bool whole = aligned(y);
    FOR_EACH(q, (n + 3) / 4) store_four(y, q, n, whole, {{value, value, value, value}});
}

// ---- Functions of one number.

// In the order of `opcode` of elementwise.rs.
enum Unary {
    SCALE, SHIFT, EXP, SIN, COS, LOG, SQRT, RECIP, SQUARE, ABS,
    RELU, SILU, GELU, GELU_TANH, QUICK_GELU, SIGMOID, TANH, ERF
};

#define SQRT_HALF 0.70710678f
#define SQRT_2_OVER_PI 0.7978846f
#define INV_SQRT_2PI 0.3989423f
#define TWO_OVER_SQRT_PI 1.1283792f
#define CUBIC 0.044715f
#define QUICK 1.702f

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ __forceinline__ float gelu_slope(float x) {
    float below = 0.5f * (1.0f + erff(x * SQRT_HALF));
    return fmaf(x * INV_SQRT_2PI, expf(-0.5f * x * x), below);
}

// (1 + tanh u)/2 = sigmoid(2u): no cancellation where the tanh is near -1.
__device__ __forceinline__ float gelu_tanh_gate(float x) {
    return sigmoid(2.0f * SQRT_2_OVER_PI * x * (1.0f + CUBIC * x * x));
}

__device__ __forceinline__ float gelu_tanh_slope(float x) {
    float s = gelu_tanh_gate(x);
    float inner = 2.0f * SQRT_2_OVER_PI * (1.0f + 3.0f * CUBIC * x * x);
    float bend = s * (1.0f - s);
    // The gate is flat long before x² overflows; the comparison keeps 0·∞ out.
    return bend == 0.0f ? s : fmaf(x * inner, bend, s);
}

__device__ __forceinline__ float quick_gelu_slope(float x) {
    float s = sigmoid(QUICK * x);
    return s * (1.0f + QUICK * x * (1.0f - s));
}

__device__ __forceinline__ float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// 0 at 0; NaN stays NaN.
__device__ __forceinline__ float sign(float x) { return x == 0.0f ? 0.0f : x != x ? x : copysignf(1.0f, x); }

template <class F>
__device__ __forceinline__ void map(const float* x, float* y, i64 n, F f) {
    bool whole = aligned(x) && aligned(y);
    FOR_EACH(q, (n + 3) / 4) {
        Four v = load_four(x, q, n, whole);
        EACH_OF_FOUR v.v[k] = f(v.v[k]);
        store_four(y, q, n, whole, v);
    }
}

// y = f(x), n numbers.
extern "C" __global__ void unary(int f, float c, const float* x, float* y, i64 n) {
    switch (f) {
        case SCALE: map(x, y, n, [c](float v) { return v * c; }); break;
        case SHIFT: map(x, y, n, [c](float v) { return v + c; }); break;
        case EXP: map(x, y, n, [](float v) { return expf(v); }); break;
        case SIN: map(x, y, n, [](float v) { return sinf(v); }); break;
        case COS: map(x, y, n, [](float v) { return cosf(v); }); break;
        case LOG: map(x, y, n, [](float v) { return logf(v); }); break;
        case SQRT: map(x, y, n, [](float v) { return sqrtf(v); }); break;
        case RECIP: map(x, y, n, [](float v) { return 1.0f / v; }); break;
        case SQUARE: map(x, y, n, [](float v) { return v * v; }); break;
        case ABS: map(x, y, n, [](float v) { return fabsf(v); }); break;
        // A maximum would turn NaN into 0.
        case RELU: map(x, y, n, [](float v) { return v < 0.0f ? 0.0f : v; }); break;
        case SILU: map(x, y, n, [](float v) { return v * sigmoid(v); }); break;
        case GELU: map(x, y, n, [](float v) { return 0.5f * v * (1.0f + erff(v * SQRT_HALF)); }); break;
        case GELU_TANH: map(x, y, n, [](float v) { return v * gelu_tanh_gate(v); }); break;
        case QUICK_GELU: map(x, y, n, [](float v) { return v * sigmoid(QUICK * v); }); break;
        case SIGMOID: map(x, y, n, [](float v) { return sigmoid(v); }); break;
        case TANH: map(x, y, n, [](float v) { return tanhf(v); }); break;
        case ERF: map(x, y, n, [](float v) { return erff(v); }); break;
    }
}

template <class F>
__device__ __forceinline__ void map_slope(const float* x, const float* dy, float* dx, i64 n, F f) {
    bool whole = aligned(x) && aligned(dy) && aligned(dx);
    FOR_EACH(q, (n + 3) / 4) {
        Four v = load_four(x, q, n, whole), d = load_four(dy, q, n, whole);
        EACH_OF_FOUR d.v[k] *= f(v.v[k]);
        store_four(dx, q, n, whole, d);
    }
}

// dx = dy·f′(x), n numbers.
extern "C" __global__ void unary_backward(int f, float c, const float* x, const float* dy, float* dx, i64 n) {
    switch (f) {
        case SCALE: map_slope(x, dy, dx, n, [c](float v) { return c; }); break;
        case SHIFT: map_slope(x, dy, dx, n, [](float v) { return 1.0f; }); break;
        case EXP: map_slope(x, dy, dx, n, [](float v) { return expf(v); }); break;
        case SIN: map_slope(x, dy, dx, n, [](float v) { return cosf(v); }); break;
        case COS: map_slope(x, dy, dx, n, [](float v) { return -sinf(v); }); break;
        case LOG: map_slope(x, dy, dx, n, [](float v) { return 1.0f / v; }); break;
        case SQRT: map_slope(x, dy, dx, n, [](float v) { return 0.5f / sqrtf(v); }); break;
        case RECIP: map_slope(x, dy, dx, n, [](float v) { return -1.0f / (v * v); }); break;
        case SQUARE: map_slope(x, dy, dx, n, [](float v) { return 2.0f * v; }); break;
        case ABS: map_slope(x, dy, dx, n, [](float v) { return sign(v); }); break;
        case RELU: map_slope(x, dy, dx, n, [](float v) { return v > 0.0f ? 1.0f : 0.0f; }); break;
        case SILU: map_slope(x, dy, dx, n, [](float v) { return silu_slope(v); }); break;
        case GELU: map_slope(x, dy, dx, n, [](float v) { return gelu_slope(v); }); break;
        case GELU_TANH: map_slope(x, dy, dx, n, [](float v) { return gelu_tanh_slope(v); }); break;
        case QUICK_GELU: map_slope(x, dy, dx, n, [](float v) { return quick_gelu_slope(v); }); break;
        case SIGMOID: map_slope(x, dy, dx, n, [](float v) { float s = sigmoid(v); return s * (1.0f - s); }); break;
        case TANH: map_slope(x, dy, dx, n, [](float v) { float t = tanhf(v); return 1.0f - t * t; }); break;
        case ERF: map_slope(x, dy, dx, n, [](float v) { return TWO_OVER_SQRT_PI * expf(-v * v); }); break;
    }
}

// ---- ln Γ and its first two derivatives in f64, as cpu/gamma.rs has them.

// Where Stirling's series is used.
#define LEAST 10.0

// Σ c·t^k from k = 0.
__device__ __forceinline__ double series(double t, double a, double b, double c, double d, double e, double f) {
    return ((((f * t + e) * t + d) * t + c) * t + b) * t + a;
}

__device__ double ln_gamma(double x) {
    double sum = 0.0;
    for (; x < LEAST; x += 1.0) sum += log(x);
    double rest = series(1.0 / (x * x), 1.0 / 12.0, -1.0 / 360.0, 1.0 / 1260.0, -1.0 / 1680.0, 1.0 / 1188.0,
                         -691.0 / 360360.0);
    return (x - 0.5) * log(x) - x + 0.91893853320467274178 + rest / x - sum;
}

__device__ double digamma(double x) {
    double sum = 0.0;
    for (; x < LEAST; x += 1.0) sum += 1.0 / x;
    double rest = series(1.0 / (x * x), 1.0 / 12.0, -1.0 / 120.0, 1.0 / 252.0, -1.0 / 240.0, 1.0 / 132.0,
                         -691.0 / 32760.0);
    return log(x) - 0.5 / x - rest / (x * x) - sum;
}

__device__ double trigamma(double x) {
    double sum = 0.0;
    for (; x < LEAST; x += 1.0) sum += 1.0 / (x * x);
    double rest = series(1.0 / (x * x), 1.0 / 6.0, -1.0 / 30.0, 1.0 / 42.0, -1.0 / 30.0, 5.0 / 66.0,
                         -691.0 / 2730.0);
    return 1.0 / x + 0.5 / (x * x) + rest / (x * x * x) + sum;
}

// y = the `order`-th derivative of ln Γ at x, times dy where that is given, n numbers.
extern "C" __global__ void gamma_function(int order, const float* x, const float* dy, float* y, i64 n) {
    FOR_EACH(i, n) {
        double v = x[i];
        float found = __int_as_float(0x7fc00000);
        if (v > 0.0) found = (float)(order == 0 ? ln_gamma(v) : order == 1 ? digamma(v) : trigamma(v));
        y[i] = dy ? found * dy[i] : found;
    }
}

// ---- Functions of two numbers.

// In the order of `Binary`.
enum Binary { ADD, SUB, MUL };

__device__ __forceinline__ float apply(int f, float a, float b) {
    return f == ADD ? a + b : f == SUB ? a - b : a * b;
}

// What a result of n numbers takes from one operand: number (i / inner) % len at i.
struct Operand {
    const float* p;
    i64 inner, len;
    // Four neighbours are neighbours, or one number, in the operand too.
    bool neighbours, same;
};

__device__ __forceinline__ Operand operand(const float* p, i64 inner, i64 len, i64 n) {
    bool neighbours = inner == 1 && (len == n || len % 4 == 0) && aligned(p);
    return {p, inner, len, neighbours, len == 1 || inner % 4 == 0};
}

__device__ __forceinline__ Four take_four(const Operand& o, i64 q, i64 n) {
    i64 i = 4 * q;
    if (o.neighbours && i + 4 <= n) return load_four(o.p, o.len == n ? q : q % (o.len / 4), n, true);
    if (o.same) {
        float v = o.p[o.len == 1 ? 0 : i / o.inner % o.len];
        return {{v, v, v, v}};
    }
    Four four;
    EACH_OF_FOUR four.v[k] = i + k < n ? o.p[(i + k) / o.inner % o.len] : 0.0f;
    return four;
}

// y = f(a, b), n numbers, a and b repeated as `Operand` says.
extern "C" __global__ void binary(
    int f, const float* a, i64 a_inner, i64 a_len, const float* b, i64 b_inner, i64 b_len, float* y, i64 n) {
    Operand left = operand(a, a_inner, a_len, n), right = operand(b, b_inner, b_len, n);
    bool whole = aligned(y);
    FOR_EACH(q, (n + 3) / 4) {
        Four v = take_four(left, q, n), w = take_four(right, q, n);
        EACH_OF_FOUR v.v[k] = apply(f, v.v[k], w.v[k]);
        store_four(y, q, n, whole, v);
    }
}

// y = f(a, b) of shape `sizes`, n numbers; the strides of a and b are 0 where they repeat.
extern "C" __global__ void binary_strided(
    int f, const float* a, Dims a_strides, const float* b, Dims b_strides, Dims sizes, float* y, i64 n) {
    FOR_EACH(i, n) {
        i64 rest = i, at_a = 0, at_b = 0;
#pragma unroll
        for (int d = 7; d >= 0; d--) {
            if (sizes.d[d] == 1) continue;
            i64 place = rest % sizes.d[d];
            rest /= sizes.d[d];
            at_a += place * a_strides.d[d];
            at_b += place * b_strides.d[d];
        }
        y[i] = apply(f, a[at_a], b[at_b]);
    }
}

// y += x, n numbers; x has `len` and is repeated.
extern "C" __global__ void accumulate(const float* x, i64 len, float* y, i64 n) {
    Operand added = operand(x, 1, len, n);
    bool whole = aligned(y);
    FOR_EACH(q, (n + 3) / 4) {
        Four v = load_four(y, q, n, whole), w = take_four(added, q, n);
        EACH_OF_FOUR v.v[k] += w.v[k];
        store_four(y, q, n, whole, v);
    }
}

// y = silu(gate)·up, n numbers.
template <typename T>
__device__ __forceinline__ void multiply_gated(const float* gate, const float* up, T* y, i64 n) {
    bool whole = aligned(gate) && aligned(up) && aligned(y);
    FOR_EACH(q, (n + 3) / 4) {
        Four g = load_four(gate, q, n, whole), u = load_four(up, q, n, whole);
        EACH_OF_FOUR u.v[k] *= g.v[k] * sigmoid(g.v[k]);
        store_four(y, q, n, whole, u);
    }
}
extern "C" __global__ void silu_mul(const float* gate, const float* up, float* y, i64 n) {
    multiply_gated(gate, up, y, n);
}
extern "C" __global__ void silu_mul_bf16(const float* gate, const float* up, u16* y, i64 n) {
    multiply_gated(gate, up, y, n);
}

// dgate = dy·up·silu′(gate), dup = dy·silu(gate), n numbers.
template <typename T>
__device__ __forceinline__ void multiply_gated_backward(
    const float* gate, const float* up, const float* dy, T* dgate, T* dup, i64 n) {
    bool whole = aligned(gate) && aligned(up) && aligned(dy) && aligned(dgate) && aligned(dup);
    FOR_EACH(q, (n + 3) / 4) {
        Four g = load_four(gate, q, n, whole), u = load_four(up, q, n, whole), d = load_four(dy, q, n, whole);
        EACH_OF_FOUR {
            float v = g.v[k], s = sigmoid(v);
            g.v[k] = d.v[k] * u.v[k] * (s * (1.0f + v * (1.0f - s)));
            u.v[k] = d.v[k] * (v * s);
        }
        store_four(dgate, q, n, whole, g);
        store_four(dup, q, n, whole, u);
    }
}
extern "C" __global__ void silu_mul_backward(
    const float* gate, const float* up, const float* dy, float* dgate, float* dup, i64 n) {
    multiply_gated_backward(gate, up, dy, dgate, dup, n);
}
extern "C" __global__ void silu_mul_backward_bf16(
    const float* gate, const float* up, const float* dy, u16* dgate, u16* dup, i64 n) {
    multiply_gated_backward(gate, up, dy, dgate, dup, n);
}

// ---- Dropout.

// Philox 4×32-10, as cpu/random.rs has it: the four words of a block of a stream.
__device__ __forceinline__ void philox(u64 block, u64 stream, u64 seed, u32 words[4]) {
    u32 a = (u32)block, b = (u32)(block >> 32), c = (u32)stream, d = (u32)(stream >> 32);
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 x = (u64)0xD2511F53u * a, y = (u64)0xCD9E8D57u * c;
        a = (u32)(y >> 32) ^ b ^ k0;
        b = (u32)y;
        c = (u32)(x >> 32) ^ d ^ k1;
        d = (u32)x;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

// y = x·scale where word i of the stream is at least `threshold`, else 0; n numbers.
extern "C" __global__ void dropout(
    u64 threshold, float scale, u64 seed, u64 stream, const float* x, float* y, i64 n) {
    bool whole = aligned(x) && aligned(y);
    FOR_EACH(q, (n + 3) / 4) {
        u32 words[4];
        philox((u64)q, stream, seed, words);
        Four v = load_four(x, q, n, whole);
        // A dropped NaN or infinity is dropped as well.
        EACH_OF_FOUR v.v[k] = words[k] >= threshold ? v.v[k] * scale : 0.0f;
        store_four(y, q, n, whole, v);
    }
}

// ---- Copies that reorder.

template <class T>
__device__ __forceinline__ void copy_columns_of(const T* x, i64 x_stride, T* y, i64 y_stride, i64 width, i64 rows) {
    FOR_EACH(i, rows * width) {
        i64 row = i / width, column = i % width;
        y[row * y_stride + column] = x[row * x_stride + column];
    }
}

// y[i][j] = x[i][j] for `rows` rows and `width` columns of matrices whose rows are `x_stride` and `y_stride` long.
extern "C" __global__ void copy_columns(
    const float* x, i64 x_stride, float* y, i64 y_stride, i64 width, i64 rows) {
    bool whole = aligned(x) && aligned(y) && x_stride % 4 == 0 && y_stride % 4 == 0 && width % 4 == 0;
    if (whole)
        copy_columns_of((const float4*)x, x_stride / 4, (float4*)y, y_stride / 4, width / 4, rows);
    else
        copy_columns_of(x, x_stride, y, y_stride, width, rows);
}

template <class T>
__device__ __forceinline__ void permute_of(const T* x, const Dims& strides, const Dims& sizes, T* y, i64 n) {
    FOR_EACH(i, n) {
        i64 rest = i, at = 0;
#pragma unroll
        for (int d = 7; d >= 0; d--) {
            if (sizes.d[d] == 1) continue;
            at += rest % sizes.d[d] * strides.d[d];
            rest /= sizes.d[d];
        }
        y[i] = x[at];
    }
}

// y of shape `sizes`, n numbers, from x with the strides that its dimensions have in y's order.
extern "C" __global__ void permute(const float* x, Dims strides, Dims sizes, float* y, i64 n) {
    permute_of(x, strides, sizes, y, n);
}

// The same in units of four neighbours that stay neighbours.
extern "C" __global__ void permute_fours(const float4* x, Dims strides, Dims sizes, float4* y, i64 n) {
    permute_of(x, strides, sizes, y, n);
}

// y [batch, columns, rows] from x [batch, rows, columns], a tile of 32 × 32 a block of 32 × 8 threads.
extern "C" __global__ void transpose(const float* x, float* y, i64 rows, i64 columns) {
    // One more, so that a column's numbers lie in different banks.
    __shared__ float tile[32][33];
    i64 down = (rows + 31) / 32, across = (columns + 31) / 32;
    i64 matrix = blockIdx.x / (down * across), within = blockIdx.x % (down * across);
    i64 row = within / across * 32, column = within % across * 32;
    x += matrix * rows * columns;
    y += matrix * rows * columns;
    for (int j = threadIdx.y; j < 32; j += 8) {
        if (row + j < rows && column + threadIdx.x < columns)
            tile[j][threadIdx.x] = x[(row + j) * columns + column + threadIdx.x];
    }
    __syncthreads();
    for (int j = threadIdx.y; j < 32; j += 8) {
        if (column + j < columns && row + threadIdx.x < rows)
            y[(column + j) * rows + row + threadIdx.x] = tile[threadIdx.x][j];
    }
}
