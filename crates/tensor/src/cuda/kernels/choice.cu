// The soft choice of k among n scores by coordinate descent, in f64: at a small ε the exponents are large.
//
// Of a segment [first, n, k] of s: b = −s; repeat a = ε·(ln k − ln Σ exp((s + b)/ε)), b = −max(s + a, 0),
// ε ← max(decay·ε, least); λ = exp((s + a + b)/ε). A block a segment.

// What an iteration leaves for backward.
struct Iteration { double a, eps, largest, sum; };

extern __shared__ Iteration steps[];

__device__ __forceinline__ double block_max_f64(double v) {
    __shared__ double parts[WARP];
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int o = 16; o; o >>= 1) v = fmax(v, __shfl_xor_sync(FULL, v, o));
    __syncthreads();
    if (lane == 0) parts[threadIdx.x / WARP] = v;
    __syncthreads();
    v = parts[0];
    for (int i = 1; i < warps; i++) v = fmax(v, parts[i]);
    return v;
}

// b of score s before iteration `step`.
__device__ __forceinline__ double before(double s, int step) {
    return step == 0 ? -s : -fmax(s + steps[step - 1].a, 0.0);
}

// All iterations on s [n]; returns the last ε.
__device__ __forceinline__ double iterate(
    const float* s, i64 n, i64 k, int iterations, float start, float decay, float least) {
    double eps = fmaxf(start, least);
    for (int step = 0; step < iterations; step++) {
        double largest = -(double)infinity(), sum = 0.0;
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) largest = fmax(largest, (s[i] + before(s[i], step)) / eps);
        largest = block_max_f64(largest);
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) sum += exp((s[i] + before(s[i], step)) / eps - largest);
        sum = block_sum_f64(sum);
        if (threadIdx.x == 0) steps[step] = {eps * (log((double)k) - largest - log(sum)), eps, largest, sum};
        __syncthreads();
        eps = fmax(eps * (double)decay, (double)least);
    }
    return eps;
}

__device__ __forceinline__ double share(double s, int iterations, double eps) {
    double a = iterations ? steps[iterations - 1].a : 0.0;
    return exp((s + a + before(s, iterations)) / eps);
}

// y = λ of each segment [first, n, k].
extern "C" __global__ void __launch_bounds__(512) soft_top_k(
    const float* s, const i64* segments, int iterations, float start, float decay, float least, float* y) {
    const i64* own = segments + 3 * (i64)blockIdx.x;
    s += own[0];
    double eps = iterate(s, own[1], own[2], iterations, start, decay, least);
    for (i64 i = threadIdx.x; i < own[1]; i += blockDim.x) y[own[0] + i] = (float)share(s[i], iterations, eps);
}

// ds = the gradient of the scores; db and sums are room for as many f64.
extern "C" __global__ void __launch_bounds__(512) soft_top_k_backward(
    const float* s, const i64* segments, int iterations, float start, float decay, float least, const float* dy,
    double* db, double* sums, float* ds) {
    const i64* own = segments + 3 * (i64)blockIdx.x;
    i64 n = own[1];
    s += own[0], dy += own[0], db += own[0], sums += own[0], ds += own[0];
    double eps = iterate(s, n, own[2], iterations, start, decay, least), part = 0.0;
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
        sums[i] = db[i] = share(s[i], iterations, eps) * (double)dy[i] / eps;
        part += db[i];
    }
    for (int step = iterations - 1; step >= 0; step--) {
        Iteration it = steps[step];
        // b = −max(s + a, 0)
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            double through = s[i] + it.a > 0.0 ? db[i] : 0.0;
            sums[i] -= through;
            part -= through;
        }
        double da = block_sum_f64(part);
        part = 0.0;
        // a = ε·(ln k − ln Σ exp((s + b)/ε)), whose slope is minus a softmax.
        for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
            double weight = exp((s[i] + before(s[i], step)) / it.eps - it.largest);
            db[i] = -da * weight / it.sum;
            sums[i] += db[i];
        }
    }
    // b₀ = −s
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) ds[i] = (float)(sums[i] - db[i]);
}
