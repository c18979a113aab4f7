// Small dense algebra: products with block-diagonal matrices in f32; inverses and orthonormal bases in f64, since one
// rounding costs more than these sizes do.

#define STEP 16

// t [STEP, W] = the part of a matrix whose rows go along W; zero outside `width` and `depth`.
template <int W>
__device__ __forceinline__ void load_tile(
    float (*t)[W + 4], const float* x, i64 across, i64 along, i64 width, i64 depth) {
    for (int e = threadIdx.x; e < STEP * W; e += blockDim.x) {
        // Neighbouring threads read neighbours in memory.
        int k = along == 1 ? e % STEP : e / W, w = along == 1 ? e / STEP : e % W;
        t[k][w] = w < width && k < depth ? x[w * across + k * along] : 0.0f;
    }
}

// For each block and piece of k: y = a [m, k] · b [k, n]. sizes: m, k, n, count, numbers of k in a piece, distance of
// the pieces' results. strides: a's row, column and block, b's, y's row and block. Grid (m/M · count · n/N, pieces).
template <int M, int N>
__device__ __forceinline__ void multiply(
    const Dims& sizes, const Dims& strides, const float* a, const float* b, float* y) {
    __shared__ __align__(16) float left[STEP][M + 4], right[STEP][N + 4];
    const i64 *s = sizes.d, *by = strides.d;
    i64 m = s[0], n = s[2], across = (n + N - 1) / N, id = blockIdx.x;
    i64 column = id % across * N, block = id / across % s[3], row = id / across / s[3] * M;
    i64 from = blockIdx.y * s[4], to = from + s[4] < s[1] ? from + s[4] : s[1];
    a += block * by[2] + row * by[0];
    b += block * by[5] + column * by[4];
    int tx = threadIdx.x % (N / 4) * 4, ty = threadIdx.x / (N / 4) * 4;
    float sum[4][4] = {};
    for (i64 k = from; k < to; k += STEP) {
        load_tile<M>(left, a + k * by[1], by[0], by[1], m - row, to - k);
        load_tile<N>(right, b + k * by[3], by[4], by[3], n - column, to - k);
        __syncthreads();
#pragma unroll
        for (int l = 0; l < STEP; l++) {
            float4 u = *(const float4*)&left[l][ty], v = *(const float4*)&right[l][tx];
            float p[4] = {u.x, u.y, u.z, u.w}, q[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fmaf(p[i], q[j], sum[i][j]);
            }
        }
        __syncthreads();
    }
    y += block * by[7] + blockIdx.y * s[5];
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            i64 r = row + ty + i, c = column + tx + j;
            if (r < m && c < n) y[r * by[6] + c] = sum[i][j];
        }
    }
}

// As `multiply`, tiles of 64 × 64, for wide blocks.
extern "C" __global__ void __launch_bounds__(256) blocks_64(
    Dims sizes, Dims strides, const float* a, const float* b, float* y) {
    multiply<64, 64>(sizes, strides, a, b, y);
}

// Tiles of 128 × 32.
extern "C" __global__ void __launch_bounds__(256) blocks_32(
    Dims sizes, Dims strides, const float* a, const float* b, float* y) {
    multiply<128, 32>(sizes, strides, a, b, y);
}

// Tiles of 256 × 16, for narrow blocks.
extern "C" __global__ void __launch_bounds__(256) blocks_16(
    Dims sizes, Dims strides, const float* a, const float* b, float* y) {
    multiply<256, 16>(sizes, strides, a, b, y);
}

// y [n] = the sum of parts [pieces, n].
extern "C" __global__ void sum_pieces(const float* parts, i64 pieces, i64 n, float* y) {
    FOR_EACH(i, n) {
        float sum = 0.0f;
        for (i64 p = 0; p < pieces; p++) sum += parts[p * n + i];
        y[i] = sum;
    }
}

