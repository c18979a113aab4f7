"""The engine's random numbers, written down from the definition of Philox 4x32-10 (Salmon et al., SC 2011).

The key is the seed, the upper half of the counter the stream, the lower half the number of a block of four words.
"""

import numpy as np

MASK = np.uint64(0xFFFFFFFF)


def stream(name):
    """FNV-1a of a name, 64 bits."""
    h = 0xCBF29CE484222325
    for b in name.encode():
        h = ((h ^ b) * 0x100000001B3) % 2**64
    return h


def words(seed, of, count, first=0):
    """Words `first` to `first + count` of the stream `of` (a number, or a name) of `seed`, as uint32."""
    of = stream(of) if isinstance(of, str) else of
    blocks = np.arange(first // 4, (first + count + 3) // 4, dtype=np.uint64)
    a, b = blocks & MASK, blocks >> np.uint64(32)
    c, d = (np.full_like(blocks, v) for v in (of & 0xFFFFFFFF, of >> 32))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        x, y = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = ((y >> np.uint64(32)) ^ b ^ np.uint64(k0), y & MASK, (x >> np.uint64(32)) ^ d ^ np.uint64(k1), x & MASK)
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    all_words = np.stack([a, b, c, d], 1).reshape(-1)
    return all_words[first % 4:first % 4 + count].astype(np.uint32)


def uniform(seed, of, shape):
    """Numbers in [0, 1), multiples of 2^-24, f32."""
    w = words(seed, of, int(np.prod(shape)))
    return ((w >> 8).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def normal(seed, of, shape):
    """Standard normal numbers, f32, by Box and Muller in f64: two words make two of them."""
    count = int(np.prod(shape))
    pairs = words(seed, of, count + count % 2).reshape(-1, 2).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((pairs[:, 0] + 0.5) / 2**32)), 2 * np.pi * pairs[:, 1] / 2**32
    drawn = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
    return drawn[:count].astype(np.float32).reshape(shape)
