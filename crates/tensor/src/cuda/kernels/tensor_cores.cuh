// Products of tiles of bf16 on tensor cores, with sums in f32: by groups of four warps (wgmma) where the card has
// them, else warp by warp (mma).
//
// A tile is COUNT rows of D numbers in shared memory, in panels of 64 numbers: row by row of 128 bytes, the eight
// pieces of 16 bytes of a row exchanged with its number. So eight rows beside each other meet in no bank; wgmma knows
// this layout as its 128-byte swizzle. Tiles begin at multiples of 1,024 bytes.
//
// Fragments of mma.m16n8k16: of a thread, g = lane/4 and t = 2·(lane%4). Left: rows g and g+8 by columns t,
// t+1, t+8, t+9; result: c[0], c[1] in row g at columns t, t+1, c[2], c[3] in row g+8. A warp's share of wgmma's 64
// rows, 16 of them, lies in its registers just so.

#define THREADS 256

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BY_GROUPS 1
// Rows whose warps work together.
#define TOGETHER 64
#else
#define BY_GROUPS 0
#define TOGETHER 16
#endif

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- copies ----

// Starts copying 16 bytes to shared memory; zeros where there is nothing.
__device__ __forceinline__ void copy_16(u32 to, const void* from, bool there) {
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_4(u32 to, const void* from, bool there) {
    int bytes = there ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Waits for this thread's copies; a barrier then shows all threads' to all, wgmma included.
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
#if BY_GROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Where 16 bytes of a row lie in a tile.
template <int COUNT>
__device__ __forceinline__ u32 place(int row, int piece) {
    return (u32)((piece / 8 * COUNT + row) * 128 + (piece % 8 ^ (row & 7)) * 16);
}

// Starts copying rows first..first+COUNT of a head; zeros from `end` on and beyond dim. `from` is the head in
// row 0.
template <int D, int COUNT>
__device__ __forceinline__ void fetch(u32 to, const u16* from, i64 stride, int first, int end, int dim) {
    // A thread has one piece of every STEP-th row; STEP is a multiple of 8, so the exchange stays the same.
    constexpr int STEP = THREADS / (D / 8);
    int row = threadIdx.x / (D / 8), piece = threadIdx.x % (D / 8);
    const u16* at = from + (i64)(first + row) * stride + piece * 8;
    int left = piece * 8 < dim ? end - first - row : 0;
    to += place<COUNT>(row, piece);
#pragma unroll
    for (int i = 0; i < COUNT; i += STEP) {
        bool there = i < left;
        copy_16(to + i * 128, there ? at : from, there);
        at += STEP * stride;
    }
}

// ---- fragments ----

// Two floats rounded to bf16, the first in the lower half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Results [16, 8N] as left factors of N/2 products.
template <int N>
__device__ __forceinline__ void pack_left(u32 (&a)[N / 2][4], const float (&c)[N][4]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        a[i][0] = pack(c[2 * i][0], c[2 * i][1]);
        a[i][1] = pack(c[2 * i][2], c[2 * i][3]);
        a[i][2] = pack(c[2 * i + 1][0], c[2 * i + 1][1]);
        a[i][3] = pack(c[2 * i + 1][2], c[2 * i + 1][3]);
    }
}

// ---- products ----

#if BY_GROUPS

// What wgmma is told of a tile from `at` on: how far on eight more rows are, and the next panel where it needs one.
__device__ __forceinline__ u64 described(u32 at, u32 panel) {
    return (u64)1 << 62 | (u64)(1024 / 16) << 32 | (u64)(panel / 16) << 16 | (u64)((at & 0x3FFFF) / 16);
}

// Sums of a product of 64 columns as an instruction names them and as operands, of four results each; of 128 columns twice as
// many.
#define NAMES_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_128 NAMES_64 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUM(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define SUMS_64 SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
#define SUMS_128 SUMS_64, SUM(8), SUM(9), SUM(10), SUM(11), SUM(12), SUM(13), SUM(14), SUM(15)

// c [64, 64] or [64, 128] = a·b, plus c where there is `more`; b's rows are its columns unless TURNED.
template <int TURNED>
__device__ __forceinline__ void multiply_group(float (&c)[8][4], const u32 (&a)[4], u64 b, int more) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %38, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{" NAMES_64 "}, {%32, %33, %34, %35}, %36, p, 1, 1, %37;}"
                 : SUMS_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TURNED), "r"(more)
                 : "memory");
}
template <int TURNED>
__device__ __forceinline__ void multiply_group(float (&c)[8][4], u64 a, u64 b, int more) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %35, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{" NAMES_64 "}, %32, %33, p, 1, 1, 0, %34;}"
                 : SUMS_64
                 : "l"(a), "l"(b), "n"(TURNED), "r"(more)
                 : "memory");
}
template <int TURNED>
__device__ __forceinline__ void multiply_group(float (&c)[16][4], const u32 (&a)[4], u64 b, int more) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %70, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" NAMES_128 "}, {%64, %65, %66, %67}, %68, p, 1, 1, %69;}"
                 : SUMS_128
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(TURNED), "r"(more)
                 : "memory");
}
template <int TURNED>
__device__ __forceinline__ void multiply_group(float (&c)[16][4], u64 a, u64 b, int more) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %67, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{" NAMES_128 "}, %64, %65, p, 1, 1, 0, %66;}"
                 : SUMS_128
                 : "l"(a), "l"(b), "n"(TURNED), "r"(more)
                 : "memory");
}