// The row from k on with the largest number in column k of w [n, n], the last of equal ones; NaN is larger than all.
__device__ __forceinline__ int find_pivot(const double* w, int n, int k) {
    __shared__ u64 keys[WARP];
    __shared__ int places[WARP];
    u64 key = 0;
    int place = k;
    for (int i = k + threadIdx.x; i < n; i += blockDim.x) {
        u64 size = (u64)__double_as_longlong(fabs(w[(i64)i * n + k]));
        if (size >= key) key = size, place = i;
    }
    for (int o = 16; o; o >>= 1) {
        u64 other = __shfl_xor_sync(FULL, key, o);
        int there = __shfl_xor_sync(FULL, place, o);
        if (other > key || (other == key && there > place)) key = other, place = there;
    }
    if (threadIdx.x % WARP == 0) keys[threadIdx.x / WARP] = key, places[threadIdx.x / WARP] = place;
    __syncthreads();
    for (int i = 0; i < blockDim.x / WARP; i++) {
        if (keys[i] > key || (keys[i] == key && places[i] > place)) key = keys[i], place = places[i];
    }
    return place;
}

extern __shared__ double memory[];

// Exchanges rows k and `pivot` of w [n, n], divides row k by its pivot and subtracts it from the others; the inverse's
// column takes the place of column k, which would be zero. `factors` [n] is room for column k.
__device__ __forceinline__ void eliminate(double* w, int n, int k, int pivot, double* factors) {
    double* own = w + (i64)k * n;
    if (pivot != k) {
        double* other = w + (i64)pivot * n;
        for (int j = threadIdx.x; j < n; j += blockDim.x) {
            double v = own[j];
            own[j] = other[j];
            other[j] = v;
        }
    }
    __syncthreads();
    double factor = 1.0 / own[k];
    __syncthreads();
    for (int j = threadIdx.x; j < n; j += blockDim.x) {
        own[j] = j == k ? factor : own[j] * factor;
        factors[j] = j == k ? 0.0 : w[(i64)j * n + k];
    }
    __syncthreads();
    for (int i = threadIdx.x / WARP; i < n; i += blockDim.x / WARP) {
        double f = factors[i], *row = w + (i64)i * n;
        if (f == 0.0) continue;
        for (int j = threadIdx.x % WARP; j < n; j += WARP) row[j] = (j == k ? 0.0 : row[j]) - f * own[j];
    }
    __syncthreads();
}

// y [count, n, n] = inverses of a by Gauss–Jordan with partial pivoting, a block a matrix; scratch [count, n, n] of f64
// where shared memory is too small.
extern "C" __global__ void __launch_bounds__(512) inverse(const float* a, int n, double* scratch, float* y) {
    i64 size = (i64)n * n, first = blockIdx.x * size;
    double* factors = memory;
    int* order = (int*)(memory + n);
    double* w = scratch ? scratch + first : memory + n + (n + 1) / 2;
    for (i64 i = threadIdx.x; i < size; i += blockDim.x) w[i] = a[first + i];
    __syncthreads();
    for (int k = 0; k < n; k++) {
        int pivot = find_pivot(w, n, k);
        if (threadIdx.x == 0) order[k] = pivot;
        eliminate(w, n, k, pivot, factors);
    }
    // Exchanges of rows are undone as exchanges of columns, the last one first: `columns` says from where each comes.
    int* columns = (int*)factors;
    if (threadIdx.x == 0) {
        for (int k = 0; k < n; k++) columns[k] = k;
        for (int k = n - 1; k >= 0; k--) {
            int from = columns[k];
            columns[k] = columns[order[k]];
            columns[order[k]] = from;
        }
    }
    __syncthreads();
    for (i64 i = threadIdx.x; i < size; i += blockDim.x) y[first + i] = (float)w[i - i % n + columns[i % n]];
}

