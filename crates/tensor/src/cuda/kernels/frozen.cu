// Frozen weights: rounding, expanding and looking up.

// y = x in bf16, n numbers.
extern "C" __global__ void to_bf16_of(const float* x, u16* y, i64 n) {
    i64 quads = n / 4;
    FOR_EACH(i, quads) {
        float4 v = reinterpret_cast<const float4*>(x)[i];
        reinterpret_cast<ushort4*>(y)[i] = make_ushort4(to_bf16(v.x), to_bf16(v.y), to_bf16(v.z), to_bf16(v.w));
    }
    if (blockIdx.x == 0 && threadIdx.x < n % 4) {
        i64 i = quads * 4 + threadIdx.x;
        y[i] = to_bf16(x[i]);
    }
}

// The same for x that does not begin at a multiple of 16 bytes.
extern "C" __global__ void to_bf16_unaligned(const float* x, u16* y, i64 n) {
    FOR_EACH(i, n) y[i] = to_bf16(x[i]);
}

// y = x in f32, n numbers.
extern "C" __global__ void from_bf16_of(const u16* x, float* y, i64 n) {
    FOR_EACH(i, n) y[i] = from_bf16(x[i]);
}

// y[i] = row ids[i] of a table of bf16 [rows, width].
extern "C" __global__ void gather_bf16(const u16* table, const i64* ids, i64 width, i64 n, float* y) {
    FOR_EACH(i, n) y[i] = from_bf16(table[ids[i / width] * width + i % width]);
}

// y[i] = row ids[i] of a table of f32 [rows, width].
extern "C" __global__ void gather_f32(const float* table, const i64* ids, i64 width, i64 n, float* y) {
    FOR_EACH(i, n) y[i] = table[ids[i / width] * width + i % width];
}

// A 4-bit matrix: two codes a byte, the even element in the high half; `block` elements share a scale, which may be
// an 8-bit code itself, 256 of which share a second scale.
struct FourBit {
    const u8* codes;
    const float* levels;
    const float* scales;
    const u8* scale_codes;
    const float* scale_map;
    float offset;
    i64 block;
};

__device__ __forceinline__ float scale_of(const FourBit& w, i64 block) {
    if (!w.scale_codes) return w.scales[block];
    return w.scale_map[w.scale_codes[block]] * w.scales[block / 256] + w.offset;
}

// Two neighbouring elements a thread, of n. `bf16` or f32 is written.
extern "C" __global__ void expand_four_bit(
    const u8* codes, const float* levels, const float* scales, const u8* scale_codes, const float* scale_map,
    float offset, i64 block, i64 n, u16* bf16, float* f32) {
    FourBit w = {codes, levels, scales, scale_codes, scale_map, offset, block};
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = levels[threadIdx.x];
    __syncthreads();
    FOR_EACH(pair, (n + 1) / 2) {
        // Blocks have an even number of elements, so that a pair has one scale.
        i64 i = 2 * pair;
        float scale = scale_of(w, i / block);
        u8 code = codes[pair];
        float first = level[code >> 4] * scale, second = level[code & 15] * scale;
        if (bf16) {
            bf16[i] = to_bf16(first);
            if (i + 1 < n) bf16[i + 1] = to_bf16(second);
        } else {
            f32[i] = first;
            if (i + 1 < n) f32[i + 1] = second;
        }
    }
}