// Products may begin: what they read and add to is in its place.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Makes a group of the products since the last one.
__device__ __forceinline__ void close_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups but the last LEFT.
template <int LEFT>
__device__ __forceinline__ void await_groups() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Keeps the compiler from reading c before its products have ended.
template <int N>
__device__ __forceinline__ void settled(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

// The warp's rows of a tile of OWN rows, as left factors. They stay where they are: nvrtc 13.0 forgets registers that
// wgmma reads again in a later round of a loop.
template <int D, int OWN>
struct Left {
    u32 tile;
    __device__ __forceinline__ void take(u32 from, int row) { tile = from + row / TOGETHER * TOGETHER * 128; }
};

// c = left·tileᵀ over all numbers, for rows first.. of the tile.
template <int D, int OWN, int COUNT, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[N][4], const Left<D, OWN>& left, u32 tile, int first) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 within = k % 4 * 32;
        multiply_group<0>(c, described(left.tile + k / 4 * OWN * 128 + within, 16),
                          described(tile + (k / 4 * COUNT + first) * 128 + within, 16), k);
    }
}

// The same with the left factor in a tile that is read anew each time.
template <int D, int OWN, int COUNT, int N>
__device__ __forceinline__ void multiply_tiles(float (&c)[N][4], u32 from, int row, u32 tile) {
    Left<D, OWN> left;
    left.take(from, row);
    multiply_rows<D, OWN, COUNT>(c, left, tile, 0);
}

// c [16, D] of a warp += a·tile, for rows first..first+16K of the tile.
template <int D, int COUNT, int K>
__device__ __forceinline__ void multiply_columns(float (&c)[D / 8][4], const u32 (&a)[K][4], u32 tile, int first) {
#pragma unroll
    for (int k = 0; k < K; k++)
        multiply_group<1>(c, a[k], described(tile + (first + k * 16) * 128, COUNT * 128), 1);
}

#else

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

template <int N>
__device__ __forceinline__ void clear(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
}

__device__ __forceinline__ void begin_products() {}
__device__ __forceinline__ void close_group() {}
template <int LEFT>
__device__ __forceinline__ void await_groups() {}
template <int N>
__device__ __forceinline__ void settled(float (&c)[N][4]) {}

// c += a·tileᵀ over numbers 16k..16k+16, for rows first..first+8N of the tile.
template <int COUNT, int N>
__device__ __forceinline__ void multiply_row_piece(float (&c)[N][4], const u32 (&a)[4], u32 tile, int first, int k) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        u32 b[4];
        load_matrices(b, tile + place<COUNT>(first + n * 8 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        multiply(c[n], a, b[0], b[1]);
        multiply(c[n + 1], a, b[2], b[3]);
    }
}

// The warp's rows of a tile of OWN rows, as left factors.
template <int D, int OWN>
struct Left {
    u32 a[D / 16][4];
    // The tile's place is free for others afterwards.
    __device__ __forceinline__ void take(u32 from, int row) {
        await_copies();
        __syncthreads();
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            load_matrices(a[k], from + place<OWN>(row + threadIdx.x % WARP % 16, k * 2 + threadIdx.x % WARP / 16));
        __syncthreads();
    }
};

// c = left·tileᵀ over all numbers, for rows first.. of the tile.
template <int D, int OWN, int COUNT, int N>
__device__ __forceinline__ void multiply_rows(float (&c)[N][4], const Left<D, OWN>& left, u32 tile, int first) {
    clear(c);
#pragma unroll
    for (int k = 0; k < D / 16; k++) multiply_row_piece<COUNT>(c, left.a[k], tile, first, k);
}

// The same with the left factor in a tile that is read anew each time.
template <int D, int OWN, int COUNT, int N>
__device__ __forceinline__ void multiply_tiles(float (&c)[N][4], u32 from, int row, u32 tile) {
    int lane = threadIdx.x % WARP;
    clear(c);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        u32 a[4];
        load_matrices(a, from + place<OWN>(row + lane % 16, k * 2 + lane / 16));
        multiply_row_piece<COUNT>(c, a, tile, 0, k);
    }
}

// c [16, D] of a warp += a·tile, for rows first..first+16K of the tile.
template <int D, int COUNT, int K>
__device__ __forceinline__ void multiply_columns(float (&c)[D / 8][4], const u32 (&a)[K][4], u32 tile, int first) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < K; k++)
#pragma unroll
        for (int n = 0; n < D / 8; n += 2) {
            u32 b[4];
            load_turned(b, tile + place<COUNT>(first + k * 16 + lane % 16, n + lane / 16));
            multiply(c[n], a[k], b[0], b[1]);
            multiply(c[n + 1], a[k], b[2], b[3]);
        }
}

#endif