// QR of a [m, n] by Householder reflections, one block: w [n, m] = the columns, below the diagonal the reflections,
// whose factors are taus [n]; r [n, n] upper triangular.
extern "C" __global__ void __launch_bounds__(1024) qr_factor(
    const float* a, i64 m, i64 n, double* w, double* taus, float* r) {
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (i64 i = threadIdx.x; i < m * n; i += blockDim.x) w[i % n * m + i / n] = a[i];
    __syncthreads();
    for (i64 k = 0; k < n; k++) {
        double *v = w + k * m, alpha = v[k], part = 0.0, tau = 0.0;
        for (i64 i = k + 1 + threadIdx.x; i < m; i += blockDim.x) part += v[i] * v[i];
        double below = block_sum_f64(part);
        // A column that is zero below needs no reflection and keeps its sign.
        if (below > 0.0) {
            double beta = -copysign(sqrt(alpha * alpha + below), alpha);
            tau = (beta - alpha) / beta;
            for (i64 i = k + 1 + threadIdx.x; i < m; i += blockDim.x) v[i] /= alpha - beta;
            if (threadIdx.x == 0) v[k] = beta;
        }
        if (threadIdx.x == 0) taus[k] = tau;
        __syncthreads();
        for (i64 j = k + 1 + threadIdx.x / WARP; j < n; j += warps) {
            double *x = w + j * m, dot = 0.0;
            for (i64 i = k + 1 + lane; i < m; i += WARP) dot += v[i] * x[i];
            dot = tau * (x[k] + warp_sum_f64(dot));
            __syncwarp();
            for (i64 i = k + 1 + lane; i < m; i += WARP) x[i] -= dot * v[i];
            if (lane == 0) x[k] -= dot;
        }
        __syncthreads();
    }
    for (i64 i = threadIdx.x; i < n * n; i += blockDim.x) r[i] = i / n <= i % n ? (float)w[i % n * m + i / n] : 0.0f;
}

// Column j of q [m, n] in block j: the reflections of `qr_factor` on a unit vector, the last one first. x [n, m] is
// room.
extern "C" __global__ void qr_expand(const double* w, const double* taus, i64 m, i64 n, double* x, float* q) {
    i64 j = blockIdx.x;
    x += j * m;
    // Each thread keeps to its own elements; element k is still that of the unit vector when reflection k comes.
    for (i64 i = threadIdx.x; i < m; i += blockDim.x) x[i] = i == j ? 1.0 : 0.0;
    for (i64 k = j; k >= 0; k--) {
        const double* v = w + k * m;
        double own = k == j ? 1.0 : 0.0, part = 0.0;
        for (i64 i = threadIdx.x; i < m; i += blockDim.x) part += i > k ? v[i] * x[i] : 0.0;
        double dot = taus[k] * (own + block_sum_f64(part));
        for (i64 i = threadIdx.x; i < m; i += blockDim.x) {
            if (i == k) x[i] = own - dot;
            if (i > k) x[i] -= dot * v[i];
        }
    }
    for (i64 i = threadIdx.x; i < m; i += blockDim.x) q[i * n + j] = (float)x[i];
}

// s [n, n]: the symmetric matrix with the lower triangle of −dqᵀ·q, q and dq [m, n]. A warp an element.
extern "C" __global__ void qr_gram(const float* q, const float* dq, i64 m, i64 n, double* s) {
    i64 element = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, i = element / n, j = element % n;
    if (i >= n || j > i) return;
    double sum = 0.0;
    for (i64 row = threadIdx.x % WARP; row < m; row += WARP) sum -= (double)dq[row * n + i] * (double)q[row * n + j];
    sum = warp_sum_f64(sum);
    if (threadIdx.x % WARP == 0) s[i * n + j] = s[j * n + i] = sum;
}

// da = (dq + q·s)·r⁻ᵀ, [m, n]; a warp a row, with room for n numbers in shared memory.
extern "C" __global__ void qr_rows(
    const float* q, const float* r, const float* dq, const double* s, i64 m, i64 n, float* da) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    i64 row = (i64)blockIdx.x * (blockDim.x / WARP) + warp;
    if (row >= m) return;
    double* x = memory + warp * n;
    q += row * n;
    for (i64 j = lane; j < n; j += WARP) {
        double sum = 0.0;
        for (i64 i = 0; i < n; i++) sum += (double)q[i] * s[i * n + j];
        x[j] = (double)dq[row * n + j] + sum;
    }
    __syncwarp();
    // From the last column back.
    for (i64 j = n - 1; j >= 0; j--) {
        double later = 0.0;
        for (i64 k = j + 1 + lane; k < n; k += WARP) later += (double)r[j * n + k] * x[k];
        later = warp_sum_f64(later);
        if (lane == 0) x[j] = (x[j] - later) / (double)r[j * n + j];
        __syncwarp();
    }
    for (i64 j = lane; j < n; j += WARP) da[row * n + j] = (float)x[j];
}
