// Fourier transforms of rows of real numbers, products with matrices of few frequencies, Walsh–Hadamard transforms.
//
// A transform of m complex numbers goes through the factors of m one after another between two buffers (Stockham); a
// prime m is one such pass, the sum itself. A real row of even length n is one of n/2 complex numbers.

// A transform of m numbers with exponents of sign `sign`; roots[k·step] = e^(2πi·k/m).
struct Transform {
    int m, step;
    const float2* roots;
    float sign;
};

__device__ __forceinline__ float2 plus(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 minus(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ __forceinline__ float2 times(float2 a, float2 b) {
    return make_float2(a.x * b.x - a.y * b.y, a.x * b.y + a.y * b.x);
}

__device__ __forceinline__ float2 root(const Transform& t, int k) {
    float2 w = t.roots[k * t.step];
    return make_float2(w.x, t.sign * w.y);
}

// roots [n, 2]: e^(2πi·k/n).
extern "C" __global__ void roots(i64 n, float2* y) {
    FOR_EACH(k, n) {
        double sine, cosine;
        sincospi(2.0 * (double)k / (double)n, &sine, &cosine);
        y[k] = make_float2((float)cosine, (float)sine);
    }
}

__device__ __forceinline__ int next_factor(int rest) {
    if (rest % 4 == 0) return 4;
    if (rest % 2 == 0) return 2;
    for (int p = 3; (i64)p * p <= rest; p += 2) {
        if (rest % p == 0) return p;
    }
    return rest;
}

// Transforms of `done` numbers in a, a power of two, to those of four times as many in b.
__device__ __forceinline__ void pass_of_four(const float2* a, float2* b, const Transform& t, int done) {
    int part = t.m / 4, stride = part / done;
    for (int j = threadIdx.x; j < part; j += blockDim.x) {
        int k = j & (done - 1), at = 4 * (j - k) + k;
        float2 w = root(t, k * stride), w2 = times(w, w);
        float2 x0 = a[j], x1 = times(a[j + part], w);
        float2 x2 = times(a[j + 2 * part], w2), x3 = times(a[j + 3 * part], times(w2, w));
        float2 even = plus(x0, x2), odd = minus(x0, x2), sum = plus(x1, x3), difference = minus(x1, x3);
        float2 turned = make_float2(-t.sign * difference.y, t.sign * difference.x);
        b[at] = plus(even, sum);
        b[at + done] = plus(odd, turned);
        b[at + 2 * done] = minus(even, sum);
        b[at + 3 * done] = minus(odd, turned);
    }
}

// The same to transforms of p times as many, each element of b by its sum.
__device__ __forceinline__ void pass_of_any(const float2* a, float2* b, const Transform& t, int done, int p) {
    int part = t.m / p, length = done * p, stride = t.m / length;
    for (int i = threadIdx.x; i < t.m; i += blockDim.x) {
        int k = i % length, j = i / length * done + k % done, turn = 0;
        float2 sum = a[j];
        for (int q = 1; q < p; q++) {
            turn += k;
            if (turn >= length) turn -= length;
            sum = plus(sum, times(a[j + q * part], root(t, turn * stride)));
        }
        b[i] = sum;
    }
}

// The transform of a, which is returned: a or b. Threads of x go along it, all of the block take part.
__device__ __forceinline__ float2* transform(float2* a, float2* b, const Transform& t) {
    __syncthreads();
    for (int done = 1; done < t.m;) {
        int p = next_factor(t.m / done);
        if (p == 4) pass_of_four(a, b, t, done);
        else pass_of_any(a, b, t, done, p);
        done *= p;
        float2* other = a;
        a = b;
        b = other;
        __syncthreads();
    }
    return a;
}

extern __shared__ float2 memory[];

// Two buffers of m for this thread's row, one behind the other.
__device__ __forceinline__ float2* buffers(float2* scratch, int m) {
    float2* block = scratch ? scratch + (i64)blockIdx.x * blockDim.y * 2 * m : memory;
    return block + threadIdx.y * 2 * m;
}

// Frequency k of a real row whose even and odd numbers are the real and imaginary parts of what z is the transform of.
__device__ __forceinline__ float2 unpacked(const float2* z, int k, const Transform& t) {
    float2 u = z[k == t.m ? 0 : k], v = z[k == 0 ? 0 : t.m - k];
    float2 even = make_float2(0.5f * (u.x + v.x), 0.5f * (u.y - v.y));
    float2 odd = make_float2(0.5f * (u.y + v.y), 0.5f * (v.x - u.x));
    float2 w = t.roots[k];
    return plus(even, times(make_float2(w.x, t.sign * w.y), odd));
}

// x [rows, n] → y [rows, n/2 + 1, 2], times `scale`, and times `inner` but at the frequencies that mirror themselves.
// A block takes blockDim.y rows at a time; scratch [blocks, blockDim.y, 2·m] where shared memory is too small.
extern "C" __global__ void half_spectrum(
    const float* x, i64 rows, int n, float inner, float scale, const float2* table, float2* scratch, float2* y) {
    bool even = n % 2 == 0;
    int m = even ? n / 2 : n, half = n / 2 + 1;
    float2* a = buffers(scratch, m);
    Transform t = {m, n / m, table, -1.0f};
    for (i64 first = (i64)blockIdx.x * blockDim.y; first < rows; first += (i64)gridDim.x * blockDim.y) {
        i64 row = first + threadIdx.y;
        bool own = row < rows;
        const float* from = x + row * n;
        for (int j = threadIdx.x; j < m; j += blockDim.x) {
            if (!own) a[j] = make_float2(0.0f, 0.0f);
            else a[j] = even ? make_float2(from[2 * j], from[2 * j + 1]) : make_float2(from[j], 0.0f);
        }
        const float2* z = transform(a, a + m, t);
        for (int k = threadIdx.x; own && k < half; k += blockDim.x) {
            float2 v = even ? unpacked(z, k, t) : z[k];
            bool edge = k == 0 || 2 * k == n;
            float factor = edge ? scale : scale * inner;
            y[row * half + k] = make_float2(v.x * factor, edge ? 0.0f : v.y * factor);
        }
        __syncthreads();
    }
}

// Frequency k of a half spectrum, as `spectrum_sum` counts it.
__device__ __forceinline__ float2 counted(const float* x, int k, int n, float inner, float scale) {
    bool edge = k == 0 || 2 * k == n;
    float factor = edge ? scale : scale * inner;
    return make_float2(x[2 * k] * factor, edge ? 0.0f : x[2 * k + 1] * factor);
}

// x [rows, n/2 + 1, 2] → y [rows, n]: the sum of all frequencies, times `scale`, and times `inner` but at those that
// mirror themselves, whose imaginary parts count nothing. Blocks and scratch as in `half_spectrum`.
extern "C" __global__ void spectrum_sum(
    const float* x, i64 rows, int n, float inner, float scale, const float2* table, float2* scratch, float* y) {
    bool even = n % 2 == 0;
    int m = even ? n / 2 : n, half = n / 2 + 1;
    float2* a = buffers(scratch, m);
    Transform t = {m, n / m, table, 1.0f};
    for (i64 first = (i64)blockIdx.x * blockDim.y; first < rows; first += (i64)gridDim.x * blockDim.y) {
        i64 row = first + threadIdx.y;
        bool own = row < rows;
        const float* from = x + row * half * 2;
        for (int k = threadIdx.x; own && k < m; k += blockDim.x) {
            if (even) {
                // e + i·o, the transforms of the even and the odd numbers.
                float2 u = counted(from, k, n, inner, scale), v = counted(from, m - k, n, inner, scale);
                float2 e = make_float2(u.x + v.x, u.y - v.y);
                float2 o = times(make_float2(u.x - v.x, u.y + v.y), table[k]);
                a[k] = make_float2(e.x - o.y, e.y + o.x);
            } else {
                float2 v = counted(from, k < half ? k : n - k, n, inner, scale);
                a[k] = make_float2(v.x, k < half ? v.y : -v.y);
            }
        }
        const float2* z = transform(a, a + m, t);
        for (int j = threadIdx.x; own && j < m; j += blockDim.x) {
            float2 v = z[j];
            if (even) {
                y[row * n + 2 * j] = v.x;
                y[row * n + 2 * j + 1] = v.y;
            } else {
                y[row * n + j] = v.x;
            }
        }
        __syncthreads();
    }
}

// Σₚ xₚ·e^(2πi·k·p/n) from the lower half of the transform of x, whose exponents are negative.
__device__ __forceinline__ float2 mirrored(const float2* half, int k, int n) {
    if (k > n / 2) return half[n - k];
    return make_float2(half[k].x, -half[k].y);
}

// Half spectra x [rows, in/2 + 1] → y [rows, out/2 + 1]: place b of y collects the frequencies
// which[starts[b]..starts[b + 1]], of which k takes c[k] times frequency from[k] to frequency to[k].
extern "C" __global__ void few_frequencies(
    const float2* x, i64 rows, int in, int out, const int* starts, const int* which, const int* to, const int* from,
    const float* c, float2* y) {
    int half = out / 2 + 1;
    FOR_EACH(i, rows * half) {
        int b = (int)(i % half);
        const float2* own = x + i / half * (in / 2 + 1);
        bool edge = b == 0 || 2 * b == out;
        float2 sum = make_float2(0.0f, 0.0f);
        for (int e = starts[b]; e < starts[b + 1]; e++) {
            int k = which[e];
            float2 v = mirrored(own, from[k], in);
            float re = v.x * c[k], im = v.y * c[k];
            // The transform back counts what lies inside twice: with its mirror image.
            sum.x += edge ? re : 0.5f * re;
            if (!edge) sum.y += to[k] == b ? 0.5f * im : -0.5f * im;
        }
        y[i] = sum;
    }
}

#define TOKENS 32

// parts [tokens/32, count]: the gradients of c from 32 tokens each; x [tokens, in/2 + 1] and dy [tokens, out/2 + 1]
// half spectra, frequency k being to[k] of dy and from[k] of x. Grid (count/128, tokens/32).
extern "C" __global__ void frequency_gradient(
    const float2* x, const float2* dy, i64 tokens, int in, int out, int count, const int* to, const int* from,
    float* parts) {
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= count) return;
    i64 first = (i64)blockIdx.y * TOKENS, end = first + TOKENS < tokens ? first + TOKENS : tokens;
    float sum = 0.0f;
    for (i64 token = first; token < end; token++) {
        float2 a = mirrored(dy + token * (out / 2 + 1), to[k], out);
        float2 b = mirrored(x + token * (in / 2 + 1), from[k], in);
        sum += a.x * b.x - a.y * b.y;
    }
    parts[(i64)blockIdx.y * count + k] = sum;
}

// y [count] = the sum of parts [pieces, count].
extern "C" __global__ void frequency_sum(const float* parts, i64 pieces, i64 count, float* y) {
    FOR_EACH(k, count) {
        float sum = 0.0f;
        for (i64 p = 0; p < pieces; p++) sum += parts[p * count + k];
        y[k] = sum;
    }
}

#define NEAR 4096
#define GROUP 128

// The first of the two places of butterfly p between places that are `half` apart.
__device__ __forceinline__ int butterfly(int p, int half) { return ((p & ~(half - 1)) << 1) | (p & (half - 1)); }

__device__ __forceinline__ void exchange(float& a, float& b) {
    float sum = a + b;
    b = a - b;
    a = sum;
}

// Walsh–Hadamard transforms of rows of n in y [total], in place, but for the steps of 4,096 and more. A block takes 4,096.
extern "C" __global__ void __launch_bounds__(256) hadamard_near(float* y, i64 total, i64 n) {
    __shared__ float tile[NEAR];
    i64 first = (i64)blockIdx.x * NEAR;
    int count = total - first < NEAR ? (int)(total - first) : NEAR;
    for (int i = threadIdx.x; i < count; i += blockDim.x) tile[i] = y[first + i];
    __syncthreads();
    for (int half = 1; half < NEAR && half < n; half *= 2) {
        for (int p = threadIdx.x; p < count / 2; p += blockDim.x) {
            int at = butterfly(p, half);
            exchange(tile[at], tile[at + half]);
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < count; i += blockDim.x) y[first + i] = tile[i];
}

// The steps of `stride` to stride·group/2 of the same, group at most 128, stride a multiple of 32. A block (32, 8)
// takes 32 neighbours.
extern "C" __global__ void __launch_bounds__(256) hadamard_far(float* y, i64 stride, int group) {
    __shared__ float tile[GROUP][32];
    i64 across = stride / 32, id = blockIdx.x;
    float* own = y + id / across * stride * group + id % across * 32 + threadIdx.x;
    for (int r = threadIdx.y; r < group; r += 8) tile[r][threadIdx.x] = own[r * stride];
    __syncthreads();
    for (int half = 1; half < group; half *= 2) {
        for (int p = threadIdx.y; p < group / 2; p += 8) {
            int at = butterfly(p, half);
            exchange(tile[at][threadIdx.x], tile[at + half][threadIdx.x]);
        }
        __syncthreads();
    }
    for (int r = threadIdx.y; r < group; r += 8) own[r * stride] = tile[r][threadIdx.x];
}
